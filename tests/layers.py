"""Small random layers, and one way to run the package on them under any namespace."""

from functools import cache

import numpy as np
import oracles

import cuobs

TILE = "view=(M/2,2,K):(2K,K,1) block=(1,1,1) scope=(1,2,4) keep=5"
FAR = "view=(M,4,K/4):(K,K/4,1) block=(1,1,1) scope=(1,4,1) keep=2"
TALL = "view=(M/4,4,K):(4K,K,1) block=(1,1,1) scope=(1,4,1) keep=2"
ROWS = "view=(M/4,4,K/2,2):(4K,K,2,1) block=(1,1,1,2) scope=(1,4,1,1) keep=2"
PATTERNS = (
    *oracles.NAMED, "1:4", "3:4", "2:3", "4:8x1", "2:4x3", "8:16", TILE, FAR, ROWS, TALL,
)


@cache
def random_layer(M, K, seed=0, dead=(), tokens=None):
    """W (M, K) and H (K, K) of correlated inputs whose columns differ in scale, both read-only."""
    rng = np.random.default_rng([seed, M, K])
    tokens = tokens or 4 * K
    rank = max(1, K // 6)
    shared = rng.standard_normal((tokens, rank)) @ rng.standard_normal((rank, K))
    X = (rng.standard_normal((tokens, K)) + 0.7 * shared) * np.exp(0.5 * rng.standard_normal(K))
    X[:, list(dead)] = 0
    W, H = rng.standard_normal((M, K)), X.T @ X
    W.flags.writeable = H.flags.writeable = False
    return W, H


@cache
def layer(pattern, M=None):
    """A layer that the pattern divides, with a dead scope and dead columns among live ones.

    Returns W, W* and H + lambda I as the references see them, the undamped H, and the scopes.
    """
    M = M or (32 if pattern == "block16-row8" else 8)
    K = {"block16-row8": 112, "2:3": 99}.get(pattern, 96)
    W, H = random_layer(M, K, dead=(1, 10, 11, *range(32, 48)))
    target, Hl = oracles.damped(W, H)
    target.flags.writeable = Hl.flags.writeable = False
    return W, H, target, Hl, oracles.scopes(pattern, M, K)


def prune(xp, W, H, dtype="float64", target=None, **options):
    """cuobs.prune on arrays of a namespace, its results brought back to NumPy."""
    device = "cpu" if xp is np else "cuda"
    if target is not None:
        target = xp.asarray(target)
    result = cuobs.prune(xp.asarray(W), hessian=xp.asarray(H), dtype=dtype, device=device,
                         target=target, **options)
    for name in ("weight", "mask", "cost"):
        value = getattr(result, name)
        if value is not None:
            assert type(value) is xp.ndarray
            setattr(result, name, host(value))
    return result


def host(array):
    """An array of any namespace in NumPy."""
    return array if isinstance(array, np.ndarray) else array.get()
