"""One layer: its weight and Hessian checked once, then pruned by a recipe."""

import dataclasses
import functools
import time
from typing import NamedTuple

import numpy as np

from cuobs import arrays, footprint, sharing, validation
from cuobs.activations import are_batches, count_tokens
from cuobs.hessian import (
    Hessian,
    check_fits,
    check_held,
    check_symmetric,
    row_bytes,
    warn_of_few,
    warn_of_swapped,
)
from cuobs.loss import loss
from cuobs.modules import is_module, weight_of
from cuobs.ops.sums import count_true
from cuobs.ops.views import permute_back
from cuobs.pattern import verify
from cuobs.problem import Problem, Pruned
from cuobs.refine import resolve, warn_unconverged
from cuobs.result import Result


class Layer(NamedTuple):
    """A weight that was checked.

    Attributes
    ----------
    W : array
        As it came.
    weight : array, shape (M, K)
        The same as an array of NumPy or CuPy.
    target : array, shape (M, K), or None
        What is to be replaced, where that is not W.
    of_module : bool
        Whether W came as a linear layer, and can't be its inputs.
    """

    W: object
    weight: object
    target: object
    of_module: bool = False


def check_layer(W, target, dtype):
    """Refuse a weight, or a target for it, that no recipe can work on; a `Layer`."""
    of_module = is_module(W)
    W = arrays.typed(weight_of(W, "W"), "W")
    weight = validation.matrix("W", W)
    validation.squares("W", weight, dtype)
    if target is not None:
        target = validation.matrix("target", target, weight.shape)
        validation.squares("target", target, dtype)
    return Layer(W, weight, target, of_module)


def hessian_of(layer, X, hessian, settings, xp, room=None):
    """The undamped Hessian of a `Layer`, on a namespace, from activations or as it came.

    Of activations, a piece takes no more than `room` bytes on its way, where that is given.

    Returns
    -------
    array, shape (K, K)
    int or None
        Its tokens, where they are known.

    Raises
    ------
    ValueError
        Neither or both of X and hessian are given, or one does not fit K.
    """
    if hessian is not None:
        return given_hessian(layer, hessian, settings, xp)
    shape = layer.weight.shape
    if not are_batches(X):
        X = arrays.typed(X, "X")
        validation.floating("X", X)
        validation.nonempty("X", X)
        check_fits(shape, X.shape)
    tokens = count_tokens(X, shape[1])
    if tokens is not None:  # said before the work, which may be long and for nothing
        _warn_of_activations(tokens, layer)
    part = Hessian(shape[1], settings.dtype, arrays.device_name(xp), settings.precision)
    part.update(X, settings.progress, room)
    check_held(part.matrix, settings.dtype, "X")
    if tokens is None:
        _warn_of_activations(part.tokens, layer)
    return part.matrix, part.tokens


def given_hessian(layer, hessian, settings, xp, name="hessian"):
    """`hessian_of` one that a caller brings, in an argument of a name."""
    tokens = None
    if isinstance(hessian, Hessian):
        hessian, tokens = hessian.matrix, hessian.tokens
    H = check_symmetric(hessian, layer.weight.shape[1])
    check_held(H, settings.dtype)
    warn_of_few(tokens, len(H), name)
    return arrays.asarray(H, xp, settings.dtype), tokens


def _warn_of_activations(tokens, layer):
    if not layer.of_module:
        warn_of_swapped(tokens, layer.weight.shape)
    warn_of_few(tokens, layer.weight.shape[1], "X")


def given_of(layer, X, hessian, settings, xp):
    """What of a `Layer` and its inputs is there, for `footprint`.

    Raises
    ------
    ValueError
        Neither or both of X and hessian are given.
    """
    if (X is None) == (hessian is None):
        found = "neither" if X is None else "both"
        raise ValueError(f"X, hessian: found {found}, expected exactly one of them")
    device, dtype = arrays.device_name(xp), np.dtype(settings.dtype)
    row = widened = 0
    if hessian is None:
        whole = hasattr(X, "dtype") and not are_batches(X)
        row = row_bytes(X if whole else None, layer.weight.shape[1], dtype, device)
        widened = arrays.widened_bytes(X) if whole else 0
    elif isinstance(hessian, Hessian):
        hessian = hessian.matrix
    goal = layer.weight if layer.target is None else layer.target
    return footprint.Given(
        dtype=arrays.dtype_of(layer.W),
        converts=any(_is_new(a, xp, dtype) for a in (goal, layer.weight)),
        makes_hessian=hessian is None or _is_new(hessian, xp, dtype),
        sums=hessian is None,
        row=row,
        widened=widened,
        outside=arrays.widened_bytes(layer.W),
    )


def _is_new(array, xp, dtype):
    """Whether an array becomes another one on a namespace and of a dtype."""
    if not hasattr(array, "dtype") or arrays.dtype_of(array) != dtype.name:
        return True
    return arrays.namespace(array) is not xp


