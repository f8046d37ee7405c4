"""The front door: prune a weight, or re-solve the weights of a mask."""

import time
from dataclasses import dataclass, field

import numpy as np

from cuobs import arrays, validation
from cuobs.algorithms import methods
from cuobs.algorithms.admm import SCHEDULES
from cuobs.hessian import Hessian, check_symmetric
from cuobs.loss import loss
from cuobs.pattern import Layout, Pattern, parse, verify
from cuobs.problem import Problem, Settings, permute_back
from cuobs.refine import resolve

DTYPES = ("float32", "float64")
PRECISIONS = ("tensor", "fp32")


@dataclass
class Result:
    """A pruned weight and what became of it.

    Attributes
    ----------
    weight : array, shape (M, K)
        In the kind, dtype and place of the weight that came in; exact zeros where pruned.
    mask : array of bool, shape (M, K)
        True = kept.
    loss : float
        Relative output error ‖X(Wp − W)ᵀ‖ / ‖XWᵀ‖, a fraction, by the undamped Hessian.
    sparsity : float
        Share of elements of `weight` that are exactly zero.
    seconds : float
        From the Hessian to the pruned weights, the measurement of the loss apart.
    hessian_seconds : float
        What the Hessian took: reading X and its products, or checking the one that came.
    method : str
    pattern : Pattern
    refine : str or None
        "exact" where the weights were solved again for the mask.
    damp : float
    options : dict
        The method's options, as given.
    cost : array, shape (M,), or None
        The damped cost of each row, summed by the method as it went (true-obs, obs-ordered).
    device : str
        "cpu" or "cuda": where it was computed.
    """

    weight: object
    mask: object
    loss: float
    sparsity: float
    seconds: float
    hessian_seconds: float
    method: str
    pattern: Pattern
    refine: str | None
    damp: float
    options: dict = field(default_factory=dict)
    cost: object = None
    device: str = "cpu"


def prune(
    W,
    X=None,
    *,
    hessian=None,
    pattern="2:4",
    method="admm",
    refine=None,
    damp=0.01,
    target=None,
    dtype="float32",
    device="auto",
    splits=None,
    group=None,
    order=None,
    schedule=None,
    precision="tensor",
    memory_limit=None,
    workers=None,
    batch_rows=None,
    progress=None,
):
    """Prune the weight of a linear layer to a pattern.

    Parameters
    ----------
    W : array, shape (M, K)
        Rows are outputs, columns inputs. NumPy, CuPy or PyTorch, half, single or double precision.
    X : array, shape (..., K), optional
        Calibration activations, the layer's inputs; read in pieces.
    hessian : array, shape (K, K), or Hessian, optional
        XᵀX, undamped, in place of X.
    pattern : str or Pattern
        A name, ``n:m``, ``n:mxb`` or the text form; see `cuobs.patterns`.
    method : str
        See `cuobs.methods`.
    refine : {None, "exact"}
        "exact" solves the weights again for the mask; admm and true-obs always do.
    damp : float
        λ as a share of the mean of the Hessian's diagonal.
    target : array, shape (M, K), optional
        What the pruned weight is to replace under the Hessian, where that is not W itself. The
        loss is still measured against W.
    dtype : {"float32", "float64"}
        The compute precision.
    device : {"auto", "cpu", "cuda"}
        "auto" takes the GPU where there is one.
    splits : int, optional
        Spans of obs-split and obs-interleaved, 64 by default.
    group : int, optional
        Scopes in a Schur update of obs-ordered and true-obs, a tenth of all by default.
    order : str, optional
        Which scopes come first in obs-ordered (largest, left, smallest) and true-obs (gap, left,
        shared, largest, smallest).
    schedule : {"default", "slow"}, optional
        How admm's penalty grows.
    precision : {"tensor", "fp32"}
        Whether products in float32 may run on tensor cores (tf32, float16); float64 never does.
    memory_limit : int or str, optional
        Bytes, or a size like "8GiB", that the computation may hold, down to batches of one row.
    workers : int, optional
        Threads that share the rows on the CPU; one for each core by default.
    batch_rows : int, optional
        Rows in a batch; sized from the free memory by default.
    progress : callable, optional
        Called with (done, total) as the method goes.

    Returns
    -------
    Result

    Raises
    ------
    ValueError
        A shape, a value or a name is wrong, or the options do not belong to the method.
    TypeError
        A dtype is no float.
    numpy.linalg.LinAlgError
        The Hessian is not positive definite even when damped.

    Examples
    --------
    >>> import numpy as np
    >>> import cuobs
    >>> rng = np.random.default_rng(0)
    >>> W, X = rng.standard_normal((8, 32)), rng.standard_normal((256, 32))
    >>> result = cuobs.prune(W, X, pattern="2:4", method="sparsegpt")
    >>> result.sparsity
    0.5
    >>> bool(cuobs.verify(result.weight, "2:4"))
    True
    """
    with arrays.stream_of(W, X, hessian):
        plan = prepare(
            W, pattern, method, refine=refine, damp=damp, target=target, dtype=dtype,
            device=device, precision=precision, memory_limit=memory_limit, workers=workers,
            batch_rows=batch_rows, progress=progress,
            options=dict(splits=splits, group=group, order=order, schedule=schedule),
        )  # fmt: skip
        began = time.perf_counter()
        H = hessian_of(plan.layout.shape[1], X, hessian, dtype, plan.xp, plan.settings)
        return plan.run(H, _since(began, plan.xp))


