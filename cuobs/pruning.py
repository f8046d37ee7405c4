"""The front door: prune a weight, or re-solve the weights of a mask."""

from collections.abc import Callable
from typing import Any

from cuobs import arrays, validation
from cuobs.layer import check_layer, given_hessian, prune_layer
from cuobs.layout import Layout
from cuobs.modules import weight_of
from cuobs.pattern import Pattern
from cuobs.problem import Problem
from cuobs.recipe import Recipe, Settings
from cuobs.refine import resolve, warn_unconverged
from cuobs.result import Result


def prune(
    W: Any,
    X: Any = None,
    *,
    hessian: Any = None,
    pattern: str | Pattern = "2:4",
    method: str = "admm",
    refine: str | None = None,
    damp: float = 0.01,
    target: Any = None,
    dtype: str = "float32",
    device: str = "auto",
    precision: str = "tensor",
    memory_limit: int | str | None = None,
    workers: int | None = None,
    batch_rows: int | None = None,
    devices: str | int | None = None,
    progress: Callable | None = None,
    **options: Any,
) -> Result:
    """Prune the weight of a linear layer to a pattern.

    Parameters
    ----------
    W : array, shape (M, K), or a linear layer
        Rows are outputs, columns inputs. NumPy, CuPy or PyTorch, half, single or double precision.
        Of an ``nn.Linear`` or ``Conv1D`` its weight is taken, and left as it is; see
        `cuobs.prune_linear`.
    X : array, shape (..., K), or batches of them, optional
        Calibration activations, the layer's inputs; read in pieces. Batches, of any length, come in
        a list, a generator, a DataLoader.
    hessian : array, shape (K, K), or Hessian, optional
        XᵀX, undamped, in place of X.
    pattern : str or Pattern
        A name, ``n:m``, ``n:mxb`` or the text form; see `cuobs.patterns`.
    method : str
        See `cuobs.methods`.
    refine : {None, "exact"}
        "exact" solves the weights again for the mask; methods with ``resolves`` always do.
    damp : float
        λ as a share of the mean of the Hessian's diagonal.
    target : array, shape (M, K), optional
        What the pruned weight is to replace under the Hessian, where that is not W itself. The
        loss is still measured against W.
    dtype : {"float32", "float64"}
        The compute precision.
    device : {"auto", "cpu", "cuda"}
        "auto" takes the GPU where there is one.
    precision : {"tensor", "fp32"}
        Whether products in float32 may run on tensor cores (tf32, float16); float64 never does.
    memory_limit : int or str, optional
        Bytes, or a size like "8GiB", for all that the call makes beside what it was given, on a
        GPU with what CUDA takes. One that is too small is refused with what is needed.
    workers : int, optional
        Threads that share the rows on the CPU; one for each core that the process may use by
        default.
    batch_rows : int, optional
        Rows in a batch; sized from the free memory by default.
    devices : str or int, optional
        GPUs of this host that share the rows: "all", how many, or which ("0,2"), for methods that
        prune rows apart or add up over them, see ``by_row`` of `Method`. The results are those of
        one but for rounding; a memory limit is that of each.
    progress : callable, optional
        Called with (done, total) as the method goes.
    **options
        The method's own, see ``cuobs.methods()[method].options`` or ``cuobs methods``; a None is
        the default.

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
    recipe = Recipe(pattern, method, options, refine, damp)
    settings = Settings(
        device, dtype, precision, workers, batch_rows, memory_limit, progress, devices
    )
    return prune_layer(recipe, settings, W, X, hessian, target)


def reconstruct(
    W: Any,
    mask: Any,
    H: Any,
    damp: float = 0.01,
    *,
    target: Any = None,
    dtype: str = "float32",
    device: str = "auto",
) -> Any:
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
    W = weight_of(W, "W")
    with arrays.stream_of(W, mask, H), validation.renaming("hessian", "H"):
        damp = validation.damping(damp)
        settings = Settings(device, dtype)
        layer = check_layer(W, target, dtype)
        W, shape = layer.W, layer.weight.shape
        mask = validation.mask("mask", mask, shape)
        xp = settings.namespace(W, H)
        H, _ = given_hessian(layer, H, settings, xp, "H")
        goal = arrays.asarray(layer.weight if target is None else layer.target, xp, dtype)
        problem = Problem.build(goal, H, Layout.plain(*shape), damp, settings)
        problem.check_definite()
        new, converged = resolve(problem, arrays.asarray(mask, xp))
        if not converged:
            warn_unconverged(dtype, "H")
        new = problem.unscaled(new)
        new = arrays.round_to(new, W)
        validation.holds(new, W)
        return arrays.hand_back(new, W)
