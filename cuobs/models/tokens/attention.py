"""Attention to keys and values alone, in place of PyTorch's own."""

import contextlib

from transformers import AttentionInterface


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