@dataclass
class Plan:
    """A call of `prune` with everything checked but the Hessian, and nothing computed."""

    W: object
    weight: object
    target: object
    pattern: Pattern
    layout: Layout
    method: object
    options: dict
    exact: bool
    damp: float
    dtype: str
    xp: object
    settings: Settings

    def run(self, H, hessian_seconds=0.0):
        """Prune under an undamped Hessian on this plan's namespace and of its dtype."""
        xp = self.xp
        began = time.perf_counter()
        base = arrays.asarray(self.weight, xp, self.dtype)
        goal = base if self.target is None else arrays.asarray(self.target, xp, self.dtype)
        with arrays.tensor_cores(xp, self.settings.precision == "tensor"):
            problem = Problem.build(goal, H, self.layout, self.damp, self.settings)
            if self.exact:
                problem.check_definite()
            pruned = self.method.function(problem, **self.options)
            problem.check_factored()
            new = pruned.weight
            if self.exact:
                new = resolve(problem, pruned.mask, new)
        mask = permute_back(pruned.mask, self.layout)
        new = arrays.round_to(xp.where(mask, permute_back(new, self.layout), 0), self.W)
        seconds = _since(began, xp)
        validation.holds(new, self.W)
        found = verify(new, self.pattern)
        if not found:
            raise RuntimeError(f"{self.method.name} broke the pattern in {found.broken} scopes")
        cost = pruned.cost
        if cost is not None:
            order = xp.asarray(np.argsort(self.layout.rows.ravel()))
            cost = arrays.hand_back(cost[order].astype("float64"), self.W, cast=False)
        return Result(
            weight=arrays.hand_back(new, self.W),
            mask=arrays.hand_back(mask, self.W),
            loss=loss(base, new.astype(base.dtype, copy=False), H),
            sparsity=1 - int(xp.count_nonzero(new)) / new.size,
            seconds=seconds,
            hessian_seconds=hessian_seconds,
            method=self.method.name,
            pattern=self.pattern,
            refine="exact" if self.exact else None,
            damp=self.damp,
            options=self.options,
            cost=cost,
            device=arrays.device_name(xp),
        )


def prepare(
    W, pattern, method, *, refine=None, damp=0.01, target=None, dtype="float32", device="auto",
    precision="tensor", memory_limit=None, workers=None, batch_rows=None, progress=None,
    options=None,
):  # fmt: skip
    """Check the arguments of `prune`, all but the Hessian, and give what runs it."""
    entry, options = _check_options(method, options or {})
    if refine not in (None, "exact"):
        raise ValueError(f"refine: found {refine!r}, expected None or 'exact'")
    validation.name_of("dtype", dtype, DTYPES)
    validation.name_of("precision", precision, PRECISIONS)
    for name, value in ("workers", workers), ("batch_rows", batch_rows):
        if value is not None:
            validation.integer(name, value)
    settings = Settings(
        precision=precision,
        workers=workers,
        batch_rows=batch_rows,
        memory_limit=None if memory_limit is None else arrays.parse_size(memory_limit),
        progress=progress,
    )
    damp = validation.damping(damp)
    pattern = parse(pattern)
    W, weight, target = _check_weights(W, target, dtype)
    return Plan(
        W=W,
        weight=weight,
        target=target,
        pattern=pattern,
        layout=pattern.compile(*weight.shape),
        method=entry,
        options=options,
        exact=refine == "exact" or entry.resolves,
        damp=damp,
        dtype=dtype,
        xp=arrays.choose(device, W),
        settings=settings,
    )


