"""Forwards of a model whose blocks are parked: all windows go through one block after the other."""

import contextlib
from functools import partial

import torch

from cuobs.models import memory
from cuobs.models.blocks import Passing, capture, evaluating, run, windows_of
from cuobs.models.parked import home_of, parked
from cuobs.models.pruning.resident import Resident
from cuobs.models.structure import find_blocks

# Bytes of hidden states that go through the blocks together, where as much is free four times.
TOGETHER = {"cpu": 2**29, "cuda": 2**32}


class Runner:
    """Runs a model on windows of tokens: as a whole, or block by block where those are parked.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    device : torch.device

    Used as a context: meanwhile the model is in evaluation mode and on the device, but for blocks
    that are parked.
    """

    def __init__(self, model, device):
        self.model, self.device = model, device
        is_parked = any(parked(module) is not None for module in model.modules())
        self._blocks = find_blocks(model)[1] if is_parked else None
        self._passing = Passing(self._blocks) if is_parked else contextlib.nullcontext()
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        place = _whole if self._blocks is None else _around
        self._stack.enter_context(place(self.model, self.device))
        self._stack.enter_context(evaluating(self.model))
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)

    def without_blocks(self):
        """A context in which blocks that are parked hand their input on, and cost nothing."""
        return self._passing

    def each(self, tokens, batch, function, progress=None):
        """The results of a function on all windows, some at a time.

        Parameters
        ----------
        tokens : tensor of int, shape (windows, length)
        batch : int
            Windows that run at once.
        function : callable
            Called with windows on the device; runs the model on them.
        progress : callable, optional
            Called with (done, total) windows.
        """
        tell = progress or (lambda done, total: None)

        def part(start, stop):
            found = function(tokens[start:stop].to(self.device))
            tell(stop, len(tokens))
            return found

        room = memory.Room(batch)
        if self._blocks is None:
            return room.each(len(tokens), part)
        results, start = [], 0
        for some in tokens.split(self._together(tokens, batch)):
            hidden = self._through(some, batch, room, partial(_tell, tell, tokens, start, some))
            for states in hidden:
                results += self._behind(states, start, room, part)
                start += len(states)
        return results

    def _together(self, tokens, batch):
        """Windows that go through the blocks together: whole batches of them."""
        weight = self.model.get_input_embeddings().weight
        window = tokens.shape[1] * weight.shape[1] * weight.element_size()
        most = min(TOGETHER[self.device.type], memory.free(self.device) // 4)
        return batch * max(1, most // (window * batch))

    def _through(self, tokens, batch, room, tell):
        """What leaves the last block, batch by batch."""
        batches = [(part, None) for part in tokens.split(batch)]
        hidden, calls = capture(self.model, self._blocks, batches, self.device, self._passing)
        with Resident(self._blocks, self.device) as source:
            for index, of_block in enumerate(calls):
                block = source.load(index)
                for i, (states, call) in enumerate(zip(hidden, of_block, strict=True)):
                    hidden[i] = _out(block, states, call, room)
                calls[index] = None
                source.store(changed=False)
                tell((index + 1) / (len(calls) + 1))
        return hidden

    def _behind(self, states, first, room, part):
        """The results for windows that have gone through the blocks, from the first on."""
        def run_behind(start, stop):
            self._passing.last = states[start:stop]
            return part(first + start, first + stop)

        try:
            with self._passing:
                return room.each(len(states), run_behind)
        finally:
            self._passing.last = None


def _tell(tell, tokens, start, some, share):
    """Say how far some windows are that go through the blocks."""
    tell(start + int(share * len(some)), len(tokens))


def _out(block, states, call, room):
    parts = room.each(
        len(states),
        lambda a, b: run(block, states[a:b], windows_of(call, a, b, len(states))),
    )
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@contextlib.contextmanager
def _whole(model, device):
    """The whole model on a device."""
    home = home_of(model)
    try:
        model.to(device)
        yield
    finally:
        model.to(home)


@contextlib.contextmanager
def _around(model, device):
    """What is around the parked blocks of a model on a device; not changed there."""
    mapped = next(own.around for own in map(parked, model.modules()) if own is not None)
    tensors = [t for t in (*model.parameters(), *model.buffers()) if not t.is_meta]
    homes = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home
        for content in mapped:
            memory.let_go(content)
