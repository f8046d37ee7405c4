"""Fingerprints of tensors, by which an unfinished run knows what it began with."""

import hashlib

from cuobs.models.checkpoints.names import bytes_of


def add(result, tensor, label=""):
    """Let a fingerprint depend on a tensor's shape, dtype and bytes, and on a label before them."""
    result.update(f"{label}{tuple(tensor.shape)} {tensor.dtype}".encode())
    result.update(bytes_of(tensor))


def digest(*tensors):
    """A fingerprint of tensors, None among them."""
    result = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            add(result, tensor.detach())
    return result.hexdigest()
