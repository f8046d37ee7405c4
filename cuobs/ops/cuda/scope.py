"""What kernels that know a pattern share: the macros of scope.cuh."""

from cuobs.ops.cuda.loader import real

# Columns of a scope and elements in all up to which kernels are unrolled over one.
MAX_PLACES, MAX_ELEMENTS = 16, 64
# Threads of a block that are scopes side by side, and row groups one below the other.
SCOPES, GROUPS = 32, 4
# Row groups that a thread takes one after the other where there are enough.
TURNS = 4
# The most blocks along the second and the third axis of a grid.
MAX_GRID = 65535


def scope_defines(layout, dtype):
    """The macros of scope.cuh."""
    r, c = layout.blocks.shape
    return {
        "REAL": real(dtype), "ROWS": r, "PLACES": c, "BLOCKS": layout.blocks.ravel(),
        "N_BLOCKS": layout.n_blocks, "N_PRUNED": layout.n_blocks - layout.keep,
    }


def thread_defines():
    """The macro of kernels on `scope_grid`."""
    return {"THREADS": SCOPES * GROUPS}


def unrolls(layout):
    """Whether a scope is small enough for a kernel that is unrolled over its elements."""
    r, c = layout.blocks.shape
    return c <= MAX_PLACES and r * c <= MAX_ELEMENTS and layout.n_blocks <= 32


def scope_grid(row_groups, column_groups):
    """Blocks and threads of a kernel with a thread a scope, several row groups a thread."""
    rows = min(-(-row_groups // (GROUPS * TURNS)), MAX_GRID)
    return (-(-column_groups // SCOPES), rows), (SCOPES, GROUPS)


def samples():
    """(layout, dtype) of the named patterns and of some that a user may write."""
    from cuobs.pattern import parse, patterns

    for text in (*patterns(), "2:3", "8:16",
                 "view=(M/2,2,K):(2K,K,1) block=(1,1,1) scope=(1,2,4) keep=5"):
        for dtype in ("float32", "float64"):
            yield parse(text).compile(16, 48), dtype
