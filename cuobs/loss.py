"""The relative output loss of a pruned layer."""

import math
from typing import Any

import numpy as np

from cuobs import arrays, validation
from cuobs.hessian import Hessian, check_symmetric, largest_square
from cuobs.modules import weight_of
from cuobs.ops.pieces import strips
from cuobs.ops.products import gemm, matmul
from cuobs.ops.sums import add_inner, add_row_inner

# Block columns of a Hessian, of which only those above its diagonal are multiplied, and of how many
# columns each is at least where tensor cores multiply.
BLOCKS, COLUMNS = 8, 2048
# Share of the whole energy that rounding may take off none at all.
ROUNDING = 1e-3


def relative_loss(W: Any, W_pruned: Any, H: Any) -> float:
    """Relative output error ‖X(Wp − W)ᵀ‖ / ‖XWᵀ‖ in the Frobenius norm, by the undamped H.

    Parameters
    ----------
    W, W_pruned : array, shape (M, K)
        The weight and what became of it.
    H : array, shape (K, K), or Hessian
        XᵀX of the calibration activations.

    Returns
    -------
    float
        0 is a layer that gives the same outputs, 1 one that gives none.

    Examples
    --------
    >>> import numpy as np
    >>> import cuobs
    >>> W = np.array([[3.0, 4.0]])
    >>> cuobs.relative_loss(W, np.array([[3.0, 0.0]]), np.eye(2))
    0.8
    """
    W, W_pruned = weight_of(W, "W"), weight_of(W_pruned, "W_pruned")
    with arrays.stream_of(W, W_pruned, H), validation.renaming("hessian", "H"):
        W = validation.matrix("W", W)
        W_pruned = validation.matrix("W_pruned", W_pruned, W.shape)
        H = check_symmetric(H.matrix if isinstance(H, Hessian) else H, W.shape[1])
        xp = arrays.namespace(H)
        dtype = xp.result_type(H.dtype, "float32")
        W, W_pruned, H = (arrays.asarray(a, xp, dtype) for a in (W, W_pruned, H))
        return loss(W, W_pruned, H)


def loss(W, W_pruned, H):
    """`relative_loss` of arrays on one namespace and of one dtype."""
    return share_lost(*energies(W, W_pruned, H, *energy_units([W], H)))


def energy_units(weights, H):
    """Powers of two: with each weight in terms of its own no square overflows or vanishes."""
    xp = arrays.namespace(H)
    ends = [end for W in weights for end in (W.max(), W.min())]
    ends = arrays.to_numpy(xp.stack(ends)).tolist()
    # Where the Hessian is tiny, weights as much larger.
    more = 2.0 ** min(0, math.frexp(largest_square(H))[1] // 2)
    sizes = [max(map(abs, pair)) for pair in zip(ends[::2], ends[1::2], strict=True)]
    units = [more * 2.0 ** (math.frexp(size)[1] - 1) if size else more for size in sizes]
    return [max(unit, float(np.finfo(H.dtype).tiny)) for unit in units]


def energies(W, W_pruned, H, unit):
    """The energy of a weight's outputs and of what they have lost, weights in terms of a unit.

    Those of some rows add up to those of all.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        whole = output_energy(W / unit, H)
        away = W_pruned - W
        away /= unit
        lost = output_energy(away, H)
    _check_energy(whole + lost, W)
    return whole, lost


def energies_together(parts, H, precision):
    """`energies` of each of several (W, W_pruned, unit), whose rows are multiplied together.

    A GPU has too little to do with few rows at a time. Its tensor cores take part, by products that
    keep the digits of float32.
    """
    xp = arrays.namespace(H)
    with np.errstate(over="ignore", invalid="ignore"):
        both = xp.concatenate(
            [W / unit for W, _, unit in parts]
            + [(W_pruned - W) / unit for W, W_pruned, unit in parts]
        )
        found = row_energies(both, H, precision)
    stops = np.cumsum([len(W) for W, _, _ in parts])
    found = np.split(arrays.to_numpy(found).reshape(2, -1), stops[:-1], axis=1)
    sums = [part.sum(1) for part in found]
    for (W, _, _), pair in zip(parts, sums, strict=True):
        _check_energy(sum(pair), W)
    return [tuple(pair.tolist()) for pair in sums]


def row_energies(D, H, precision):
    """`output_energy` of each row, an array of float64, by tensor cores where `precision` lets."""
    xp = arrays.namespace(H)
    found = xp.zeros(len(D))
    for a, b in strips(len(H), BLOCKS, COLUMNS):
        # Symmetric: its rows lie as tensor cores take the columns of an operand.
        rows, product = H[a:b, :b].copy(), xp.empty((len(D), b - a), D.dtype)
        rows[:, a:] *= 0.5
        gemm(D[:, :b], rows.T, product, precision=precision, exact=True)
        add_row_inner(product, D[:, a:b], found)
    return 2 * found


def _check_energy(energy, W):
    if not math.isfinite(energy):
        raise ValueError(
            f"hessian: found outputs whose energy overflows {W.dtype}, expected smaller values or "
            "dtype='float64'"
        )


def share_lost(whole, lost):
    """The relative loss of two `energies`."""
    if lost < -ROUNDING * abs(whole):
        raise ValueError("hessian: found outputs of negative energy, expected XᵀX, which has none")
    return math.sqrt(max(lost, 0.0) / whole) if whole > 0 else 0.0


def output_energy(D, H):
    """tr(D H Dᵀ), the squared norm of the outputs X Dᵀ, summed in float64.

    H is symmetric: blocks above its diagonal count twice, those below are not read.
    """
    half = arrays.namespace(D).zeros(())  # on a GPU, which is waited for at the end
    for a, b in strips(len(H), BLOCKS):
        part = D[:, a:b]
        product = matmul(part, H[a:b, a:b])
        product *= 0.5
        if a:
            gemm(D[:, :a], H[:a, a:b], product, beta=1)
        add_inner(product, part, half)
    return 2 * float(half)


def loss_bytes(size):
    """Bytes that `loss` takes: a weight, and three blocks of its columns."""
    K = size.layout.shape[1]
    return size.weight + 3 * size.weight * -(-K // BLOCKS) // K
