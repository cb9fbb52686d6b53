"""Tensors put together from pieces, against Megatron's order written with plain loops and `transformers`' own names."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_safe.huggingface.families import FAMILIES, Description, describe
from megatron_safe.huggingface.layout import huggingface_tensors, optional_tensors, stored_tensors

WHERE = Path("folder/config.json")
SIZES = {
    "odd": {"vocab_size": 131, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10},
    "multi-head": {"vocab_size": 128, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8},
    "multi-query": {"vocab_size": 257, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 6},
    "as hidden": {"vocab_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
}


def tiny(model_type: str, architecture: str, **fields) -> dict:
    return {
        "model_type": model_type, "architectures": [architecture], "hidden_size": 24, "intermediate_size": 36,
        "num_hidden_layers": 2, "vocab_size": 131, "num_attention_heads": 4, "num_key_value_heads": 2,
    } | fields  # fmt: skip


def in_transformers(config: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape in the state dict of the class that `architectures` names."""
    model = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        state = model(model.config_class(**json.loads(json.dumps(config)))).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_language_model_has_the_tensors_of_transformers_in_its_order(model_type, tied, sizes):
    config = tiny(model_type, FAMILIES[model_type].language, tie_word_embeddings=tied, **SIZES[sizes])
    description = describe(config, WHERE)
    expected = in_transformers(config)
    optional = {"lm_head.weight": expected.pop("lm_head.weight")} if tied else {}
    assert list(huggingface_tensors(description).items()) == list(expected.items())
    assert optional_tensors(description) == optional


@pytest.mark.parametrize("model_type", FAMILIES)
def test_scaled_rope_has_no_tensors(model_type):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32, "rope_theta": 1e4}  # fmt: skip
    config = tiny(model_type, FAMILIES[model_type].language, rope_parameters=rope, head_dim=6)
    assert huggingface_tensors(describe(config, WHERE)) == in_transformers(config)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_sequence_classifier_has_the_tensors_of_transformers_in_its_order(model_type, tied):
    name = FAMILIES[model_type].architecture("sequence-classification")
    config = tiny(model_type, name, id2label={"0": "LABEL_0"}, tie_word_embeddings=tied, head_dim=6)
    description = describe(config, WHERE)
    assert list(huggingface_tensors(description).items()) == list(in_transformers(config).items())
    assert optional_tensors(description) == {}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_safe_rlhf_score_model_has_a_head_of_its_own_beside_the_trunk_of_transformers(bias, normalize):
    config = tiny("llama", "LlamaForScore", score_bias=bias, do_normalize=normalize, tie_word_embeddings=True)
    description = describe(config, WHERE)
    trunk = in_transformers(config | {"architectures": ["LlamaModel"]})
    head = {"score_head.weight": (1, 24), "score_head.bias": (1,)}
    normalizer = {"normalizer.mean": (1,), "normalizer.var": (1,)}
    if not bias:
        del head["score_head.bias"]
    expected = {f"model.{name}": shape for name, shape in trunk.items()} | head | (normalizer if normalize else {})
    assert list(huggingface_tensors(description).items()) == list(expected.items())
    assert optional_tensors(description) == ({} if normalize else normalizer) | {"normalizer.count": (1,)}


@st.composite
def descriptions(draw) -> Description:
    family = FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))]
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    score = draw(st.sampled_from([None, "score", "sequence-classification"]))
    config = tiny(
        family.model_type, family.architecture(score), id2label={"0": ""}, score_bias=draw(st.booleans()),
        do_normalize=draw(st.booleans()), tie_word_embeddings=draw(st.booleans()), num_key_value_heads=groups,
        num_attention_heads=groups * per_group, head_dim=2 * draw(st.integers(1, 3)),
        # One size for all of them now and then: shapes alone must not tell tensors apart.
        **{name: draw(st.integers(1, 12)) for name in ("hidden_size", "intermediate_size", "vocab_size")},
    )  # fmt: skip
    description = describe(config, WHERE)
    return replace(description, model=replace(description.model, vocab_multiple=draw(st.integers(1, 5))))


