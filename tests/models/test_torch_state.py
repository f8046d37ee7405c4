"""What a caller has set in PyTorch changes nothing, and is left as it was."""

import contextlib
import copy
from functools import cache

import numpy as np
import pytest
import torch
from small_models import make_model, make_source, make_tokens, prune_all, same, weights_of

from cuobs.models import (
    agreement,
    distill,
    evaluate_folder,
    pack_folder,
    pack_model,
    perplexity,
    prune_folder,
    prune_model,
    rotate_folder,
    unpack_folder,
    write_calibration,
    write_windows,
)
from cuobs.models.blocks import plain_torch
from cuobs.models.structure import find_blocks, linears


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)


@cache
def as_it_is(tune):
    """A model pruned in torch's own state, and its report."""
    model = make_model("llama", blocks=2)
    return model, prune_model(model, make_tokens(), tune=tune, device="cpu")


STATES = pytest.mark.parametrize(
    "state",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.device("meta"),
        lambda: default_dtype(torch.float64),
        lambda: default_dtype(torch.bfloat16),
    ],
    ids=["autocast", "inference", "no_grad", "device", "float64", "bfloat16"],
)


@pytest.mark.parametrize("tune", [0, 1])
@STATES
def test_torchs_state_changes_nothing_and_is_left_as_it_was(state, tune):
    plain, expected = as_it_is(tune)
    inside = make_model("llama", blocks=2)
    with state():
        grad, mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        cast, place = torch.is_autocast_enabled("cpu"), torch.get_default_device()
        found = prune_model(inside, make_tokens(), tune=tune, device="cpu")
        assert (grad, mode) == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        assert (cast, place) == (torch.is_autocast_enabled("cpu"), torch.get_default_device())
    assert same(weights_of(plain), weights_of(inside))
    assert [block.drift for block in found.blocks] == [block.drift for block in expected.blocks]


def in_memory(model, dense, masks):
    """All that is done with models besides pruning them, in numbers."""
    tokens = make_tokens()
    done = distill(model, dense, masks, tokens, passes=1, rate=1e-3)
    near, said = agreement(model, dense, tokens), perplexity(model, tokens)
    return done.divergence, near, said, write_windows(dense, 2, 6).tolist(), pack_model(model).left


def folder_to_folder(source, path):
    """The same for models of folders; the files that they are."""
    path.mkdir()
    calibration = f"{source.parent / 'tokens.npy'}"
    write_calibration(source, path / "own.npz", 2, 6, device="cpu")
    rotate_folder(source, path / "rotated", calibration, steps=1, device="cpu")
    prune_folder(
        source, path / "pruned", calibration, method="wanda", rotate=True, rotate_steps=1,
        distill=1, evaluate=[calibration], device="cpu",
    )  # fmt: skip
    pack_folder(path / "pruned", path / "packed", device="cpu")
    unpack_folder(path / "packed", path / "unpacked")
    found = evaluate_folder(path / "pruned", calibration, against=source, device="cpu")
    files = sorted(path.rglob("*.safetensors"))
    return found[:1] + found[2:], [(f.relative_to(path), f.read_bytes()) for f in files]


@cache
def by_magnitude():
    """A pruned model, the dense one and the masks."""
    dense = make_model("llama", blocks=2)
    model = prune_all(make_model("llama", blocks=2))
    masks = {f"model.layers.{n}": m.weight != 0 for n, m in linears(model.model.layers).items()}
    return model, dense, masks


@cache
def whatever_else_as_it_is():
    model, dense, masks = by_magnitude()
    return in_memory(copy.deepcopy(model), dense, masks)


@STATES
def test_torchs_state_changes_nothing_that_is_done_in_memory(state):
    expected = whatever_else_as_it_is()
    model, dense, masks = by_magnitude()
    model = copy.deepcopy(model)
    with state():
        found = in_memory(model, dense, masks)
    assert found == expected


@pytest.fixture(scope="module")
def of_folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("states")
    np.save(path / "tokens.npy", make_tokens())
    source = make_source(path / "source", blocks=2)
    return source, folder_to_folder(source, path / "plain")


@STATES
def test_torchs_state_changes_nothing_that_is_done_from_folder_to_folder(
    state, tmp_path, of_folders
):
    source, expected = of_folders
    with state():
        found = folder_to_folder(source, tmp_path / "found")
    assert found == expected


def as_decorated(forward):
    return torch.autocast("cpu", torch.bfloat16)(forward)


def as_it_runs(forward):
    def casting(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    return casting


@pytest.mark.parametrize("cast", [as_decorated, as_it_runs])
def test_a_model_that_casts_its_weights_itself_runs_with_them_as_they_are(cast):
    """Not with what autocast has kept of them from before they were pruned."""
    def casting(model):
        for block in find_blocks(model)[1]:
            block.forward = cast(block.forward)
        return model

    tokens, model = make_tokens(), casting(make_model("llama"))
    with plain_torch():
        dense = perplexity(model, tokens)
        pruned = perplexity(prune_all(model), tokens)
    assert dense == perplexity(casting(make_model("llama")), tokens)
    assert pruned == perplexity(casting(prune_all(make_model("llama"))), tokens)
    assert pruned != dense


def test_autocast_around_it_all_runs_on_with_the_pruned_weights():
    model, ids = make_model("llama"), torch.tensor(make_tokens(2))
    with torch.autocast("cpu", torch.bfloat16):
        dense = model(ids).logits
        prune_model(model, make_tokens(), method="wanda", device="cpu")
        found = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found, model(ids).logits) and not torch.equal(found, dense)
