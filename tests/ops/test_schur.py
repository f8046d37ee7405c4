"""Schur complements for all rows."""

import numpy as np
import oracles
from op_cases import SINGLE, definite

from cuobs.ops import schur


@SINGLE
def test_eliminate(xp, rng, dtype, close):
    C = definite(rng, 20)
    columns = rng.permutation(20)[:7]
    others = np.setdiff1d(np.arange(20), columns)
    left, group, cross = (
        xp.array(C[np.ix_(*at)], dtype)
        for at in ((others, others), (columns, columns), (columns, others))
    )
    schur.eliminate(left, group, cross)
    close(left, oracles.eliminate(C, columns)[np.ix_(others, others)])
