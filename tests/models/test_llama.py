"""Megatron-Core's modules, as we put them together, against a Llama written here from the formulas in float64.

Legend: B rows, S tokens, V vocabulary, h hidden, D head size, G key/value heads, N places that are read.
"""

import dataclasses
import math

import pytest
import torch
from whole_rows import outputs

from megatron_safe.config import ModelConfig
from megatron_safe.errors import UserError
from megatron_safe.models.llama import architecture, build, check_model_fits, padded_vocab_size
from megatron_safe.models.packing import Sequences, pack
from megatron_safe.models.rope import rope_frequencies

VOCABULARY = 21
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2, rotary_base=500.0,
    norm_epsilon=1e-3, max_sequence_length=32, vocab_multiple=8, init_std=0.2,
)  # fmt: skip


def build_random(model, runtime, head="language", precision="fp32", seed=0):
    """Every weight random, norms and biases too: at their 1 and 0 a mistake in them would not show."""
    module = build(model, runtime, head, VOCABULARY, precision, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return module


def rms_norm(x_Sh, weight_h, epsilon):
    return x_Sh / torch.sqrt((x_Sh**2).mean(dim=-1, keepdim=True) + epsilon) * weight_h


def rotate(x_SD, base):
    """RoPE (Su et al., 2021), pairs (i, i + D/2) as in GPT-NeoX and Llama's Hugging Face weights."""
    size = x_SD.size(1)
    angles_SP = torch.arange(len(x_SD)).double()[:, None] * torch.tensor(
        [base ** (-2 * i / size) for i in range(size // 2)], dtype=torch.float64
    )
    first, second = x_SD[:, : size // 2], x_SD[:, size // 2 :]
    cos, sin = angles_SP.cos(), angles_SP.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)


def in_float64(module) -> dict[str, torch.Tensor]:
    """Its weights by name, to be differentiated by."""
    return {name: parameter.detach().double().requires_grad_() for name, parameter in module.named_parameters()}


def reference(w, model, tokens_S, head):
    """Logits [S, V] or scores [S] of one row, of weights in float64, head by head and token by token."""
    groups = model.num_query_groups or model.num_attention_heads
    per_group, size = model.num_attention_heads // groups, model.hidden_size // model.num_attention_heads
    x_Sh = w["embedding.word_embeddings.weight"][tokens_S]
    for layer in range(model.num_layers):
        name = f"decoder.layers.{layer}"
        normed_Sh = rms_norm(x_Sh, w[f"{name}.input_layernorm.weight"], model.norm_epsilon)
        # Megatron's rows: group by group its query heads, its key, its value.
        qkv_GhD = w[f"{name}.self_attention.linear_qkv.weight"].view(groups, per_group + 2, size, -1)
        contexts = []
        for head_number in range(model.num_attention_heads):
            group, place = divmod(head_number, per_group)
            query_SD = rotate(normed_Sh @ qkv_GhD[group, place].T, model.rotary_base)
            key_SD = rotate(normed_Sh @ qkv_GhD[group, per_group].T, model.rotary_base)
            value_SD = normed_Sh @ qkv_GhD[group, per_group + 1].T
            rows = []
            for t in range(len(tokens_S)):
                seen = slice(max(0, t + 1 - (model.sliding_window or t + 1)), t + 1)
                p = torch.softmax(key_SD[seen] @ query_SD[t] / math.sqrt(size), dim=0)
                rows.append(p @ value_SD[seen])
            contexts.append(torch.stack(rows))
        x_Sh = x_Sh + torch.cat(contexts, dim=1) @ w[f"{name}.self_attention.linear_proj.weight"].T
        normed_Sh = rms_norm(x_Sh, w[f"{name}.pre_mlp_layernorm.weight"], model.norm_epsilon)
        gate, up = (normed_Sh @ w[f"{name}.mlp.linear_fc1.weight"].T).chunk(2, dim=1)
        x_Sh = x_Sh + (gate / (1 + torch.exp(-gate)) * up) @ w[f"{name}.mlp.linear_fc2.weight"].T
    x_Sh = rms_norm(x_Sh, w["decoder.final_layernorm.weight"], model.norm_epsilon)
    if head == "scalar":
        return (x_Sh @ w["output_layer.weight"].T + w["output_layer.bias"])[:, 0]
    output = w["embedding.word_embeddings.weight"] if model.tie_embeddings else w["output_layer.weight"]
    return x_Sh @ output.T


def random_tokens(rows, length, seed=5):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("head", ["language", "scalar"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("groups", [None, 4, 2, 1])
def test_forward_is_the_formulas(runtime, head, tied, groups):
    model = dataclasses.replace(MODEL, num_query_groups=groups, tie_embeddings=tied)
    module = build_random(model, runtime, head)
    tokens_BS = random_tokens(3, 11)
    with torch.no_grad():
        output = outputs(module, tokens_BS)
    assert output.shape == ((3, 11, 24) if head == "language" else (3, 11))
    expected = torch.stack([reference(in_float64(module), model, tokens_S, head) for tokens_S in tokens_BS])
    assert expected.std() > 0.3
    if head == "language":
        assert (output[..., VOCABULARY:] == torch.finfo(torch.float32).min).all()
        output, expected = output[..., :VOCABULARY], expected[..., :VOCABULARY]
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head, tied", [("scalar", False), ("language", False), ("language", True)])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("budget", [1, 20, 100])
def test_packs_of_ragged_rows_are_the_formulas_on_each_row_alone(runtime, head, tied, window, budget):
    """What is read, and the gradient of every parameter, whatever stands behind the rows and shares their pack."""
    model = dataclasses.replace(MODEL, tie_embeddings=tied, sliding_window=window)
    module = build_random(model, runtime, head)
    lengths = [7, 1, 12, 7, 3]
    tokens_BS = random_tokens(5, 12)
    read_BS = torch.rand(5, 12, generator=torch.Generator().manual_seed(8)) < 0.5
    read_BS &= torch.arange(12) < torch.tensor(lengths)[:, None]
    packs = pack(Sequences(tokens_BS, torch.tensor(lengths), read_BS), budget)
    assert len(packs) == {1: 5, 20: 2, 100: 1}[budget]
    places = int(read_BS.sum())
    output = torch.full((places, VOCABULARY) if head == "language" else (places,), math.nan)
    for one in packs:
        found = module.logits(module(one))[:, :VOCABULARY] if head == "language" else module(one)
        output = output.index_copy(0, one.places_N, found)
    weights = in_float64(module)
    expected = torch.cat([
        reference(weights, model, row[:length], head)[read[:length]]
        for row, length, read in zip(tokens_BS, lengths, read_BS, strict=True)
    ])  # fmt: skip
    expected = expected[:, :VOCABULARY] if head == "language" else expected
    assert expected.std() > 0.3
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    (output * slope).sum().backward()
    (expected * slope.double()).sum().backward()
    for name, parameter in module.named_parameters():
        wanted = weights[name].grad
        torch.testing.assert_close(parameter.grad.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_bf16_is_near_the_formulas(runtime):
    module = build_random(MODEL, runtime, precision="bf16")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    tokens_BS = random_tokens(2, 9)
    with torch.no_grad():
        output = outputs(module, tokens_BS)[..., :VOCABULARY].double()
        expected = [reference(in_float64(module), MODEL, tokens_S, "language") for tokens_S in tokens_BS]
    expected = torch.stack(expected)[..., :VOCABULARY]
    assert (output - expected).abs().max() < 0.05 * expected.abs().max()


def test_what_comes_after_a_token_does_not_reach_it(runtime):
    module = build_random(MODEL, runtime, "scalar")
    tokens_BS = random_tokens(2, 12)
    changed_BS = tokens_BS.clone()
    changed_BS[:, 7:] = random_tokens(2, 5, seed=6)
    with torch.no_grad():
        before, after = outputs(module, tokens_BS), outputs(module, changed_BS)
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=1e-5, atol=1e-6)
    assert (after[:, 7:] != before[:, 7:]).all()


def test_tied_embeddings_are_one_parameter_and_the_scalar_head_is_not_tied(runtime):
    tied = dataclasses.replace(MODEL, tie_embeddings=True)
    names = dict(build(tied, runtime, "language", VOCABULARY, "fp32", 0).named_parameters())
    assert "output_layer.weight" not in names
    names = dict(build(tied, runtime, "scalar", VOCABULARY, "fp32", 0).named_parameters())
    assert names["output_layer.weight"].shape == (1, 32) and names["output_layer.bias"].shape == (1,)


def test_padding_rows_can_never_be_predicted(runtime):
    module = build_random(MODEL, runtime)
    tokens_BS = random_tokens(2, 5)
    log_probs = torch.log_softmax(outputs(module, tokens_BS), dim=-1)
    assert (log_probs[..., VOCABULARY:].exp() == 0).all()
    log_probs[..., 3].sum().backward()
    gradient_Vh = dict(module.named_parameters())["output_layer.weight"].grad
    assert (gradient_Vh[VOCABULARY:] == 0).all() and (gradient_Vh[:VOCABULARY] != 0).any(dim=1).all()


def test_a_vocabulary_that_needs_no_padding_is_not_masked(runtime):
    module = build(MODEL, runtime, "language", 24, "fp32", 0)
    assert outputs(module, random_tokens(1, 4)).min() > -1e4


@pytest.mark.parametrize("size, multiple, stored", [(21, 8, 24), (24, 8, 24), (25, 8, 32), (1, 128, 128)])
def test_padded_vocab_size(size, multiple, stored):
    assert padded_vocab_size(size, multiple) == stored


@pytest.mark.parametrize(
    "changes, tp, pp, message",
    [
        ({"num_layers": 3}, 1, 2, "m.num_layers: expected a positive multiple of pipeline_model_parallel_size 2, "),
        ({"num_layers": 0}, 1, 1, "m.num_layers: expected a positive multiple of .* found 0"),
        ({}, 3, 1, "m.num_attention_heads: expected a positive multiple of tensor_model_parallel_size 3, found 4"),
        ({}, 4, 1, "m.num_query_groups: expected a positive multiple of tensor_model_parallel_size 4, found 2"),
        ({"ffn_hidden_size": 41}, 2, 1, "m.ffn_hidden_size: .* tensor_model_parallel_size 2, found 41"),
        ({"ffn_hidden_size": -8}, 1, 1, "m.ffn_hidden_size: .* found -8"),
        ({"vocab_multiple": 9}, 2, 1, "m.vocab_multiple: .* tensor_model_parallel_size 2, found 9"),
        ({"hidden_size": 34}, 1, 1, "m.hidden_size: expected a multiple of num_attention_heads 4, found 34"),
        ({"hidden_size": 36}, 1, 1, "m.hidden_size: RoPE needs an even head size, found 9"),
        ({"num_query_groups": 3}, 1, 1, "m.num_query_groups: expected a divisor of num_attention_heads 4, found 3"),
        ({"num_query_groups": 8}, 1, 1, "m.num_query_groups: expected a divisor of num_attention_heads 4, found 8"),
        ({}, 8, 1, r"m.num_attention_heads: .* found 4 \(which allows 1, 2, 4\)"),
        ({"head_dim": 7}, 1, 1, "m.head_dim: RoPE needs an even head size, found 7"),
        (
            {"rope_type": "llama3", "rope_high_freq_factor": 1.0}, 1, 1,
            "m.rope_high_freq_factor: expected more than rope_low_freq_factor 1.0, found 1.0",
        ),
    ],
)
def test_check_model_fits_names_the_field(changes, tp, pp, message):
    with pytest.raises(UserError, match=message):
        check_model_fits(dataclasses.replace(MODEL, **changes), tp, pp, "m")


def test_chunks_of_a_pipeline_rank_have_layers_each():
    message = "pipeline_model_parallel_size x virtual_pipeline_model_parallel_size 4, found 6"
    with pytest.raises(UserError, match=f"m.num_layers: expected a positive multiple of {message}"):
        check_model_fits(dataclasses.replace(MODEL, num_layers=6), 1, 2, "m", chunks=2)
    check_model_fits(dataclasses.replace(MODEL, num_layers=8), 1, 2, "m", chunks=2)


def test_check_model_fits_lets_good_layouts_pass():
    for tp, pp in ((1, 1), (2, 1), (1, 2), (2, 2)):
        check_model_fits(MODEL, tp, pp, "m")
    check_model_fits(dataclasses.replace(MODEL, num_query_groups=None), 4, 2, "m")


def test_llama3_stretches_long_wavelengths_alone():
    """By the definition: which frequencies are kept, which are divided, and what lies between them."""
    model = dataclasses.replace(
        MODEL, head_dim=64, rope_type="llama3", rope_factor=8.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0,
        rope_original_max_position=256,
    )  # fmt: skip
    kinds = set()
    for i, found in enumerate(rope_frequencies(model).tolist()):
        plain = model.rotary_base ** (-2 * i / 64)
        turns = 256 * plain / (2 * math.pi)  # in the original length
        share = (turns - 1) / (4 - 1)  # 1: kept, 0: stretched
        expected = plain if turns > 4 else plain / 8 if turns < 1 else (1 - share) * plain / 8 + share * plain
        kinds.add((turns > 4) - (turns < 1))
        assert found == pytest.approx(expected, rel=1e-5)
    assert kinds == {-1, 0, 1}


def test_linear_stretches_all(runtime):
    plain = rope_frequencies(MODEL)
    torch.testing.assert_close(
        rope_frequencies(dataclasses.replace(MODEL, rope_type="linear", rope_factor=2.5)), plain / 2.5
    )


# Fresh weights.


def weights(model, runtime, seed, head="language"):
    return {name: p.detach() for name, p in build(model, runtime, head, VOCABULARY, "fp32", seed).named_parameters()}


def test_a_trunk_that_is_going_to_be_filled_is_not_drawn(runtime):
    """The head above it is, where it may stay: the same as without a checkpoint."""
    filled = dataclasses.replace(MODEL, checkpoint="somewhere")
    fresh = weights(MODEL, runtime, 3, "scalar")
    draws = []

    def count(*args, **kwargs):
        draws.append(args)
        return randn(*args, **kwargs)

    randn, torch.randn = torch.randn, count
    try:
        found = weights(filled, runtime, 3, "scalar")
    finally:
        torch.randn = randn
    assert torch.equal(found["output_layer.weight"], fresh["output_layer.weight"])
    assert (found["output_layer.bias"] == 0).all() and len(draws) == 1


def test_weights_are_keyed_by_seed_and_name(runtime):
    first, again, other = (weights(MODEL, runtime, seed) for seed in (3, 3, 4))
    drawn = [name for name, weight in first.items() if weight.dim() > 1]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    for i, name in enumerate(drawn):  # no two parameters share their numbers
        for second in drawn[i + 1 :]:
            assert not torch.equal(first[name].flatten()[:32], first[second].flatten()[:32]), (name, second)


def test_weights_do_not_depend_on_what_else_there_is(runtime):
    """One more layer, or another head, leaves the first layers as they were (but for the scaled output projections)."""
    two, three = weights(MODEL, runtime, 3), weights(dataclasses.replace(MODEL, num_layers=3), runtime, 3)
    scalar = weights(MODEL, runtime, 3, "scalar")
    for name in two:
        if not name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            assert torch.equal(two[name], three[name]), name
        if not name.startswith("output_layer"):
            assert torch.equal(two[name], scalar[name]), name


def test_standard_deviations(runtime):
    model = dataclasses.replace(MODEL, hidden_size=128, ffn_hidden_size=256, num_layers=2, vocab_multiple=128)
    for name, weight in weights(model, runtime, 0).items():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
        else:
            scaled = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            expected = 0.2 / math.sqrt(2 * 2) if scaled else 0.2
            # The standard deviation of n normals is known to 1 / sqrt(2 n); the mean to 1 / sqrt(n).
            n = weight.numel()
            assert float(weight.std()) == pytest.approx(expected, rel=6 / math.sqrt(2 * n)), name
            assert abs(float(weight.mean())) < 6 * expected / math.sqrt(n), name
    assert (weights(model, runtime, 0, "scalar")["output_layer.bias"] == 0).all()


def test_architecture_is_what_a_checkpoint_must_say():
    assert set(architecture(MODEL)) == {f.name for f in dataclasses.fields(ModelConfig)} - {"checkpoint", "init_std"}