def reconstruct(W, mask, H, damp=0.01, *, target=None, dtype="float32", device="auto"):
    """The best weights for a mask: the exact re-solve.

    Parameters
    ----------
    W : array, shape (M, K)
    mask : array of bool, shape (M, K)
        True = kept.
    H : array, shape (K, K), or Hessian
        XᵀX, undamped.
    damp : float
        λ as a share of the mean of the Hessian's diagonal.
    target : array, shape (M, K), optional
        What the weights are to replace, where that is not W itself.
    dtype, device : str
        As in `prune`.

    Returns
    -------
    array, shape (M, K)
        In the kind and dtype of W; zero where the mask is False.

    Examples
    --------
    >>> import numpy as np
    >>> import cuobs
    >>> W, H = np.array([[1.0, 1.0]]), np.array([[2.0, 1.0], [1.0, 2.0]])
    >>> cuobs.reconstruct(W, np.array([[True, False]]), H, damp=0.0, dtype="float64")
    array([[1.5, 0. ]])
    """
    with arrays.stream_of(W, mask, H):
        damp = validation.damping(damp)
        validation.name_of("dtype", dtype, DTYPES)
        W, weight, target = _check_weights(W, target, dtype)
        mask = validation.mask("mask", mask, weight.shape)
        xp = arrays.choose(device, W, H)
        H = hessian_of(weight.shape[1], None, H, dtype, xp, Settings())
        goal = arrays.asarray(weight if target is None else target, xp, dtype)
        with arrays.tensor_cores(xp, True):
            problem = Problem.build(goal, H, Layout.plain(*weight.shape), damp)
            problem.check_definite()
            new = arrays.round_to(resolve(problem, arrays.asarray(mask, xp)), W)
        validation.holds(new, W)
        return arrays.hand_back(new, W)


def hessian_of(K, X, hessian, dtype, xp, settings):
    """The undamped Hessian, shape (K, K), on a namespace, from activations or as it came.

    Raises
    ------
    ValueError
        Neither or both of X and hessian are given, or one does not fit K.
    """
    if (X is None) == (hessian is None):
        found = "neither" if X is None else "both"
        raise ValueError(f"X, hessian: found {found}, expected exactly one of them")
    if hessian is None:
        part = Hessian(K, dtype, arrays.device_name(xp), settings.precision)
        part.update(X, settings.progress)
        return part.matrix
    H = hessian.matrix if isinstance(hessian, Hessian) else hessian
    return arrays.asarray(check_symmetric(H, K), xp, dtype)


def _check_weights(W, target, dtype):
    """W as it came, as a matrix of NumPy or CuPy, and the target as such a matrix or None."""
    W = arrays.typed(W, "W")
    weight = validation.matrix("W", W)
    validation.squares("W", weight, dtype)
    if target is not None:
        target = validation.matrix("target", target, weight.shape)
        validation.squares("target", target, dtype)
    return W, weight, target


def _check_options(name, given):
    """The method of a name, and those of its options that were given."""
    validation.name_of("method", name, methods())
    method = methods()[name]
    options = {key: value for key, value in given.items() if value is not None}
    for key, value in options.items():
        if key not in method.options:
            takes = " and ".join(method.options) or "no options"
            raise ValueError(f"{key}: found {value!r}, but {name} takes {takes}")
    for key in ("splits", "group"):
        if key in options:
            options[key] = validation.integer(key, options[key])
    if "order" in options:
        validation.name_of("order", options["order"], method.orders)
    if "schedule" in options:
        validation.name_of("schedule", options["schedule"], SCHEDULES)
    return method, options


def _since(began, xp):
    arrays.synchronize(xp)
    return time.perf_counter() - began
