"""Distillation with the masks fixed."""

import copy

import forks
import numpy as np
import pytest
import torch
import transformers
from small_models import make_model, make_tokens, prune_all, same, weights_of
from torch import nn

from cuobs import arrays
from cuobs.models import distill, memory
from cuobs.models.distilling import distillation, logits
from cuobs.models.distilling.distillation import _order, _Pair, split_windows
from cuobs.models.distilling.divergence import divergence, divergence_gradient
from cuobs.models.distilling.logits import Cut
from cuobs.models.distilling.sharding import sharded
from cuobs.models.memory import Room
from cuobs.models.ranks import Ranks
from cuobs.models.structure import find_blocks, linears
from cuobs.torch.keep_zeros import masked_weights

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_pruned(dense, seed=0):
    """A copy with half of the weights of its blocks' linears gone, and the masks."""
    model, masks = copy.deepcopy(dense), {}
    generator = torch.Generator().manual_seed(seed)
    name, blocks = find_blocks(model)
    for inner, module in linears(blocks).items():
        mask = torch.rand(module.weight.shape, generator=generator) < 0.5
        module.weight.data.mul_(mask)
        masks[f"{name}.{inner}"] = mask
    return model, masks


def kl(model, dense, tokens, mask=None):
    """Mean KL(dense ‖ model) over all positions, in float64 from the definition."""
    with torch.no_grad():
        extra = {} if mask is None else {"attention_mask": torch.tensor(mask)}
        p, q = (
            m(input_ids=torch.tensor(tokens), **extra).logits.double().softmax(-1)
            for m in (dense, model)
        )
    counted = torch.ones(p.shape[:2]) if mask is None else torch.tensor(mask)
    lost = (p * (p / q).log()).sum(-1)
    return float((lost * counted).sum() / counted.sum())


def test_divergence_falls_and_masks_hold(family):
    dense = make_model(family, blocks=2)
    model, masks = make_pruned(dense)
    start, before = weights_of(dense), weights_of(model)
    tokens = make_tokens(64)
    told = []
    report = distill(
        model, dense, masks, tokens, passes=3, rate=3e-3,
        on_pass=lambda report: told.append(report.divergence[-1]),
    )  # fmt: skip
    _, aside = split_windows(64)
    assert report.aside == 2 == len(aside) and report.windows == 62
    assert report.steps == 3 * 8 and len(report.divergence) == 4 and told == report.divergence
    assert report.divergence[report.kept] == min(report.divergence) < report.divergence[0]
    assert report.divergence[report.kept] == pytest.approx(
        kl(model, dense, tokens[aside]), rel=1e-4
    )
    assert same(start, weights_of(dense))
    after = weights_of(model)
    learned = {f"{name}.weight" for name in masks}
    for name, tensor in after.items():
        if name in learned:
            mask = masks[name.removesuffix(".weight")]
            assert torch.equal(tensor != 0, mask)
            assert not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_gradient_is_that_of_the_whole_logits(family, monkeypatch):
    """Chunks of a few tokens give what all logits at once give."""
    monkeypatch.setitem(logits.CHUNK, "cpu", 5 * 97)
    dense = make_model(family).double()
    model, _ = make_pruned(dense)
    tokens = torch.tensor(make_tokens(2, 9))
    counts = torch.rand(18, dtype=torch.double)
    # The head learns as well, so that what follows the cut is seen to be differentiated.
    weights = list(find_blocks(model)[1].parameters()) + [model.get_output_embeddings().weight]
    both = Cut(model, tokens), Cut(dense, tokens)
    assert not both[0].whole
    hidden, goals = (cut.hidden(tokens).flatten(0, 1) for cut in both)
    pull, at_head = divergence_gradient(*both, hidden, goals, counts, weights)
    found = torch.autograd.grad(hidden, weights, pull, allow_unused=True)
    q, p = (m(input_ids=tokens).logits.flatten(0, 1).softmax(-1) for m in (model, dense))
    lost = ((p * (p / q).log()).sum(-1) * counts).sum()
    expected = torch.autograd.grad(lost, weights)
    assert float(divergence(*both, hidden, goals, counts)) == pytest.approx(lost.item(), rel=1e-5)
    for a, b, c in zip(found, at_head, expected, strict=True):
        total = sum(part for part in (a, b) if part is not None)
        assert (total - c).norm() <= 1e-5 * c.norm() + 1e-9


