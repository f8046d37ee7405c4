"""The blocks of a model in memory or in files, one of which at a time is on a device."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from cuobs.models.parked import parked


class Resident:
    """Takes blocks to a device, and their weights back to the very memory that they came from.

    Those of a parked block come from files; what has become of them is to be kept before it is
    stored. While one is worked on, the next is already copied to a GPU, and the one before still
    on its way back.

    Parameters
    ----------
    blocks : torch.nn.ModuleList
    device : torch.device

    Used as a context; the blocks are at home afterwards.
    """

    def __init__(self, blocks, device):
        self._blocks, self._device = blocks, device
        self._homes, self._next, self._parked = {}, {}, None
        self._leaving, self._left = {}, None
        self._pool = ThreadPoolExecutor(1)

    def __len__(self):
        return len(self._blocks)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.settle()
        finally:
            self._pool.shutdown()
            if self._parked is not None:
                self._parked.put_away()
            _send_home(self._homes)

    def load(self, index):
        """A block, on the device."""
        if self._leaving.keys() & _tensors(self._blocks[index]).keys():
            self.settle()  # the two blocks share a tensor
        waiting = self._next.pop(index, None)
        copies = waiting.result() if waiting is not None else {}
        self._parked = parked(self._blocks[index])
        if self._parked is not None:
            self._parked.load(self._device, copies)
        for tensor in self._away(index):
            self._homes[id(tensor)] = tensor, tensor.data
            copy = copies.get(id(tensor))
            tensor.data = tensor.data.to(self._device) if copy is None else copy
        if index + 1 < len(self._blocks) and self._device.type == "cuda":
            self._copy_ahead(index + 1)
        return self._blocks[index]

    def store(self, changed=True):
        """Take the loaded block back to where it was, with its weights if they have changed.

        From a GPU they are on their way until `settle`.
        """
        self.settle()
        self._leaving, self._homes = self._homes, {}
        pairs = list(self._leaving.values()) if changed else []
        if pairs and self._device.type == "cuda":
            ready = torch.cuda.current_stream(self._device).record_event()
            self._left = self._pool.submit(_copy_back, pairs, self._device, ready)
        else:
            for tensor, home in pairs:
                home.copy_(tensor.data)
            self.settle()
        if self._parked is not None:
            self._parked.put_away()
            self._parked = None

    def settle(self):
        """Have the block that was stored last at home."""
        left, self._left = self._left, None
        try:
            if left is not None:
                left.result()
        finally:
            _send_home(self._leaving)

    def digest(self):
        """The fingerprint of the block that is loaded, where it is known; else None."""
        return self._parked and self._parked.digest

    def kept(self, stored):
        """Say in what files the weights of the block that is loaded are kept, by their names."""
        if self._parked is not None:
            self._parked.replace(stored)

    def _away(self, index):
        """The tensors of a block that are in memory and not on the device, each once."""
        tensors = _tensors(self._blocks[index])
        return [t for t in tensors.values() if t.device != self._device and not t.is_meta]

    def _copy_ahead(self, index):
        """Begin to copy a block's tensors in a thread beside the work on another block."""
        sources = {id(tensor): (tensor, tensor.detach) for tensor in self._away(index)}
        own = parked(self._blocks[index])
        for slot in own.slots if own is not None else ():
            sources[slot.name] = slot.held[slot.key], partial(own.take, slot, self._device)
        try:
            copies = {
                n: torch.empty_like(like, device=self._device, requires_grad=False)
                for n, (like, _) in sources.items()
            }
        except torch.cuda.OutOfMemoryError:
            return
        ready = torch.cuda.current_stream(self._device).record_event()

        def run():
            stream = torch.cuda.Stream(self._device)
            with torch.cuda.stream(stream):
                stream.wait_event(ready)  # until then the memory may be in use
                for name, (_, take) in sources.items():
                    copies[name].copy_(take())
            stream.synchronize()
            return copies

        self._next[index] = self._pool.submit(run)


def _tensors(block):
    """The tensors of a block by their ids."""
    return {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}


def _send_home(homes):
    """Let tensors be where they were before; a dict of (tensor, memory) that is empty then."""
    for tensor, home in homes.values():
        tensor.data = home
    homes.clear()


def _copy_back(pairs, device, ready):
    """Copy tensors of a GPU, each to its place in the host's memory, after an event."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        stream.wait_event(ready)
        for tensor, home in pairs:
            staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            staged.copy_(tensor.data, non_blocking=True)
            stream.synchronize()
            home.copy_(staged)
