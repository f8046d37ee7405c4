"""What the layers of a model are pruned towards, from dense and pruned activations side by side.

With X the inputs of a layer in the dense model, X̂ in the pruned one, Ĥ = X̂ᵀX̂, Hλ = Ĥ + λI, and
h, ĥ the residual stream just before a layer writes into it, dense and pruned:

    W* = (W (α XᵀX̂ + (1 − α) Ĥ) + λW + β (h − ĥ)ᵀX̂) Hλ⁻¹
       = W + (α W (X − X̂)ᵀX̂ + β (h − ĥ)ᵀX̂) Hλ⁻¹

The second form is the one computed: where nothing has been lost yet, it is W to the last bit.
"""

import contextlib
from dataclasses import dataclass

import numpy as np
import torch

# Shares (α, β) that a target stands for; "mixed" leaves both to the caller.
TARGETS = {"mixed": None, "pruned": (0.0, 0.0), "dense": (1.0, 0.0)}


@dataclass
class Moments:
    """Sums over the calibration tokens for one group of linears.

    Attributes
    ----------
    hessian : tensor, shape (K, K)
        Ĥ = X̂ᵀX̂, float32.
    lost : tensor, shape (K, K), or None
        (X − X̂)ᵀX̂, how the inputs have changed.
    residual : tensor, shape (D, K), or None
        (h − ĥ)ᵀX̂, what the residual stream has lost.
    """

    hessian: torch.Tensor | None = None
    lost: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    def update(self, Xh, X=None, hidden=None, pruned_hidden=None):
        """Add the tokens of one batch.

        Parameters
        ----------
        Xh, X : tensor, shape (N, K)
            Inputs in the pruned and, if wanted, in the dense model.
        hidden, pruned_hidden : tensor, shape (N, D), optional
            The residual stream in the dense and in the pruned model.
        """
        with exact_products(Xh):
            Xh = Xh.float()
            products = {"hessian": Xh.T @ Xh}
            if X is not None:
                products["lost"] = (X.float() - Xh).T @ Xh
            if hidden is not None:
                products["residual"] = (hidden.float() - pruned_hidden.float()).T @ Xh
        # Nothing is added before all products are there: memory may run out on the way.
        for name, product in products.items():
            total = getattr(self, name)
            setattr(self, name, product if total is None else total.add_(product))


@contextlib.contextmanager
def exact_products(like):
    """On the device, tf32 only where it holds every value: half precision that was widened."""
    if not like.is_cuda:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if like.element_size() < 4 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def target_weights(weights, moments, damp, dense_share, residual_shares):
    """The targets W* of linears that share their inputs.

    Parameters
    ----------
    weights : list of tensor, shape (M, K)
    moments : Moments
    damp : float
        λ as a share of the mean of Ĥ's diagonal.
    dense_share : float
        α.
    residual_shares : list of float
        β of each; where it is not 0, `moments.residual` is needed.

    Returns
    -------
    list of tensor, shape (M, K), float32

    Raises
    ------
    numpy.linalg.LinAlgError
        The damped Hessian is not positive definite.
    """
    changes = []
    for W, residual_share in zip(weights, residual_shares, strict=True):
        change = torch.zeros_like(W, dtype=torch.float64)
        if dense_share:
            change += dense_share * (W.double() @ moments.lost.double())
        if residual_share:
            change += residual_share * moments.residual.double()
        changes.append(change)
    if not dense_share and not any(residual_shares):
        return [W.float() for W in weights]
    H = moments.hessian.double()
    diagonal = H.diagonal().clone()
    H.diagonal().add_(torch.where(diagonal == 0, 1.0, damp * diagonal.mean()))
    factor, info = torch.linalg.cholesky_ex(H)
    if info.item():
        raise np.linalg.LinAlgError("hessian: not positive definite even when damped")
    changes = torch.cholesky_solve(torch.cat(changes).T.contiguous(), factor).T
    changes = changes.split([len(W) for W in weights])
    return [(W.double() + change).float() for W, change in zip(weights, changes, strict=True)]
