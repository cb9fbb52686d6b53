"""What `config.json` means, against `transformers`' own reading of it; what is refused; what is written anew."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_safe.config import ModelConfig
from megatron_safe.errors import UserError
from megatron_safe.huggingface.families import FAMILIES, describe, new_config, normalizer_of, with_normalizer

WHERE = Path("folder/config.json")
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROPES = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {"rope_type": "llama3", **LLAMA3},
}


def tiny(model_type: str = "llama", score: str | None = None, **more) -> dict:
    return {
        "model_type": model_type, "architectures": [FAMILIES[model_type].architecture(score)], "vocab_size": 131,
        "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4,
    } | more  # fmt: skip


def full(config: dict) -> dict:
    """The same config with every field, as transformers 5 writes it."""
    filled = transformers.CONFIG_MAPPING[config["model_type"]](**json.loads(json.dumps(config)))
    filled.standardize_rope_params()  # as a model does when it is built
    return json.loads(filled.to_json_string(use_diff=False))


def in_the_old_spelling(config: dict) -> dict:
    """The same config, with RoPE as transformers 4 spelled it at first."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    return config | {"rope_scaling": {"type": kind, **rope} if kind != "default" else None}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_is_found_in_both_spellings(model_type, rope, tied):
    config = full(
        tiny(
            model_type, num_key_value_heads=2, head_dim=10, rms_norm_eps=3e-4, max_position_embeddings=77,
            tie_word_embeddings=tied, initializer_range=0.125, sliding_window=9,
            rope_parameters={"rope_theta": 54321.0, "rope_type": "default", **ROPES[rope]},
        )
    )  # fmt: skip
    expected = ModelConfig(
        num_layers=3, hidden_size=24, ffn_hidden_size=36, num_attention_heads=4, num_query_groups=2, head_dim=10,
        norm_epsilon=3e-4, max_sequence_length=77, tie_embeddings=tied, init_std=0.125, rotary_base=54321.0,
        sliding_window=9 if model_type == "mistral" else None, qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3", rope_type=rope,
    )  # fmt: skip
    if rope == "linear":
        expected = replace(expected, rope_factor=2.5)
    if rope == "llama3":
        expected = replace(
            expected, rope_factor=8.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0,
            rope_original_max_position=64,
        )  # fmt: skip
    for spelled in (config, in_the_old_spelling(config)):
        description = describe(spelled, WHERE)
        assert description.model == expected
        assert (description.head, description.score, description.vocab_size) == ("language", None, 131)
        assert description.family is FAMILIES[model_type]
        assert description.config == spelled


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"max_window_layers": 0},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "original_max_position_embeddings": 32},
        {"rope_scaling": {k: v for k, v in {"rope_type": "llama3", **LLAMA3}.items() if not k.startswith("original")}},
        {"rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 123},
        {"rope_scaling": {"type": "linear", "factor": 4}, "rope_parameters": {"rope_theta": 99.0}},
        {"rope_parameters": {"rope_theta": 99.0}, "rope_theta": 7.0},
    ],
)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_left_out_is_what_transformers_takes(model_type, more):
    """A config with holes means what it means once transformers has filled them."""
    config = tiny(model_type, num_attention_heads=32, hidden_size=320) | more
    filled = full(config)
    filled.pop("original_max_position_embeddings", None)  # it is among RoPE's now
    assert describe(config, WHERE).model == describe(filled, WHERE).model


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_null_key_value_heads_are_as_many_as_query_heads(model_type):
    config = tiny(model_type, head_dim=6, num_key_value_heads=None)
    assert describe(config, WHERE).model.num_query_groups == full(config)["num_key_value_heads"] == 4


def test_a_qwen3_head_is_128_wide_unless_it_says_otherwise():
    assert describe(tiny("qwen3", num_key_value_heads=4), WHERE).model.head_dim == 128
    assert transformers.Qwen3Config().head_dim == 128


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("first", [0, 1, 3, 28])
@pytest.mark.parametrize("slides", [False, True])
def test_qwens_window_holds_for_all_layers_or_for_none(model_type, first, slides):
    window = {"use_sliding_window": slides, "sliding_window": 5, "max_window_layers": first}
    config = tiny(model_type, num_key_value_heads=2, head_dim=6, **window)
    layers = transformers.CONFIG_MAPPING[model_type](**config).layer_types
    for written in (config, full(config)):
        if len(set(layers)) > 1:
            with pytest.raises(UserError, match="(max_window_layers|layer_types): expected sliding_attention in each"):
                describe(written, WHERE)
        else:
            expected = 5 if layers[0] == "sliding_attention" else None
            assert describe(written, WHERE).model.sliding_window == expected


