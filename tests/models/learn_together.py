"""What processes learn together: run by test_ranks.py, alone and under torchrun.

    python learn_together.py steps OUT DEVICE
    python learn_together.py slices FOLDER DEVICE

OUT is an .npz of numbers by which one can tell whether all came to the same; into FOLDER each
process writes one, which says who of how many it is, and the first the last state.
"""

import copy
import os
import sys
from unittest import mock

import numpy as np
import torch
from small_models import make_model, make_tokens, prune_all

from cuobs.models import distill, memory, rotate
from cuobs.models.blocks import capture, run
from cuobs.models.pruning.tuning import tune_block
from cuobs.models.ranks import joined
from cuobs.models.structure import find_blocks, linears

WINDOWS, BATCH = 21, 10


def masks_of(modules):
    return {name: module.weight != 0 for name, module in modules.items()}


@torch.no_grad()
def tuned(ranks, device):
    """Errors and a block's weights; some windows count for nothing, a whole step among them."""
    dense, ids = make_model("llama").to(device), torch.tensor(make_tokens(WINDOWS))
    block, counts = find_blocks(dense)[1][0], torch.ones(ids.shape, dtype=bool, device=device)
    counts[8:10], counts[3, 5:] = False, False
    parts = ids[ranks.share].split(BATCH)
    entry = capture(dense, [block], [(part, None) for part in parts], device)
    goals = [run(block, h, c) for h, c in zip(entry.hidden, entry.calls[0], strict=True)]
    pruned = find_blocks(prune_all(copy.deepcopy(dense)))[1][0]
    errors = tune_block(
        pruned, masks_of(linears(pruned)), entry.hidden, goals, entry.calls[0],
        counts[ranks.share].split(BATCH), passes=3, rate=1e-3, batch=BATCH, ranks=ranks,
    )  # fmt: skip
    return {"errors": errors, "tuned": flat(linears(pruned).values())}


def distilled(device, spare=0, **options):
    """The report and a model's weights; the last step has a single window.

    The device is said to have so many bytes to ``spare`` where it holds all weights.
    """
    dense = make_model("llama").to(device)
    model = prune_all(copy.deepcopy(dense))
    modules, mask = linears(model), np.ones((WINDOWS - 3, 24), int)
    masks = {name: m for name, m in masks_of(modules).items() if "layers" in name}
    mask[2, 7:] = 0
    needed = 12 * sum(modules[name].weight.numel() for name in masks)
    needed += 8 * sum(parameter.numel() for parameter in model.parameters())
    with mock.patch.object(memory, "whole", lambda device: needed + spare):
        report = distill(
            model, dense, masks, make_tokens(WINDOWS - 3), attention_mask=mask, passes=2, rate=1e-3,
            **options,
        )  # fmt: skip
    return report, flat(modules[name] for name in masks)


def rotated(device):
    """The objective before and after, and what a model's weights became."""
    model = make_model("llama")
    report = rotate(model, make_tokens(7), steps=5, device=device, permute=True)
    return {"share": [report.before, report.after], "rotated": flat(linears(model).values())}


def flat(modules):
    return torch.cat([module.weight.detach().cpu().flatten() for module in modules]).numpy()


def steps(path, device):
    """All that learns, each process holding all weights."""
    with joined(device) as ranks:
        place = torch.device(device)
        found = tuned(ranks, place) | rotated(device)
        report, weights = distilled(place)
        found |= {"divergence": report.divergence, "distilled": weights}
        if ranks.leads:
            np.savez(path, **found)


def slices(folder, device):
    """Distillation where the first of several processes has a byte too little for all weights."""
    with joined(device) as ranks, mock.patch.object(
        torch.optim, "AdamW", wraps=torch.optim.AdamW
    ) as optimizer:
        report, weights = distilled(
            torch.device(device), -1 if ranks.size > 1 and ranks.leads else 0, save_seconds=0.0,
            state=os.path.join(folder, f"state-{ranks.size}"),
        )  # fmt: skip
        np.savez(
            os.path.join(folder, f"{ranks.rank}-{ranks.size}.npz"), weights=weights,
            divergence=report.divergence, kept=report.kept, predicted=report.memory_predicted,
            held=sum(weight.numel() for weight in optimizer.call_args.args[0]),
        )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"steps": steps, "slices": slices}[sys.argv[1]](*sys.argv[2:])
