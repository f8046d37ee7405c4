"""What a GPU is told many times over, recorded once: launching it costs more than running it."""

import contextlib

import torch
from transformers import AttentionInterface


def record(function):
    """A function without arguments as a recording of what it does on the GPU.

    It must read and write tensors that stay in their place, and wait for nothing.

    Parameters
    ----------
    function : callable
        Runs a few times; returns tensors.

    Returns
    -------
    callable
        Does the same; what it returns lies where it lay before.

    Raises
    ------
    RuntimeError
        It can't be recorded, or the memory for it is not there.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        function()  # libraries set themselves up
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.empty_cache()  # a recording has memory of its own
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = function()
    except RuntimeError:
        torch.cuda.synchronize()
        raise

    def replay():
        graph.replay()
        return result

    return replay


@contextlib.contextmanager
def attention(model, name, function):
    """Another attention in a model meanwhile, in place of PyTorch's own and of no other.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    name : str
        Under which transformers finds it; a model that has it makes no masks.
    function : callable
        As in ``transformers.AttentionInterface``.
    """
    config = model.config.get_text_config()
    own = config._attn_implementation
    if own == "sdpa":
        AttentionInterface.register(name, function)
        config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = own


def sees_all(model, length):
    """Whether every layer of a model attends to all of so many tokens."""
    if not hasattr(model, "config"):
        return False
    sliding = getattr(model.config.get_text_config(), "sliding_window", None)
    return not sliding or length <= sliding


def refuse_more(arguments):
    """Refuse what attention to keys and values alone leaves out."""
    if more := set(arguments) & {"softcap", "s_aux", "position_bias"}:
        raise ValueError(f"attention: found {min(more)}, expected keys and values alone")
