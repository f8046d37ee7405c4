"""A model end to end: tokens a second and memory, dense and packed.

One step of decoding, with a cache of fixed size, is recorded as a CUDA graph and replayed.
"""

import contextlib
import copy
import inspect
import os
from dataclasses import dataclass
from functools import partial

import torch

from cuobs.models.checkpoints.loading import empty_model, from_config, load_model, model_class
from cuobs.models.checkpoints.source import CHECKPOINTS, Source, read_config
from cuobs.models.packed.packing import pack_model
from cuobs.models.packed.timing import check_device, keep_largest
from cuobs.models.structure import find_blocks, linears, oriented
from cuobs.pattern import parse, verify
from cuobs.torch.graphs import record

__all__ = ["SEQUENCES", "Generation", "generation"]

SEQUENCES = (1, 8, 32)
PROMPT = 16


@dataclass
class Generation:
    """How fast a model writes.

    Attributes
    ----------
    sequences : int
        Written side by side.
    dense, packed : float
        Tokens a second, of all sequences together.
    dense_bytes, packed_bytes : int
        Of the weights, embeddings among them.
    compiled : bool
        Whether the blocks were.
    """

    sequences: int
    dense: float
    packed: float
    dense_bytes: int
    packed_bytes: int
    compiled: bool = False

    @property
    def gain(self):
        """How many times as fast the packed model is."""
        return self.packed / self.dense


@torch.no_grad()
def generation(
    source, pattern="2:4", sequences=SEQUENCES, new_tokens=128, dtype="bfloat16", compiled=False,
    say=None,
):  # fmt: skip
    """Measure decoding with a static cache and a CUDA graph, dense and packed.

    Parameters
    ----------
    source : path
        A checkpoint's folder. Weights that do not obey the pattern lose their smallest, for the
        time only; without weights, with a ``config.json`` alone, they are random.
    pattern : str or Pattern
    sequences : sequence of int
    new_tokens : int
        Steps that are timed.
    dtype : {"float16", "bfloat16"}
    compiled : bool or sequence of bool
        Compile the blocks with `torch.compile`, dense and packed, before they are recorded; of
        several, each.
    say : callable, optional
        Called with lines of text.

    Returns
    -------
    list of Generation
    """
    say = say or (lambda line: None)
    pattern = parse(pattern)
    check_device()
    model = _on_device(source, getattr(torch, dtype), say)
    if changed := _obey(model, pattern):
        say(f"weights      {changed} linears did not obey {pattern.label}: their smallest are left "
            "out for the time")  # fmt: skip
    length = PROMPT + new_tokens + 8
    dense_bytes = _bytes(model)
    blocks = find_blocks(model)[1]
    runs = [(c, n) for c in ([compiled] if isinstance(compiled, bool) else compiled)
            for n in sequences]  # fmt: skip
    measure = partial(_tokens_a_second, model, length, new_tokens)
    dense = [measure(blocks if c else (), n) for c, n in runs]
    pack_model(model, pattern)
    torch.cuda.empty_cache()
    packed = [measure(blocks if c else (), n) for c, n in runs]
    return [
        Generation(n, a, b, dense_bytes, _bytes(model), c)
        for (c, n), a, b in zip(runs, dense, packed, strict=True)
    ]


def _on_device(source, dtype, say):
    source = os.fspath(source)
    if any(os.path.isfile(os.path.join(source, name)) for name in CHECKPOINTS):
        return load_model(source).to("cuda", dtype)
    say("weights      none found: random ones")
    config = empty_model(source).config
    found = model_class(Source(source, source, config=read_config(
        os.path.join(source, "config.json"))))  # fmt: skip
    with torch.device("cuda"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = from_config(found, config)
        finally:
            torch.set_default_dtype(before)
    return model.to(dtype).eval()


def _obey(model, pattern):
    """Have every linear in the blocks obey a pattern; how many did not."""
    changed = 0
    for module in linears(find_blocks(model)[1]).values():
        weight = oriented(module)
        try:
            if not verify(weight, pattern):
                weight.copy_(keep_largest(weight, pattern))
                changed += 1
        except ValueError:  # it does not divide this shape: the linear stays dense
            continue
    return changed


def _bytes(model):
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


class Decoder:
    """Greedy decoding, a token of each sequence a step, on tensors that stay where they are.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    sequences : int
    length : int
        Of the cache.
    """

    def __init__(self, model, sequences, length):
        from transformers import StaticCache

        self.model = model
        device = model.get_input_embeddings().weight.device
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.token = torch.full((sequences, 1), 5, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        parameters = inspect.signature(type(model).forward).parameters
        self.takes = {"cache_position", "position_ids"} & parameters.keys()
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"

    def step(self):
        """Read the last token and write the next one."""
        given = {"cache_position": self.position, "position_ids": self.position[None].expand(
            len(self.token), 1)}  # fmt: skip
        out = self.model(
            input_ids=self.token, use_cache=True,
            **{self.cache_name: self.cache}, **{name: given[name] for name in self.takes},
        )  # fmt: skip
        self.token.copy_(out.logits[:, -1:].argmax(-1))
        self.position.add_(1)


@contextlib.contextmanager
def _compiled(blocks):
    """Compile blocks as they run here, once for all that are alike.

    The number of a block would be compiled into it. So each is told that it is the first, and given
    a cache that begins with its own layer.
    """
    if not blocks:
        yield
        return
    from torch._dynamo import config

    torch.compiler.reset()
    shared = torch.compile(lambda block, *args, **given: block._call_impl(*args, **given),
                           dynamic=False)  # fmt: skip
    numbers = {module: module.layer_idx for block in blocks for module in block.modules()
               if hasattr(module, "layer_idx")}  # fmt: skip
    for module in numbers:
        module.layer_idx = 0
    for index, block in enumerate(blocks):
        block._compiled_call_impl = partial(_as_the_first, shared, block, index)
    try:
        # Beyond the limit a block would go on as it is, and only a warning would say so.
        with config.patch(recompile_limit=len(blocks) + config.recompile_limit):
            yield
    finally:
        for module, number in numbers.items():
            module.layer_idx = number
        for block in blocks:
            del block._compiled_call_impl


def _as_the_first(shared, block, index, *args, **given):
    """Call what blocks share for one of them, with its own part of the cache."""
    from transformers import Cache

    return shared(block, *args, **{
        name: _own_part(value, index) if isinstance(value, Cache) else value
        for name, value in given.items()
    })  # fmt: skip


def _own_part(cache, index):
    part = copy.copy(cache)
    part.layers = cache.layers[index : index + 1]
    for tensor in vars(part.layers[0]).values():
        # A compiled block would insist on this one tensor.
        getattr(tensor, "__dict__", {}).pop("_dynamo_static_input_type", None)
    return part


def _tokens_a_second(model, length, new_tokens, compiled, sequences):
    """Of a model whose ``compiled`` blocks are compiled first."""
    decoder = Decoder(model, sequences, length)
    decoder.step()  # the cache is made, and kernels of packed weights are chosen
    with _compiled(compiled):
        replay = record(decoder.step, warm_up=PROMPT // 4)
    for _ in range(2):
        replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(new_tokens):
        replay()
    end.record()
    end.synchronize()
    return 1000 * sequences * new_tokens / start.elapsed_time(end)
