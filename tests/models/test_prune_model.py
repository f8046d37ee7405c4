"""A model in memory, pruned in place."""

import copy
import importlib
import warnings
import weakref
from functools import cache

import numpy as np
import pytest
import torch
import transformers
from small_models import make_model, make_tokens, same, weights_of

import cuobs
from cuobs.models import prune_model
from cuobs.models.blocks import capture, run
from cuobs.models.recipe import read_arguments
from cuobs.models.structure import find_blocks, linears, oriented


def pruned(model, tokens, **options):
    """A pruned copy, its report, and the inputs of each linear while it was pruned."""
    model = copy.deepcopy(model)
    return model, prune_model(model, tokens, device="cpu", **options)


@cache
def outcome(family, target, drop):
    """A model, what the windows of `make_tokens` make of it, and the report; not to be changed."""
    model = make_model(family, blocks=2)
    return model, *pruned(model, make_tokens(), target=target, drop_first_token=drop)


def test_patterns_are_obeyed_in_every_family(family):
    model, found, report = outcome(family, "mixed", True)
    before = weights_of(model)
    assert len(report.layers) == len(linears(find_blocks(model)[1]))
    for row in report.layers:
        module = found.get_submodule(row.name)
        assert cuobs.verify(oriented(module), "2:4"), row.name
        assert row.shape == tuple(oriented(module).shape)
        assert row.sparsity == 0.5
        assert 0 < row.loss < 1
    inside = {f"{row.name}.weight" for row in report.layers}
    after = weights_of(found)
    assert all(torch.equal(before[name], after[name]) for name in before if name not in inside)
    assert report.left == ["lm_head"]


@pytest.mark.parametrize("pattern", ["4:8", "coupled-2:4", "block16-row8", "1:4"])
def test_other_patterns(tokens, pattern):
    found, report = pruned(make_model("llama", blocks=2), tokens, pattern=pattern)
    for row in report.layers:
        assert cuobs.verify(found.get_submodule(row.name).weight.data, pattern)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "true-obs"])
def test_other_methods(tokens, method):
    found, report = pruned(make_model("gpt2", blocks=2), tokens, method=method)
    assert all(cuobs.verify(oriented(found.get_submodule(r.name)), "2:4") for r in report.layers)


@pytest.mark.parametrize("target", ["mixed", "pruned", "dense"])
@pytest.mark.parametrize("drop", [True, False])
def test_reported_loss_is_that_of_running_the_layer(family, tokens, target, drop):
    dense, found, report = outcome(family, target, drop)
    found = copy.deepcopy(found)
    name, blocks = find_blocks(found)
    first = int(drop)

    seen = {}
    for inner, module in linears(found.base_model).items():
        module.register_forward_pre_hook(
            lambda _, args, inner=inner: seen.__setitem__(inner, args[0].detach())
        )
    with torch.no_grad():
        found.base_model(torch.tensor(tokens), use_cache=False)
    root = name.split(".")[0] + "."
    for row in report.layers:
        x = seen[row.name.removeprefix(root)].double()
        x = x.reshape(*tokens.shape, -1)[:, first:].reshape(-1, x.shape[-1])
        W = oriented(dense.get_submodule(row.name)).double()
        Wp = oriented(found.get_submodule(row.name)).double()
        loss = (x @ (Wp - W).T).norm() / (x @ W.T).norm()
        assert row.loss == pytest.approx(float(loss), rel=1e-3), row.name