def test_mistrals_window_is_4096_unless_it_says_otherwise():
    config = tiny("mistral", num_key_value_heads=2)
    assert describe(config, WHERE).model.sliding_window == transformers.MistralConfig().sliding_window == 4096
    assert describe(config | {"sliding_window": None}, WHERE).model.sliding_window is None
    layers = {"layer_types": ["sliding_attention"] * 3}
    assert describe(config | layers, WHERE).model.sliding_window == 4096
    with pytest.raises(UserError, match="layer_types: expected sliding_attention in each of 3 layers"):
        describe(config | {"layer_types": ["full_attention"] * 3}, WHERE)


def test_the_first_llamas_spelled_themselves_differently():
    for names in (["LLaMAForCausalLM"], [], None):
        assert describe(tiny(architectures=names), WHERE).head == "language"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_sequence_classifier_with_one_label_is_a_scalar_head_without_bias(model_type):
    config = tiny(model_type, "sequence-classification", num_key_value_heads=2)
    for labels in ({"num_labels": 1}, {"id2label": {"0": "LABEL_0"}}):
        description = describe(full(config | labels), WHERE)
        assert (description.head, description.score) == ("scalar", "sequence-classification")
        assert not description.model.score_bias
        assert description.tensors["output_layer.weight"] == ("score.weight",)
        assert "output_layer.bias" not in description.tensors
    with pytest.raises(UserError, match="folder/config.json: num_labels: expected 1, found 2"):
        describe(config, WHERE)
    with pytest.raises(UserError, match="num_labels: expected 1, found 3"):
        describe(full(config | {"num_labels": 3}), WHERE)


@pytest.mark.parametrize(
    ("more", "bias"),
    [
        ({}, True), ({"score_bias": False}, False), ({"bias": False}, False), ({"bias": True}, True),
        ({"score_bias": True, "bias": False}, True),
    ],
)  # fmt: skip
def test_a_safe_rlhf_score_model_has_a_bias_unless_it_says_otherwise(more, bias):
    description = describe(tiny(score="score", score_dim=1, **more), WHERE)
    assert (description.head, description.score, description.normalizer) == ("scalar", "score", None)
    assert description.model.score_bias == bias == ("output_layer.bias" in description.tensors)
    assert description.tensors["output_layer.weight"] == ("score_head.weight",)
    assert with_normalizer(description, 3.0, 4.0, WHERE) == description


@pytest.mark.parametrize("score_type", ["reward", "cost", "critic"])
@pytest.mark.parametrize("normalizer_type", [None, "RunningMeanStd"])
def test_scores_are_normalized_as_safe_rlhf_does(score_type, normalizer_type):
    config = tiny(score="score", score_type=score_type, do_normalize=True, normalizer_type=normalizer_type)
    mean, var, score = 0.7, 2.3, 5.0
    model = with_normalizer(describe(config, WHERE), mean, var, WHERE).model
    std = math.sqrt(var) + 1e-8
    expected = {"reward": (score - mean) / std, "cost": score / std, "critic": score}[score_type]
    assert (score - model.score_mean) / model.score_std == expected


@pytest.mark.parametrize(("mean", "var"), [(math.nan, 1.0), (0.0, -1.0), (0.0, math.inf)])
def test_a_normalizer_is_made_of_numbers(mean, var):
    description = describe(tiny(score="score", do_normalize=True), WHERE)
    with pytest.raises(UserError, match="^folder/shard: normalizer.mean and normalizer.var: expected finite"):
        with_normalizer(description, mean, var, Path("folder/shard"))


