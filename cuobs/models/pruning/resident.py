"""The blocks of a model in memory, one of which at a time is on a device."""

from concurrent.futures import ThreadPoolExecutor

import torch


class Resident:
    """Takes blocks to a device and their weights back, to the very memory that they came from.

    While one is worked on, the next is already copied.

    Parameters
    ----------
    blocks : torch.nn.ModuleList
    device : torch.device

    Used as a context; the blocks are at home afterwards.
    """

    def __init__(self, blocks, device):
        self._blocks, self._device = blocks, device
        self._homes, self._next = {}, {}
        self._pool = ThreadPoolExecutor(1)

    def __len__(self):
        return len(self._blocks)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pool.shutdown()
        for tensor, home in self._homes.values():
            tensor.data = home
        self._homes.clear()

    def load(self, index):
        """A block, on the device."""
        waiting = self._next.pop(index, None)
        copies = waiting.result() if waiting is not None else {}
        for tensor in self._away(index):
            self._homes[id(tensor)] = tensor, tensor.data
            copy = copies.get(id(tensor))
            tensor.data = tensor.data.to(self._device) if copy is None else copy
        if index + 1 < len(self._blocks) and self._device.type == "cuda":
            self._copy_ahead(index + 1)
        return self._blocks[index]

    def store(self, index):
        """Take a block back to where it was."""
        for tensor, home in self._homes.values():
            _copy_back(tensor.data, home)
            tensor.data = home
        self._homes.clear()

    def _away(self, index):
        """The tensors of a block that are not on the device, each once."""
        block = self._blocks[index]
        tensors = {id(t): t for t in (*block.parameters(), *block.buffers())}
        return [t for t in tensors.values() if t.device != self._device]

    def _copy_ahead(self, index):
        """Begin to copy a block's tensors in a thread beside the work on another block."""
        sources = {id(tensor): tensor.data for tensor in self._away(index)}
        try:
            copies = {n: torch.empty_like(s, device=self._device) for n, s in sources.items()}
        except torch.cuda.OutOfMemoryError:
            return
        ready = torch.cuda.current_stream(self._device).record_event()

        def run():
            stream = torch.cuda.Stream(self._device)
            with torch.cuda.stream(stream):
                stream.wait_event(ready)  # until then the memory may be in use
                for name, source in sources.items():
                    copies[name].copy_(source)
            stream.synchronize()
            return copies

        self._next[index] = self._pool.submit(run)


def _copy_back(tensor, home):
    """Copy a tensor of the device into memory of the host, by way of pinned memory."""
    if not tensor.is_cuda or home.is_cuda:
        home.copy_(tensor)
        return
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    staged.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    home.copy_(staged)
