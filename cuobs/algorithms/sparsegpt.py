"""SparseGPT in the form of one Cholesky factor."""

from cuobs.footprint import Memory
from cuobs.ops.products import gemm
from cuobs.ops.sweep import block_width, sparsegpt_block
from cuobs.problem import Pruned
from cuobs.recipe import Method

# Blocks of columns that are finished before all to their right are updated by one product.
BLOCKS = 4


def sparsegpt(problem):
    """Column by column: prune by w²/U_ii², compensate to the right, freeze what is kept.

    The published method needs the Cholesky factor U of the inverse Hessian. With H = R Rᵀ and
    F = R / diag(R), the compensation of column j is s_j = Σ e_i F_ij over the deviations e of the
    columns before it, so neither an inverse nor a second factor is formed.

    References
    ----------
    .. [1] Frantar, Alistarh, "SparseGPT: massive language models can be accurately pruned in
       one-shot", ICML 2023.
    """
    xp, W, R, layout = problem.xp, problem.W, problem.R, problem.layout
    K = W.shape[1]
    width = block_width(layout.columns)
    diagonal = R.diagonal()
    scale = diagonal**2
    # Block by block, from the compensation of the columns to the deviations from the target.
    S = xp.zeros_like(W)
    mask = xp.empty(W.shape, bool)
    for a in range(0, K, BLOCKS * width):
        b = min(a + BLOCKS * width, K)
        F = xp.ascontiguousarray(R[a:b, a:] / diagonal[a:])
        for i in range(a, b, width):
            j = min(i + width, b)
            own = F[i - a : j - a, i - a : b - a]
            sparsegpt_block(
                W[:, i:j], S[:, i:j], own[:, : j - i], scale[i:j], layout, mask[:, i:j]
            )
            gemm(S[:, i:j], own[:, j - i :], S[:, j:b], beta=1, precision=problem.precision)
        gemm(S[:, a:b], F[:, b - a :], S[:, b:], beta=1, precision=problem.precision)
        own = F = None  # the next is not made beside it
        problem.settings.report(b, K)
    weight = xp.subtract(W, S, out=S)
    weight *= mask
    return Pruned(mask, weight)


def memory(size):
    """R and some rows of it, S, mask, and either a block's columns or what is added to S."""
    M, K = size.layout.shape
    c, s = size.layout.columns, size.itemsize
    width = block_width(c)
    rows = min(BLOCKS * width, K)
    block = M * (min(width, K) * (4 * s + 2) + c * (5 * s + 8))
    added = size.product * max(K - rows, rows - width) // K
    return Memory(
        size.matrix + rows * K * s + size.weight + size.mask + max(block, added), size.matrix
    )


METHOD = Method(
    "sparsegpt",
    "column by column, kept columns freeze",
    sparsegpt,
    memory=memory,
    by_row=True,
    operations=(1 / 3, 2),
    held=(5, 5),
)
