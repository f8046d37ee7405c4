"""Hidden states away from where they are worked on: in the host's memory, or in mapped files, a
batch of which at a time is in memory.
"""

import tempfile

import torch

from cuobs import files
from cuobs.models.checkpoints.source import LEFTOVER
from cuobs.models.memory import let_go


class Scratch:
    """A list of tensors on the CPU that lie in files without names, gone with the process.

    What is taken out is the very memory of the file: it lasts until the item is set again. Its
    pages leave memory when another item is looked at, and come back when they are wanted.

    Parameters
    ----------
    folder : path
        On the disk that is to hold them.
    """

    def __init__(self, folder):
        self._folder, self._tensors, self._last = folder, [], None

    def __len__(self):
        return len(self._tensors)

    def __getitem__(self, index):
        tensor = self._tensors[index]
        if self._last is not tensor:
            self._leave()
        self._last = tensor
        return tensor

    def __setitem__(self, index, tensor):
        mine = self[index]
        if (mine.shape, mine.dtype) == (tensor.shape, tensor.dtype):
            mine.copy_(tensor)
        else:
            self._tensors[index] = _mapped(self._folder, tensor)

    def append(self, tensor):
        """Add a copy of a tensor."""
        self._tensors.append(_mapped(self._folder, tensor))

    def copy(self):
        """The same tensors in other files."""
        other = Scratch(self._folder)
        for tensor in self:
            other.append(tensor)
        self._leave()
        return other

    def _leave(self):
        if self._last is not None:
            let_go(self._last)
        self._last = None


class OnHost:
    """A list of tensors on the CPU; what is taken out is a copy on a device.

    Parameters
    ----------
    home : list or Scratch
        Holds them.
    device : torch.device
    """

    def __init__(self, home, device):
        self.home, self._device = home, device

    def __len__(self):
        return len(self.home)

    def __getitem__(self, index):
        return self.home[index].to(self._device)

    def __setitem__(self, index, tensor):
        self.home[index] = tensor.cpu()

    def append(self, tensor):
        """Add a copy of a tensor."""
        self.home.append(tensor.cpu())

    def copy(self):
        """The same tensors in another list."""
        return OnHost(self.home.copy(), self._device)


def states_at(place, device, folder):
    """An empty list, or what acts as one, for hidden states.

    Parameters
    ----------
    place : {"device", "host", "scratch"}
        See `cuobs.models.pruning.prediction.place_of_states`.
    device : torch.device
        Where they are worked on.
    folder : path
        Of the scratch file.
    """
    found = Scratch(folder) if place == "scratch" else []
    return found if place == "device" or device.type == "cpu" else OnHost(found, device)


def at_home(states):
    """Hidden states where they lie, without a copy on the device."""
    return states.home if isinstance(states, OnHost) else states


def leave(*tensors):
    """Have what a `Scratch` has given, or parts of it, leave memory until it is wanted."""
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None:
            let_go(tensor)


def _mapped(folder, tensor):
    """A copy of a tensor in a file of its own, out of memory."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{LEFTOVER}states_") as file:
        # A full disk is said here; later it would end the process.
        files.reserve(file, tensor.nbytes)
        found = torch.from_file(
            file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype
        ).view(tensor.shape)
    found.copy_(tensor)
    let_go(found)
    return found
