"""The Hugging Face architectures that can be read and written: a table of tensors each, and what `config.json` means.

A further architecture of the Llama kind is one more table and one more `Family`.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_safe.config import ModelConfig
from megatron_safe.errors import UserError
from megatron_safe.models.llama import Head
from megatron_safe.models.rope import head_dim

Score = Literal["score", "sequence-classification"]
Tensors = dict[str, str | tuple[str, ...]]

LLAMA: Tensors = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": "model.layers.{layer}.input_layernorm.weight",
    "decoder.layers.self_attention.linear_qkv.weight": (
        "model.layers.{layer}.self_attn.q_proj.weight",
        "model.layers.{layer}.self_attn.k_proj.weight",
        "model.layers.{layer}.self_attn.v_proj.weight",
    ),
    "decoder.layers.self_attention.linear_proj.weight": "model.layers.{layer}.self_attn.o_proj.weight",
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": "model.layers.{layer}.post_attention_layernorm.weight",
    "decoder.layers.mlp.linear_fc1.weight": (
        "model.layers.{layer}.mlp.gate_proj.weight",
        "model.layers.{layer}.mlp.up_proj.weight",
    ),
    "decoder.layers.mlp.linear_fc2.weight": "model.layers.{layer}.mlp.down_proj.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}
QWEN2: Tensors = LLAMA | {
    "decoder.layers.self_attention.linear_qkv.bias": (
        "model.layers.{layer}.self_attn.q_proj.bias",
        "model.layers.{layer}.self_attn.k_proj.bias",
        "model.layers.{layer}.self_attn.v_proj.bias",
    ),
}
QWEN3: Tensors = LLAMA | {
    "decoder.layers.self_attention.q_layernorm.weight": "model.layers.{layer}.self_attn.q_norm.weight",
    "decoder.layers.self_attention.k_layernorm.weight": "model.layers.{layer}.self_attn.k_norm.weight",
}
HEADS: dict[Score | None, Tensors] = {
    None: {"output_layer.weight": "lm_head.weight"},
    "score": {"output_layer.weight": "score_head.weight", "output_layer.bias": "score_head.bias"},
    "sequence-classification": {"output_layer.weight": "score.weight"},
}
_ONLY = {"hidden_act": "silu", "mlp_bias": False, "quantization_config": None, "per_layer_config": None}


@dataclass(frozen=True)
class Family:
    """An architecture: its tensors, and what is peculiar about its `config.json`."""

    model_type: str
    """Its name in `config.json`."""
    language: str
    """The transformers class with the language head."""
    tensors: Tensors
    """Our key -> the Hugging Face tensor it is made of, or tensors, in the order of their rows; without the head."""
    model: dict[str, bool] = field(default_factory=dict)
    """ModelConfig's fields that are the same in every model of the family."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """What transformers takes where `config.json` leaves a field out."""
    only: dict[str, Any] = field(default_factory=lambda: _ONLY | {"attention_bias": False})
    """Fields of `config.json` with the one value that we can express."""
    window: Literal["none", "all", "some"] = "none"
    """Whose attention `sliding_window` bounds: no layer's, every layer's, or those that other fields choose."""

    def architecture(self, score: Score | None) -> str:
        """The class that holds a model with that head: LlamaForCausalLM, LlamaForScore (safe-rlhf's), ..."""
        kind = {None: "CausalLM", "score": "Score", "sequence-classification": "SequenceClassification"}[score]
        return self.language.removesuffix("CausalLM") + kind


_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama", "LlamaForCausalLM", LLAMA,
            defaults=_DEFAULTS | {"max_position_embeddings": 2048},
        ),
        Family(
            "mistral", "MistralForCausalLM", LLAMA,
            defaults=_DEFAULTS | {"max_position_embeddings": 131072, "num_key_value_heads": 8},
            window="all",
        ),
        Family(
            "qwen2", "Qwen2ForCausalLM", QWEN2,
            model={"qkv_bias": True},
            defaults=_DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 32},
            only=_ONLY,  # it has no attention_bias: the biases are always there
            window="some",
        ),
        Family(
            "qwen3", "Qwen3ForCausalLM", QWEN3,
            model={"qk_norm": True},
            defaults=_DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
            window="some",
        ),
    )
}  # fmt: skip
_GEMMA = "Gemma scales its embeddings and has GELU and other norms, which our model does not"

FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_epsilon": "rms_norm_eps",
    "max_sequence_length": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
"""ModelConfig's field -> that of `config.json`."""
ROPE = {
    "default": {},
    "linear": {"rope_factor": "factor"},
    "llama3": {
        "rope_factor": "factor",
        "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
        "rope_original_max_position": "original_max_position_embeddings",
    },
}
"""RoPE type -> ModelConfig's field -> that of `rope_scaling` or `rope_parameters`."""
NORMALIZERS = {"reward": "affine", "cost": "scale", "critic": None}
"""safe-rlhf's `score_type` -> how a score is normalized: (s - mean) / std, s / std, not at all."""
_KINDS = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
_EXPECTED = {
    int: "a positive whole number",
    int | None: "a positive whole number or null",
    float: "a positive number",
    bool: "true or false",
}
_MAY_BE_ZERO = ("max_window_layers", "initializer_range", "rms_norm_eps")
_MISSING = object()


@dataclass(frozen=True)
class Description:
    """What a Hugging Face folder holds, as its `config.json` says."""

    family: Family
    head: Head
    model: ModelConfig
    """`vocab_multiple` is the default; `score_mean` and `score_std` wait for `with_normalizer`."""
    vocab_size: int
    """Rows of the embedding in the folder: never padded by us."""
    score: Score | None
    """How a scalar head is stored: as safe-rlhf's `...ForScore` or as `...ForSequenceClassification`."""
    config: dict
    """`config.json` as it is."""
    normalizer: Literal["affine", "scale"] | None = None
    """What safe-rlhf does to the scores: (s - mean) / std, s / std, or nothing."""

    @property
    def tensors(self) -> dict[str, tuple[str, ...]]:
        """Our key -> the names of the Hugging Face tensors it is made of; those that this model has, head and all."""
        head = dict(HEADS[self.score])
        if self.head == "language" and self.model.tie_embeddings:
            del head["output_layer.weight"]
        if not self.model.score_bias:
            head.pop("output_layer.bias", None)
        tables = self.family.tensors | head
        return {key: (names,) if isinstance(names, str) else names for key, names in tables.items()}


def describe(config: dict, where: Path) -> Description:
    """What a `config.json` means.

    Args:
        config: its content.
        where: its path, for messages.

    Raises:
        UserError: it asks for something that our model does not compute exactly; names the field.
    """
    family = _family(config, where)
    score = _head(config, family, where)
    for name, value in family.only.items():
        if config.get(name) is not None and config[name] != value:
            raise _wrong(where, name, json.dumps(value), config[name])
    given = family.defaults | config
    vocab_size = _checked(given.get("vocab_size", _MISSING), int, "vocab_size", where)
    model = {
        ours: _checked(given.get(theirs, _MISSING), _KINDS[ours], theirs, where) for ours, theirs in FIELDS.items()
    }
    heads, size = model["num_attention_heads"], model["hidden_size"]
    groups = model["num_query_groups"] = model["num_query_groups"] or heads
    if heads % groups:
        raise _wrong(where, "num_key_value_heads", f"a divisor of num_attention_heads {heads}", groups)
    if model["head_dim"] is None and size % heads:
        raise _wrong(where, "hidden_size", f"a multiple of num_attention_heads {heads}", size)
    model["head_dim"] = model["head_dim"] or size // heads
    model["sliding_window"] = _sliding_window(given, family, model["num_layers"], where)
    model |= _rope(given, where) | family.model
    model["score_bias"], normalizer = _score(config, score, where)
    head = "scalar" if score else "language"
    return Description(family, head, ModelConfig(**model), vocab_size, score, config, normalizer)


def with_normalizer(description: Description, mean: float, var: float, where: Path) -> Description:
    """The description with the folder's `normalizer.mean` and `normalizer.var` in it, if the model uses them.

    safe-rlhf's `Normalizer`: (score - mean) / (sqrt(var) + 1e-8), without the mean in a cost model. `where` is the
    file they are from, for the UserError if they are not numbers.
    """
    if description.normalizer is None:
        return description
    if not (math.isfinite(mean) and 0 <= var < math.inf):
        raise _wrong(where, "normalizer.mean and normalizer.var", "finite numbers, var from 0", [mean, var])
    mean = mean if description.normalizer == "affine" else 0.0
    model = dataclasses.replace(description.model, score_mean=mean, score_std=math.sqrt(var) + 1e-8)
    return dataclasses.replace(description, model=model)