@pytest.mark.parametrize(
    ("name", "limit"),
    [("cpu", 1e-4), pytest.param("cuda", 5e-2, marks=[pytest.mark.gpu, GPU])],
)
def test_a_steps_gradient_is_that_of_the_definition(name, limit):
    """In parts, with padding; products in bfloat16 on a GPU."""
    dense, device = make_model("llama"), torch.device(name)
    model, masks = make_pruned(dense)
    tokens, padding = torch.from_numpy(make_tokens(8)), torch.ones(8, 24, dtype=torch.long)
    padding[::3, -7:] = 0
    wide, wider = copy.deepcopy(model).double(), copy.deepcopy(dense).double()
    weights, kept = masked_weights(wide, masks)
    chosen = np.array([6, 0, 2, 5, 3])
    q, p = (
        m(input_ids=tokens[chosen], attention_mask=padding[chosen]).logits.softmax(-1)
        for m in (wide, wider)
    )
    counted = padding[chosen].double()
    lost = ((p * (p / q).log()).sum(-1) * counted).sum() / counted.sum()
    expected = torch.autograd.grad(lost, list(weights.values()))
    mine, _ = masked_weights(model.to(device), masks)
    pair = _Pair(model, dense.to(device), mine, kept, [], tokens, padding, device)
    pair.gradient(chosen, Room(2))
    for (key, weight), goal in zip(mine.items(), expected, strict=True):
        found = weight.grad.cpu().double()
        assert not found[~kept[key]].any()
        goal = goal * kept[key]
        assert (found - goal).norm() <= limit * goal.norm(), key


def test_logits_of_a_large_vocabulary_are_made_a_few_tokens_at_a_time(monkeypatch):
    monkeypatch.setitem(logits.CHUNK, "cpu", 2**21)
    dense = make_model("llama", vocab_size=262144)
    model, masks = make_pruned(dense)
    tokens, sizes = make_tokens(3, 8), []
    model.lm_head.register_forward_hook(lambda _, args, out: sizes.append(out.numel()))
    report = distill(model, dense, masks, tokens, passes=1)
    assert report.steps == 1 and len(report.divergence) == 2
    assert max(sizes) <= logits.CHUNK["cpu"] < 2 * 8 * 262144  # those of the step's two windows


def test_padding_enters_no_sum():
    dense = make_model("llama")
    mask = np.ones((16, 24), int)
    mask[::2, -5:] = 0
    tokens = make_tokens(16)
    found = []
    for ids in (tokens, np.where(mask == 0, 3, tokens)):
        model, masks = make_pruned(dense)
        report = distill(model, dense, masks, ids, attention_mask=mask, passes=2, rate=1e-3)
        found.append((report.divergence, weights_of(model)))
    _, aside = split_windows(16)
    start = kl(make_pruned(dense)[0], dense, tokens[aside], mask[aside])
    assert found[0][0][0] == pytest.approx(start, rel=1e-5)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(tensor, found[1][1][name], rtol=1e-4, atol=1e-5)


def test_windows_of_padding_alone_are_left_out():
    dense = make_model("llama")
    mask = np.ones((16, 24), int)
    mask[8:] = 0
    found = []
    for ids, padding in ((make_tokens(16), mask), (make_tokens(16)[:8], mask[:8])):
        model, masks = make_pruned(dense)
        distill(model, dense, masks, ids, attention_mask=padding, passes=2)
        found.append(weights_of(model))
    assert same(*found)


@pytest.mark.parametrize(("windows", "passes"), [(0, 2), (8, 0)])
def test_nothing_to_learn_from_changes_nothing(windows, passes):
    dense = make_model("llama")
    model, masks = make_pruned(dense)
    before = weights_of(model)
    report = distill(model, dense, masks, make_tokens()[:windows], passes=passes)
    assert same(before, weights_of(model)) and report.steps == 0 and report.divergence == []


