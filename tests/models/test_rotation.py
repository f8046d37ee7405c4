"""Rotations that fold away: the same function in another basis, and a lower objective."""

import types

import numpy as np
import pytest
import torch
from small_models import make_model, make_tokens, same, weights_of

import cuobs
from cuobs.models.digests import digest
from cuobs.models.recipe import RotationRecipe
from cuobs.models.rotating import folding
from cuobs.models.rotating.pruned_share import Scopes, pruned_share, smallest
from cuobs.models.rotating.rotation import load, rotate
from cuobs.models.rotating.rotation_learning import learn
from cuobs.models.rotating.rotation_moments import deal
from cuobs.models.structure import linears, oriented

FOLD = ("llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "phi3")
REFUSED = {
    "opt": r"self_attn_layer_norm takes the mean away \(LayerNorm\)",
    "gpt2": r"ln_1 takes the mean away \(LayerNorm\)",
    "gemma2": r"post_attention_layernorm between self_attn.o_proj and the residual stream",
    "gemma3": r"post_attention_layernorm between self_attn.o_proj and the residual stream",
    "olmo2": r"q_proj reads the residual stream with no norm before it",
    "mixtral": r"mixture of experts",
}
PATTERNS = (*cuobs.patterns(), "8:16", "1:4x2")
LENGTH = 24
# The score that a model shows by itself, every column where it was.
SHOWN = {"score": "activations", "permute": False}


def tokens_of(windows=8):
    return torch.from_numpy(make_tokens(windows, LENGTH))


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def in_float64(model):
    """A model whose norms and attention compute in float64, which transformers' do not."""
    model = model.double()
    model.set_attn_implementation("sdpa")

    def forward(self, x):
        epsilon = getattr(self, "variance_epsilon", None) or self.eps
        scale = self.weight + ("Gemma" in type(self).__name__)
        return scale * x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(forward, module)
    return model


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


def random_rotation(stream, seed=1):
    """Any rotation that the structure allows."""
    generator = torch.Generator().manual_seed(seed)
    values = tuple(
        folding.random_basis((len(b.values.rows),), b.values.rows.shape[1], generator)
        if b.values
        else None
        for b in stream.blocks
    )
    orders = tuple(
        tuple(torch.randperm(64, generator=generator) for _ in b.inner) for b in stream.blocks
    )
    return folding.Rotation(folding.random_basis((), stream.width, generator), values, orders)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FOLD)
def test_another_basis_gives_the_same_logits(family, tied, dtype, limit):
    model = make_model(family, blocks=2, tie_word_embeddings=tied)
    tokens = tokens_of()
    stream = folding.examine(model, tokens)
    if dtype == torch.float64:
        model = in_float64(model)
    before = weights_of(model)
    dense = logits(model, tokens)
    added = folding.fold(model, stream, random_rotation(stream))
    assert distance(logits(model, tokens), dense) < limit
    head = model.get_output_embeddings().weight
    assert added == (head.numel() * head.element_size() if tied else 0)
    after = weights_of(model)
    changed = {name for name in before if not torch.allclose(after[name], before[name])}
    untouched = {n for n in before if "q_norm" in n or "k_norm" in n or "rotary" in n}
    untouched |= {n for n in before if n.endswith(("q_proj.bias", "k_proj.bias"))}
    assert changed == before.keys() - untouched


