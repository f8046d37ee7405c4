"""Calibration windows that were checked, in batches."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from cuobs.models.tokens.calibration import check_tokens, to_array


@dataclass
class Windows:
    """Calibration windows that were checked.

    Attributes
    ----------
    tokens : tensor of int, shape (windows, length)
    mask : tensor, likewise, or None
        The attention mask.
    keep : tensor of bool, likewise
        Which tokens enter the sums.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    keep: torch.Tensor

    def part(self, chosen):
        """Some of the windows, by a slice."""
        mask = None if self.mask is None else self.mask[chosen]
        return Windows(self.tokens[chosen], mask, self.keep[chosen])

    def digest(self):
        """A fingerprint."""
        found = hashlib.sha256()
        for tensor in (self.tokens, self.keep):
            found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()

    def batches(self, size):
        """(tokens, mask or None) of so many windows at a time."""
        masks = self.mask.split(size) if self.mask is not None else None
        parts = self.tokens.split(size)
        return list(zip(parts, masks or [None] * len(parts), strict=True))

    def counts(self, size, device):
        """Which tokens count, batch by batch; None where all do."""
        return [None if bool(k.all()) else k.to(device) for k in self.keep.split(size)]


def check_windows(model, tokens, attention_mask, drop_first_token):
    """Calibration tokens and what counts of them, as `Windows`."""
    array = check_tokens(model, tokens)
    keep, mask = np.ones(array.shape, bool), None
    if attention_mask is not None:
        values = to_array(attention_mask)
        keep = values == 1
        if keep.shape != array.shape:
            raise ValueError(
                f"attention_mask: found shape {keep.shape}, expected {array.shape} as the tokens"
            )
        if not (keep | (values == 0)).all():
            raise ValueError("attention_mask: found other values, expected 0 and 1 alone")
        mask = torch.from_numpy(keep.astype(np.int64))
    if drop_first_token:
        keep[np.arange(len(keep)), keep.argmax(axis=1)] = False
    if not keep.any():
        raise ValueError("tokens: found none that count, expected longer windows")
    return Windows(torch.from_numpy(array), mask, torch.from_numpy(keep))