def test_steps_that_do_harm_are_taken_back():
    dense = make_model("llama")
    model, masks = make_pruned(dense)
    before = weights_of(model)
    report = distill(model, dense, masks, make_tokens(16), passes=2, rate=10.0)
    assert same(before, weights_of(model))
    assert report.kept == 0 and min(report.divergence[1:]) > report.divergence[0]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_run_that_goes_on_gives_the_same_bits(tmp_path, stop):
    dense, tokens = make_model("llama"), make_tokens(32)
    whole, masks = make_pruned(dense)
    options = {"passes": 2, "rate": 3e-3}
    expected = distill(whole, dense, masks, tokens, **options)
    assert expected.steps == 8

    def progress(done, total):
        if done == stop:
            raise Stopped

    model, _ = make_pruned(dense)
    path = tmp_path / "state.safetensors"
    with pytest.raises(Stopped):
        distill(model, dense, masks, tokens, state=path, save_seconds=0, progress=progress,
                **options)  # fmt: skip
    seen = []
    model, _ = make_pruned(dense)
    report = distill(
        model, dense, masks, tokens, state=path, resume=True, save_seconds=1e9,
        progress=lambda done, total: seen.append(done), **options,
    )  # fmt: skip
    assert seen == list(range(stop + 1, 9))
    assert same(weights_of(whole), weights_of(model))
    assert report.divergence == expected.divergence and report.kept == expected.kept


