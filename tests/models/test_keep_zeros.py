"""Zeros stay zero in any training loop."""

import copy
import inspect
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_models import make_model, same, weights_of
from torch import nn

from cuobs.models import keep_zeros
from cuobs.torch import merge_masked

OPTIMIZERS = [
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and kind is not torch.optim.Optimizer
]
VARIANTS = [
    (name, {key: True})
    for name in OPTIMIZERS
    for key in ("foreach", "fused")
    if key in inspect.signature(getattr(torch.optim, name).__init__).parameters
]


def make_layers(seed=0):
    """Two linears, half of whose weights are zero, and inputs."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    for module in (model[0], model[2]):
        weight = module.weight.data.reshape(-1, 4)
        weight[:, torch.randperm(4)[:2]] = 0
    return model, torch.randn(32, 8)


def zeros_of(model):
    return [p == 0 for p in model.parameters()]


def train(model, x, optimizer, steps=3):
    """Fit a fixed goal; LBFGS calls the loss itself."""
    goal = torch.sin(x @ torch.ones(8, 4))

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - goal).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def make_optimizer(name, parameters, **options):
    signature = inspect.signature(getattr(torch.optim, name).__init__).parameters
    wanted = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}
    options = {**{k: v for k, v in wanted.items() if k in signature}, **options}
    return getattr(torch.optim, name)(parameters, **options)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("name", "options"), [(name, {}) for name in OPTIMIZERS if name != "SparseAdam"] + VARIANTS
)
def test_every_optimizer(name, options, given):
    model, x = make_layers()
    before, start = zeros_of(model), [p.clone() for p in model.parameters()]
    try:
        optimizer = make_optimizer(name, list(model.parameters()), **options)
    except (RuntimeError, TypeError) as error:
        if not options:
            raise
        pytest.skip(str(error))
    train(model, x, optimizer)  # momentum that moves pruned weights
    with torch.no_grad():
        for parameter, first in zip(model.parameters(), start, strict=True):
            parameter.copy_(first)
    with keep_zeros(model, optimizer if given else None):
        train(model, x, optimizer)
        found = zeros_of(model)
    for mine, theirs, parameter, first in zip(
        found, before, model.parameters(), start, strict=True
    ):
        assert torch.equal(mine, theirs)
        assert not torch.equal(parameter, first)


def test_an_optimizer_of_sparse_gradients_trains_the_embedding_beside():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 4, bias=False))
    model[1].weight.data[:, ::2] = 0
    model[0].weight.data[3] = 0
    mask = model[0].weight.data != 0
    optimizer = torch.optim.SparseAdam(model[0].parameters(), lr=0.1)
    with keep_zeros(model, masks={"0": mask, "1": model[1].weight != 0}):
        model(torch.tensor([2, 3])).square().sum().backward()
        start = model[0].weight.detach().clone()
        optimizer.step()
    assert not model[0].weight[3].any() and not torch.equal(model[0].weight[2], start[2])
    assert not model[1].weight[:, ::2].any() and not model[1].weight.grad[:, ::2].any()


def test_gradients_accumulate_masked_under_autocast_and_are_clipped():
    model, x = make_layers()
    before = zeros_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    with keep_zeros(model):
        for _ in range(3):
            for part in x.split(8):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    model(part).square().sum().backward()
            for parameter, zeros in zip(model.parameters(), before, strict=True):
                assert not parameter.grad[zeros].any() and parameter.grad.any()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            kept = sum(p.grad[~z].square().sum() for p, z in zip(
                model.parameters(), before, strict=True)).sqrt()  # fmt: skip
            assert norm > 1 and float(kept) == pytest.approx(1, rel=1e-4)
            optimizer.step()
            optimizer.zero_grad()
            assert all(map(torch.equal, zeros_of(model), before))


def test_gradients_that_are_no_numbers():
    model, x = make_layers()
    before = zeros_of(model)
    with keep_zeros(model):
        (model(x).sum() * float("nan")).backward()
    for parameter, zeros in zip(model.parameters(), before, strict=True):
        assert not parameter.grad[zeros].any()


def test_an_optimizer_of_another_kind():
    """One that holds quantised moments need not be of PyTorch's class."""

    class Other:
        def step(self):
            for parameter in model.parameters():
                parameter.data.add_(1)
            return "done"

    model, _ = make_layers()
    before, optimizer = zeros_of(model), Other()
    with keep_zeros(model, optimizer):
        assert optimizer.step() == "done"
        assert all(map(torch.equal, zeros_of(model), before))
    optimizer.step()
    assert not any(zeros.any() for zeros in zeros_of(model))


