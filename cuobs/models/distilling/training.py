"""Keep zeros in transformers' own training loop."""

from typing import Any

from transformers import TrainerCallback

from cuobs.torch.keep_zeros import keep_zeros


class KeepZeros(TrainerCallback):
    """Hold a pruned model's zeros while transformers' ``Trainer`` trains it.

    ``Trainer(..., callbacks=[KeepZeros()])``; see `keep_zeros`. Sharded training, which replaces
    parameters, is not covered.

    Parameters
    ----------
    masks : dict of tensor of bool, optional
        As in `keep_zeros`; by default the zeros that the linears have when training begins.
    """

    def __init__(self, masks=None):
        self._masks, self._kept = masks, None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Begin to hold."""
        self.on_train_end(args, state, control)
        self._kept = keep_zeros(model, masks=self._masks)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hold no longer."""
        if self._kept is not None:
            self._kept.remove()
            self._kept = None
