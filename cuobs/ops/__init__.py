"""The algebra under the methods: free functions on NumPy and CuPy arrays, explicit in and out.

Each checks the dtypes, shapes and strides that it is given, and runs where its arrays lie. Patterns
come as a `Layout`, which ``cuobs.Pattern.compile`` gives for a shape; weights are then taken in its
order, in which scopes lie side by side. Letters are one thing each: a weight is (M, K), of m row
groups of r rows and n column groups of c columns; H is a Hessian, C its inverse, R its reversed
factor, H = R Rᵀ.

Examples
--------
SparseGPT's mask and weights of 128 columns, from the activations on:

>>> import numpy as np
>>> import cuobs
>>> from cuobs import ops
>>> rng = np.random.default_rng(0)
>>> W, X = rng.standard_normal((8, 32)), rng.standard_normal((256, 32))
>>> H = np.zeros((32, 32))
>>> ops.add_gram(X, H)
>>> layout = cuobs.patterns()["2:4"].compile(*W.shape)
>>> R = ops.reversed_cholesky(H)
>>> deviation, mask = np.zeros_like(W), np.empty(W.shape, bool)
>>> diagonal = R.diagonal()
>>> ops.sparsegpt_block(W, deviation, R / diagonal, diagonal**2, layout, mask)
>>> pruned = (W - deviation) * mask
>>> bool(cuobs.verify(pruned, "2:4"))
True
"""

from cuobs.arrays import tensor_view
from cuobs.ops.conjugate_gradient import masked_cg
from cuobs.ops.factors import (
    check_factored,
    cholesky,
    cholesky_inverse,
    factor_solve,
    inverse,
    reversed_cholesky,
    upper_gram,
    upper_inverse,
    upper_solve,
)
from cuobs.ops.gram import add_cross_gram, add_gram, mirror_upper
from cuobs.ops.packed import pack, packed_matmul, tiling, unpack
from cuobs.ops.products import gemm, matmul
from cuobs.ops.projection import project_mask
from cuobs.ops.schur import eliminate
from cuobs.ops.selection import (
    block_sums,
    expand,
    factor_scope_blocks,
    prune_lowest,
    scope_blocks,
    select,
    select_mask,
)
from cuobs.ops.sweep import scope_solutions, span_inverses, sparsegpt_block
from cuobs.ops.systems import masked_factor_solve, masked_solve, scope_compensation
from cuobs.ops.views import by_scope, permute, permute_back

__all__ = [
    "add_cross_gram",
    "add_gram",
    "block_sums",
    "by_scope",
    "check_factored",
    "cholesky",
    "cholesky_inverse",
    "eliminate",
    "expand",
    "factor_solve",
    "factor_scope_blocks",
    "gemm",
    "inverse",
    "masked_cg",
    "masked_factor_solve",
    "masked_solve",
    "matmul",
    "mirror_upper",
    "pack",
    "packed_matmul",
    "permute",
    "permute_back",
    "project_mask",
    "prune_lowest",
    "reversed_cholesky",
    "scope_blocks",
    "scope_compensation",
    "scope_solutions",
    "select",
    "select_mask",
    "span_inverses",
    "sparsegpt_block",
    "tensor_view",
    "tiling",
    "unpack",
    "upper_gram",
    "upper_inverse",
    "upper_solve",
]