def prune_layer(recipe, settings, W, X=None, hessian=None, target=None):
    """Check a weight, make or check its Hessian, and prune it; a `Result`."""
    with sharing.first(settings), arrays.stream_of(weight_of(W, "W"), X, hessian):
        layer = check_layer(W, target, settings.dtype)
        recipe.pattern.compile(*layer.weight.shape)
        sharing.check(recipe, settings, layer.weight.shape)
        xp = settings.namespace(layer.W)
        began = time.perf_counter()
        given = given_of(layer, X, hessian, settings, xp)
        room = footprint.check([recipe], settings, layer.weight.shape, xp, given)
        H, tokens = hessian_of(layer, X, hessian, settings, xp, room)
        result = prune_checked(recipe, settings, layer, H, given, _since(began, xp))
        return dataclasses.replace(result, tokens=tokens)


def prune_checked(recipe, settings, layer, H, given, hessian_seconds=0.0):
    """Prune a `Layer` under an undamped Hessian on the namespace and of the dtype to compute in."""
    xp = arrays.namespace(H)
    began = time.perf_counter()
    outside = given.outside + given.makes_hessian * H.nbytes
    new, mask, cost, converged = _solve(recipe, settings, layer, H, outside)
    seconds = _since(began, xp)
    base = arrays.asarray(layer.weight, xp, settings.dtype)
    if cost is not None:
        cost = arrays.hand_back(cost, layer.W, cast=False)
    return Result(
        weight=arrays.hand_back(new, layer.W),
        mask=arrays.hand_back(mask, layer.W),
        loss=loss(base, new.astype(base.dtype, copy=False), H),
        sparsity=1 - count_true(new != 0) / new.size,
        seconds=seconds,
        hessian_seconds=hessian_seconds,
        recipe=recipe,
        settings=dataclasses.replace(settings, device=arrays.device_name(xp), progress=None),
        cost=cost,
        converged=converged,
    )


def _solve(recipe, settings, layer, H, outside):
    """`solve_layer`, on as many devices as the settings say."""
    if settings.devices is None:
        return solve_layer(recipe, settings, layer, H, outside=outside)
    solve = functools.partial(solve_layer, outside=outside)
    return sharing.solve_on(solve, recipe, settings, layer, H)


def solve_layer(recipe, settings, layer, H, pull=None, outside=0):
    """New weights, mask, costs or None, and whether solves converged, on H's namespace.

    The weights are in the precision of the `Layer`'s own, and verified to be finite and to obey
    the pattern. Where `pull` is given, a function that gives an (M, K) array, the target is raised
    by that times Hλ⁻¹, with the factor of Hλ that the method uses; it is called when the factor is
    under way. Under the limit of the settings count the bytes `outside`,
    which the caller holds.
    """
    xp = arrays.namespace(H)
    size = footprint.size_of(recipe, settings, layer.weight.shape, xp)
    layout, outside = size.layout, outside + footprint.small(size)
    mask, new, cost, converged = _apply(recipe, settings, layer, H, layout, pull, outside)
    mask, new = permute_back(mask, layout), permute_back(new, layout)
    if cost is not None:
        cost = cost[xp.asarray(np.argsort(layout.row_order.ravel()))]
    new = arrays.round_to(xp.where(mask, new, 0), layer.W)
    validation.holds(new, layer.W)
    found = verify(new, recipe.pattern)
    if not found:
        raise RuntimeError(f"{recipe.method} broke the pattern in {found.broken} scopes")
    return new, mask, cost, converged


def _apply(recipe, settings, layer, H, layout, pull, outside):
    """`Pruned` with its weights and costs in terms of 1; the problem is gone when it returns."""
    problem = _problem(recipe, settings, layer, H, layout, outside)
    if settings.shares > 1 and settings.memory_limit is None and recipe.entry.inverts:
        problem.inverts = functools.partial(recipe.entry.inverts, **recipe.options)
    if pull is not None:
        problem.pull(pull)
    if recipe.exact:
        problem.check_definite()
    mask, new, cost, converged = recipe.entry.function(problem, **recipe.options)
    problem.check_factored()
    if new is None and not recipe.exact:
        raise TypeError(
            f"method: found no weights from {recipe.method}, expected some, or resolves=True"
        )
    if recipe.exact:
        new, solved = resolve(problem, mask, new)
        converged = converged and solved
    if not converged:
        warn_unconverged(settings.dtype)
    if cost is not None:
        cost = cost.astype("float64") * problem.cost_unit
    return Pruned(mask, problem.unscaled(new), cost, converged)


def _problem(recipe, settings, layer, H, layout, outside):
    goal = layer.weight if layer.target is None else layer.target
    goal = arrays.asarray(goal, arrays.namespace(H), settings.dtype)
    return Problem.build(goal, H, layout, recipe.damp, settings, outside)


def _since(began, xp):
    arrays.synchronize(xp)
    return time.perf_counter() - began
