"""Schur complements of the inverse Hessian: of one for all rows, and of one for each row.

Of a row that has lost columns, the inverse Hessian is C − Z Zᵀ on the columns of its open scopes,
the ones that are undecided. Z has one row for each of these columns, scope by scope, so that a
scope moves as one run of memory, and one column for each column that is lost. On a GPU Z is held in
float16 where tensor cores are allowed: C is scaled to a unit diagonal, so that every entry lies in
[-1, 1].
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cuobs.arrays import namespace
from cuobs.ops import cuda
from cuobs.ops.cholesky import cholesky_inverse
from cuobs.ops.gemm import gemm, tensor_cores_allowed

# A GPU moves runs of 16 bytes and multiplies fastest where lengths are multiples of this.
ALIGN = 8
THREADS = 256
# Threads that share a scope in an update, and the widest scope whose sums fit a thread.
LANES = 8
UNROLLED = 16


@dataclass
class Factor:
    """Z of a batch of B rows.

    Attributes
    ----------
    Z : array, shape (B, open columns, room)
    used : int
        Columns of Z in use; rows that have lost fewer hold zeros there.
    starts : array of int, shape (B,), or None
        Where the next columns of each row go, if the rows differ.
    turn : int
        Which of two buffers Z lies in.
    """

    Z: object
    used: int = 0
    starts: object = None
    turn: int = 0


def factor_dtype(xp, dtype):
    """The dtype of Z for weights of a dtype."""
    if xp is not np and dtype == np.float32 and tensor_cores_allowed():
        return np.dtype("float16")
    return np.dtype(dtype)


def eliminate(C, group, cross):
    """C −= crossᵀ group⁻¹ cross: what is left of an inverse Hessian after a group of its columns.

    Parameters
    ----------
    C : array, shape (K, K)
        Overwritten.
    group : array, shape (p, p)
        The inverse Hessian of the group. Overwritten.
    cross : array, shape (p, K)
        Between the group and the others.
    """
    Y = cholesky_inverse(group[None])[0] @ cross
    gemm(Y.T, Y, C, alpha=-1, beta=1)


def first_scopes(key, scopes, size):
    """Positions, ascending, of the scopes with the smallest keys; the lowest scope where keys tie.

    Parameters
    ----------
    key : array, shape (R, n)
    scopes : array of int32, shape (R, n)
    size : int

    Returns
    -------
    array of int32, shape (R, size)
    """
    xp = namespace(key)
    if xp is np:
        return np.sort(np.lexsort((scopes, key))[:, :size]).astype(np.int32)
    R, n = key.shape
    chosen = xp.empty((R, size), np.int32)
    _kernel("first_scopes", key.dtype)(
        (R,), (THREADS,),
        (key, _row(key), scopes, _row(scopes), np.int32(n), np.int32(size), chosen),
    )
    return chosen


def take_pruned(blocks, chosen, scopes, w, layout, mask):
    """Write the masks of the chosen scopes, and list the columns that each row loses there.

    Parameters
    ----------
    blocks : array of bool, shape (n_blocks, R, n)
        The blocks that each open scope would lose.
    chosen : array of int32, shape (R, size)
        Positions of scopes.
    scopes : array of int32, shape (R, n)
    w : array, shape (c, R, r, n)
    layout : Layout
    mask : array of bool, shape (R, r, G, c)
        True = kept; the chosen scopes are overwritten.

    Returns
    -------
    places : array of int32, shape (B, p)
        Among the open columns, c of a scope side by side; -1 fills the shorter lists up.
    columns : array of int32, shape (B, p)
        The same columns in the layout.
    weights : array, shape (B, p)
        Their weights, 0 where filled up.
    counts : array of int32, shape (B,), or None
        Columns that each row loses, if the rows may differ. On a GPU with zeros up to a multiple
        of `ALIGN`.
    """
    xp = namespace(w)
    c, R, r, n = w.shape
    B, size = R * r, chosen.shape[1]
    most, alike = pruned_columns(layout)
    if xp is not np:
        p = aligned(size * most)
        places, columns = xp.empty((2, B, p), np.int32)
        weights = xp.empty((B, p), w.dtype)
        counts = xp.empty(B, np.int32)
        _kernel("take_pruned", w.dtype, layout=layout)(
            (R,), (THREADS,),
            (blocks, chosen, np.int32(size), scopes, _row(scopes), w, *cuda.strides(w),
             np.int32(n), np.int32(mask.shape[2]), np.int32(p), mask, places, columns, weights,
             counts),
        )
        if alike:
            return places, columns, weights, None
        counts = (counts + (ALIGN - 1)) // ALIGN * ALIGN
        p = int(counts.max())
        return *(xp.ascontiguousarray(a[:, :p]) for a in (places, columns, weights)), counts
    every = np.arange(R)[:, None]
    picked = blocks[:, every, chosen].transpose(1, 0, 2)
    flags = picked[:, layout.blocks].transpose(0, 1, 3, 2)
    mask[every, :, scopes[every, chosen]] = ~flags.transpose(0, 2, 1, 3)
    flags = flags.reshape(B, -1)
    counts = flags.sum(1, dtype=np.int32)
    p = int(counts.max())
    # A stable sort brings the pruned ones to the front, in order.
    order = (~flags).argsort(axis=1, kind="stable")[:, :p]
    index = np.arange(B)[:, None]
    position, place = chosen[index // r, order // c], (order % c).astype(np.int32)
    filled = np.arange(p) >= counts[:, None]
    weights = np.where(filled, 0, w[place, index // r, index % r, position])
    columns = scopes[index // r, position] * c + place
    places = position * c + place
    places[filled] = columns[filled] = -1
    return places, columns, weights, None if alike else counts


def gather_factor(Z, places, used, out=None):
    """Z_P, the first `used` columns of Z at the columns P: shape (B, p, used); zeros where -1.

    Parameters
    ----------
    Z : array, shape (B, columns, room)
    places : array of int32, shape (B, p), or None for all columns in order
    used : int
    out : array, shape (B, p, used), optional
        Rows contiguous. Overwritten.
    """
    xp = namespace(Z)
    B, p = Z.shape[:2] if places is None else places.shape
    if out is None:
        out = xp.empty((B, p, used), Z.dtype)
    if not used:
        return out
    if xp is not np:
        _kernel("gather_factor", Z.dtype, Z.dtype)(
            (-(-p // 8), B), (THREADS,),
            (Z, *cuda.strides(Z)[:2], cuda.NULL if places is None else places, np.int32(p),
             np.int32(used), out, *cuda.strides(out)[:2]),
        )
    elif places is None:
        out[...] = Z[:, :, :used]
    else:
        for b in range(B):
            Z[b, :, :used].take(places[b], axis=0, out=out[b], mode="wrap")
        if (places[:, -1] < 0).any():
            out[places < 0] = 0
    return out


def group_blocks(C, columns, Z_P):
    """A = C_PP − Z_P Z_Pᵀ for the columns P of each row, with a unit diagonal where -1.

    Parameters
    ----------
    C : array, shape (K, K)
    columns : array of int32, shape (B, p)
    Z_P : array, shape (B, p, used)

    Returns
    -------
    array, shape (B, p, p)
        On a GPU its lower triangle alone.
    """
    xp = namespace(C)
    B, p = columns.shape
    A = xp.empty((B, p, p), C.dtype)
    if xp is not np:
        tiles = -(-p // 32)
        _kernel("group_blocks", C.dtype)(
            (tiles, tiles, B), (THREADS,), (C, np.int64(len(C)), columns, np.int32(p), A)
        )
        if Z_P.shape[2]:
            gemm(Z_P, Z_P.transpose(0, 2, 1), A, alpha=-1, beta=1)
        return A
    flat = C.ravel()
    for b in range(B):
        wide = columns[b].astype(np.intp)
        flat.take(wide[:, None] * len(C) + wide, out=A[b], mode="wrap")
        if Z_P.shape[2]:
            A[b] -= Z_P[b] @ Z_P[b].T
        if wide[-1] < 0:
            filled = wide < 0
            A[b, filled] = A[b, :, filled] = 0
            A[b, filled, filled] = 1
    return A


def solve_group(inverse, weights, cost, dtype):
    """y = L⁻¹ w, and cost += y·y.

    Parameters
    ----------
    inverse : array, shape (B, p, p)
        L⁻¹.
    weights : array, shape (B, p)
    cost : array, shape (B,)
        Overwritten.
    dtype : dtype
        Of the factor that L⁻¹ is to be multiplied with.

    Returns
    -------
    y : array, shape (B, p)
    inverse : array, shape (B, p, p)
        L⁻¹ in that dtype.
    """
    xp = namespace(inverse)
    if xp is np:
        y = np.matmul(inverse, weights[:, :, None])[:, :, 0]
        cost += np.vecdot(y, y)
        return y, inverse
    B, p = weights.shape
    y = xp.empty_like(weights)
    rounded = inverse if dtype == inverse.dtype else xp.empty(inverse.shape, dtype)
    _kernel("solve_group", inverse.dtype, dtype)(
        (B,), (THREADS,),
        (inverse, weights, np.int32(p), y, cost, cuda.NULL if rounded is inverse else rounded),
    )
    return y, rounded


def drop_scopes(chosen, scopes, w, D, factor):
    """Forget the chosen scopes: those that are open at the end take their places.

    Parameters
    ----------
    chosen : array of int32, shape (R, size)
        Positions, ascending.
    scopes : array of int32, shape (R, n)
    w : array, shape (c, R, r, n)
    D : array, shape (c, c, R, r, n)
        On a GPU its lower triangles alone. All these are overwritten.
    factor : Factor
        Overwritten.

    Returns
    -------
    scopes, w, D
        What is left, the first n - size scopes.
    """
    c, R, r, n = w.shape
    size, Z = chosen.shape[1], factor.Z
    left = n - size
    if namespace(w) is np:
        is_open = np.ones((R, n), bool)
        is_open[np.arange(R)[:, None], chosen] = False
        for group in range(R):
            holes = chosen[group, : np.searchsorted(chosen[group], left)]
            tail = left + is_open[group, left:].nonzero()[0]
            scopes[group, holes] = scopes[group, tail]
            w[:, group, :, holes] = w[:, group, :, tail]
            D[:, :, group, :, holes] = D[:, :, group, :, tail]
            for b in range(group * r, group * r + r):
                by_scope = Z[b].reshape(n, c, Z.shape[2])[:, :, : factor.used]
                by_scope[holes] = by_scope[tail]
    else:
        _kernel("drop_scopes", w.dtype, Z.dtype, rows=r, places=c)(
            (size, R * r), (THREADS,),
            (chosen, np.int32(size), np.int32(n), scopes, _row(scopes), w, *cuda.strides(w), D,
             *cuda.strides(D), Z, *cuda.strides(Z)[:2], np.int32(factor.used)),
        )
    factor.Z = Z[:, : left * c]
    return scopes[:, :left], w[..., :left], D[..., :left]


def append_factor(C, scopes, columns, Z_P, inverse, counts, factor, space):
    """Zn = L⁻¹ (C_P: − Z_P Zᵀ) on the open columns, appended to Z.

    Parameters
    ----------
    C : array, shape (K, K)
        Of the factor's dtype.
    scopes : array of int32, shape (R, n)
    columns : array of int32, shape (B, p)
    Z_P : array, shape (B, p, used)
    inverse : array, shape (B, p, p)
        L⁻¹, of the factor's dtype.
    counts : array of int32, shape (B,), or None
        Columns of Zn that each row has, if they differ.
    factor : Factor
        With room for p more columns. Overwritten.
    space : Workspace

    Returns
    -------
    array, shape (B, c n, p)
        Zn, zero where `columns` is -1.
    """
    xp = namespace(C)
    Z, used = factor.Z, factor.used
    B, p = columns.shape
    R, n = scopes.shape
    c = Z.shape[1] // n
    shape = B, c * n, p
    if counts is None:
        Zn = Z[:, :, used : used + p]
    else:
        Zn = space.array("Zn", shape, Z.dtype, xp)
    if xp is np:
        by_scope = C.reshape(len(C), -1, c)
        for b in range(B):
            own = p if counts is None else counts[b]
            # Whole rows first: two takes read memory in order, one double index would not.
            Y = by_scope[columns[b, :own]].take(scopes[b // (B // R)], axis=1)
            Y = Y.reshape(own, n * c)
            if used:
                Y -= Z_P[b, :own] @ Z[b, :, :used].T
            np.matmul(Y.T, inverse[b, :own, :own].T, out=Zn[b, :, :own])
            Zn[b, :, own:] = 0
    else:
        Y = space.array("Y", shape, Z.dtype, xp)
        _kernel("gather_blocks", C.dtype, C.dtype, rows=B // R, places=c)(
            (-(-p // 64), B, -(-n * c // _width(C.dtype))), (THREADS,),
            (C, np.int64(len(C)), columns, np.int32(p), scopes, _row(scopes), np.int32(n), Y),
        )
        if used:
            gemm(Z[:, :, :used], Z_P.transpose(0, 2, 1), Y, alpha=-1, beta=1)
        gemm(Y, inverse.transpose(0, 2, 1), Zn)
    if counts is None:
        factor.used += p
    else:
        _append_rows(factor, Zn, counts)
    return Zn


def _append_rows(factor, Zn, counts):
    """Append to Z the first counts[b] columns of Zn for each row b."""
    Z, starts = factor.Z, factor.starts
    B, n, _ = Zn.shape
    ends = starts + counts
    # Behind its own columns a row holds zeros already, up to those in use so far.
    zeros, factor.used = factor.used, int(ends.max())
    if namespace(Z) is np:
        for b in range(B):
            Z[b, :, starts[b] : ends[b]] = Zn[b, :, : counts[b]]
            Z[b, :, max(ends[b], zeros) : factor.used] = 0
    else:
        _kernel("append_rows", Z.dtype, Z.dtype)(
            (-(-n // 8), B), (THREADS,),
            (Zn, *cuda.strides(Zn)[:2], np.int32(n), starts, counts, np.int32(zeros),
             np.int32(factor.used), Z, *cuda.strides(Z)[:2]),
        )
    factor.starts = ends


def update_scopes(w, D, Zn, y):
    """Take a group's elimination out of the weights and diagonal blocks of the open scopes.

    w −= Zn y, and D −= the diagonal blocks of Zn Znᵀ.

    Parameters
    ----------
    w : array, shape (c, R, r, n)
        Overwritten.
    D : array, shape (c, c, R, r, n)
        On a GPU its lower triangles alone. Overwritten.
    Zn : array, shape (B, c n, p)
    y : array, shape (B, p)
    """
    xp = namespace(w)
    c, _, r, n = w.shape
    B, _, p = Zn.shape
    if xp is not np and c <= UNROLLED:
        _kernel("update_scopes", w.dtype, Zn.dtype, rows=r, places=c)(
            (-(-n * LANES // THREADS), B), (THREADS,),
            (Zn, *cuda.strides(Zn)[:2], np.int32(p), y, np.int32(n), w, *cuda.strides(w), D,
             *cuda.strides(D)),
        )
        return
    for b in range(B):
        rows = Zn[b].astype(w.dtype, copy=False)
        w[:, b // r, b % r] -= (rows @ y[b]).reshape(n, c).T
        by_scope = rows.reshape(n, c, p)
        change = xp.matmul(by_scope, by_scope.transpose(0, 2, 1))
        D[:, :, b // r, b % r] -= change.transpose(1, 2, 0)


def make_room(factor, p, area, space):
    """Widen Z where p more columns do not fit, so that each row's Z has `area` elements or more."""
    Z = factor.Z
    B, n, room = Z.shape
    if factor.used + p <= room:
        return
    xp = namespace(Z)
    # Two buffers take turns.
    factor.turn = 1 - factor.turn
    room = room_for(factor.used + p, n, area)
    factor.Z = space.array(f"Z{factor.turn}", (B, n, room), Z.dtype, xp)
    gather_factor(Z, None, factor.used, out=factor.Z[:, :, : factor.used])


