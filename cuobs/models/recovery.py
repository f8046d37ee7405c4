"""What happens to a pruned model after its last block: distillation, and how near it comes."""

import os
from functools import partial

import numpy as np

from cuobs.arrays import size_text
from cuobs.models.checkpoints.source import BLOCKS
from cuobs.models.distilling.distillation import check_fits, distill, size_of_both
from cuobs.models.evaluate import agreement
from cuobs.models.structure import find_blocks, linears

STATE = "distillation.safetensors"


def check_room(model, recipe, device, limit=None):
    """Refuse, before it is pruned, a model that a device has no room to distil.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        May be on the meta device.
    recipe : ModelRecipe
    device : torch.device
    limit : int, optional
        Bytes of the host's memory that may be used.

    Returns
    -------
    int
        Bytes that it takes in one process, at least.
    """
    prefix, blocks = find_blocks(model)
    modules = linears(blocks).items()
    learning = (m for name, m in modules if recipe.of(f"{prefix}.{name}") is not None)
    count = sum(m.weight.numel() for m in learning)
    check_fits(model, count, device, limit)
    return size_of_both(model, count)


def recover(
    model, dense, masks, tokens, attention_mask=None, times=None, *,
    passes, rate, seed=0, device, folder=None, say=None, progress=None,
):  # fmt: skip
    """Distil a model that has just been pruned, or go on with it.

    Parameters
    ----------
    model, dense, masks, tokens, times, passes, rate, seed, device
        Of `distill`.
    attention_mask : array or None
        Of the first windows; all tokens of the others count.
    folder : path, optional
        That of an unfinished run: the state is kept beside its blocks.
    say : callable, optional
        Called with lines of text.
    progress : callable, optional
        Called with (done, total) steps.

    Returns
    -------
    DistillationReport
    """
    say = say or (lambda line: None)
    if attention_mask is not None:
        whole = np.ones(tokens.shape, np.int64)
        whole[: len(attention_mask)] = attention_mask
        attention_mask = whole
    state = folder and os.path.join(folder, BLOCKS, STATE)

    def starting(report):
        say(
            f"distillation {_count(passes, 'pass', 'es')} over {_count(report.windows, 'window')}, "
            f"{_count(report.steps, 'step')}; {_count(report.aside, 'window')} kept aside"
        )
        say(f"memory       about {size_text(report.memory_predicted)} on {device.type}")

    def on_pass(report):
        done = len(report.divergence) - 1
        what = f"pass {done}/{passes}" if done else "before"
        say(f"{what:<12} KL {report.divergence[-1]:.4f} on the windows kept aside")

    report = distill(
        model, dense, masks, tokens, attention_mask=attention_mask, times=times, passes=passes,
        rate=rate, seed=seed, device=device, state=state,
        resume=bool(state) and os.path.exists(state), starting=starting, on_pass=on_pass,
        progress=progress,
    )  # fmt: skip
    if not report.kept:
        say("distillation did not help: the pruned weights stay as they were")
    return report


def agreements(model, dense, texts, device, progress):
    """How near a model is to the dense one on each text, by the text's name."""
    found = {}
    for name, tokens in texts.items():
        step = progress and partial(progress, f"agreement, {name}")
        found[name] = agreement(model, dense, tokens, device, step)._asdict()
    return found


def _count(n, what, ending="s"):
    return f"{n} {what}{'' if n == 1 else ending}"
