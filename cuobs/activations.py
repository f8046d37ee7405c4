"""Calibration activations: one array (..., K), or batches of them, in a list or one by one."""

import math

from cuobs import arrays, modules, validation

# What is public; the rest is for the package.
__all__ = ["check_matrix"]


def check_matrix(X, K=None, name="X"):
    """X as a matrix (tokens, K), still where it was, and not yet read; any K where it is None."""
    X = arrays.typed(X, name)
    validation.floating(name, X)
    if X.ndim < 2:
        raise ValueError(
            f"{name}: found {X.ndim} dimensions, expected at least 2 (tokens, features)"
        )
    validation.nonempty(name, X)
    if K not in (None, X.shape[-1]):
        raise ValueError(
            f"{name}: found {X.shape[-1]} features, expected K={K}, the columns of the weight or "
            "Hessian"
        )
    X = arrays.receive(X, name)
    return X.reshape(-1, X.shape[-1])


def are_batches(X):
    """Whether X is no array but batches of them: a list, a generator, a DataLoader."""
    if isinstance(X, list | tuple):
        return bool(X) and all(getattr(_unwrapped(x), "ndim", 0) > 1 for x in X)
    if isinstance(X, str | bytes | dict | set | frozenset) or modules.is_module(X):
        return False
    if any(hasattr(X, form) for form in ("dtype", "__array__", "__dlpack__")):
        return False
    return hasattr(X, "__iter__")


def check_batches(X, K):
    """The matrices (tokens, K) of batches, and how many tokens they have in all.

    Those of a list are checked at once; any others one by one, as they are asked for, and their
    tokens are None.
    """
    matrices = (_check_batch(_unwrapped(x), K, f"X[{i}]") for i, x in enumerate(X))
    if not isinstance(X, list | tuple):
        return matrices, None
    matrices = list(matrices)
    return matrices, sum(map(len, matrices))


def count_tokens(X, K):
    """The rows of activations of K features, an array or batches, where they are known at once."""
    if are_batches(X):
        return check_batches(X, K)[1] if isinstance(X, list | tuple) else None
    return math.prod(X.shape[:-1]) if X.ndim > 1 and X.shape[-1] == K else None


def _check_batch(batch, K, name):
    if isinstance(batch, list | tuple) and are_batches(batch):
        raise TypeError(f"{name}: found {len(batch)} arrays, expected the layer's inputs alone")
    return check_matrix(batch, K, name)


def _unwrapped(batch):
    """The array of a batch that is alone in a tuple or list, as hooks and data sets give it."""
    if isinstance(batch, list | tuple) and len(batch) == 1:
        return batch[0]
    return batch


def join(matrices, xp, rows):
    """Matrices one after the other on a namespace, in pieces of so many rows."""
    held, count = [], 0
    for matrix in matrices:
        for start in range(0, len(matrix), rows):
            held.append(arrays.asarray(matrix[start : start + rows], xp))
            count += len(held[-1])
            if count >= rows:
                joined = _concatenated(held, xp)
                yield joined[:rows]
                held, count = [joined[rows:]], count - rows
    if count:
        yield _concatenated(held, xp)


def _concatenated(held, xp):
    held = [piece for piece in held if len(piece)]
    return held[0] if len(held) == 1 else xp.concatenate(held)
