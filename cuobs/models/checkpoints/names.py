"""Which tensor of a checkpoint's files each tensor of its loaded model is.

transformers renames tensors while it loads: it adds or drops the prefix of a class, follows
tables of renamings, and puts some together. Here a pair is found by name and shape and believed
only where some of its numbers are the same, so it does not depend on how that is done.
"""

import torch
from safetensors import safe_open

from cuobs.models.checkpoints.source import stored_tensors

# Rows of a tensor that are compared to know that two are the same.
ROWS = 16


class Reader:
    """The tensors of a checkpoint's files, each read when it is asked for.

    Parameters
    ----------
    source : Source
    stored : dict of str to Stored
    """

    def __init__(self, source, stored):
        self._source, self._stored, self._open = source, stored, {}

    def __call__(self, name, rows=None):
        """A tensor on the CPU, or some of its rows."""
        file = self._stored[name].file
        if file not in self._open:
            self._open = {file: self._opened(file)}  # one at a time: some are not mapped
        stored = self._open[file]
        if isinstance(stored, dict):
            return stored[name] if rows is None else stored[name][rows]
        if rows is None or not self._stored[name].shape:
            return stored.get_tensor(name)
        part = stored.get_slice(name)
        return torch.cat([part[row : row + 1] for row in rows])

    def _opened(self, file):
        path = self._source.path(file)
        if file.endswith(".safetensors"):
            return safe_open(path, "pt")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # of a time when torch.save wrote no zip
            content = torch.load(path, map_location="cpu", weights_only=True)
        return content.get("state_dict", content)


def match(model, source, stored):
    """Pair the tensors of a model with those of the files that it was loaded from.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As it was loaded, not yet changed.
    source : Source
    stored : dict of str to Stored
        See `cuobs.models.checkpoints.source.stored_tensors`.

    Returns
    -------
    dict of str to str
        The name in the files by the name in ``model.state_dict()``. What the model makes of
        several tensors, or holds without having read it, is not in it; nor is what the model
        does not hold, see `ignored`.
    """
    read, found = Reader(source, stored), {}
    own = model.state_dict()
    rest = []
    for name, tensor in own.items():
        if name in stored and _same(tensor, name, stored, read):
            found[name] = name
        else:
            rest.append(name)
    shapes = {}
    for name in stored.keys() - set(found.values()):
        shapes.setdefault(stored[name].shape, []).append(name)
    for name in rest:
        candidates = sorted(shapes.get(tuple(own[name].shape), ()), key=_likeness(name))
        for other in reversed(candidates):
            if _same(own[name], other, stored, read):
                found[name] = other
                shapes[stored[other].shape].remove(other)
                break
    return found


def ignored(stored, names, model):
    """Names of stored tensors that a model does not hold.

    Those that it does hold by another name, because two share one tensor, are not among them.
    """
    held = {id(t) for n, t in model.state_dict(keep_vars=True).items() if n in names}
    shared = {n for n, t in model.state_dict(keep_vars=True).items() if id(t) in held}
    return [n for n in stored if n not in set(names.values()) and n not in shared]


def check_all_known(model, source, names):
    """Refuse a checkpoint with tensors that would stay in the old basis.

    Raises
    ------
    ValueError
        The files hold tensors that the model does not, or the model makes some of several.
    """
    if source.gguf is not None:
        return
    unknown = [
        name
        for name in ignored(stored_tensors(source), names, model)
        if not name.endswith("inv_freq")  # frequencies of old checkpoints, which have no basis
    ]
    if unknown:
        raise ValueError(
            f"rotate: found {len(unknown)} tensors of {source.name} that {type(model).__name__} "
            f"does not hold, {unknown[0]} among them, expected none: they would go on reading the "
            "residual stream in its old basis"
        )
    own = model.state_dict(keep_vars=True)
    named = {id(own[name]) for name in names if name in own}
    for name, _ in model.named_parameters():
        if id(own[name]) not in named:
            raise ValueError(
                f"rotate: found that {name} is put together from several tensors of "
                f"{source.name}, expected one that lies in the files as the model holds it"
            )


def _likeness(name):
    """Order other names by how much of this one they have: its end first, then any part."""
    parts = name.split(".")

    def key(other):
        theirs = other.split(".")
        end = 0
        for a, b in zip(reversed(parts), reversed(theirs), strict=False):
            if a != b:
                break
            end += 1
        return end, len(set(parts) & set(theirs)), other

    return key


def _same(tensor, name, stored, read):
    """Whether a tensor of a model holds the numbers of a stored one, by some of their rows."""
    if tuple(tensor.shape) != stored[name].shape:
        return False
    if not tensor.ndim or tensor.numel() == 0:
        return equal(tensor, read(name))
    count = len(tensor)
    rows = sorted({i * (count - 1) // (ROWS - 1) for i in range(ROWS)})
    return equal(tensor[rows], read(name, rows))


def equal(tensor, stored):
    """Whether a tensor of a model is a stored one in the model's dtype; NaN is NaN."""
    tensor, stored = tensor.cpu(), stored.to(tensor.dtype)
    if torch.equal(tensor, stored):
        return True
    alike = (tensor == stored) | (tensor.isnan() & stored.isnan())
    return tensor.is_floating_point() and bool(alike.all())