SCALED = {"rope_type": "llama3", **LLAMA3}
REFUSED = {
    "Gemma 2": ({"model_type": "gemma2"}, "model_type", "llama, mistral, qwen2, qwen3 (Gemma", '"gemma2"'),
    "Gemma 3": ({"model_type": "gemma3_text"}, "model_type", "scales its embeddings", '"gemma3_text"'),
    "Mixtral": ({"model_type": "mixtral"}, "model_type", "llama, mistral, qwen2, qwen3", '"mixtral"'),
    "no model type": ({"model_type": None}, "model_type", "llama", "null"),
    "other head": (
        {"architectures": ["LlamaForTokenClassification"]}, "architectures", "LlamaForCausalLM, LlamaForScore",
        '["LlamaForTokenClassification"]',
    ),
    "no head": ({"architectures": ["LlamaModel"]}, "architectures", "LlamaForCausalLM", '["LlamaModel"]'),
    "another's head": ({"architectures": ["Qwen2ForCausalLM"]}, "architectures", "LlamaForCausalLM", '["Qwen2'),
    "two heads": ({"architectures": ["LlamaForCausalLM"] * 2}, "architectures", "LlamaForCausalLM", "["),
    "attention bias": ({"attention_bias": True}, "attention_bias", "false", "true"),
    "MLP bias": ({"mlp_bias": True}, "mlp_bias", "false", "true"),
    "GELU": ({"hidden_act": "gelu"}, "hidden_act", '"silu"', '"gelu"'),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config", "null", '{"bits": 4}'),
    "by layer": ({"per_layer_config": {"0": {}}}, "per_layer_config", "null", '{"0": {}}'),
    "half-rotated": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "1", "0.5"),
    "half-rotated 5": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor", "1", "0.5"),
    "YaRN": ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling.rope_type", "default, linear", '"yarn"'),
    "dynamic": ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling.rope_type", "llama3", '"dynamic"'),
    "longrope": ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type", "llama3", '"longrope"'),
    "odd RoPE": ({"rope_scaling": "linear"}, "rope_scaling", "one set", '"linear"'),
    "RoPE by layer": ({"rope_parameters": {"full_attention": {}}}, "rope_parameters", "one set", "{"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor", "a positive number", "nothing"),
    "factor 0": ({"rope_scaling": SCALED | {"factor": 0}}, "rope_scaling.factor", "a positive number", "0"),
    "factors alike": ({"rope_scaling": SCALED | {"high_freq_factor": 1}}, "high_freq_factor", "low_freq_factor", "1.0"),
    "no base": ({"rope_theta": None}, "rope_theta", "a positive number", "null"),
    "mixed layers": (
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types",
        "full_attention in each of 3 layers", "[",
    ),
    "odd layers": ({"layer_types": ["linear_attention"] * 3}, "layer_types", "full_attention", "["),
    "sizes left out": ({"hidden_size": ...}, "hidden_size", "a positive whole number", "nothing"),
    "no vocabulary": ({"vocab_size": 0}, "vocab_size", "a positive whole number", "0"),
    "fraction": ({"intermediate_size": 36.0}, "intermediate_size", "a positive whole number", "36.0"),
    "truth": ({"num_hidden_layers": True}, "num_hidden_layers", "a positive whole number", "true"),
    "text": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings", "true or false", '"yes"'),
    "not a number": ({"rms_norm_eps": math.nan}, "rms_norm_eps", "a positive number", "NaN"),
    "endless": ({"rope_theta": math.inf}, "rope_theta", "a positive number", "Infinity"),
    "groups": ({"num_key_value_heads": 3}, "num_key_value_heads", "a divisor of num_attention_heads 4", "3"),
    "head size": ({"hidden_size": 26}, "hidden_size", "a multiple of num_attention_heads 4", "26"),
}  # fmt: skip
REFUSED_SCORES = {
    "two scores": ({"score_dim": 2}, "score_dim", "1", "2"),
    "odd bias": ({"score_bias": 1}, "score_bias", "true or false", "1"),
    "odd old bias": ({"bias": "no"}, "bias", "true or false", '"no"'),
    "odd normalize": ({"do_normalize": "no"}, "do_normalize", "true or false", '"no"'),
    "odd type": ({"do_normalize": True, "score_type": "other"}, "score_type", "reward, cost, critic", '"other"'),
}


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_SCORES])
def test_what_cannot_be_expressed_is_refused_in_one_line(name):
    more, field, expected, found = (REFUSED | REFUSED_SCORES)[name]
    config = tiny(score="score" if name in REFUSED_SCORES else None) | more
    config = {key: value for key, value in config.items() if value is not ...}
    with pytest.raises(UserError) as error:
        describe(config, WHERE)
    message = str(error.value)
    said, seen = message.removeprefix(f"{WHERE}: ").split(", found ")
    assert message.startswith(f"{WHERE}: ") and "\n" not in message and len(message) < 300
    what, wanted = said.split(": expected ")
    assert what.endswith(field) and expected in wanted and seen.startswith(found)


