"""True-obs's passes over a batch of B = m r rows, row group by row group.

Of a row that has lost columns, the inverse Hessian is C − Z Zᵀ on the columns of its open scopes,
the ones that are undecided. Z has one row for each of these columns, scope by scope, so that a
scope moves as one run of memory, and one column for each column that is lost. On a GPU Z is held in
float16 where tensor cores are allowed: C is scaled to a unit diagonal, so that every entry lies in
[-1, 1].

Shapes speak of m row groups of r rows, of which each has n open scopes of c columns.
"""

from dataclasses import dataclass

import numpy as np

from cuobs.arrays import namespace
from cuobs.ops.dispatch import twinned

# A GPU moves runs of 16 bytes and multiplies fastest where lengths are multiples of this.
ALIGN = 8


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


@twinned()
def rows_at_once(C, rows):
    """Of so many rows of a batch, those whose Y `eliminated_columns` makes at once."""
    return 1


@twinned()
def notes(W, rows):
    """Where to note the rows whose factorisation fails; None where that is raised at once.

    A GPU is not asked before the end, since each question waits for it.
    """
    return None


@twinned()
def first_scopes(key, scopes, size):
    """Positions, ascending, of the scopes with the smallest keys; the lowest scope where keys tie.

    Parameters
    ----------
    key : array, shape (m, n)
    scopes : array of int32, shape (m, n)
    size : int

    Returns
    -------
    array of int32, shape (m, size)
    """
    return np.sort(np.lexsort((scopes, key))[:, :size]).astype(np.int32)


