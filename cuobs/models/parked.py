"""Blocks whose weights stay in files until they are wanted.

The tensors of a parked block stand on the meta device. A forward through it reads them and lets
them go again; `at_hand` and `cuobs.models.pruning.resident` keep them for longer.
"""

import contextlib
import types
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from cuobs.models.checkpoints.names import TensorReader
from cuobs.models.threads import callers_stream, side_by_side


class Slot(NamedTuple):
    """Where a module holds a tensor.

    Attributes
    ----------
    name : str
        The tensor's, in the model.
    held : dict
        The module's parameters or its buffers.
    key : str
        In that.
    tensor : tensor
        What stands there while the block is at hand; without memory while it is parked.
    """

    name: str
    held: dict
    key: str
    tensor: torch.Tensor


def park(model, prefix, blocks, source, stored, dtype=None):
    """Let go of the weights in a model's blocks; they are read from files from now on.

    What is around the blocks is mapped. What the model made itself, or shares between modules of
    its blocks, stays in memory.

    Parameters
    ----------
    model : torch.nn.Module
        On the CPU.
    prefix : str
        Name of the list of blocks.
    blocks : torch.nn.ModuleList
    source : Source
    stored : dict of str to Stored
        By the model's own names, see `cuobs.models.checkpoints.names.match`.
    dtype : torch.dtype, optional
        What all in floating point that lies in files is to be from now on; by default as it is.
    """
    held = [part for m in model.modules() for part in (m._parameters, m._buffers)]
    uses = Counter(id(tensor) for part in held for tensor in part.values())
    read = TensorReader(source, stored)
    parks = []
    for index, block in enumerate(blocks):
        slots = [
            Slot(name, part, key, tensor)
            for inner, module in block.named_modules()
            for part in (module._parameters, module._buffers)
            for key, tensor in part.items()
            for name in [".".join(filter(None, (prefix, str(index), inner, key)))]
            if tensor is not None and name in stored and uses[id(tensor)] == 1
        ]
        parks.append(Parked(block, slots, read))
    inside = {id(slot.tensor) for own in parks for slot in own.slots}
    mapped = _read_rest(model, inside, read, dtype)
    for own in parks:
        own.around = mapped
        own.put_away()
        for slot in own.slots if dtype is not None else ():
            if slot.tensor.is_floating_point():
                slot.held[slot.key].data = slot.held[slot.key].data.to(dtype)


def _read_rest(model, inside, read, dtype):
    """Map what lies in files and in no block, or read it in another dtype; what is mapped."""
    mapped = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) in inside or name not in read.stored:
            continue
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        content = read.mapped(name)
        if content is not None and content.dtype == wanted:
            tensor.data = content
            mapped.append(content)
        elif tensor.dtype != wanted:
            tensor.data = read(name).to(wanted)
    return mapped


class Parked:
    """A block's way to its tensors, and its forward while they are away.

    Parameters
    ----------
    block : torch.nn.Module
    slots : list of Slot
    read : TensorReader
        By the names of the slots.

    Attributes
    ----------
    around : list of tensor
        What is mapped of the rest of the model.
    digest : str or None
        A fingerprint of the tensors in the source, once it was made.
    """

    def __init__(self, block, slots, read):
        self.block, self.slots, self.read = block, slots, read
        self.around, self.digest = [], None

    def __call__(self, *args, **kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        try:
            self._fetch(hidden.device)
            return types.MethodType(type(self.block).forward, self.block)(*args, **kwargs)
        finally:
            self._release()

    def load(self, device, copies=None):
        """Have all tensors on a device: those given by name, the others from their files."""
        self._fetch(device, copies or {})
        self.block.__dict__.pop("forward", None)

    def put_away(self):
        """Let go of all tensors, whatever has become of them."""
        self._release()
        self.block.forward = self

    def replace(self, stored):
        """Have some tensors lie elsewhere from now on, by their names; see `TensorReader`."""
        self.read.stored.update(stored)

    def take(self, slot, device=None):
        """A tensor in the dtype in which the block holds it, on the CPU or as it was unpacked."""
        return self.read(slot.name, device=device).to(slot.held[slot.key].dtype)

    def _fetch(self, device, copies=()):
        stream = callers_stream(device)

        def found(slot):
            with stream():
                if slot.name in copies:
                    return copies[slot.name]
                return self.take(slot, device).to(device)

        for slot, tensor in zip(self.slots, side_by_side(found, self.slots), strict=True):
            slot.tensor.data = tensor
            slot.held[slot.key] = slot.tensor

    def _release(self):
        for slot in self.slots:
            tensor = slot.held[slot.key]
            away = torch.empty_like(tensor, device="meta", requires_grad=False)
            if isinstance(tensor, nn.Parameter):
                away = nn.Parameter(away, requires_grad=tensor.requires_grad)
            slot.held[slot.key] = away
            slot.tensor.data = torch.empty(0, dtype=tensor.dtype)


def parked(block):
    """The `Parked` of a block whose tensors are away, else None."""
    own = block.__dict__.get("forward")
    return own if isinstance(own, Parked) else None


def home_of(module):
    """The device of a module's tensors, of those that are not away."""
    tensors = [*module.parameters(), *module.buffers()]
    return next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))


@contextlib.contextmanager
def at_hand(block, device=None):
    """A block on a device for a while, by default on its own; then where it was."""
    own = parked(block)
    home = home_of(block)
    if own is not None:
        own.load(home if device is None else device)
    elif device is not None:
        block.to(device)
    try:
        yield block
    finally:
        if own is not None:
            own.put_away()
        elif device is not None:
            block.to(home)


def state_of(block):
    """Name and tensor of all that a block's state holds, one at a time where it is parked."""
    own = parked(block)
    slots = {} if own is None else {id(slot.held[slot.key]): slot for slot in own.slots}
    for name, tensor in block.state_dict(keep_vars=True).items():
        slot = slots.get(id(tensor))
        yield name, tensor.detach() if slot is None else own.take(slot)


def around(model, blocks):
    """Name and tensor of all that a model holds outside its blocks.

    Where those are parked, what lies in files is read from them: what is mapped would stay in
    memory once it was looked at.
    """
    own = parked(blocks[0])
    inside = {id(t) for part in (blocks.parameters(), blocks.buffers()) for t in part}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in inside:
            read = own is not None and name in own.read.stored
            yield name, own.read(name).to(tensor.dtype) if read else tensor.detach()
