"""What is recorded as a CUDA graph, and what is left of it."""

import pytest

torch = pytest.importorskip("torch")

from cuobs.torch.graphs import record  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
]


@pytest.mark.parametrize("warm_up", [0, 1, 3])
def test_it_does_the_same_again(warm_up):
    x, ran = torch.ones(64, 64, device="cuda"), []

    def function():
        ran.append(torch.cuda.is_current_stream_capturing())
        return x.add_(1) @ x

    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")
    replay = record(function, warm_up)
    assert ran == [False] * warm_up + [True]
    assert (x == 1 + warm_up).all()
    for n in (1, 2):
        out = replay()
        assert (x == 1 + warm_up + n).all() and (out == 64.0 * (1 + warm_up + n) ** 2).all()
    assert replay() is out


def test_one_in_the_warm_up_of_another():
    """As a product does that first runs there, and measures its kernels."""
    x, inner = torch.ones(8, device="cuda"), []

    def function():
        if not torch.cuda.is_current_stream_capturing():
            inner.append(record(lambda: x.mul_(3), warm_up=0))
            inner[-1]()
        return x.add_(1)

    replay = record(function, warm_up=2)
    assert (x == 13).all()
    replay()
    inner[0]()
    assert (x == 42).all()


def test_graphs_that_are_gone_hold_no_memory():
    """Not even for the dense product in them, nor a workspace for each."""
    x = torch.randn(64, 64, device="cuda").half()
    x @ x
    held = []
    for warm_up in (0, 1, 0, 2):
        replay = record(lambda: x @ x, warm_up)
        torch.testing.assert_close(replay(), x @ x)
        del replay
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert len(set(held)) == 1