def test_layers_by_hand(tokens):
    """The whole procedure on two blocks, written out without any of its helpers."""
    dense = make_model("llama")
    found, _ = pruned(dense, tokens, method="sparsegpt", drop_first_token=False)
    hand = copy.deepcopy(dense)
    ids = torch.tensor(tokens)

    def look(model, name):
        caught = {}
        block = model.model.layers[int(name.split(".")[2])]
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args: caught.update(x=args[0])
            ),
            block.register_forward_pre_hook(lambda _, args: caught.update(block=args[0])),
            block.self_attn.o_proj.register_forward_hook(
                lambda _, args, out: caught.update(attention=out)
            ),
        ]
        with torch.no_grad():
            model.model(ids, use_cache=False)
        for handle in handles:
            handle.remove()
        stream = caught["block"] + (caught["attention"] if "down" in name else 0)
        return caught["x"].reshape(-1, caught["x"].shape[-1]).double(), stream.reshape(-1, 32)

    for index in range(2):
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                      ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"),
                      ("mlp.down_proj",)):  # fmt: skip
            names = [f"model.layers.{index}.{n}" for n in group]
            X, h = look(dense, names[0])
            Xh, hh = look(hand, names[0])
            H = Xh.T @ Xh
            lam = 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
            beta = 0.5 if group[0].endswith(("o_proj", "down_proj")) else 0
            for name in names:
                W = dense.get_submodule(name).weight.data.double()
                right = W @ (0.5 * X.T @ Xh + 0.5 * H + lam)
                if beta:
                    right += beta * (h - hh).double().T @ Xh
                target = torch.linalg.solve(H + lam, right.T).T.contiguous()
                result = cuobs.prune(
                    W.float(), hessian=H, target=target, method="sparsegpt", device="cpu"
                )
                hand.get_submodule(name).weight.data.copy_(result.weight)
                mine = found.get_submodule(name).weight
                assert float(((mine != 0) == (result.weight != 0)).float().mean()) > 0.999
                torch.testing.assert_close(mine.data, result.weight, rtol=0.02, atol=0.02)


def test_second_sweep_changes_nothing(tokens):
    """With the model as it came out, each weight is the best one for its mask and its target."""
    dense = make_model("llama")
    found, report = pruned(dense, tokens, keep_masks=True, drop_first_token=False)
    masks = report.masks

    def inputs(model):
        seen = {}
        handles = [
            m.register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, 1).double())
            )
            for name, m in model.model.layers.named_modules(prefix="model.layers")
            if hasattr(m, "weight")
        ]
        with torch.no_grad():
            model(torch.tensor(tokens), use_cache=False)
        for handle in handles:
            handle.remove()
        return seen

    X, Xh = inputs(dense), inputs(found)
    # What enters a norm is the residual stream.
    norms = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}
    for index in range(3):
        for inner in linears(dense.model.layers[index]):
            name = f"model.layers.{index}.{inner}"
            W = dense.get_submodule(name).weight.data.double()
            H, lost = Xh[name].T @ Xh[name], (X[name] - Xh[name]).T @ Xh[name]
            lam = 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
            change = 0.5 * W @ lost
            if inner in norms:
                norm = f"model.layers.{index}.{norms[inner]}"
                change += 0.5 * (X[norm] - Xh[norm]).T @ Xh[name]
            goal = W + torch.linalg.solve(H + lam, change.T).T
            again = cuobs.reconstruct(
                W, masks[name], H, target=goal, damp=0.01, dtype="float64", device="cpu"
            )
            kept = found.get_submodule(name).weight.data.double()
            assert float((kept - again).norm() / again.norm()) < 1e-4, name


def test_mixed_without_shares_is_pruned(family, tokens):
    model, plain, b = outcome(family, "pruned", True)
    mixed, a = pruned(model, tokens, target="mixed", dense_share=0, residual_share=0)
    assert same(weights_of(mixed), weights_of(plain))
    assert [row.loss for row in a.layers] == [row.loss for row in b.layers]


def test_mixed_with_the_dense_share_alone_is_dense(tokens):
    model, dense, _ = outcome("llama", "dense", True)
    mixed, _ = pruned(model, tokens, target="mixed", dense_share=1, residual_share=0)
    assert same(weights_of(mixed), weights_of(dense))


def test_mixed_target_keeps_closer_to_the_dense_model():
    model, tokens = make_model("llama"), make_tokens(64, 48)
    drift = {
        target: pruned(model, tokens, target=target, tune=0)[1].blocks[-1].drift
        for target in ("mixed", "dense")
    }
    plain, _ = pruned(model, tokens, target="pruned")
    with torch.no_grad():
        ids = torch.tensor(tokens)
        states = [m.base_model(ids, use_cache=False, output_hidden_states=True).hidden_states[-2]
                  for m in (model, plain)]  # fmt: skip
    assert drift["mixed"] < float((states[0] - states[1]).norm() / states[0].norm())


def test_settings_name_the_shares_of_a_target(tokens):
    found = {}
    for target in ("pruned", "dense", "mixed"):
        _, report = pruned(make_model("llama"), tokens, method="wanda", target=target)
        found[target] = report.settings["dense_share"], report.settings["residual_share"]
    assert found == {"pruned": ((0, 0), (0, 0)), "dense": ((1, 1), (0, 0)),
                     "mixed": ((0.5, 0.5), (0.5, 0.5))}  # fmt: skip