def normalizer_of(model: ModelConfig) -> tuple[float, float]:
    """`normalizer.mean` and `normalizer.var` that `with_normalizer` makes this model of."""
    return model.score_mean, (model.score_std - 1e-8) ** 2


def new_config(
    model: ModelConfig, head: Head, vocab_size: int, score_kind: Score | None, dtype: str, special_ids: dict[str, int]
) -> dict:
    """`config.json` for a model that never came from Hugging Face.

    RoPE is spelled as transformers 4 did, which transformers 5 and vLLM read too.

    Args:
        model: the architecture; the family follows from it.
        head: `language` or `scalar`.
        vocab_size: rows of the embedding that are written.
        score_kind: how a scalar head is stored; None for a language head.
        dtype: torch's name of the weights' type, `bfloat16`.
        special_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`, those that the tokenizer has.

    Raises:
        UserError: no Hugging Face architecture here is this model; names the field.
    """
    if model.qk_norm and model.qkv_bias:
        raise UserError("qkv_bias: expected false beside qk_norm (no Hugging Face architecture has both), found true")
    window = model.sliding_window
    family = FAMILIES[
        "qwen3" if model.qk_norm else "qwen2" if model.qkv_bias else "mistral" if window is not None else "llama"
    ]
    scaling = {theirs: getattr(model, ours) for ours, theirs in ROPE[model.rope_type].items()}
    config = {
        "architectures": [family.architecture(score_kind if head == "scalar" else None)],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        **{theirs: getattr(model, ours) for ours, theirs in FIELDS.items()},
        "hidden_act": "silu",
        "rope_theta": model.rotary_base,
        "rope_scaling": {"rope_type": model.rope_type, **scaling} if scaling else None,
        "torch_dtype": dtype,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **special_ids,
    }
    config["num_key_value_heads"] = model.num_query_groups or model.num_attention_heads
    config["head_dim"] = head_dim(model)
    if family.window == "all":
        config["sliding_window"] = window
    elif family.window == "some":
        config |= {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
    return config | (_new_score(model, score_kind) if head == "scalar" else {})


def _new_score(model: ModelConfig, kind: Score | None) -> dict:
    """The fields of `config.json` that a scalar head has."""
    plain = (model.score_mean, model.score_std) == (0.0, 1.0)
    if kind == "sequence-classification":
        if model.score_bias or not plain:
            name = "score_bias" if model.score_bias else "score_mean, score_std"
            raise UserError(f"{name}: expected none, for a sequence-classification head cannot hold it")
        return {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    # A reward model is the type whose scores are normalized with the mean, too.
    normalize = {} if plain else {"score_type": "reward", "do_normalize": True}
    return {"score_dim": 1, "score_bias": model.score_bias, **normalize}


def _family(config: dict, where: Path) -> Family:
    name = config.get("model_type", _MISSING)
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    reason = f" ({_GEMMA})" if str(name).startswith("gemma") else ""
    raise _wrong(where, "model_type", f"one of {', '.join(FAMILIES)}{reason}", name)


def _head(config: dict, family: Family, where: Path) -> Score | None:
    """How the head is stored, as `architectures` says; None for a language head."""
    names = {family.architecture(score): score for score in HEADS}
    found = config.get("architectures") or [family.language]
    # Checkpoints older than transformers 4.28 say LLaMAForCausalLM.
    fits = [name for name in names if isinstance(found, list) and [str(one).lower() for one in found] == [name.lower()]]
    if not fits:
        raise _wrong(where, "architectures", f"one of {', '.join(names)}", found)
    return names[fits[0]]


def _sliding_window(given: dict, family: Family, num_layers: int, where: Path) -> int | None:
    """How far back attention reaches, the same in all layers."""
    some = family.window == "some"
    slides = family.window == "all" or some and _checked(given["use_sliding_window"], bool, "use_sliding_window", where)
    window = _checked(given["sliding_window"], int | None, "sliding_window", where) if slides else None
    layers, name = given.get("layer_types"), "layer_types"
    if layers is None:
        name = "max_window_layers"
        first = _checked(given[name], int, name, where) if some else 0
        layers = ["sliding_attention" if window and i >= first else "full_attention" for i in range(num_layers)]
    if layers == ["sliding_attention"] * num_layers and window:
        return window
    if layers == ["full_attention"] * num_layers and not (window and family.window == "all"):
        return None
    kinds = "full_attention" if window is None else "sliding_attention"
    raise _wrong(where, name, f"{kinds} in each of {num_layers} layers, as sliding_window says", layers)


def _rope(given: dict, where: Path) -> dict[str, Any]:
    """ModelConfig's fields of RoPE, from transformers 5's spelling or the one before it, by transformers 5's rules."""
    name = "rope_scaling" if given.get("rope_scaling") else "rope_parameters"
    rope = given.get(name) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise _wrong(where, name, "one set of RoPE parameters for all layers", rope)
    rotated = rope.get("partial_rotary_factor", given.get("partial_rotary_factor"))
    if rotated not in (None, 1):
        raise _wrong(where, "partial_rotary_factor", "1", rotated)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE:
        raise _wrong(where, f"{name}.rope_type", f"one of {', '.join(ROPE)}", kind)
    length = "original_max_position_embeddings"
    rope = {length: given["max_position_embeddings"]} | rope | {key: given[key] for key in (length,) if key in given}
    base = rope.get("rope_theta", given.get("rope_theta", 10000.0))
    model = {"rope_type": kind, "rotary_base": _checked(base, float, "rope_theta", where)}
    for ours, theirs in ROPE[kind].items():
        model[ours] = _checked(rope.get(theirs, _MISSING), _KINDS[ours], f"{name}.{theirs}", where)
    if kind == "llama3" and model["rope_high_freq_factor"] <= model["rope_low_freq_factor"]:
        expected = f"more than low_freq_factor {model['rope_low_freq_factor']}"
        raise _wrong(where, f"{name}.high_freq_factor", expected, model["rope_high_freq_factor"])
    return model


def _score(config: dict, score: Score | None, where: Path) -> tuple[bool, Literal["affine", "scale"] | None]:
    """Whether a scalar head has a bias, and how its scores are normalized."""
    if score is None:
        return True, None
    if score == "sequence-classification":
        labels = config.get("id2label")
        found = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)  # 2: transformers' default
        if found != 1 or config.get("num_labels", 1) != 1:
            raise _wrong(where, "num_labels", "1", found)
        return False, None
    if config.get("score_dim", 1) != 1:
        raise _wrong(where, "score_dim", "1", config["score_dim"])
    spelling = "bias" if "bias" in config and "score_bias" not in config else "score_bias"  # the first releases' name
    bias = _checked(config.get(spelling, True), bool, spelling, where)
    if not _checked(config.get("do_normalize", False), bool, "do_normalize", where):
        return bias, None
    kind = config.get("score_type", "reward")
    if not isinstance(kind, str) or kind not in NORMALIZERS:
        raise _wrong(where, "score_type", f"one of {', '.join(NORMALIZERS)}", kind)
    return bias, NORMALIZERS[kind]


def _checked(found: Any, kind: Any, name: str, where: Path) -> Any:
    """`found` if it is of that kind, otherwise the UserError that says so."""
    if kind is bool or found is None:
        fits = isinstance(found, bool) or (found is None and kind == int | None)
    else:
        fits = type(found) in ((int, float) if kind is float else (int,))
        fits = fits and (0 < found < math.inf or found == 0 and name in _MAY_BE_ZERO)
    if not fits:
        raise _wrong(where, name, _EXPECTED[kind], found)
    return float(found) if kind is float else found


def _wrong(where: Path, name: str, expected: str, found: Any) -> UserError:
    """The one line about a field, with what was found as `config.json` spells it."""
    text = "nothing" if found is _MISSING else json.dumps(found, default=str)
    return UserError(f"{where}: {name}: expected {expected}, found {text if len(text) <= 80 else text[:77] + '...'}")
