"""Windows of tokens that a model writes itself, to calibrate and to distil where there is no text.

All windows of a batch are written side by side, a token each a step. Keys and values lie in one
place from the beginning, so that on a GPU a step can be recorded once and replayed.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import Cache

from cuobs import validation
from cuobs.models import memory
from cuobs.models.blocks import evaluating, plain_torch
from cuobs.models.tokens.attention import attention, refuse_more, sees_all
from cuobs.models.tokens.calibration import SELF_WINDOWS, longest_window
from cuobs.torch.graphs import record

# Windows that are written side by side.
BATCH_WINDOWS = {"cpu": 32, "cuda": 512}
# A step looks at this many tokens more whenever a window has grown past those it looks at.
STRIDE = 128
# Logits by steps differ from those of a whole forward by rounding alone.
TOLERANCE = 5e-2
# The name under which transformers finds `_attend`.
ATTENTION = "cuobs_one_token"


@plain_torch()
def write_windows(
    model: Any,
    windows: int = SELF_WINDOWS,
    length: int = 1024,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    special: Sequence = (),
    device: Any = None,
    batch: int | None = None,
    progress: Callable | None = None,
) -> Any:
    """Let a model sample windows of tokens from itself.

    The first token of each is drawn from the vocabulary, all others from what the model gives for
    those before; a window goes on where a text would end. On a GPU in bfloat16.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Not changed; on ``device`` meanwhile.
    windows, length : int
    temperature : float
        1 samples from the model's own distribution; a lower one from a sharper.
    seed : int
        The same on the same device, with the same batch, gives the same windows.
    special : sequence of int
        Tokens that no window begins with, besides those that the model's config names.
    device : torch.device or str, optional
        The model's own by default.
    batch : int, optional
        Windows that are written side by side; by default as many as memory allows, up to 512.
    progress : callable, optional
        Called with (done, total) tokens.

    Returns
    -------
    ndarray of int64, shape (windows, length)
    """
    _check_arguments(model, windows, length, temperature, seed)
    if batch is not None:
        validation.integer("batch", batch)
    first = _first_tokens(model, windows, special, seed)
    device = torch.device(next(model.parameters()).device if device is None else device)
    found = []
    try:
        with evaluating(model), _current(device), _placed(model, device) as mine:
            steps = _Steps.of(mine, length, first, device)
            most = batch or _fitting(steps, device)
            batch = -(-windows // -(-windows // most))  # all batches nearly alike
            for start in range(0, windows, batch):
                part = np.resize(first[start : start + batch], batch)
                logits = steps.begin(batch) if steps else _by_cache(mine)
                tell = progress and partial(_tell, progress, start, len(first), length, batch)
                found.append(_write(logits, part, length, seed + start, device, temperature, tell))
    except torch.cuda.OutOfMemoryError:
        raise MemoryError(
            "memory: found the device full while windows are written, expected a smaller batch"
        ) from None
    return np.concatenate(found)[:windows]


def _check_arguments(model, windows, length, temperature, seed):
    """Refuse what can't be written."""
    validation.integer("windows", windows)
    validation.integer("length", length, low=2)
    validation.integer("seed", seed, low=0)
    validation.positive("temperature", temperature)
    longest = longest_window(model)
    if longest and length > longest:
        raise ValueError(f"length: found {length}, expected at most {longest}, the model's longest")