def test_shares_by_depth(tokens):
    _, report = pruned(make_model("llama"), tokens, dense_share=(0.2, 0.8), residual_share=(1, 0))
    shares = [
        (r.dense_share, r.residual_share) for r in report.layers if r.name.endswith("down_proj")
    ]
    assert shares == [pytest.approx(pair) for pair in ((0.2, 1), (0.5, 0.5), (0.8, 0))]
    gates = [r.residual_share for r in report.layers if r.name.endswith("gate_proj")]
    assert gates == [0, 0, 0]


def test_padding_takes_no_part(family, tokens):
    model, unmasked, _ = outcome(family, "mixed", True)
    mask = np.ones_like(tokens)
    for i in range(len(tokens)):
        mask[i, : i % 5] = 0
    other = np.where(mask == 0, (tokens + 7) % 90 + 3, tokens)
    assert (other != tokens).any()
    a, first = pruned(model, tokens, attention_mask=mask)
    b, second = pruned(model, other, attention_mask=mask)
    others = weights_of(b)
    for name, tensor in weights_of(a).items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-4, atol=1e-5)
    assert not same(weights_of(a), weights_of(unmasked))


def test_first_real_token_is_dropped(tokens):
    """Left out is the first token that is no padding, not the first place of a window."""
    model = make_model("llama")
    mask = np.ones_like(tokens)
    mask[:, :4] = 0
    losses = [
        [row.loss for row in pruned(model, *arguments, method="wanda", target="pruned", **options)
         [1].layers]
        for arguments, options in (
            ((tokens[:, 4:],), {}),
            ((tokens,), {"attention_mask": mask}),
            ((tokens[:, 4:],), {"drop_first_token": False}),
        )
    ]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] != pytest.approx(losses[0], rel=1e-3)


def test_linears_of_a_group_may_have_recipes_of_their_own(tokens):
    """They share a Hessian, and each is pruned as it would be alone."""
    options = {"target": "pruned", "method": "sparsegpt"}
    layers = {"*.k_proj": {"pattern": "4:8"}, "*.v_proj": {"method": "wanda", "damp": 0.1}}
    found, report = pruned(
        make_model("llama"), tokens, layers=layers, skip=["*.layers.2.*", "lm_head"], **options
    )
    plain, _ = pruned(make_model("llama"), tokens, **options)
    other, _ = pruned(make_model("llama"), tokens, **{**options, "pattern": "4:8"})
    third, _ = pruned(make_model("llama"), tokens, **{**options, "method": "wanda"})
    for name, expected in (("q_proj", plain), ("k_proj", other), ("v_proj", third)):
        key = f"model.layers.0.self_attn.{name}.weight"
        torch.testing.assert_close(weights_of(found)[key], weights_of(expected)[key])
    assert {row.damp for row in report.layers if row.name.endswith("v_proj")} == {0.1, None}
    assert all(row.note for row in report.layers if ".layers.2." in row.name)
    with pytest.raises(ValueError, match="skip: found no linear whose name '.*w2' fits"):
        prune_model(make_model("llama"), tokens, skip=["*.w2"], device="cpu")


def test_skipped_and_indivisible_layers_are_reported(tokens):
    model = make_model("llama", intermediate_size=60)
    found, report = pruned(model, tokens, pattern="4:8", skip=["*.k_proj", "*.layers.0.*"])
    notes = {row.name: row.note for row in report.layers if row.loss is None}
    assert notes["model.layers.0.self_attn.q_proj"] == "left as it is: skipped"
    assert notes["model.layers.1.self_attn.k_proj"] == "left as it is: skipped"
    assert "does not divide a weight of shape (32, 60)" in notes["model.layers.1.mlp.down_proj"]
    assert len(notes) == 7 + 2 * 2
    for name in notes:
        assert torch.equal(found.get_submodule(name).weight, model.get_submodule(name).weight)


def test_a_warning_names_the_line_of_the_caller():
    with pytest.warns(UserWarning, match="found 23 for 64 columns of model.layers.0.mlp") as found:
        prune_model(make_model("llama"), make_tokens(1), method="wanda", device="cpu")
    assert [warning.filename for warning in found] == [__file__]


