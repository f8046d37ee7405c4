"""Token windows, from a text or from a file of tokens."""

import os
import re
from typing import Any

import numpy as np

from cuobs import files, validation
from cuobs.models.tokens.texts import EXPECTED, joined, read_documents

# Windows that a model writes where no number is given.
SELF_WINDOWS = 1024
# Share of a text's tokens that its tokenizer may not know.
MOST_UNKNOWN = 0.5
# Keys of a config that say how many tokens a window may have.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


def is_tokens(spec):
    """Whether a source names an array of tokens and not a text."""
    return files.split(spec)[0].lower().endswith(files.SUFFIXES)


def self_written(spec):
    """How many windows a source of the form ``self`` or ``self:1024`` asks the model to write.

    Returns
    -------
    int, or None where it names something else
    """
    match = re.fullmatch(r"self(?::(.*))?", os.fspath(spec))
    if not match:
        return None
    if match[1] is None:
        return SELF_WINDOWS
    if not re.fullmatch(r"\d+", match[1], re.ASCII):
        raise ValueError(f"{spec}: found {match[1]!r}, expected a number of windows, as self:1024")
    return validation.integer(spec, int(match[1]))


def listed(specs):
    """One source or several, as a list."""
    one = isinstance(specs, str | os.PathLike)
    return [os.fspath(spec) for spec in ([specs] if one else specs)]


def check_tokens(model, tokens):
    """Tokens as an array of int64, refused where the model can't read them.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokens : array of int, shape (windows, length)

    Returns
    -------
    ndarray of int64, shape (windows, length)
    """
    array = to_array(tokens)
    if array.dtype.kind not in "iu":
        raise TypeError(f"tokens: found dtype {array.dtype}, expected integers")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"tokens: found shape {array.shape}, expected (windows, length)")
    if not hasattr(model, "get_input_embeddings"):
        raise TypeError(
            f"model: found {type(model).__name__}, expected a causal language model of transformers"
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if array.min() < 0 or array.max() >= vocabulary:
        raise ValueError(
            f"tokens: found {array.min()} to {array.max()}, expected 0 to {vocabulary - 1}, "
            "the model's vocabulary"
        )
    longest = longest_window(model)
    if longest and array.shape[1] > longest:
        raise ValueError(
            f"tokens: found windows of {array.shape[1]}, expected at most {longest}, the model's "
            "longest"
        )
    return array.astype(np.int64)


def to_array(values):
    """Tokens or a mask of them, of PyTorch or not, as an array on the CPU."""
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values)


def longest_window(model):
    """Tokens that the model has positions for, None if nothing says how many.

    The config says how many it was made for; a table of positions has so many rows, less those up
    to its padding index where it has one (RoBERTa counts from there). Neither 0 nor −1 means any.
    """
    from cuobs.models.structure import text_body

    config, body = model.config.get_text_config(), text_body(model)
    found = [getattr(config, key, None) for key in POSITIONS]
    found += [rows for name, table in body.named_modules() if (rows := _positions(name, table))]
    found = [n for n in found if isinstance(n, int) and n > 0]
    return min(found, default=None)


def _positions(name, table):
    """The positions that a table of them holds, None of any other module."""
    import torch

    if not isinstance(table, torch.nn.Embedding) or "position" not in name.rpartition(".")[2]:
        return None
    first = getattr(table, "offset", None)
    if first is None:
        first = 0 if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - first


def load_tokens(
    spec: str,
    samples: int | None = None,
    length: int | None = None,
    kinds: str = "iu",
) -> Any:
    """Windows of tokens from ``tokens.npz:key``, in the order in which they lie there.

    Parameters
    ----------
    spec : str
        A .npy, .npz or .safetensors file; an integer array of shape (windows, length).
    samples : int, optional
        How many windows to take from the front; all by default.
    length : int, optional
        What to cut windows to; whole by default.
    kinds : str
        Kinds of dtype that may be; an attention mask may be "b", bool, too.

    Returns
    -------
    ndarray of int64, shape (windows, length)
    """
    check_cut(samples, length)
    tokens = files.load(spec)
    if tokens.dtype.kind not in kinds:
        raise TypeError(f"{spec}: found dtype {tokens.dtype}, expected integers")
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"{spec}: found shape {tokens.shape}, expected (windows, length)")
    if length is not None and length > tokens.shape[1]:
        raise ValueError(
            f"{spec}: found windows of {tokens.shape[1]} tokens, expected at least {length}; "
            "sequence_length says how long windows are"
        )
    return np.asarray(tokens[:samples, :length], np.int64)


def tokenize(
    spec: str,
    tokenizer: Any,
    length: int,
    samples: int | None = None,
    seed: int | None = None,
) -> Any:
    """Windows of a text: tokenised once as a whole, cut without overlap, the tail dropped.

    Parameters
    ----------
    spec : str
        See `cuobs.models.tokens.texts.read_documents`.
    tokenizer : transformers.PreTrainedTokenizerBase
    length : int
        Tokens of a window.
    samples : int, optional
        How many windows to draw, in the text's order; all if there are no more.
    seed : int, optional
        Of that draw.

    Returns
    -------
    ndarray of int64, shape (windows, length)

    Raises
    ------
    ValueError
        It is shorter than a window, or most of it is nothing that the tokenizer knows.
    """
    check_cut(samples, length)
    text, special = joined(read_documents(spec), tokenizer, spec)
    ids = tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"]
    ids = np.asarray(ids, np.int64)
    windows = ids[: len(ids) // length * length].reshape(-1, length)
    if not len(windows):
        raise ValueError(f"{spec}: found {len(ids)} tokens, expected at least one window: {length}")
    _check_known(spec, tokenizer, windows)
    if samples is not None and samples < len(windows):
        chosen = np.random.default_rng(seed).choice(len(windows), samples, replace=False)
        windows = windows[np.sort(chosen)]
    return windows


def _check_known(spec, tokenizer, windows):
    """Refuse a text that a tokenizer hardly knows a word of: its windows say nothing."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    share = 0.0 if unknown is None else float(np.mean(windows == unknown))
    if share > MOST_UNKNOWN:
        raise ValueError(
            f"{spec}: found that {share:.0%} of its tokens are {tokenizer.unk_token}, expected a "
            "text in the words of the model's tokenizer; its files may be another model's"
        )


def check_tokens_file(spec, vocabulary=None, samples=None, length=None):
    """Refuse a file of tokens that is missing, is none, or is not of a vocabulary."""
    validation.existing_file(files.split(spec)[0], EXPECTED, spec)
    tokens = load_tokens(spec, samples, length)
    if tokens.min() < 0 or vocabulary and tokens.max() >= vocabulary:
        last = "" if vocabulary is None else f" to {vocabulary - 1}"
        raise ValueError(
            f"{spec}: tokens: found {tokens.min()} to {tokens.max()}, expected 0{last}, the "
            "model's vocabulary"
        )
    return tokens


def check_cut(samples, length):
    """Refuse a number of windows or a length of theirs that can't be cut."""
    if samples is not None:
        validation.integer("samples", samples)
    if length is not None:
        validation.integer("sequence_length", length, low=2)
