"""What the layers of a model are pruned towards, from dense and pruned activations side by side.

With X the inputs of a layer in the dense model, X̂ in the pruned one, Ĥ = X̂ᵀX̂, Hλ = Ĥ + λI, and
h, ĥ the residual stream just before a layer writes into it, dense and pruned:

    W* = (W (α XᵀX̂ + (1 − α) Ĥ) + λW + β (h − ĥ)ᵀX̂) Hλ⁻¹
       = W + (α W (X − X̂)ᵀX̂ + β (h − ĥ)ᵀX̂) Hλ⁻¹

The second form is the one computed: where nothing has been lost yet, it is W to the last bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from cuobs import arrays
from cuobs.arrays import tensor_view
from cuobs.hessian import damping
from cuobs.models.blocks import not_finite
from cuobs.ops.gram import add_cross_gram, add_gram
from cuobs.ops.products import gemm


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
    _finish: Callable | None = None

    def update(self, Xh, X=None, hidden=None, pruned_hidden=None):
        """Add the tokens of one batch.

        On a GPU half precision is multiplied as it is, on tensor cores; differences are rounded
        to it.

        Parameters
        ----------
        Xh, X : tensor, shape (N, K)
            Inputs in the pruned and, if wanted, in the dense model.
        hidden, pruned_hidden : tensor, shape (N, D), optional
            The residual stream in the dense and in the pruned model.
        """
        if not (Xh.is_cuda and Xh.element_size() == 2):
            Xh, X, hidden, pruned_hidden = (
                None if x is None else x.float() for x in (Xh, X, hidden, pruned_hidden)
            )
        away = {"hessian": None}
        if X is not None:
            away["lost"] = X - Xh
        if hidden is not None:
            away["residual"] = hidden - pruned_hidden
        # Nothing is added before all of this is there: memory may run out on the way.
        for name, x in away.items():
            if getattr(self, name) is None:
                rows = Xh.shape[1] if x is None else x.shape[1]
                setattr(self, name, Xh.new_zeros(rows, Xh.shape[1], dtype=torch.float32))
        precision = "tensor" if Xh.element_size() == 2 else "fp32"
        # Whether the sums are finite is looked at afterwards.
        with arrays.stream_of(Xh), np.errstate(over="ignore", invalid="ignore"):
            inputs = tensor_view(Xh)
            for name, x in away.items():
                total = tensor_view(getattr(self, name))
                if x is None:
                    add_gram(inputs, total, precision)
                else:
                    add_cross_gram(tensor_view(x), inputs, total, precision)

    def add_up(self, ranks):
        """Make the sums those over all processes' tokens; until `finish`, the Hessian alone is."""
        ranks.add_up(self.hessian)
        self._finish = ranks.begin_add_up(*self.sums()[1:])

    def finish(self):
        """Wait for what other processes add to the sums; a GPU does behind all it has to do."""
        if self._finish is not None:
            self._finish()

    def sums(self):
        """The sums that there are, the Hessian first."""
        return [s for s in (self.hessian, self.lost, self.residual) if s is not None]

    def check_finite(self, name):
        """Refuse activations that are not finite, before a linear of this name."""
        if not bool(torch.isfinite(self.hessian.diagonal()).all()):
            raise not_finite(f"before {name}")


def pulls(weights, moments, dense_share, residual_shares, dtype, rows=None):
    """What is added to W Hλ on the right-hand side of the targets, (W* − W) Hλ.

    Parameters
    ----------
    weights : list of tensor, shape (M, K)
    moments : Moments
    dense_share : float
        α.
    residual_shares : list of float
        β of each; where it is not 0, `moments.residual` is needed.
    dtype : torch.dtype
        float32 or float64.
    rows : list of slice, optional
        Those of each weight that are wanted; all by default.

    Returns
    -------
    list of tensor, shape (rows, K), or None
        None where the targets are the weights themselves.
    """
    if not dense_share and not any(residual_shares):
        return None
    moments.finish()
    found, rows = [], rows or [slice(None)] * len(weights)
    for W, residual_share, own in zip(weights, residual_shares, rows, strict=True):
        W = W[own]
        pull = torch.zeros_like(W, dtype=dtype)
        if dense_share and len(W):
            pull += dense_share * _product(W.to(dtype), moments.lost.to(dtype))
        if residual_share:
            pull += residual_share * moments.residual[own].to(dtype)
        found.append(pull)
    return found


def target_weights(weights, moments, damp, dense_share, residual_shares, rows=None):
    """The targets W* of linears that share their inputs, solved for in float64.

    Parameters
    ----------
    weights, moments, dense_share, residual_shares, rows
        As in `pulls`.
    damp : float
        λ as a share of the mean of Ĥ's diagonal.

    Returns
    -------
    list of tensor, shape (rows, K), float32

    Raises
    ------
    numpy.linalg.LinAlgError
        The damped Hessian is not positive definite.
    """
    changes = pulls(weights, moments, dense_share, residual_shares, torch.float64, rows)
    if rows is not None:
        weights = [W[own] for W, own in zip(weights, rows, strict=True)]
    if changes is None:
        return [W.float() for W in weights]
    H = moments.hessian.double()
    H.diagonal().add_(damping(H.diagonal(), damp, torch.where))
    factor, info = torch.linalg.cholesky_ex(H)
    if info.item():
        raise np.linalg.LinAlgError("hessian: not positive definite even when damped")
    changes = torch.cholesky_solve(torch.cat(changes).T.contiguous(), factor).T
    changes = changes.split([len(W) for W in weights])
    return [(W.double() + change).float() for W, change in zip(weights, changes, strict=True)]


def _product(A, B):
    """A B; on a GPU in tf32 where float32, which holds every digit of weights in half precision."""
    if not A.is_cuda:
        return A @ B
    with arrays.stream_of(A):
        out = torch.empty(A.shape[0], B.shape[1], dtype=A.dtype, device=A.device)
        gemm(tensor_view(A), tensor_view(B), tensor_view(out), precision="tensor")
    return out