@pytest.mark.parametrize("target", ["mixed", "pruned", "dense"])
def test_singular_hessian_is_damped_more_and_said(target):
    # one window of few tokens: fewer than columns
    dense = make_model("llama", blocks=2)
    model, report = pruned(dense, make_tokens(1, 6), damp=0.0, target=target)
    assert all(row.damp > 0 and "not positive definite" in row.note for row in report.layers)
    for row in report.layers:
        assert cuobs.verify(model.get_submodule(row.name).weight.data, "2:4")
    _, report = pruned(dense, make_tokens(64, 32), damp=0.01, target=target)
    assert all(row.damp == 0.01 and row.note == "" for row in report.layers)


@pytest.mark.parametrize("target", ["mixed", "pruned"])
def test_layers_that_share_a_weight_stay_as_they_are(tokens, target):
    """In two blocks, and in one: pruned for one of them, it would be wrong for the other."""
    model = make_model("llama")
    first, second = (model.model.layers[i] for i in (0, 1))
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    first.self_attn.v_proj.weight = first.self_attn.k_proj.weight
    shared = {
        "model.layers.0.mlp.up_proj": "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj": "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.self_attn.k_proj": "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.v_proj": "model.layers.0.self_attn.k_proj.weight",
    }
    found, report = pruned(model, tokens, target=target)
    rows = {row.name: row for row in report.layers}
    assert len(rows) == 21 and shared.keys() < rows.keys()
    for name, row in rows.items():
        weight, before = (m.get_submodule(name).weight for m in (found, model))
        if name in shared:
            assert row.note == f"left as it is: it shares its weight with {shared[name]}"
            assert torch.equal(weight, before) and row.loss is None
        else:
            assert row.note == "" and cuobs.verify(weight.data, "2:4")


@pytest.mark.parametrize(("windows", "warned"), [(2, True), (4, False)])
def test_few_tokens_are_warned_of_once(tokens, windows, warned):
    """46 and 92 of them, first tokens left out, for the 64 columns of down_proj."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        report = prune_model(make_model("llama"), tokens[:windows], method="wanda", device="cpu")
    said = [str(w.message) for w in found if "columns" in str(w.message)]
    assert len(said) == warned and report.protocol["tokens"] == 23 * windows
    if warned:
        assert said[0].startswith("tokens: found 46 for 64 columns of model.layers.0.")


def test_bfloat16(tokens):
    model = make_model("llama", blocks=2).bfloat16()
    found, report = pruned(model, tokens)
    assert all(t.dtype == torch.bfloat16 for t in found.state_dict().values())
    reference = outcome("llama", "mixed", True)[2]
    for row, other in zip(report.layers, reference.layers, strict=True):
        assert cuobs.verify(found.get_submodule(row.name).weight.data.float(), "2:4")
        assert row.loss == pytest.approx(other.loss, rel=0.2, abs=0.02)


def test_tied_embeddings_stay_tied(tokens):
    model = make_model("llama", tie_word_embeddings=True)
    before = model.lm_head.weight.clone()
    found, _ = pruned(model, tokens)
    assert found.lm_head.weight.data_ptr() == found.model.embed_tokens.weight.data_ptr()
    assert torch.equal(found.lm_head.weight, before)


def test_masks_are_in_the_form_of_the_weight(tokens):
    model = make_model("gpt2")
    report = prune_model(model, tokens, keep_masks=True, device="cpu")
    assert len(report.masks) == len(report.layers)
    for name, mask in report.masks.items():
        weight = model.get_submodule(name).weight
        assert mask.shape == weight.shape and mask.dtype == torch.bool
        assert not weight[~mask].any()
        assert int(mask.sum()) == mask.numel() // 2


def test_batches_change_little(tokens):
    model = make_model("llama")
    a, _ = pruned(model, tokens, batch_tokens=24)
    b, _ = pruned(model, tokens, batch_tokens=10_000)
    others = weights_of(b)
    for name, tensor in weights_of(a).items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-2, atol=1e-3)


def test_same_run_gives_the_same_bits(family, tokens):
    model = make_model(family, blocks=2)
    assert same(*(weights_of(pruned(model, tokens, tune=1)[0]) for _ in range(2)))


def test_drift_is_that_of_the_hidden_states(tokens):
    model, found, report = outcome("llama", "mixed", False)
    ids = torch.tensor(tokens)
    states = []
    for m in (model, found):
        _, blocks = find_blocks(m)
        entry = capture(m, blocks, [(ids, None)], "cpu")
        hidden = entry.hidden[0]
        with torch.no_grad():
            for i, block in enumerate(blocks):
                hidden = run(block, hidden, entry.calls[i][0])
        states.append(hidden)
    expected = float((states[0] - states[1]).norm() / states[0].norm())
    assert report.blocks[-1].drift == pytest.approx(expected, rel=1e-4)


def test_drift_is_over_the_tokens_that_count(tokens):
    """Huge hidden states of tokens that are left out do not dilute it."""
    mask = np.ones(tokens.shape, int)
    mask[:, :6] = 0
    found = []
    for token in 3, 4:
        padded = np.where(mask == 1, tokens, token)
        _, report = pruned(make_model("llama"), padded, attention_mask=mask)
        found.append([block.drift for block in report.blocks])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_modes_are_restored(tokens):
    model = make_model("llama").train()
    model.model.layers[1].eval()
    prune_model(model, tokens, device="cpu")
    assert model.training and model.model.layers[2].mlp.training
    assert not model.model.layers[1].training and not model.model.layers[1].mlp.training


def test_a_forward_of_ones_own_is_kept(tokens):
    model = make_model("llama")
    block = model.model.layers[1]
    whole, seen = block.forward, []

    def forward(*args, **kwargs):
        seen.append(1)
        return whole(*args, **kwargs)

    block.forward = forward
    prune_model(model, tokens, device="cpu")
    assert block.forward is forward and seen


def test_a_weight_that_is_not_finite_is_named(tokens):
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="model.layers.1.mlp.down_proj: W: found 1 elements"):
        prune_model(model, tokens, target="pruned", device="cpu")


@pytest.mark.parametrize("kind", ["Mpt", "Bloom"])
def test_what_is_by_head_is_not_taken_for_windows(kind, tokens):
    """As many heads as windows: neither a wrong result in silence nor a traceback."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=8
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    before = weights_of(model)
    length = tokens.shape[1]
    with pytest.raises(
        ValueError, match=f"gives one window something else .*; batch_tokens={length} runs them"
    ):
        prune_model(model, tokens, device="cpu")
    assert same(weights_of(model), before)
    prune_model(model, tokens, device="cpu", batch_tokens=length)