def test_a_state_of_another_run_is_refused(tmp_path):
    dense, tokens = make_model("llama"), make_tokens(16)
    model, masks = make_pruned(dense)
    path = tmp_path / "state.safetensors"
    start = copy.deepcopy(model)
    distill(model, dense, masks, tokens, passes=1, state=path, save_seconds=0)
    again = {"state": path, "resume": True}
    with pytest.raises(FileExistsError, match="found the state of a run, expected resume"):
        distill(start, dense, masks, tokens, passes=1, state=path)
    for changes, key in (
        ({"passes": 2}, "passes"), ({"rate": 1e-3}, "rate"), ({"tokens": tokens[::-1]}, "tokens"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"made with another {key}, expected the same run"):
            distill(start, dense, masks, **{"tokens": tokens, "passes": 1, **again, **changes})
    changed = copy.deepcopy(start)
    changed.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    with pytest.raises(ValueError, match="made with another model"):
        distill(changed, dense, masks, tokens, passes=1, **again)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged, expected a whole file"):
        distill(start, dense, masks, tokens, passes=1, **again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns_in_float32_and_stays_as_it_is(dtype):
    dense = make_model("llama").to(dtype)
    model, masks = make_pruned(dense)
    others = {n: t for n, t in weights_of(model).items() if n.removesuffix(".weight") not in masks}
    report = distill(model, dense, masks, make_tokens(64), passes=3, rate=3e-3)
    assert report.kept and report.divergence[report.kept] < report.divergence[0]
    after = weights_of(model)
    assert all(t.dtype == dtype for t in after.values())
    assert all(torch.equal(after[name], tensor) for name, tensor in others.items())
    # What is measured is the model as it is stored, not the weights that learned.
    _, aside = split_windows(64)
    wide = copy.deepcopy(model).float(), copy.deepcopy(dense).float()
    assert report.divergence[report.kept] == pytest.approx(
        kl(*wide, make_tokens(64)[aside]), rel=1e-4
    )


def test_doing_forwards_again_gives_the_same_bits():
    dense, found = make_model("llama"), []
    for checkpointing in (False, True):
        model, masks = make_pruned(dense)
        distill(model, dense, masks, make_tokens(16), passes=1, checkpointing=checkpointing)
        found.append(weights_of(model))
        assert "forward" not in model.model.layers[0].__dict__
    assert same(*found)


def test_forwards_are_done_again_where_a_window_does_not_fit(monkeypatch):
    dense, seen, found = make_model("llama"), [], []
    # What this process holds besides differs from one run to the next.
    monkeypatch.setattr(memory, "resident", lambda: 0)
    for free in (2**40, 0):
        monkeypatch.setattr(arrays, "free_memory", lambda xp, free=free: free)
        model, masks = make_pruned(dense)
        report = distill(
            model, dense, masks, make_tokens(16), passes=1,
            starting=lambda _, block=model.model.layers[0]: seen.append("forward" in vars(block)),
        )  # fmt: skip
        found.append(report.memory_predicted)
    assert seen == [False, True] and found[1] < found[0]


def test_half_the_windows_do_as_well():
    dense, found = make_model("llama"), []
    for limit in (8, 2):
        model, masks = make_pruned(dense)

        def look(_, args, limit=limit):
            if len(args[0]) > limit:
                raise torch.cuda.OutOfMemoryError("no memory left")

        model.model.layers[1].mlp.register_forward_pre_hook(look)
        report = distill(model, dense, masks, make_tokens(16), passes=1, rate=1e-3)
        found.append((report.divergence, weights_of(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(tensor, found[1][1][name], rtol=1e-3, atol=1e-4)


def test_windows_that_a_pass_sees_twice():
    times = np.array([2, 1, 0, 1])
    seen = np.concatenate(_order(np.array([0, 2, 3]), times, 8, [0, 1]))
    assert sorted(seen.tolist()) == [0, 0, 3]
    dense = make_model("llama")
    model, masks = make_pruned(dense)
    report = distill(model, dense, masks, make_tokens(16), times=np.full(16, 2), passes=1)
    assert report.windows == 15 and report.steps == 4


class Bare(nn.Module):
    """Any module whose forward gives logits for tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner = nn.Embedding(11, 16), nn.Linear(16, 32)
        self.head = nn.Linear(32, 11)

    def forward(self, tokens):
        return self.head(self.inner(self.embedding(tokens).cumsum(1)).tanh())


def test_any_model_whose_forward_gives_logits():
    dense = Bare()
    model = copy.deepcopy(dense)
    masks = {name: torch.rand(model.get_submodule(name).weight.shape) < 0.5
             for name in ("inner", "head")}  # fmt: skip
    for name, mask in masks.items():
        model.get_submodule(name).weight.data.mul_(mask)
    tokens = np.random.default_rng(0).integers(0, 11, (64, 12))
    report = distill(model, dense, masks, tokens, passes=4, rate=3e-3)
    assert report.divergence[report.kept] < 0.9 * report.divergence[0]
    for name, mask in masks.items():
        assert not model.get_submodule(name).weight[~mask].any()


def test_a_model_that_does_more_between_its_blocks_and_its_head():
    """RoFormer's head stands behind a part of its own, so that all before it runs again for logits;
    together the windows have more tokens than it has positions."""
    config = transformers.RoFormerConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=24, is_decoder=True,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = transformers.RoFormerForCausalLM(config).eval()
    for parameter in dense.parameters():
        parameter.data.mul_(4 if parameter.ndim == 2 else 1)
    model, masks = make_pruned(dense)
    tokens = make_tokens(64)
    report = distill(model, dense, masks, tokens, passes=2, rate=3e-3)
    _, aside = split_windows(64)
    assert report.divergence[report.kept] < report.divergence[0]
    assert report.divergence[0] == pytest.approx(
        kl(make_pruned(dense)[0], dense, tokens[aside]), rel=1e-4
    )


def test_memory_is_predicted_before_the_first_step():
    dense = make_model("llama")
    model, masks = make_pruned(dense)
    told = []
    report = distill(
        model, dense, masks, make_tokens(16), passes=1,
        starting=lambda report: told.append((report.memory_predicted, list(report.divergence))),
    )  # fmt: skip
    assert told == [(report.memory_predicted, [])] and report.memory_predicted > 2**20
    assert report.memory_peak > 0 and report.seconds > 0


def test_the_peak_is_about_what_is_predicted(tmp_path):
    """In a process of its own: what others do meanwhile is in its peak too."""
    process = forks.start(say_the_peak, said=tmp_path / "said")
    process.join()
    predicted, peak, before = map(int, (tmp_path / "said").read_text().split())
    assert peak - before < predicted - before < 2 * (peak - before)


def say_the_peak():
    dense = make_model("llama", hidden_size=256, intermediate_size=1024, vocab_size=16384,
                       max_position_embeddings=256)  # fmt: skip
    model = prune_all(copy.deepcopy(dense))
    masks = {name: m.weight != 0 for name, m in linears(model).items() if "layers" in name}
    memory.trim(torch.device("cpu"))  # what other tests have left behind is not used again
    before = memory.resident()
    report = distill(model, dense, masks, make_tokens(9, 256), passes=1)
    print(report.memory_predicted, report.memory_peak, before)


def test_bad_arguments():
    dense = make_model("llama")
    model, masks = make_pruned(dense)
    name = next(iter(masks))
    other = make_model("llama", vocab_size=98)
    for changes, match in (
        ({"passes": -1}, "passes: found -1"),
        ({"step_windows": 0}, "step_windows: found 0"),
        ({"rate": 0}, "rate: found 0, expected a positive number"),
        ({"tokens": make_tokens(1)}, "tokens: found 1 window, expected 2 at least"),
        ({"tokens": make_tokens() + 90}, "the model's vocabulary"),
        ({"times": [1, 2]}, "times: found"),
        ({"attention_mask": np.full((8, 24), 2)}, "attention_mask: found"),
        ({"masks": {"nothing": masks[name]}}, "masks: found 'nothing'"),
        ({"masks": {name: masks[name][:1]}}, "masks: found shape"),
        ({"dense": other}, "dense: found a vocabulary of 98, expected that of the model: 97"),
        ({"dense": model}, "dense: found the model itself, expected a copy"),
        ({"model": copy.deepcopy(dense)}, r"model: found \d+ elements of .* expected the pruned"),
    ):
        before = weights_of(model)
        with pytest.raises(ValueError, match=match):
            distill(**{"model": model, "dense": dense, "masks": masks, "tokens": make_tokens(),
                       **changes})  # fmt: skip
        assert same(before, weights_of(model))
    for changes, match in (
        ({"dense": None}, "dense: found NoneType, expected a torch.nn.Module"),
        ({"masks": [masks[name]]}, "masks: found list, expected a dict"),
        ({"masks": {name: masks[name].float()}}, "masks: found torch.float32"),
    ):
        with pytest.raises(TypeError, match=match):
            distill(**{"model": model, "dense": dense, "masks": masks, "tokens": make_tokens(),
                       **changes})  # fmt: skip
    with pytest.raises(FileNotFoundError, match="state: found no folder .*nowhere, expected one"):
        distill(model, dense, masks, make_tokens(), state="nowhere/state.safetensors")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])])
def test_in_bfloat16_it_ends_where_float32_does(device, monkeypatch):
    dense, tokens = make_model("llama", blocks=2), make_tokens(64)
    model, masks = make_pruned(dense)
    expected = distill(make_pruned(dense)[0], dense, masks, tokens, passes=3, rate=3e-3)
    monkeypatch.setattr(distillation, "IN_HALF", (device,))
    report = distill(model, dense, masks, tokens, passes=3, rate=3e-3, device=device)
    assert report.divergence == pytest.approx(expected.divergence, rel=0.05)
    assert next(model.parameters()).device.type == "cpu"
    for name, mask in masks.items():
        assert torch.equal(model.get_submodule(name).weight != 0, mask)
    _, aside = split_windows(64)
    assert report.divergence[report.kept] == pytest.approx(
        kl(model, dense, tokens[aside]), rel=0.05
    )


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("stop", [3, 8])
def test_on_a_gpu_a_run_that_goes_on_gives_the_same_bits(tmp_path, stop):
    dense, tokens = make_model("llama"), make_tokens(64)
    options = {"passes": 2, "rate": 3e-3, "device": "cuda"}
    whole, masks = make_pruned(dense)
    distill(whole, dense, masks, tokens, **options)

    def progress(done, total):
        if done == stop:
            raise Stopped

    path = tmp_path / "state.safetensors"
    with pytest.raises(Stopped):
        distill(make_pruned(dense)[0], dense, masks, tokens, state=path, save_seconds=0,
                progress=progress, **options)  # fmt: skip
    model, _ = make_pruned(dense)
    distill(model, dense, masks, tokens, state=path, resume=True, **options)
    assert same(weights_of(whole), weights_of(model))


def test_a_linear_that_is_shared_out_takes_its_input_by_name_too(monkeypatch):
    monkeypatch.setattr(Ranks, "gather", lambda self, own, counts: own)
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    expected = model[0](x)
    with sharded(model, ["0.weight"], Ranks(), torch.device("cpu")):
        assert torch.equal(model[0](input=x), expected)
