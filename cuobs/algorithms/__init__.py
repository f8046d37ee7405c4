"""The methods by name. A method is one file and one line here."""

from typing import NamedTuple

from cuobs.algorithms.admm import admm
from cuobs.algorithms.magnitude import magnitude
from cuobs.algorithms.obs_full import obs_full
from cuobs.algorithms.obs_interleaved import obs_interleaved, obs_split
from cuobs.algorithms.obs_local import obs_local
from cuobs.algorithms.obs_ordered import obs_ordered
from cuobs.algorithms.sparsegpt import sparsegpt
from cuobs.algorithms.true_obs import true_obs
from cuobs.algorithms.wanda import wanda


class Method(NamedTuple):
    """A pruning method.

    Attributes
    ----------
    name : str
    function : callable
        Called with a `Problem` and the method's options; returns `Pruned`.
    summary : str
    options : tuple of str
        Names of the options that it takes.
    orders : tuple of str
        What `order` may be; the first is the default.
    resolves : bool
        Whether the method always leaves its weights to the exact re-solve.
    """

    name: str
    function: object
    summary: str
    options: tuple = ()
    orders: tuple = ()
    resolves: bool = False


_METHODS = (
    Method("magnitude", magnitude, "smallest weights, no compensation"),
    Method("wanda", wanda, "smallest weights times activation norms, no compensation"),
    Method("obs-local", obs_local, "exact scope costs, compensation inside each scope"),
    Method("obs-full", obs_full, "obs-local's masks, compensation everywhere, C frozen"),
    Method("obs-split", obs_split, "obs-full span by span, C updated between", ("splits",)),
    Method("obs-interleaved", obs_interleaved, "obs-split, masks chosen span by span",
           ("splits",)),
    Method("sparsegpt", sparsegpt, "column by column, kept columns freeze"),
    Method("obs-ordered", obs_ordered, "groups of scopes, dearest first, one C for all rows",
           ("group", "order"), ("largest", "left", "smallest")),
    Method("true-obs", true_obs, "every row has its own C and its own order",
           ("group", "order"), ("gap", "left", "shared", "largest", "smallest"), resolves=True),
    Method("admm", admm, "alternating directions towards mask and weights together",
           ("schedule",), resolves=True),
)


def methods():
    """The methods, by name."""
    return {method.name: method for method in _METHODS}