@pytest.mark.parametrize("family", FOLD)
def test_structure(family):
    stream = folding.examine(make_model(family), tokens_of())
    assert stream.embeddings == ("model.embed_tokens",)
    assert stream.norm.name == "model.norm" and stream.head == "lm_head"
    for block in stream.blocks:
        assert block.writers == ("self_attn.o_proj", "mlp.down_proj")
        assert [n.name for n in block.norms] == ["input_layernorm", "post_attention_layernorm"]
        if family == "phi3":  # q, k and v, and gate and up, in one linear each
            assert block.values is None and block.inner == ()
            continue
        assert block.values[:2] == ("self_attn.v_proj", "self_attn.o_proj")
        assert block.values.rows.tolist() == np.arange(16).reshape(2, 8).tolist()
        assert block.values.columns.tolist() == np.arange(32).reshape(2, 2, 8).tolist()
        assert block.inner == ((("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),)


def test_biases_of_every_linear_fold():
    model = make_model("llama", attention_bias=True, mlp_bias=True)
    tokens = tokens_of()
    stream = folding.examine(model, tokens)
    model = in_float64(model)
    dense = logits(model, tokens)
    folding.fold(model, stream, random_rotation(stream))
    assert distance(logits(model, tokens), dense) < 1e-10


@pytest.mark.parametrize("family", REFUSED)
def test_what_does_not_fold_is_refused_by_its_reason(family):
    model = make_model(family)
    before = weights_of(model)
    with pytest.raises(ValueError, match=REFUSED[family]):
        rotate(model, tokens_of(), steps=1)
    assert same(weights_of(model), before)


class Scaled(torch.nn.Module):
    """A linear with a scale of each output behind it."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x) * torch.linspace(1, 2, 32, dtype=x.dtype)


class Shifted(torch.nn.Module):
    """A norm with a bias."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.bias = norm, torch.nn.Parameter(torch.ones(32))

    def forward(self, x):
        return self.norm(x) + self.bias


def gate_by_an_element_of_the_stream(block):
    """Let one element of the hidden states scale what attention gives."""
    gates = []
    block.register_forward_pre_hook(lambda _, args: gates.append(args[0][..., :1].sigmoid()))
    block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: (args[0] * gates[-1],))


def test_what_does_not_commute_is_refused():
    model = make_model("llama")
    block = model.model.layers[1]
    block.self_attn.o_proj = Scaled(block.self_attn.o_proj)
    with pytest.raises(ValueError, match="adds to the residual stream is no sum of its linears"):
        folding.examine(model, tokens_of())
    model = make_model("llama")
    model.model.layers[2].input_layernorm = Shifted(model.model.layers[2].input_layernorm)
    with pytest.raises(ValueError, match=r"layers.2.input_layernorm is no RMSNorm without bias"):
        folding.examine(model, tokens_of())
    model = make_model("llama")
    gate_by_an_element_of_the_stream(model.model.layers[0])
    with pytest.raises(ValueError, match="layers.0 in another basis gives hidden states that dif"):
        folding.examine(model, tokens_of())
    model = make_model("llama")
    model.model.norm = torch.nn.LayerNorm(32)
    with pytest.raises(ValueError, match=r"model.norm takes the mean away \(LayerNorm\)"):
        folding.examine(model, tokens_of())


def test_a_block_that_does_not_run_in_float64_is_refused():
    def fill(_, args):
        torch.full((), torch.finfo(args[0].dtype).min)  # in the default dtype, as XGLM's attention

    model = make_model("llama")
    model.model.layers[1].mlp.register_forward_pre_hook(fill)
    with pytest.raises(ValueError, match="rotate: found that model.layers.1 does not run in floa"):
        rotate(model, tokens_of())


def test_parts_that_tokens_do_not_pass_are_refused():
    model = make_model("llama")
    model.model.visual = torch.nn.Linear(8, 32)
    with pytest.raises(ValueError, match="model.visual.weight takes no part in what tokens alone"):
        folding.examine(model, tokens_of())
    model = make_model("llama")
    model.model.layers[1].cross = torch.nn.Linear(32, 32)
    with pytest.raises(ValueError, match="layers.1 runs cross 0 times, expected once"):
        folding.examine(model, tokens_of())
    model = make_model("llama")
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[2].mlp.up_proj)
    with pytest.raises(ValueError, match="layers.2.mlp.up_proj under a parametrization"):
        rotate(model, tokens_of())


def brute_share(W, h, pattern):
    """Pruned score over score, of every scope the blocks with the least."""
    layout = cuobs.pattern.parse(pattern).compile(*W.shape)
    S = (W.double() ** 2 * h.double()).numpy()
    scopes = S[layout.row_order[:, None, :, None], layout.column_order[:, None]]
    scores = [scopes[..., layout.blocks == b].sum(-1) for b in range(layout.n_blocks)]
    return np.sort(scores, 0)[: layout.n_blocks - layout.keep].sum() / S.sum()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_share_and_its_gradient(pattern):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(2, 32, 64, generator=generator)
    h = torch.rand(2, 64, generator=generator) + 0.1
    scopes = Scopes(cuobs.pattern.parse(pattern).compile(32, 64), "cpu")
    W.requires_grad_(), h.requires_grad_()
    share = pruned_share(W, h, scopes)
    expected = [brute_share(W[i].detach(), h[i].detach(), pattern) for i in range(2)]
    assert share.tolist() == pytest.approx(expected, rel=1e-5)
    share[1].backward()
    assert not W.grad[0].any() and not h.grad[0].any()
    for tensor, place in ((W, (1, 3, 17)), (W, (1, 20, 40)), (h, (1, 17))):
        moved, step = tensor.detach().clone(), 1e-3
        moved[place] += step
        other = (moved[1], h[1].detach()) if tensor is W else (W[1].detach(), moved[1])
        slope = (brute_share(*other, pattern) - expected[1]) / step
        assert float(tensor.grad[place]) == pytest.approx(slope, rel=0.02, abs=1e-6)


def test_smallest():
    scores = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    for k in range(1, 8):
        assert torch.equal(smallest(scores, k), scores.sort(-1)[0][:, k - 1])


def without_first(tokens):
    counted = torch.ones_like(tokens).bool()
    counted[:, 0] = False
    return counted


def everywhere(model, pattern="2:4"):
    return {name: cuobs.pattern.parse(pattern) for name in linears(model) if "layers" in name}


def layers_of(model, tokens):
    """Names of linears, their weights, and mean squares of their inputs without first tokens."""
    inputs = {}

    def watch(name):
        return lambda _, args: inputs.__setitem__(name, args[0][:, 1:].flatten(0, 1))

    layers = {n: m for n, m in linears(model).items() if "layers" in n}
    handles = [m.register_forward_pre_hook(watch(n)) for n, m in layers.items()]
    logits(model, tokens)
    for handle in handles:
        handle.remove()
    return [(n, oriented(m), inputs[n].double().square().mean(0)) for n, m in layers.items()]


def share_of(model, tokens, pattern):
    """The objective of a model as it is, from its own inputs, first tokens left out."""
    layers = layers_of(model, tokens)
    pruned = sum(W.numel() * brute_share(W, h, pattern) for _, W, h in layers)
    return pruned / sum(W.numel() for _, W, _ in layers)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_objective_is_what_it_says_and_falls_for_every_pattern(pattern):
    model, tokens = make_model("llama"), tokens_of()
    stream = folding.examine(model, tokens)
    eye = torch.eye(stream.width, dtype=torch.float64)
    depth = len(stream.blocks)
    none = folding.Rotation(eye, (None,) * depth, ((),) * depth)
    plain = make_model("llama")
    folding.fold(plain, stream, none)  # scales of norms alone
    found = rotate(model, tokens, pattern, steps=12, rate=1e-2, **SHOWN)
    assert found.before == pytest.approx(share_of(plain, tokens, pattern), rel=1e-4)
    assert found.after == pytest.approx(share_of(model, tokens, pattern), rel=1e-4)
    assert found.after < 0.9 * found.before
    assert found.heads == 6


@pytest.mark.parametrize("family", FOLD)
def test_learned_bases_are_orthogonal_and_leave_the_model_alone(family):
    model, tokens = make_model(family), tokens_of()
    before = weights_of(model)
    stream = folding.examine(model, tokens)
    counted, patterns = without_first(tokens), everywhere(model)
    learned = learn(model, stream, tokens, counted, patterns, RotationRecipe(10, rate=1e-2))
    assert same(weights_of(model), before)
    assert len(learned.history) == 11 and learned.history[-1] < learned.history[0]
    for R in filter(lambda R: R is not None, (learned.rotation.stream, *learned.rotation.values)):
        eye = torch.eye(R.shape[-1], dtype=torch.float64)
        assert R.dtype == torch.float64
        assert float((R.mT @ R - eye).abs().max()) < 1e-12


def test_compensated_scores_are_those_of_the_inverse():
    model, tokens = make_model("qwen2"), tokens_of()
    stream = folding.examine(model, tokens)
    found = learn(
        model, stream, tokens, without_first(tokens), everywhere(model),
        RotationRecipe(steps=0, score="compensated", permute=False, damp=0.1),
    )  # fmt: skip
    depth, whole, pruned = len(stream.blocks), 0, 0.0
    eye = torch.eye(stream.width, dtype=torch.float64)
    folding.fold(model, stream, folding.Rotation(eye, (None,) * depth, ((),) * depth))
    inputs = {}
    for name, module in linears(model).items():
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0][:, 1:].flatten(0, 1))
        )
    logits(model, tokens)
    for name, module in linears(model).items():
        if "layers" in name:
            X = inputs[name].double()
            H = X.T @ X / len(X)
            C = torch.linalg.inv(H + 0.1 * H.diagonal().mean() * torch.eye(len(H)))
            pruned += module.weight.numel() * brute_share(oriented(module), 1 / C.diagonal(), "2:4")
            whole += module.weight.numel()
    assert found.history[0] == pytest.approx(pruned / whole, rel=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_dealing_puts_a_column_of_each_kind_into_each_scope(pattern):
    worth = torch.rand(64, generator=torch.Generator().manual_seed(3))
    order = deal(worth, (32, 64), cuobs.pattern.parse(pattern))
    assert sorted(order.tolist()) == list(range(64))
    layout = cuobs.pattern.parse(pattern).compile(32, 64)
    rank = worth.argsort(descending=True).argsort()[order].numpy()
    if pattern == "block16-row8":  # rows compete, not columns
        assert order.tolist() == list(range(64))
        return
    width = 64 // layout.n_blocks
    for columns in layout.column_order:
        for block in range(layout.n_blocks):
            inside = rank[columns[layout.blocks[0] == block]]
            assert (inside // width == block).all()
    means = rank[layout.column_order].mean(1)
    assert (np.diff(means) > 0).all()  # the dearest scope first


def test_permuted_columns_leave_the_function():
    model, tokens = make_model("llama"), tokens_of()
    dense = logits(model, tokens)
    found = rotate(model, tokens, "2:4", steps=2, score="activations")
    assert found.permuted
    assert distance(logits(model, tokens), dense) < 1e-4
    assert share_of(model, tokens, "2:4") == pytest.approx(found.after, rel=1e-4)


def test_layers_of_other_patterns_count_by_their_own():
    model, tokens = make_model("llama"), tokens_of()
    names = everywhere(model)
    down = {n for n in names if "down" in n}
    patterns = {n: "4:8" if n in down else "2:4" for n in names if "mlp" not in n or n in down}
    found = rotate(model, tokens, patterns, steps=0)
    assert found.pattern == "2:4, 4:8"
    sizes = {n: m.weight.numel() for n, m in linears(model).items() if n in patterns}
    parts = {}
    for pattern in ("2:4", "4:8"):
        mine = {n: p for n, p in patterns.items() if p == pattern}
        again = rotate(make_model("llama"), tokens, mine, steps=0)
        parts[pattern] = again.before * sum(sizes[n] for n in mine)
    assert found.before == pytest.approx(sum(parts.values()) / sum(sizes.values()), rel=1e-5)


def test_what_the_caller_has_set_changes_nothing():
    tokens = tokens_of()
    a, b = make_model("llama"), make_model("llama")
    rotate(a, tokens, "2:4", steps=2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rotate(b, tokens, "2:4", steps=2)
    assert same(weights_of(a), weights_of(b))
    assert all(p.requires_grad for p in b.parameters())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_dearest_scopes_of_the_stream_come_first(pattern):
    plain, model, tokens = make_model("llama"), make_model("llama"), tokens_of()
    found = rotate(model, tokens, pattern, steps=8, rate=1e-2, score="activations")
    assert found.after == pytest.approx(share_of(model, tokens, pattern), rel=1e-4)
    assert distance(logits(model, tokens), logits(plain, tokens)) < 1e-4
    layout = cuobs.pattern.parse(pattern).compile(32, 32)
    if layout.rows > 1:  # rows of writers compete as well: nothing moves
        return
    worth = stream_worth(model, tokens)[layout.column_order].sum(1)
    assert (np.diff(worth) <= 1e-6 * worth.max()).all()


def stream_worth(model, tokens):
    """The score by element of the stream: each reader's share, by its size."""
    worth = np.zeros(32)
    for name, W, h in layers_of(model, tokens):
        if not name.endswith(("o_proj", "down_proj")):
            score = (W.double().square().sum(0) * h).numpy()
            worth += W.numel() * score / score.sum()
    return worth


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, tokens = make_model("qwen2", tie_word_embeddings=True).to(dtype), tokens_of()
    dense = logits(model, tokens).float()
    exact = make_model("qwen2", tie_word_embeddings=True).to(dtype).float()
    rounding = distance(dense, logits(exact, tokens))
    found = rotate(model, tokens, "2:4", steps=10, rate=1e-2)
    assert found.after < found.before and found.deviation < 0.1
    assert all(p.dtype == dtype for p in model.parameters())
    assert distance(logits(model, tokens).float(), dense) < 5 * rounding


def test_a_hessian_that_is_not_positive_definite_is_damped_more():
    """One window of 23 tokens for 64 columns, no damping; and inputs that are nothing but zeros."""
    for damp, dead in ((0, False), (1e-30, False), (0.01, True)):
        model, tokens = make_model("llama"), tokens_of(1)
        if dead:
            model.model.layers[0].mlp.up_proj.weight.data.zero_()
        dense = logits(model, tokens)
        found = rotate(model, tokens, "2:4", steps=4, rate=1e-2, damp=damp)
        assert 0 < found.after < found.before < 0.5
        assert distance(logits(model, tokens), dense) < 1e-4


def test_what_is_no_number_is_refused():
    model, tokens = make_model("llama"), tokens_of()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite behind model.layers.1, expected finite"):
        rotate(model, tokens)
    # What overflows float16 alone is found where the model runs in it.
    model = make_model("llama").half()
    model.model.layers[1].input_layernorm.weight.data.fill_(6e4)
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"NaN or infinite in model.layers.1, .* bfloat16"):
        rotate(model, tokens)
    assert same(weights_of(model), before)
    model = make_model("llama").half()
    model.model.norm.weight.data.fill_(3e3)
    model.lm_head.weight.data.mul_(100)
    with pytest.raises(ValueError, match="rotate: found logits that differ by nan of their norm"):
        rotate(model, tokens, steps=1)


def test_padding_enters_no_sum():
    tokens = tokens_of()
    mask = torch.ones_like(tokens)
    mask[:, 16:] = 0
    other = tokens.clone()
    other[:, 16:] = 5
    a, b = make_model("llama"), make_model("llama")
    rotate(a, tokens, "2:4", steps=3, attention_mask=mask)
    rotate(b, other, "2:4", steps=3, attention_mask=mask)
    assert same(weights_of(a), weights_of(b))


def test_a_digest_knows_shape_and_dtype():
    tensor = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    others = tensor.T.contiguous().T, tensor.reshape(4, 3), tensor.view(torch.float32), tensor + 1
    assert [digest(t) == digest(tensor) for t in others] == [True, False, False, False]


def test_what_is_stored_gives_the_same_bits(tmp_path):
    tokens, path = tokens_of(), tmp_path / "rotation.safetensors"
    a, b, c = (make_model("qwen2") for _ in range(3))
    first = rotate(a, tokens, "2:4", steps=5, permute=True, stored=path)
    found, calls = path.read_bytes(), []
    again = rotate(
        b, tokens, "2:4", steps=5, permute=True, stored=path, progress=lambda *s: calls.append(s)
    )
    assert not calls and path.read_bytes() == found
    assert (first.before, first.after) == (again.before, again.after)
    assert same(weights_of(a), weights_of(b))
    rotate(c, tokens, "2:4", steps=5, permute=True)
    assert same(weights_of(a), weights_of(c))  # nothing is drawn at random
    with pytest.raises(ValueError, match="other settings or tokens"):
        rotate(make_model("qwen2"), tokens, "4:8", steps=5, permute=True, stored=path)
    path.write_bytes(found[:100])
    with pytest.raises(ValueError, match="damaged"):
        load(path, {})


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"steps": -1}, "steps: found -1"),
        ({"rate": 0}, "rate: found 0"),
        ({"windows": 0}, "windows: found 0"),
        ({"score": "weights"}, "score: found 'weights'"),
        ({"damp": -1}, "damp: found -1"),
        ({"pattern": "7:64"}, "divides no linear"),
        ({"attention_mask": torch.ones(8, 3)}, r"attention_mask: found shape \(8, 3\)"),
        ({"attention_mask": torch.zeros(8, LENGTH)}, "tokens: found none that count"),
    ],
)
def test_bad_arguments(arguments, sentence):
    model = make_model("llama", hidden_size=24, intermediate_size=24, num_attention_heads=3,
                       num_key_value_heads=3)  # fmt: skip
    with pytest.raises(ValueError, match=sentence):
        rotate(model, tokens_of(), **{"steps": 1, **arguments})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", [SHOWN, {}])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_on_a_gpu(pattern, changes):
    tokens = tokens_of()
    a, b = make_model("qwen2"), make_model("qwen2")
    dense = logits(a, tokens)
    options = {"steps": 12, "rate": 1e-2, **changes}
    expected = rotate(a, tokens, pattern, device="cpu", **options)
    found = rotate(b, tokens, pattern, device="cuda", **options)
    assert found.before == pytest.approx(expected.before, rel=1e-2)
    assert found.after == pytest.approx(expected.after, rel=3e-2)
    assert distance(logits(b, tokens), dense) < 1e-4
    c = make_model("qwen2")
    rotate(c, tokens, pattern, device="cuda", **options)
    assert same(weights_of(b), weights_of(c))