@pytest.mark.parametrize(
    "change,error,match",
    [
        ({"pattern": "2:5:7"}, ValueError, "pattern"),
        ({"method": "sparsegtp"}, ValueError, "nearest: sparsegpt"),
        ({"splits": 4}, ValueError, "splits.*admm takes"),
        ({"refine": "no"}, ValueError, "refine"),
        ({"target": "mix"}, ValueError, "target.*nearest: mixed"),
        ({"target": "half"}, ValueError, "target: found 'half', expected .*dense$"),
        ({"dense_share": -1}, ValueError, "dense_share: found -1"),
        ({"target": "pruned", "residual_share": 0.5}, ValueError, "with target='pruned'"),
        ({"tune_rate": float("nan")}, ValueError, "tune_rate: found nan"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens: found 0"),
        ({"tokens": make_tokens(2, 65)}, ValueError, "tokens: found windows of 65"),
        ({"residual_share": (1, 2, 3)}, ValueError, "residual_share"),
        ({"skip": "("}, ValueError, "skip: found '[(]', a regular expression, expected a glob"),
        ({"damp": -0.1}, ValueError, "damp"),
        ({"tune": -1}, ValueError, "tune"),
        ({"device": "tpu"}, ValueError, "device"),
        ({"pattern": "2:7"}, ValueError, "no linear that could be pruned"),
        ({"tokens": np.zeros((2, 8))}, TypeError, "tokens: found dtype float64"),
        ({"tokens": np.zeros(8, int)}, ValueError, "tokens: found shape"),
        ({"tokens": np.full((2, 8), 97)}, ValueError, "tokens: found 97 to 97, expected 0 to 96"),
        ({"attention_mask": np.ones((2, 8))}, ValueError, "attention_mask: found shape"),
        ({"attention_mask": np.zeros((8, 24))}, ValueError, "none that count"),
        ({"attention_mask": np.full((8, 24), 0.5)}, ValueError, "attention_mask: found other"),
        ({"skip": "qproj"}, ValueError, "skip: found no linear.*layers.0.self_attn.q_proj$"),
        ({"skip": "q_proj"}, ValueError, "no linear whose name 'q_proj' fits.*; '[*]q_proj[*]' fi"),
    ],
)
def test_bad_input_is_refused_before_any_work(tokens, change, error, match):
    model = make_model("llama")
    before = weights_of(model)
    with pytest.raises(error, match=match):
        prune_model(model, **{"tokens": tokens, "device": "cpu", **change})
    assert same(before, weights_of(model))


def test_activations_that_are_not_finite_are_refused(tokens):
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or inf"):
        prune_model(model, tokens, device="cpu")


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "true-obs"])
def test_linears_of_a_group_are_pruned_as_each_alone(tokens, method):
    """q, k and v share a call; their rows must not see each other."""
    found, _ = pruned(make_model("llama"), tokens, method=method, target="pruned")
    alone, _ = pruned(make_model("llama"), tokens, method=method, target="pruned",
                      skip=["*.[kvo]_proj", "*.up_proj", "*.down_proj", "*.layers.[12].*"]
                      )  # fmt: skip
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(weights_of(found)[name], weights_of(alone)[name])


