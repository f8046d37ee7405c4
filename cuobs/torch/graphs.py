"""CUDA graphs: what a GPU is told many times over, recorded once, since telling it costs more."""

import threading
from functools import lru_cache

import torch

_RECORDING = threading.RLock()


def record(function, warm_up=1):
    """A function without arguments as a recording of what it does on the current GPU.

    It must read and write tensors that stay in their place, and wait for nothing.

    Parameters
    ----------
    function : callable
        Runs a few times.
    warm_up : int
        How often it runs before it is recorded, so that libraries set themselves up; what that
        took is given back, as a recording has memory of its own. 0 where it has run before.

    Returns
    -------
    callable
        Does the same on the current stream; what it returns lies where it lay before.

    Raises
    ------
    RuntimeError
        It can't be recorded, or the memory for it is not there.
    """
    graph, stream = torch.cuda.CUDAGraph(), _aside(torch.cuda.current_device())
    # Of all threads one: what another enqueued on this stream would be in the recording. Again in
    # itself, since a product measures its kernels where it first runs.
    with _RECORDING:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                function()
            if warm_up:
                torch.cuda.empty_cache()
            result = _captured(graph, function)
        torch.cuda.current_stream().wait_stream(stream)

    def replay():
        graph.replay()
        return result

    return replay


def _captured(graph, function):
    # Other threads may go on meanwhile.
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        try:
            return function()
        finally:
            graph.capture_end()
    except RuntimeError:
        torch.cuda.synchronize()
        raise


@lru_cache(maxsize=16)
def _aside(number):
    """The stream of a device on which graphs are recorded."""
    # One for all: PyTorch keeps a workspace of cuBLAS for each stream that it met, and for good.
    return torch.cuda.Stream(number)