def _write(logits, first, length, seed, device, temperature, tell):
    """Windows that begin with some tokens, shape (batch, length)."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.zeros(len(first), length, dtype=torch.long, device=device)
    tokens[:, 0] = torch.from_numpy(first).to(device)
    for t in range(length - 1):
        shares = (logits(tokens[:, t : t + 1], t).float() / temperature).softmax(1)
        # The largest of shares over exponential noise is a draw from them.
        noise = torch.empty_like(shares).exponential_(generator=generator)
        tokens[:, t + 1] = (shares / noise).argmax(1)
        if tell:
            tell(t + 1)
    return tokens.cpu().numpy()


def _tell(progress, start, windows, length, batch, written):
    """Report tokens; windows of a last batch that only fill it up do not count."""
    here = min(batch, windows - start)
    progress(start * (length - 1) + here * written, windows * (length - 1))


def _by_cache(model):
    """Logits of the next token where the model itself keeps what it needs of those before."""
    name, cache = _cache_name(model), None

    def logits(last, t):
        nonlocal cache
        out = model(input_ids=last, use_cache=True, **{name: cache})
        cache = getattr(out, name, None)
        if cache is None:
            raise TypeError(f"model: found {type(model).__name__}, expected one that keeps a cache")
        return out.logits[:, -1]

    return logits


class _Steps:
    """Logits of the next token by calls of one shape, which a GPU records and replays."""

    def __init__(self, model, length, device):
        self._model, self._length, self._device = model, length, device
        self._name = _cache_name(model)
        self._held, self._recorded = None, {}

    @classmethod
    def of(cls, model, length, first, device):
        """Steps of a model, or None where they do not give what a whole forward gives."""
        if not sees_all(model, length):
            return None
        steps = cls(model, length, device)
        tokens = torch.from_numpy(np.resize(first, (2, min(4, length)))).to(device)
        whole = model(input_ids=tokens, use_cache=False).logits.float()
        try:
            logits = steps.begin(2, record=False)
            for t, expected in enumerate(whole.unbind(1)):
                found = logits(tokens[:, t : t + 1], t).float()
                if not (found - expected).norm() <= TOLERANCE * expected.norm():
                    return None
        except torch.cuda.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return None
        return steps

    def bytes_of_a_window(self):
        """What the keys and values of one window take."""
        return self._held.size() // 2

    def begin(self, batch, record=True):
        """A function (tokens (batch, 1), place) → logits (batch, vocabulary), for new windows."""
        if self._held is None or len(self._held.last) != batch:
            dtype = next(self._model.parameters()).dtype
            self._held = _Held(batch, self._length, self._device, dtype)
            self._recorded.clear()
        held = self._held
        held.clear()

        def logits(last, t):
            held.move(last, t)
            held.shown = min(-(-(t + 1) // STRIDE) * STRIDE, self._length)
            if not record or self._device.type != "cuda":
                return self._step()
            if held.shown not in self._recorded:
                self._recorded[held.shown] = _recorded(self._step)
            return self._recorded[held.shown]()

        return logits

    def _step(self):
        held = self._held
        with attention(self._model, ATTENTION, _attend):
            out = self._model(
                input_ids=held.last, position_ids=held.position, use_cache=True,
                attention_mask=held.mask[..., : held.shown], **{self._name: held},
            )  # fmt: skip
        return out.logits[:, -1]


class _Held(Cache):
    """Keys and values of a batch in one place, and what a step is called with.

    Attributes
    ----------
    last, position : tensor of int, shape (batch, 1)
        The tokens that a step sees and where they stand.
    mask : tensor, shape (1, 1, 1, length)
        What is added to a query's scores: 0 up to its own place.
    shown : int
        Places that a step looks at.
    """

    def __init__(self, batch, length, device, dtype):
        super().__init__(layers=[])
        self.last = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros_like(self.last)
        self.mask = torch.empty(1, 1, 1, length, dtype=dtype, device=device)
        self.shown = length
        self._places = {}
        self.clear()

    def clear(self):
        """Forget what was before; what lies there is hidden by the mask."""
        self.mask.fill_(torch.finfo(self.mask.dtype).min)

    def move(self, last, place):
        """Go to a place, with the tokens that stand there."""
        self.last.copy_(last)
        self.position.fill_(place)
        self.mask[..., place] = 0

    def size(self):
        """Bytes of keys and values."""
        return sum(t.numel() * t.element_size() for pair in self._places.values() for t in pair)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Put keys and values (batch, heads, 1, D) in their place; all that a step looks at."""
        new = key_states, value_states
        if layer_idx not in self._places:
            length = self.mask.shape[-1]
            self._places[layer_idx] = [
                x.new_zeros(*x.shape[:2], length, x.shape[3]) for x in new
            ]
        for place, x in zip(self._places[layer_idx], new, strict=True):
            place.index_copy_(2, self.position[0], x)
        keys, values = self._places[layer_idx]
        return keys[:, :, : self.shown], values[:, :, : self.shown]

    def get_seq_length(self, *args, **kwargs):
        """Places are given to each step, so nobody needs to count."""
        return 0

    def get_mask_sizes(self, *args, **kwargs):
        """What a step looks at, from the first place on."""
        return self.shown, 0


def _recorded(step):
    """A step recorded on the GPU, or as it is where it can't be."""
    try:
        return record(step)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        return step


def _attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention of one token a window; heads that share keys are not copied for it.

    Parameters
    ----------
    query : tensor, shape (B, heads, 1, D)
    key, value : tensor, shape (B, key-value heads, n, D)
    attention_mask : tensor, shape (1, 1, 1, n)
    """
    refuse_more(kwargs)
    batch, heads, _, size = query.shape
    query = query.reshape(batch, key.shape[1], -1, size)
    scores = query @ key.transpose(2, 3) * (size**-0.5 if scaling is None else scaling)
    shares = (scores + attention_mask).float().softmax(-1).to(value.dtype)
    out = (shares @ value).reshape(batch, 1, heads, value.shape[3])
    return out, None


@contextlib.contextmanager
def _placed(model, device):
    """The model on a device; on a GPU in half precision."""
    home = next(model.parameters()).device
    if device.type == "cuda" and next(model.parameters()).dtype in (torch.float32, torch.float64):
        mine = copy.deepcopy(model)
        for parameter in mine.parameters():  # buffers, as of rotary positions, stay as they are
            parameter.data = parameter.data.to(device, torch.bfloat16)
        yield mine.to(device)
        return
    try:
        yield model.to(device)
    finally:
        model.to(home)


def _current(device):
    """A device as PyTorch's current one, whose streams are those that are recorded."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _fitting(steps, device):
    """Windows side by side: their keys and values in half of the device's free memory."""
    most = BATCH_WINDOWS.get(device.type, BATCH_WINDOWS["cpu"])
    if device.type != "cuda":
        return most
    if steps is None:
        return max(1, most // 8)
    memory.give_back()
    free = torch.cuda.mem_get_info(device)[0]
    return max(1, min(most, free // 2 // steps.bytes_of_a_window()))


def _first_tokens(model, windows, special, seed):
    """Tokens drawn from the vocabulary without special ones."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    config = model.config.get_text_config()
    named = [getattr(config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")]
    left = {int(i) for ids in (*named, special) if ids is not None for i in np.atleast_1d(ids)}
    allowed = np.setdiff1d(np.arange(vocabulary), sorted(left))
    if not len(allowed):
        raise ValueError("special: found the whole vocabulary, expected tokens to begin with")
    return np.random.default_rng(seed).choice(allowed, windows)


def _cache_name(model):
    """What the model calls its cache: it depends on the version of transformers."""
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"