def test_rows_that_depend_on_the_height_are_not_stacked(tokens):
    """Rows r and r + M/2 compete: set below each other, q and k would mix."""
    model = make_model("llama", num_key_value_heads=4, intermediate_size=32)
    for module in linears(model.model.layers).values():
        assert tuple(module.weight.shape) == (32, 32)
    # M/2 rows of 32 are 512 elements
    pattern = "view=(M/2,2,K):(K,512,1) block=(1,1,1) scope=(1,2,1) keep=1"
    found, report = pruned(model, tokens, pattern=pattern)
    for row in report.layers:
        weight = found.get_submodule(row.name).weight.data
        assert int(((weight[:16] != 0) & (weight[16:] != 0)).sum()) == 0
        assert row.sparsity == 0.5


@pytest.mark.parametrize("target", ["pruned", "mixed"])
def test_hidden_states_do_not_outlive_their_block(tokens, target, monkeypatch):
    """What entered the first block is gone after it; nothing lies there before the start."""
    module = importlib.import_module("cuobs.models.pruning.prune")
    seen, alive = [], []

    def watched(*args, **given):
        found = capture(*args, **given)
        seen.extend(weakref.ref(h) for h in found.hidden)
        return found

    monkeypatch.setattr(module, "capture", watched)
    prune_model(
        make_model("llama"), tokens, target=target, device="cpu", batch_tokens=72,
        starting=lambda report: alive.append(len(seen)),
        on_block=lambda report, blocks: alive.append(sum(s() is not None for s in seen)),
    )  # fmt: skip
    assert len(seen) == 3 and alive == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "change, match",
    [
        ({"skip": 5}, "skip: found int"),
        ({"tune_rate": "a"}, "tune_rate: found 'a'"),
        ({"speed": 1}, "speed: found an unknown argument"),
        ({"devices": 2}, "devices: found 2, expected it for a single layer"),
        ({"resume": True}, "resume: found no checkpoint_folder"),
    ],
)
def test_bad_arguments(tokens, change, match):
    model = make_model("llama")
    before = weights_of(model)
    with pytest.raises((ValueError, TypeError), match=match):
        prune_model(model, tokens, device="cpu", **change)
    assert same(before, weights_of(model))


@pytest.mark.parametrize("skip", [
    "k_proj|v_proj", "(q|k)_proj", "layers\\.0", "down_proj$", "^model", ".+_proj", "a{2}",
])  # fmt: skip
def test_expressions_are_no_globs(skip):
    for given in (skip, ["lm_head", skip]):
        with pytest.raises(ValueError, match="skip: found .*, a regular expression, expected a gl"):
            read_arguments({"skip": given})


def test_one_glob_or_several():
    assert read_arguments({"skip": "*.[qk]_proj"}).config.skip == ("*.[qk]_proj",)
    recipe = read_arguments({"skip": ["*.layers.[!0].*", "lm_head"]})
    assert recipe.of("model.layers.1.mlp.up_proj") is None is recipe.of("lm_head")
    assert recipe.of("model.layers.0.mlp.up_proj") == recipe.config.recipe
