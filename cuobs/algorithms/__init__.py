"""The methods of the package, in their published order. A method is one file here."""

from cuobs.algorithms import (
    admm,
    magnitude,
    obs_full,
    obs_interleaved,
    obs_local,
    obs_ordered,
    sparsegpt,
    true_obs,
    wanda,
)
from cuobs.recipe import methods, register_method

__all__ = ["methods", "register_method"]

for _method in (
    magnitude.METHOD,
    wanda.METHOD,
    obs_local.METHOD,
    obs_full.METHOD,
    obs_interleaved.SPLIT,
    obs_interleaved.METHOD,
    sparsegpt.METHOD,
    obs_ordered.METHOD,
    true_obs.METHOD,
    admm.METHOD,
):
    register_method(_method)