def room_for(used, n, area):
    """The columns that `make_room` gives a Z of n rows that needs `used` of them."""
    return aligned(max(used, area // n))


@lru_cache(maxsize=64)
def pruned_columns(layout):
    """The most columns that a scope takes from one row, and whether it always takes as many."""
    n_pruned = layout.n_blocks - layout.keep
    counts = (layout.blocks[:, :, None] == np.arange(layout.n_blocks)).sum(1)
    counts.sort(axis=1)
    most, least = counts[:, -n_pruned:].sum(1).max(), counts[:, :n_pruned].sum(1).min()
    return int(most), bool(most == least)


def aligned(count):
    """`count` or the next length that a GPU likes."""
    return -(-count // ALIGN) * ALIGN


def _row(array):
    """Elements from one row of a matrix to the next."""
    return cuda.strides(array)[0]


def _width(dtype):
    """Columns of a tile of gather_blocks."""
    return 64 if dtype == np.float64 else 128


def _kernel(name, dtype, factor=None, layout=None, rows=None, places=None):
    return cuda.kernel_for(
        "schur.cu", name, _defines, dtype, factor or dtype, layout, rows, places
    )


def _defines(dtype, factor, layout=None, rows=None, places=None):
    # Passes over the factor alone compute nothing in float16.
    dtype = "float32" if dtype == np.float16 else dtype
    if layout is not None:
        return cuda.scope_defines(layout, dtype) | {"FACTOR": cuda.real(factor)}
    defines = {"REAL": cuda.real(dtype), "FACTOR": cuda.real(factor)}
    return defines if rows is None else defines | {"ROWS": rows, "PLACES": places}


def variants():
    """What the kernels here compile for some patterns."""
    for layout, dtype in cuda.samples():
        r, c = layout.blocks.shape
        yield "schur.cu", _defines(dtype, dtype, layout)
        for factor in {dtype, "float16" if dtype == "float32" else dtype}:
            yield "schur.cu", _defines(dtype, factor)
            yield "schur.cu", _defines(dtype, factor, rows=r, places=c)
