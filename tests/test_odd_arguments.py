"""Whatever is handed over as an argument is refused in one sentence, or works."""

import types
import warnings

import numpy as np
import pytest

import cuobs

W = np.random.default_rng(0).standard_normal((8, 32))
X = np.random.default_rng(1).standard_normal((64, 32))
H = X.T @ X

ODD = [
    None, True, 3, -1, 0.5, float("nan"), 10**400, 1j, "x", "", b"x", bytearray(b"x"), ...,
    object(), [], (), {}, {1}, [None], [1, 2], [[1, 2], [3]], [[[1.0]]], ["a", 1], range(3),
    iter([1, 2]), len, int, types.SimpleNamespace(dtype="float32"),
    types.SimpleNamespace(dtype=np.dtype("f4"), shape=(8, 32), ndim=2),
    np.float64(3), np.array(3.0), np.array([]), np.array(["a"]), np.array([object()]), np.ma.masked,
    np.zeros((8, 32), [("a", "f4")]), np.array(["2020"], "M8[Y]"), W.astype(">f4"), W.astype("f2"),
    W[:0], W[:, :0], W[None], cuobs.Hessian(32, device="cpu"), cuobs.Hessian, Exception("x\ny"),
]


def pruned(**options):
    return cuobs.prune(**{"W": W, "X": X, "method": "wanda", "device": "cpu"} | options)


CALLS = {
    **{f"prune {name}": lambda odd, name=name: pruned(**{name: odd}) for name in (
        "W", "X", "target", "pattern", "method", "refine", "damp", "dtype", "device", "precision",
        "workers", "batch_rows", "memory_limit",
    )},
    "prune hessian": lambda odd: pruned(X=None, hessian=odd),
    "reconstruct W": lambda odd: cuobs.reconstruct(odd, W > 0, H, device="cpu"),
    "reconstruct mask": lambda odd: cuobs.reconstruct(W, odd, H, device="cpu"),
    "reconstruct H": lambda odd: cuobs.reconstruct(W, W > 0, odd, device="cpu"),
    "relative_loss W": lambda odd: cuobs.relative_loss(odd, W, H),
    "relative_loss W_pruned": lambda odd: cuobs.relative_loss(W, odd, H),
    "relative_loss H": lambda odd: cuobs.relative_loss(W, W, odd),
    "verify W": lambda odd: cuobs.verify(odd, "2:4"),
    "verify pattern": lambda odd: cuobs.verify(W, odd),
    "compare methods": lambda odd: cuobs.compare(W, X, methods=odd, device="cpu"),
    "Hessian K": lambda odd: cuobs.Hessian(odd, device="cpu"),
    "Hessian dtype": lambda odd: cuobs.Hessian(3, dtype=odd, device="cpu"),
    "update": lambda odd: cuobs.Hessian(32, device="cpu").update(odd),
    "merge": lambda odd: cuobs.Hessian(32, device="cpu").merge(odd),
    "prune_linear": lambda odd: cuobs.prune_linear(odd, X),
    "collect": lambda odd: cuobs.collect(odd).__enter__(),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_one_sentence_or_a_result(name):
    for odd in ODD:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                CALLS[name](odd)
            except (ValueError, TypeError) as error:
                said = str(error)
                assert "\n" not in said, repr(odd)
                assert "found" in said or "does not divide" in said, (repr(odd), said)
                assert len(said) < 400, said