@twinned()
def take_pruned(blocks, chosen, scopes, w, layout, mask):
    """Write the masks of the chosen scopes, and list the columns that each row loses there.

    Parameters
    ----------
    blocks : array of bool, shape (blocks, m, n)
        The blocks that each open scope would lose.
    chosen : array of int32, shape (m, size)
        Positions of scopes.
    scopes : array of int32, shape (m, n)
    w : array, shape (c, m, r, n)
    layout : Layout
    mask : array of bool, shape (m, r, K / c, c)
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
    c, m, r, n = w.shape
    B = m * r
    every = np.arange(m)[:, None]
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
    return places, columns, weights, None if alike(layout) else counts


def alike(layout):
    """Whether every row loses as many columns of a scope."""
    least, most = layout.pruned_columns
    return least == most


@twinned()
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
    B, p = Z.shape[:2] if places is None else places.shape
    if out is None:
        out = np.empty((B, p, used), Z.dtype)
    if not used:
        return out
    if places is None:
        out[...] = Z[:, :, :used]
    else:
        for b in range(B):
            out[b] = Z[b, places[b], :used]
        if (places[:, -1] < 0).any():
            out[places < 0] = 0
    return out


@twinned()
def group_blocks(C, columns, Z_P, precision="fp32"):
    """A = C_PP − Z_P Z_Pᵀ for the columns P of each row, with a unit diagonal where -1.

    Parameters
    ----------
    C : array, shape (K, K)
    columns : array of int32, shape (B, p)
    Z_P : array, shape (B, p, used)
    precision : {"tensor", "fp32"}

    Returns
    -------
    array, shape (B, p, p)
        On a GPU its lower triangle alone.
    """
    B, p = columns.shape
    A = np.empty((B, p, p), C.dtype)
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


@twinned()
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
    y = np.matmul(inverse, weights[:, :, None])[:, :, 0]
    cost += np.vecdot(y, y)
    return y, inverse


@twinned()
def drop_scopes(chosen, scopes, w, D, factor):
    """Forget the chosen scopes: those that are open at the end take their places.

    Parameters
    ----------
    chosen : array of int32, shape (m, size)
        Positions, ascending.
    scopes : array of int32, shape (m, n)
    w : array, shape (c, m, r, n)
    D : array, shape (c, c, m, r, n)
        On a GPU its lower triangles alone. All these are overwritten.
    factor : Factor
        Overwritten.

    Returns
    -------
    scopes, w, D
        What is left, the first n - size scopes.
    """
    c, m, r, n = w.shape
    size, Z = chosen.shape[1], factor.Z
    left = n - size
    is_open = np.ones((m, n), bool)
    is_open[np.arange(m)[:, None], chosen] = False
    for group in range(m):
        holes = chosen[group, : np.searchsorted(chosen[group], left)]
        tail = left + is_open[group, left:].nonzero()[0]
        scopes[group, holes] = scopes[group, tail]
        w[:, group, :, holes] = w[:, group, :, tail]
        D[:, :, group, :, holes] = D[:, :, group, :, tail]
        for b in range(group * r, group * r + r):
            by_scope = Z[b].reshape(n, c, Z.shape[2])[:, :, : factor.used]
            by_scope[holes] = by_scope[tail]
    return what_is_left(left, scopes, w, D, factor)


def what_is_left(left, scopes, w, D, factor):
    """The first `left` scopes of each row, for `drop_scopes`."""
    factor.Z = factor.Z[:, : left * len(w)]
    return scopes[:, :left], w[..., :left], D[..., :left]


def append_factor(
    C, scopes, columns, Z_P, inverse, counts, factor, space, precision="fp32"
):
    """Zn = L⁻¹ (C_P: − Z_P Zᵀ) on the open columns, appended to Z.

    Parameters
    ----------
    C : array, shape (K, K)
        Of the factor's dtype.
    scopes : array of int32, shape (m, n)
    columns : array of int32, shape (B, p)
    Z_P : array, shape (B, p, used)
    inverse : array, shape (B, p, p)
        L⁻¹, of the factor's dtype.
    counts : array of int32, shape (B,), or None
        Columns of Zn that each row has, if they differ.
    factor : Factor
        With room for p more columns. Overwritten.
    space : Workspace
    precision : {"tensor", "fp32"}

    Returns
    -------
    array, shape (B, c n, p)
        Zn, zero where `columns` is -1.
    """
    Z, used = factor.Z, factor.used
    B, p = columns.shape
    shape = B, Z.shape[1], p
    if counts is None:
        Zn = Z[:, :, used : used + p]
    else:
        Zn = space.array("Zn", shape, Z.dtype, namespace(C))
    eliminated_columns(C, scopes, columns, Z[:, :, :used], Z_P, inverse, counts, Zn, space,
                       precision)
    if counts is None:
        factor.used += p
        return Zn
    ends = factor.starts + counts
    # Behind its own columns a row holds zeros already, up to those in use so far.
    zeros, factor.used = used, int(ends.max())
    append_rows(Zn, factor.starts, counts, zeros, factor.used, Z)
    factor.starts = ends
    return Zn


@twinned()
def eliminated_columns(C, scopes, columns, Z, Z_P, inverse, counts, out, space, precision):
    """`append_factor`'s Zn, from the columns of Z in use, into `out`, shape (B, c n, p)."""
    B, p = columns.shape
    m, n = scopes.shape
    c, r = Z.shape[1] // n, B // m
    by_scope = C.reshape(len(C), -1, c)
    for b in range(B):
        own = p if counts is None else int(counts[b])
        Y = space.array("Y", (own, n, c), C.dtype)
        # Whole rows first: two takes read memory in order, one double index would not.
        by_scope[columns[b, :own]].take(scopes[b // r], axis=1, out=Y, mode="clip")
        Y = Y.reshape(own, n * c)
        if Z.shape[2]:
            Y -= Z_P[b, :own] @ Z[b].T
        np.matmul(Y.T, inverse[b, :own, :own].T, out=out[b, :, :own])
        out[b, :, own:] = 0


@twinned()
def append_rows(Zn, starts, counts, zeros, used, Z):
    """The first counts[b] columns of Zn to where Z starts for row b, zeros behind them.

    Parameters
    ----------
    Zn : array, shape (B, c n, p)
    starts, counts : array of int32, shape (B,)
    zeros : int
        Columns up to which Z holds zeros already, behind those of a row.
    used : int
        Columns of Z in use after this.
    Z : array, shape (B, c n, room)
        Overwritten.
    """
    for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
        Z[b, :, start : start + count] = Zn[b, :, :count]
        Z[b, :, max(start + count, zeros) : used] = 0


@twinned()
def update_scopes(w, D, Zn, y):
    """Take a group's elimination out of the weights and diagonal blocks of the open scopes.

    w −= Zn y, and D −= the diagonal blocks of Zn Znᵀ.

    Parameters
    ----------
    w : array, shape (c, m, r, n)
        Overwritten.
    D : array, shape (c, c, m, r, n)
        On a GPU its lower triangles alone. Overwritten.
    Zn : array, shape (B, c n, p)
    y : array, shape (B, p)
    """
    xp = namespace(w)
    c, _, r, n = w.shape
    B, _, p = Zn.shape
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


def aligned(count):
    """`count` or the next length that a GPU likes."""
    return -(-count // ALIGN) * ALIGN

