"""True-obs's passes on a GPU."""

from pathlib import Path

import cupy
import numpy as np

from cuobs.algorithms.true_obs_ops import ALIGN, aligned, alike, what_is_left
from cuobs.ops.cuda import loader
from cuobs.ops.cuda.scope import samples, scope_defines
from cuobs.ops.products import gemm

SOURCE = Path(__file__).with_suffix(".cu")
THREADS = 256
WARP = 32
# Order of the tiles of a group's block.
TILE = 32
# Columns of C and of P in a tile of gather_blocks.
WIDTH, DEEP = {"float16": 128, "float32": 128, "float64": 64}, 64
# Threads that share a scope in an update, and the widest scope whose sums fit a thread.
LANES, UNROLLED = 8, 16


def rows_at_once(C, rows):
    return rows


def notes(W, rows):
    return cupy.zeros(rows, np.int32)


def first_scopes(key, scopes, size):
    m, n = key.shape
    chosen = cupy.empty((m, size), np.int32)
    _kernel("first_scopes", key.dtype)(
        (m,), (THREADS,),
        (key, _row(key), scopes, _row(scopes), np.int32(n), np.int32(size), chosen),
    )
    return chosen


def take_pruned(blocks, chosen, scopes, w, layout, mask):
    _, m, r, n = w.shape
    B, size = m * r, chosen.shape[1]
    p = aligned(size * layout.pruned_columns[1])
    places, columns = cupy.empty((2, B, p), np.int32)
    weights = cupy.empty((B, p), w.dtype)
    counts = cupy.empty(B, np.int32)
    _kernel("take_pruned", w.dtype, layout=layout)(
        (m,), (THREADS,),
        (blocks, chosen, np.int32(size), scopes, _row(scopes), w, *loader.strides(w), np.int32(n),
         np.int32(mask.shape[2]), np.int32(p), mask, places, columns, weights, counts),
    )
    if alike(layout):
        return places, columns, weights, None
    counts = (counts + (ALIGN - 1)) // ALIGN * ALIGN
    p = int(counts.max())
    return *(cupy.ascontiguousarray(a[:, :p]) for a in (places, columns, weights)), counts


def gather_factor(Z, places, used, out=None):
    B, p = Z.shape[:2] if places is None else places.shape
    if out is None:
        out = cupy.empty((B, p, used), Z.dtype)
    if used:
        _kernel("gather_factor", Z.dtype, Z.dtype)(
            (_warps(p), B), (THREADS,),
            (Z, *loader.strides(Z)[:2], loader.NULL if places is None else places, np.int32(p),
             np.int32(used), out, *loader.strides(out)[:2]),
        )
    return out


def group_blocks(C, columns, Z_P, precision="fp32"):
    B, p = columns.shape
    A = cupy.empty((B, p, p), C.dtype)
    tiles = -(-p // TILE)
    _kernel("group_blocks", C.dtype)(
        (tiles, tiles, B), (THREADS,), (C, np.int64(len(C)), columns, np.int32(p), A)
    )
    if Z_P.shape[2]:
        gemm(Z_P, Z_P.transpose(0, 2, 1), A, alpha=-1, beta=1, precision=precision)
    return A


def solve_group(inverse, weights, cost, dtype):
    B, p = weights.shape
    y = cupy.empty_like(weights)
    rounded = inverse if dtype == inverse.dtype else cupy.empty(inverse.shape, dtype)
    _kernel("solve_group", inverse.dtype, dtype)(
        (B,), (THREADS,),
        (inverse, weights, np.int32(p), y, cost, loader.NULL if rounded is inverse else rounded),
    )
    return y, rounded


def drop_scopes(chosen, scopes, w, D, factor):
    c, m, r, n = w.shape
    size, Z = chosen.shape[1], factor.Z
    _kernel("drop_scopes", w.dtype, Z.dtype, rows=r, places=c)(
        (size, m * r), (THREADS,),
        (chosen, np.int32(size), np.int32(n), scopes, _row(scopes), w, *loader.strides(w), D,
         *loader.strides(D), Z, *loader.strides(Z)[:2], np.int32(factor.used)),
    )
    return what_is_left(n - size, scopes, w, D, factor)


def eliminated_columns(C, scopes, columns, Z, Z_P, inverse, counts, out, space, precision):
    B, p = columns.shape
    m, n = scopes.shape
    Y = space.array("Y", out.shape, out.dtype, cupy)
    _kernel("gather_blocks", C.dtype, C.dtype, rows=B // m, places=Z.shape[1] // n)(
        (-(-p // DEEP), B, -(-Z.shape[1] // WIDTH[C.dtype.name])), (THREADS,),
        (C, np.int64(len(C)), columns, np.int32(p), scopes, _row(scopes), np.int32(n), Y),
    )
    if Z.shape[2]:
        gemm(Z, Z_P.transpose(0, 2, 1), Y, alpha=-1, beta=1, precision=precision)
    gemm(Y, inverse.transpose(0, 2, 1), out, precision=precision)


def append_rows(Zn, starts, counts, zeros, used, Z):
    B, n, _ = Zn.shape
    _kernel("append_rows", Z.dtype, Z.dtype)(
        (_warps(n), B), (THREADS,),
        (Zn, *loader.strides(Zn)[:2], np.int32(n), starts, counts, np.int32(zeros),
         np.int32(used), Z, *loader.strides(Z)[:2]),
    )


def update_scopes(w, D, Zn, y):
    c, _, r, n = w.shape
    B, _, p = Zn.shape
    if c > UNROLLED:
        return NotImplemented
    _kernel("update_scopes", w.dtype, Zn.dtype, rows=r, places=c)(
        (-(-n * LANES // THREADS), B), (THREADS,),
        (Zn, *loader.strides(Zn)[:2], np.int32(p), y, np.int32(n), w, *loader.strides(w), D,
         *loader.strides(D)),
    )


def _warps(count):
    """Blocks of threads that have a warp for each of so many rows."""
    return -(-count // (THREADS // WARP))


def _row(array):
    """Elements from one row of a matrix to the next."""
    return loader.strides(array)[0]


def _kernel(name, dtype, factor=None, layout=None, rows=None, places=None):
    return loader.kernel_for(
        SOURCE, name, _defines, dtype, factor or dtype, layout, rows, places
    )


def _defines(dtype, factor, layout=None, rows=None, places=None):
    # Passes over the factor alone compute nothing in float16.
    dtype = "float32" if dtype == np.float16 else dtype
    defines = {
        "REAL": loader.real(dtype), "FACTOR": loader.real(factor), "THREADS": THREADS, "TILE": TILE,
        "LANES": LANES, "UNROLLED": UNROLLED, "WIDTH": WIDTH[str(factor)], "DEEP": DEEP,
    }
    if layout is not None:
        return defines | scope_defines(layout, dtype)
    return defines if rows is None else defines | {"ROWS": rows, "PLACES": places}


def variants():
    """The macros that the kernels may be compiled with, for some patterns."""
    for layout, dtype in samples():
        r, c = layout.blocks.shape
        yield _defines(dtype, dtype, layout)
        for factor in {dtype, "float16" if dtype == "float32" else dtype}:
            yield _defines(dtype, factor)
            yield _defines(dtype, factor, rows=r, places=c)
