"""Which windows a run over a model learns from: texts, tokens, and what the model writes itself."""

import json
import os
from typing import NamedTuple

import numpy as np

from cuobs import files, validation
from cuobs.models.checkpoints.loading import load_tokenizer
from cuobs.models.tokens.calibration import (
    check_tokens,
    is_tokens,
    load_tokens,
    longest_window,
    self_written,
    tokenize,
)
from cuobs.models.tokens.texts import read_documents
from cuobs.models.tokens.writing import write_windows

DEFAULT_LENGTH = 2048
# How often a pass of distillation sees a window that pruned, where it sees others as well.
PRUNING_TIMES = 2


class Mixture(NamedTuple):
    """Windows of several sources.

    Attributes
    ----------
    pruning : ndarray of int64, shape (windows, length)
    distilling : ndarray of int64, shape (all windows, length)
        Those that prune first.
    times : ndarray of int, shape (all windows,)
        How often a pass of distillation sees each.
    counts : dict of str to int
        Windows by source.
    drawn : list of str
        Sources whose windows a seed decided.
    """

    pruning: np.ndarray
    distilling: np.ndarray
    times: np.ndarray
    counts: dict
    drawn: list

    def sources(self):
        """The source, or the windows of each where there are several."""
        return self.counts if len(self.counts) > 1 else next(iter(self.counts))

    def lines(self, seed):
        """The sources, for people."""
        for spec, count in self.counts.items():
            text = not is_tokens(spec) and self_written(spec) is None
            how = f", drawn with seed {seed}" if spec in self.drawn else ""
            every = "" if how else "all "
            documents = f"{read_documents(spec)}, {every}" if text else ""
            yield f"{spec}: {documents}{count} windows of {self.pruning.shape[1]} tokens{how}"


def read_given(calibration, distillation, reader, *, samples, length=None):
    """The windows that lie in texts and files, and how long those of all sources are to be.

    Parameters
    ----------
    calibration, distillation, reader, samples, length
        See `gather`.

    Returns
    -------
    found : dict of str to ndarray
    length : int
    """
    found, told = {}, length
    given = [spec for spec in (*calibration, *distillation) if self_written(spec) is None]
    for spec in sorted(given, key=is_tokens, reverse=True):  # their length is that of all
        most = samples if spec in calibration else None
        found[spec] = reader.read(spec, most, told if is_tokens(spec) else length)
        length = length or found[spec].shape[1]
    if bad := [spec for spec, part in found.items() if part.shape[1] != length]:
        raise ValueError(
            f"{bad[0]}: found windows of {found[bad[0]].shape[1]}, expected {length} as of the "
            "others; sequence_length cuts them"
        )
    return found, length or reader.default_length()


def gather(given, calibration, distillation, reader, *, samples, length, distill=0):
    """Windows of all sources.

    What the model writes itself serves distillation alone where there is something else to prune
    by, and the first ``samples`` of it prune where there is not.

    Parameters
    ----------
    given : dict of str to ndarray
        Those that the model does not write, see `read_given`.
    calibration, distillation : list of str
        What prunes and distils, and what distils alone: texts, ``tokens.npz:key``, ``self:1024``.
    reader : WindowReader
    samples : int
        Windows of each text or file that prune.
    length : int
    distill : int
        Passes of distillation; without any, all windows prune.

    Returns
    -------
    Mixture
    """
    found = dict(given)
    others = [spec for spec in calibration if spec in given]
    own = [spec for spec in (*calibration, *distillation) if spec not in given]
    for spec in own:
        named = ":" in spec or distill
        found[spec] = reader.write(self_written(spec) if named else samples, length)
    pruning = others + ([] if others and distill else [s for s in calibration if s in own])
    parts = [found[s][:samples] if s in own and distill else found[s] for s in pruning]
    rest = [found[s][samples:] for s in pruning if s in own and distill]
    rest += [part for spec, part in found.items() if spec not in pruning]
    rest = [part for part in rest if len(part)]
    prunes = np.concatenate(parts)
    alike = not rest or bool(own) and not others
    times = np.ones(len(prunes), int) if alike else np.full(len(prunes), PRUNING_TIMES)
    return Mixture(
        prunes,
        np.concatenate([prunes, *rest]),
        np.concatenate([times, *(np.ones(len(part), int) for part in rest)]),
        {spec: len(part) for spec, part in found.items()},
        own + [spec for spec in others if not is_tokens(spec) and len(found[spec]) == samples],
    )


class WindowReader:
    """Windows for a model, from the forms of sources that there are.

    Parameters
    ----------
    source : Source
    model : transformers.PreTrainedModel
        Dense, for windows of its own.
    seed : int or None
        Draws windows of texts, and what the model writes.
    device : torch.device or str
        Where it writes.
    trust_remote_code : bool
    stored : path, optional
        A file that keeps what the model writes, for a run that goes on.
    progress : callable, optional
        Called with (done, total) while it writes.
    alone : callable, optional
        Called before it writes, and waits until nothing else is launched on the device: a step
        that is recorded there must be told nothing else meanwhile.
    """

    def __init__(
        self, source, model, seed=0, device="cpu", *, trust_remote_code=False, stored=None,
        progress=None, alone=None,
    ):  # fmt: skip
        self._source, self._model, self._seed, self._device = source, model, seed, device
        self._trust, self._stored, self._progress = trust_remote_code, stored, progress
        self._alone, self._tokenizer = alone, None

    def read(self, spec, samples, length):
        """Windows of a text or of a file of tokens."""
        if is_tokens(spec):
            found = load_tokens(spec, samples, length)
        else:
            if self._tokenizer is None:  # opened when the first text is read
                self._tokenizer = load_tokenizer(self._source, self._trust)
            length = length or self.default_length()
            found = tokenize(spec, self._tokenizer, length, samples, self._seed)
        with validation.naming(spec):
            return check_tokens(self._model, found)

    def default_length(self):
        """Tokens of a window where nothing says how many."""
        return default_length(self._model)

    def write(self, windows, length, temperature=1.0):
        """Windows that the model samples itself, or those that it has before."""
        length = length or self.default_length()
        made_of = json.dumps([self._source.name, windows, length, self._seed])
        if self._stored is not None and os.path.exists(self._stored):
            before = files.load_arrays(self._stored)
            if str(before["made_of"]) == made_of:
                return before["tokens"].astype(np.int64)
        if self._alone is not None:
            self._alone()
        found = write_windows(
            self._model, windows, length, temperature=temperature, seed=self._seed,
            special=special_tokens(self._source, self._model, self._trust), device=self._device,
            progress=self._progress,
        )  # fmt: skip
        if self._stored is not None:
            os.makedirs(os.path.dirname(self._stored), exist_ok=True)
            content = {"tokens": found.astype(np.int32), "made_of": np.array(made_of)}
            files.save_arrays(self._stored, content, force=True)
        return found


class Unwritten(WindowReader):
    """The same where a model has no weights yet: what it is to write is zeros of that shape."""

    def write(self, windows, length, temperature=1.0):
        """Windows of zeros."""
        return np.zeros((windows, length), np.int64)


def special_tokens(source, model, trust_remote_code=False):
    """Tokens that no text begins with: the tokenizer's special ones, and those it does not have."""
    try:
        tokenizer = load_tokenizer(source, trust_remote_code)
    except ValueError:
        return []  # the config names the most of them
    unknown = range(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    return [*tokenizer.all_special_ids, *unknown]


def default_length(model):
    """Tokens of a window of a text: 2048, or what the model allows."""
    return min(DEFAULT_LENGTH, longest_window(model) or DEFAULT_LENGTH)
