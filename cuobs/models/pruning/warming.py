"""Compile the kernels that pruning will need, side by side, while the model is looked at."""

import contextlib
import threading

import torch

from cuobs import arrays
from cuobs.layer import check_layer, solve_layer
from cuobs.loss import loss
from cuobs.ops.conjugate_gradient import masked_cg
from cuobs.problem import Problem
from cuobs.refine import resolve


class Warming:
    """Prunes a small linear and measures it, part by part in threads of their own.

    A kernel is compiled when it is launched first: one after the other, while a GPU and most of
    the host have nothing to do.

    Parameters
    ----------
    recipe : Recipe
    settings : Settings
    shapes : iterable of (int, int)
        Of the weights. The smallest that can be pruned is; of the others the columns matter.
    dtype : torch.dtype
        Theirs.
    device : torch.device
        Nothing is done on the CPU.
    """

    def __init__(self, recipe, settings, shapes, dtype, device):
        self._threads = []
        shapes = [shape for shape in sorted(set(shapes)) if _fits(recipe.pattern, shape)]
        if device.type != "cuda" or not shapes:
            return
        smallest = min(shapes, key=lambda shape: shape[0] * shape[1])
        work = [(_solve, recipe, settings, smallest, dtype)]
        if recipe.exact:
            work.append((_resolve, recipe, settings, smallest, dtype))
            work += [(_iterate, settings, K) for K in {K for _, K in shapes}]
        # Daemons, since a model that is refused meanwhile must not wait for them.
        self._threads = [
            threading.Thread(target=_quietly, args=(device, *part), daemon=True) for part in work
        ]
        for thread in self._threads:
            thread.start()

    def finish(self):
        """Wait until all is compiled."""
        for thread in self._threads:
            thread.join()
        if self._threads:
            arrays.give_back()


def _quietly(device, function, *args):
    """Whatever goes wrong here will do so again, and be said, where it matters."""
    with contextlib.suppress(Exception), torch.cuda.device(device), torch.no_grad():
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream), arrays.stream_of(torch.empty(1, device=device)):
            function(device, *args)
        stream.synchronize()


def _layer(device, shape, dtype):
    rows, K = shape
    generator = torch.Generator(device).manual_seed(0)
    W = torch.randn(rows, K, device=device, generator=generator)
    return W.to(dtype), torch.eye(K, device=device) + 1 / K


def _solve(device, recipe, settings, shape, dtype):
    W, H = _layer(device, shape, dtype)
    H = arrays.receive(H)
    layer = check_layer(W, W.float(), settings.dtype)
    base = arrays.asarray(layer.weight, arrays.namespace(H), settings.dtype)
    loss(base, base, H)
    solve_layer(recipe, settings, layer, H)


def _resolve(device, recipe, settings, shape, dtype):
    W, H = _layer(device, shape, torch.float32)
    problem = Problem.build(
        arrays.receive(W), arrays.receive(H), recipe.pattern.compile(*shape), recipe.damp, settings
    )
    resolve(problem, problem.W > 0)


def _iterate(device, settings, K):
    A = arrays.receive(torch.eye(K, device=device))
    residual = A[:1].copy()
    masked_cg(
        A, residual, residual < 2, limit=residual[:, 0] * 0, max_iterations=2,
        precision=settings.precision,
    )  # fmt: skip


def _fits(pattern, shape):
    try:
        pattern.compile(*shape)
    except ValueError:
        return False
    return True