def put_together(stored, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    ours = torch.zeros(stored.shape)
    for piece in stored.pieces:
        ours[piece.at : piece.at + piece.stop - piece.start] = tensors[piece.name][piece.start : piece.stop]
    return ours


def megatron_qkv(q, k, v, heads: int, groups: int, size: int) -> list:
    """Rows of Megatron's linear_qkv: group by group its query heads, its key head, its value head."""
    rows = []
    for group in range(groups):
        for head in range(heads):
            if head * groups // heads == group:
                for row in range(size):
                    rows.append(q[head * size + row])
        for tensor in (k, v):
            for row in range(size):
                rows.append(tensor[group * size + row])
    return rows


def expected_tensors(description: Description, theirs: dict[str, torch.Tensor]) -> dict:
    """(key, layer) -> our tensor, written out."""
    model, vocab = description.model, description.vocab_size
    padding = torch.zeros((-vocab) % model.vocab_multiple, model.hidden_size)
    ours = {("embedding.word_embeddings.weight", None): torch.cat([theirs["model.embed_tokens.weight"], padding])}
    for layer in range(model.num_layers):
        prefix, mine = f"model.layers.{layer}.", "decoder.layers."
        attention = f"{prefix}self_attn."
        ours[f"{mine}self_attention.linear_qkv.layer_norm_weight", layer] = theirs[f"{prefix}input_layernorm.weight"]
        for kind in ("weight", "bias") if model.qkv_bias else ("weight",):
            q, k, v = (theirs[f"{attention}{name}_proj.{kind}"] for name in "qkv")
            rows = megatron_qkv(q, k, v, model.num_attention_heads, model.num_query_groups, model.head_dim)
            ours[f"{mine}self_attention.linear_qkv.{kind}", layer] = torch.stack(rows)
        if model.qk_norm:
            for name in "qk":
                key = f"{mine}self_attention.{name}_layernorm.weight"
                ours[key, layer] = theirs[f"{attention}{name}_norm.weight"]
        ours[f"{mine}self_attention.linear_proj.weight", layer] = theirs[f"{attention}o_proj.weight"]
        ours[f"{mine}mlp.linear_fc1.layer_norm_weight", layer] = theirs[f"{prefix}post_attention_layernorm.weight"]
        gate_up = [*theirs[f"{prefix}mlp.gate_proj.weight"], *theirs[f"{prefix}mlp.up_proj.weight"]]
        ours[f"{mine}mlp.linear_fc1.weight", layer] = torch.stack(gate_up)
        ours[f"{mine}mlp.linear_fc2.weight", layer] = theirs[f"{prefix}mlp.down_proj.weight"]
    ours["decoder.final_layernorm.weight", None] = theirs["model.norm.weight"]
    if description.score == "score":
        ours["output_layer.weight", None] = theirs["score_head.weight"]
        if model.score_bias:
            ours["output_layer.bias", None] = theirs["score_head.bias"]
    elif description.score:
        ours["output_layer.weight", None] = theirs["score.weight"]
    elif not model.tie_embeddings:
        ours["output_layer.weight", None] = torch.cat([theirs["lm_head.weight"], padding])
    return ours


@settings(max_examples=60, deadline=None)
@given(descriptions(), st.integers(0, 2**32))
def test_pieces_put_together_are_megatrons_tensors(description, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = huggingface_tensors(description)
    theirs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    ours = {(stored.key, stored.layer): put_together(stored, theirs) for stored in stored_tensors(description)}
    expected = expected_tensors(description, theirs)
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(ours[key], tensor), key


@settings(max_examples=60, deadline=None)
@given(descriptions())
def test_every_row_of_either_side_is_in_one_piece_but_for_the_vocabularys_padding(description):
    theirs = {
        (name, row) for name, shape in huggingface_tensors(description).items() for row in range(shape[0])
        if not name.startswith("normalizer.")
    }  # fmt: skip
    used = []
    for stored in stored_tensors(description):
        rows = []
        for piece in stored.pieces:
            used += [(piece.name, row) for row in range(piece.start, piece.stop)]
            rows += range(piece.at, piece.at + piece.stop - piece.start)
        of_vocabulary = stored.key.startswith("embedding.") or (
            stored.key == "output_layer.weight" and description.head == "language"
        )
        # In order and without gaps: what is not covered is at the end.
        assert rows == list(range(description.vocab_size if of_vocabulary else stored.shape[0]))
        assert 0 <= stored.shape[0] - len(rows) < description.model.vocab_multiple
    assert len(used) == len(set(used)) and set(used) == theirs


PUBLISHED = {
    "Llama 2 7B": (6_738_415_616, "llama", {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    }),
    "Llama 3.1 8B": (8_030_261_248, "llama", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    }),
    "Mistral 7B": (7_241_732_096, "mistral", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32000,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    }),
    "Qwen2.5 0.5B": (494_032_768, "qwen2", {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }),
    "Qwen3 0.6B": (596_049_920, "qwen3", {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "vocab_size": 151936,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters_as_published(name):
    parameters, model_type, sizes = PUBLISHED[name]
    description = describe(tiny(model_type, FAMILIES[model_type].language, **sizes), WHERE)
    assert sum(math.prod(shape) for shape in huggingface_tensors(description).values()) == parameters


def test_tensors_come_layer_by_layer():
    stored = stored_tensors(describe(tiny("qwen2", "Qwen2ForCausalLM"), WHERE))
    layers = [each.layer for each in stored]
    assert layers == [None, *[0] * 7, *[1] * 7, None, None]
    assert [each.key for each in stored if each.layer is None] == [
        "embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight",
    ]  # fmt: skip