def test_qwen2_has_its_biases_whatever_attention_bias_says():
    assert describe(tiny("qwen2", num_key_value_heads=2, attention_bias=True), WHERE).model.qkv_bias


@st.composite
def models(draw) -> ModelConfig:
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    # transformers' Llama and Qwen 2 take no hidden size that the heads do not divide, whatever the head size.
    heads = groups * per_group
    kind = draw(st.sampled_from([{}, {"qkv_bias": True}, {"qk_norm": True}]))
    rope = draw(
        st.sampled_from([
            {}, {"rope_type": "linear", "rope_factor": 3.0},
            {
                "rope_type": "llama3", "rope_factor": 8.0, "rope_low_freq_factor": 1.5, "rope_high_freq_factor": 6.0,
                "rope_original_max_position": 32,
            },
        ])
    )  # fmt: skip
    return ModelConfig(
        num_layers=draw(st.integers(1, 3)), hidden_size=2 * heads * draw(st.integers(1, 4)),
        ffn_hidden_size=draw(st.integers(1, 40)), num_attention_heads=heads, num_query_groups=groups,
        head_dim=2 * draw(st.integers(1, 8)), rotary_base=draw(st.sampled_from([1e4, 5e5, 1e6])),
        norm_epsilon=draw(st.sampled_from([1e-5, 1e-6])), max_sequence_length=draw(st.integers(33, 4096)),
        tie_embeddings=draw(st.booleans()), init_std=draw(st.sampled_from([0.02, 0.006])),
        sliding_window=draw(st.none() | st.integers(1, 50)), **kind, **rope,
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(models(), st.integers(1, 300), st.booleans())
def test_a_new_config_is_read_by_transformers_and_means_the_same_model(tmp_path_factory, model, vocab_size, scalar):
    folder = tmp_path_factory.mktemp("new")
    ids = {"bos_token_id": 0, "pad_token_id": vocab_size - 1}
    model = replace(model, score_bias=not scalar)
    head, score, auto = "language", None, transformers.AutoModelForCausalLM
    if scalar:
        head, score, auto = "scalar", "sequence-classification", transformers.AutoModelForSequenceClassification
    config = new_config(model, head, vocab_size, score, "bfloat16", ids)
    (folder / "config.json").write_text(json.dumps(config))

    read = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        built = auto.from_config(read)
    assert [type(built).__name__] == config["architectures"]
    assert built.dtype is torch.bfloat16
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (0, None, vocab_size - 1)
    for spelled in (config, json.loads(read.to_json_string(use_diff=False))):
        description = describe(spelled, WHERE)
        assert description.model == model
        assert (description.head, description.score, description.vocab_size) == (head, score, vocab_size)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 2.5), (0.0, 0.25)])
def test_a_new_score_model_is_safe_rlhfs(bias, mean, std):
    model = ModelConfig(num_query_groups=2, head_dim=32, score_bias=bias, score_mean=mean, score_std=std)
    config = json.loads(json.dumps(new_config(model, "scalar", 131, "score", "float32", {})))
    assert config["architectures"] == ["LlamaForScore"]
    found = with_normalizer(describe(config, WHERE), *normalizer_of(model), WHERE)
    assert (found.head, found.score, found.normalizer is None) == ("scalar", "score", (mean, std) == (0.0, 1.0))
    assert found.model.score_std == pytest.approx(std, rel=1e-12)
    assert replace(found.model, score_std=std) == model


def test_a_default_size_is_written_out():
    model = ModelConfig()
    found = describe(new_config(model, "language", 131, None, "float32", {}), WHERE).model
    changed = {field.name for field in fields(model) if getattr(found, field.name) != getattr(model, field.name)}
    assert changed == {"num_query_groups", "head_dim"}
    assert (found.num_query_groups, found.head_dim) == (4, 32)


@pytest.mark.parametrize(
    ("more", "head", "score", "field"),
    [
        ({"qk_norm": True, "qkv_bias": True}, "language", None, "qkv_bias"),
        ({}, "scalar", "sequence-classification", "score_bias"),
        ({"score_bias": False, "score_mean": 1.0}, "scalar", "sequence-classification", "score_mean, score_std"),
    ],
)
def test_a_model_that_hugging_face_has_no_name_for_is_refused(more, head, score, field):
    with pytest.raises(UserError, match=f"^{field}: expected [^\n]*$"):
        new_config(ModelConfig(**more), head, 131, score, "float32", {})
