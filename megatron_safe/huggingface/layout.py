"""Which rows of which Hugging Face tensor make up each tensor of ours.

The same for every layout of ranks: tensors here are whole, as a checkpoint stores them.

Legend: h hidden size, f width of the SwiGLU, q rows of all query heads, k those of all key (or value) heads, d head
size, V vocabulary.
"""

import itertools
from dataclasses import dataclass

from megatron_safe.config import ModelConfig
from megatron_safe.huggingface.families import Description
from megatron_safe.models.llama import padded_vocab_size
from megatron_safe.models.rope import head_dim

_WRITTEN = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm",
    "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
)  # fmt: skip
"""A layer's modules in the order in which transformers writes them."""


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a Hugging Face tensor, which lie at rows [at, at + stop - start) of ours."""

    name: str
    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class Stored:
    """A tensor of ours (one layer's, where it is in a layer) and what it is made of.

    Rows in no piece are padding of the vocabulary: zeros on the way in, cut on the way out.
    """

    key: str
    """Its name in a checkpoint, without role and layer: `decoder.layers.mlp.linear_fc2.weight`."""
    layer: int | None
    """Counted over the whole pipeline from 0; None outside the layers."""
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def stored_tensors(description: Description) -> list[Stored]:
    """All tensors of our model: the embedding, layer by layer, the last norm, the head."""
    model, names = description.model, description.tensors
    dimensions = _dimensions(description)
    inside = [key for key in names if key.startswith("decoder.layers.")]
    first, *last = (key for key in names if key not in inside)
    padded = {first, "output_layer.weight"} if description.head == "language" else {first}

    def stored(key: str, layer: int | None) -> Stored:
        rows, columns = dimensions[key]
        whole = tuple(name.format(layer=layer) for name in names[key])
        pieces = _by_group(whole, rows, model) if len(whole) == 3 else _stacked(whole, rows)
        total = padded_vocab_size(rows[0], model.vocab_multiple) if key in padded else sum(rows)
        return Stored(key, layer, (total, *columns), tuple(pieces))

    layers = [stored(key, layer) for layer in range(model.num_layers) for key in inside]
    return [stored(first, None), *layers, *(stored(key, None) for key in last)]


def huggingface_tensors(description: Description) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the folder must hold, in the order in which transformers writes them.

    All but safe-rlhf's normalizer are in the pieces of `stored_tensors`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for _, layer in itertools.groupby(stored_tensors(description), lambda stored: stored.layer):
        rows: dict[str, tuple[int, ...]] = {}
        for stored in layer:
            for piece in stored.pieces:
                least = rows.get(piece.name, (0,))[0]
                rows[piece.name] = (max(least, piece.stop), *stored.shape[1:])
        shapes |= dict(sorted(rows.items(), key=lambda item: _place(item[0])))
    if description.normalizer:
        shapes |= {"normalizer.mean": (1,), "normalizer.var": (1,)}
    return shapes


def optional_tensors(description: Description) -> dict[str, tuple[int, ...]]:
    """Name -> shape of tensors that the folder may hold besides: our model has no use for them.

    They are the head where it is tied to the embedding (its rows once more), and what safe-rlhf's normalizer saves in a
    model that does not normalize, or just counts.
    """
    if description.head == "language" and description.model.tie_embeddings:
        return {"lm_head.weight": (description.vocab_size, description.model.hidden_size)}
    if description.score != "score":
        return {}
    normalizer = {} if description.normalizer else {"normalizer.mean": (1,), "normalizer.var": (1,)}
    return normalizer | {"normalizer.count": (1,)}


def _dimensions(description: Description) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Our key -> (rows of each Hugging Face tensor that it is made of, their columns, if they have any)."""
    model = description.model
    h, f = model.hidden_size, model.ffn_hidden_size
    d = head_dim(model)
    q, k = model.num_attention_heads * d, (model.num_query_groups or model.num_attention_heads) * d
    V = description.vocab_size
    return {
        "embedding.word_embeddings.weight": ((V,), (h,)),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": ((h,), ()),
        "decoder.layers.self_attention.linear_qkv.weight": ((q, k, k), (h,)),
        "decoder.layers.self_attention.linear_qkv.bias": ((q, k, k), ()),
        "decoder.layers.self_attention.q_layernorm.weight": ((d,), ()),
        "decoder.layers.self_attention.k_layernorm.weight": ((d,), ()),
        "decoder.layers.self_attention.linear_proj.weight": ((h,), (q,)),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": ((h,), ()),
        "decoder.layers.mlp.linear_fc1.weight": ((f, f), (h,)),
        "decoder.layers.mlp.linear_fc2.weight": ((h,), (f,)),
        "decoder.final_layernorm.weight": ((h,), ()),
        "output_layer.weight": ((V if description.head == "language" else 1,), (h,)),
        "output_layer.bias": ((1,), ()),
    }


def _stacked(names: tuple[str, ...], rows: tuple[int, ...]) -> list[Piece]:
    """One after the other."""
    ends = itertools.accumulate(rows)
    return [Piece(name, 0, count, end - count) for name, count, end in zip(names, rows, ends, strict=True)]


def _by_group(names: tuple[str, ...], rows: tuple[int, ...], model: ModelConfig) -> list[Piece]:
    """Queries, keys and values by query group, as Megatron has them: a group's query heads, its key, its value."""
    groups = model.num_query_groups or model.num_attention_heads
    heads = [count // groups for count in rows]  # rows of a group in each
    return [
        Piece(piece.name, group * count, (group + 1) * count, group * sum(heads) + piece.at)
        for group in range(groups)
        for piece, count in zip(_stacked(names, tuple(heads)), heads, strict=True)
    ]


def _place(name: str) -> tuple[int, bool]:
    """Where a tensor stands among those of its layer."""
    modules = [place for place, module in enumerate(_WRITTEN) if f".{module}." in name]
    return (*modules, 0)[0], name.endswith(".bias")