class EightBit(torch.optim.Optimizer):
    """Adam whose moments are bytes, a scale for each: what is 0 does not stay it."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            for name, new in (("first", parameter.grad), ("second", parameter.grad.square())):
                old = 0.0
                if name in state:
                    bytes_, low, width = state[name]
                    old = low + bytes_ * width
                value = 0.9 * old + 0.1 * new
                low, width = value.min(), (value.max() - value.min()) / 255
                state[name] = ((value - low) / width).round().to(torch.uint8), low, width
            first, second = (low + b * width for b, low, width in (state["first"], state["second"]))
            parameter.sub_(self.param_groups[0]["lr"] * first / (second.clamp_min(0).sqrt() + 1e-8))


@pytest.mark.parametrize("given", [False, True])
def test_moments_of_eight_bits(given):
    model, x = make_layers()
    before = zeros_of(model)
    optimizer = EightBit(model.parameters(), lr=1e-3)
    goal = torch.sin(x @ torch.ones(8, 4))

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (model(x) - goal).square().mean().backward()
            optimizer.step()

    with keep_zeros(model, optimizer if given else None):
        train(5)
        assert all(map(torch.equal, zeros_of(model), before))
    # Held by the step after the step: bytes near 0 are no 0, whatever the gradients are.
    train(1)
    assert not any(map(torch.equal, zeros_of(model), before))


def test_weights_that_begin_to_learn_later():
    model, x = make_layers()
    before = zeros_of(model.requires_grad_(False))
    with keep_zeros(model):
        assert not any(p.requires_grad for p in model.parameters())
        model[2].requires_grad_(True)
        model(x).square().sum().backward()
        assert model[0].weight.grad is None
        assert model[2].weight.grad.any() and not model[2].weight.grad[before[1]].any()
    model(x).square().sum().backward()
    assert model[2].weight.grad[before[1]].any()


def test_afterwards_nothing_is_held():
    model, x = make_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = keep_zeros(model, optimizer)
    kept.remove()
    train(model, x, optimizer)
    assert not any(zeros.all() or zeros.sum() > 2 for zeros in zeros_of(model))


def test_another_models_optimizer_is_left_alone():
    model, _ = make_layers()
    other, x = make_layers(seed=1)
    with keep_zeros(model):
        model[0].weight.data += 1
        train(other, x, torch.optim.SGD(other.parameters(), lr=0.1), steps=1)
        assert not (model[0].weight == 0).any()


def test_masks_that_do_not_fit():
    model, _ = make_layers()
    dense = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="model: found no zeros in the linears of Linear"):
        keep_zeros(dense)
    for masks, match in (
        ({"1": torch.ones(2, 2, dtype=bool)}, "masks: found '1', expected names"),
        ({"0": torch.ones(2, 2, dtype=bool)}, r"masks: found shape \(2, 2\) for 0, expected"),
    ):
        with pytest.raises(ValueError, match=match):
            keep_zeros(model, masks=masks)
    with pytest.raises(TypeError, match="masks: found torch.float32 for 0, expected bool"):
        keep_zeros(model, masks={"0": torch.ones(16, 8)})
    with pytest.raises(TypeError, match="optimizer: found int, expected one with step"):
        keep_zeros(model, 3)


def test_adapters_that_begin_at_zero_are_free():
    peft = pytest.importorskip("peft")
    model = make_model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[:, ::2] = 0
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    tokens = torch.arange(3, 27)[None]
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    with keep_zeros(adapted, optimizer):
        for _ in range(2):
            adapted(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
    layers = adapted.base_model.model.model.layers
    up = layers[0].mlp.up_proj
    base = up.weight.detach().clone()
    product = 0.5 * 8 * (up.lora_B["default"].weight @ up.lora_A["default"].weight).detach()
    assert product[:, ::2].any()
    name = "model.layers.0.mlp.up_proj"
    for wrong in ({f"{name}x": up.weight != 0}, {name: (up.weight != 0).T}):
        with pytest.raises(ValueError, match="masks: found"):
            merge_masked(adapted, wrong)
        assert torch.equal(up.weight, base) and hasattr(up, "lora_A")
    given = copy.deepcopy(adapted)
    merged = merge_masked(adapted)
    found = merged.model.layers[0].mlp.up_proj.weight
    masks = {f"model.layers.{i}.mlp.up_proj": layer.mlp.up_proj.weight != 0
             for i, layer in enumerate(merged.model.layers)}  # fmt: skip
    tuner = copy.deepcopy(given).base_model
    assert same(weights_of(merge_masked(given, masks)), weights_of(merged))
    assert same(weights_of(merge_masked(tuner, masks)), weights_of(merged))
    assert not found[:, ::2].any()
    torch.testing.assert_close(found[:, 1::2], (base + product)[:, 1::2])


def test_the_example_ends_in_a_folder_that_still_has_its_pattern(monkeypatch):
    from click.testing import CliRunner
    from cuobs_cli import main

    path = Path(__file__).parents[2] / "examples" / "fine_tune_pruned.py"
    example = runpy.run_path(str(path))["main"]
    commands = []
    monkeypatch.setattr(sys, "argv", [str(path)])

    def run(command):
        commands.append(command)
        result = CliRunner().invoke(main, command[3:])
        assert "2:4" in result.output
        return SimpleNamespace(returncode=result.exit_code)

    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(SystemExit) as ended:
        example()
    assert ended.value.code == 0 and commands[0][1:4] == ["-m", "cuobs", "verify"]


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_transformers_own_loop(tmp_path, optim):
    transformers = pytest.importorskip("transformers")
    from cuobs.models import KeepZeros  # with the trainer, which takes seconds to import

    model = make_model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[:, ::2] = 0
    before = [layer.mlp.up_proj.weight.detach().clone() for layer in model.model.layers]
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(3, 83).reshape(8, 10)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        num_train_epochs=2, learning_rate=0.01, weight_decay=0.1, optim=optim, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    callback = KeepZeros()
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    for layer, first in zip(model.model.layers, before, strict=True):
        weight = layer.mlp.up_proj.weight
        assert torch.equal(weight == 0, first == 0) and not torch.equal(weight, first)
    assert callback._kept is None
