"""Bytes that a role takes on one rank, part by part, from its architecture and the layout alone.

The formulas follow what the code keeps, operation by operation; those for activations are the method of Korthikanti et
al. (2022), "Reducing Activation Recomputation in Large Transformer Models", section 4, for our layer: RMSNorm, RoPE,
grouped-query attention without a stored score matrix, SwiGLU, no dropout, packed sequences, and a last layer that goes
on with the rows that are read.

Letters: h hidden size, f SwiGLU width, H query heads, G key/value heads, D head size, V stored vocabulary, T tokens of
a pack, N of them read, b bytes of a compute element (4 fp32, 2 bf16); t, p, d, c the TP, PP, DP and CP sizes.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_safe.config import ModelConfig
from megatron_safe.models.llama import Head
from megatron_safe.models.rope import head_dim
from megatron_safe.planning.layout import Layout

BYTES = {"fp32": 4, "bf16": 2}
Device = Literal["cpu", "gpu"]
HEAD_CHUNK = {"cpu": 2**24, "gpu": 2**28}
"""Logits of a chunk (kernels/linear_logprob.py)."""
HEAD_BLOCK = 2**18
"""Logits that elementwise work takes at a time in the PyTorch path (same file)."""


@dataclass(frozen=True)
class Sizes:
    """A model's widths on one tensor-parallel rank, in elements of a token: h, q = H D / t, kv = G D / t, f / t."""

    h: int
    q: int
    kv: int
    f: int
    heads: int
    head_dim: int

    @classmethod
    def of(cls, model: ModelConfig, tp: int) -> "Sizes":
        heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
        size = head_dim(model)
        return cls(
            model.hidden_size, heads * size // tp, groups * size // tp, model.ffn_hidden_size // tp, heads // tp, size
        )


def layer_parameters(model: ModelConfig, tp: int) -> int:
    """Of one layer on one rank: matrices divided by t, norms whole."""
    s = Sizes.of(model, tp)
    qkv = (s.q + 2 * s.kv) * (s.h + (1 if model.qkv_bias else 0))
    return 2 * s.h + qkv + s.q * s.h + 3 * s.f * s.h + (2 * s.head_dim if model.qk_norm else 0)


def stage_parameters(
    model: ModelConfig, vocab_rows: int, head: Head, layout: Layout, stage: int, outputs: int = 1
) -> int:
    """Of one pipeline stage on one rank. `vocab_rows`: V, as stored; `outputs`: of a scalar head.

    The first stage has the embedding, the last one the final norm and the head; a tied head is a copy there unless the
    two are one stage.
    """
    h, embedding = model.hidden_size, vocab_rows // layout.tp * model.hidden_size
    count = model.num_layers // layout.pp * layer_parameters(model, layout.tp)
    if stage == 0:
        count += embedding
    if stage == layout.pp - 1:
        count += h
        if head == "scalar":
            count += outputs * (h + (1 if model.score_bias else 0))
        elif not (model.tie_embeddings and layout.pp == 1):
            count += embedding
    return count


def weight_bytes(parameters: int, precision: str) -> int:
    return BYTES[precision] * parameters


def gradient_bytes(parameters: int) -> int:
    """Megatron's buffers, in fp32 whatever the weights are (`grad_reduce_in_fp32`), on every rank."""
    return 4 * parameters


def optimizer_bytes(parameters: int, precision: str, shards: int) -> float:
    """AdamW's two moments in fp32, and fp32 master weights where the weights are bf16; a distributed optimizer divides
    them over `shards` ranks (1: not distributed). Narayanan et al. 2021; Rajbhandari et al. 2020 (ZeRO-1)."""
    return (8 if precision == "fp32" else 12) * parameters / shards


def norm_bytes(h: int, precision: str) -> int:
    """Kept by an RMSNorm for a token, its output included: the input, 1 / rms in fp32, the output."""
    return 2 * BYTES[precision] * h + 4


def layer_activation_bytes(
    model: ModelConfig, tokens: float, read: float, precision: str, layout: Layout, device: Device
) -> float:
    """Kept by one layer for its backward pass on one rank: T tokens of a pack; `read` is N in a last layer, else T.

    Norms: whole on each TP rank, or divided by t with sequence parallelism. Attention, for each of its T / c tokens:
    the fused q, k, v; q and k rotated; its output and one log-sum-exp a head; and the projection's input, which is the
    output itself on a GPU. With c > 1 also all T tokens' k and v, gathered. MLP: gate and up, silu(gate), a copy of up,
    their product: 5 f.
    Selective recompute keeps q, k, v and the projection's input; full recompute the layer's input.
    """
    s, b = Sizes.of(model, layout.tp), BYTES[precision]
    tokens, read, whole = tokens / layout.cp, read / layout.cp, tokens
    split = layout.tp if layout.sequence_parallel else 1
    if layout.recompute == "full":
        return b * s.h * tokens / split
    norms = norm_bytes(s.h, precision) * (tokens + read) / split
    attention = b * (s.q + 2 * s.kv) * tokens
    if layout.recompute == "none":
        attention += (b * (s.q + s.kv + s.q) + 4 * s.heads) * tokens
        if layout.cp > 1:
            attention += 2 * b * s.kv * whole
    if device == "cpu" or layout.recompute == "selective" or read < tokens:
        attention += b * s.q * read
    return norms + attention + 5 * b * s.f * read


def stage_activation_bytes(
    model: ModelConfig, tokens: float, read: float, precision: str, layout: Layout, stage: int, device: Device
) -> float:
    """Kept by a stage for the backward pass of ONE pack, without the loss: its layers, cosines and sines, token ids,
    and the final norm. The last layer goes on with the N rows that are read, but for sequence parallelism, where each
    rank has other rows."""
    b, last = BYTES[precision], stage == layout.pp - 1
    layers = model.num_layers // layout.pp
    args = precision, layout, device
    total = (layers - last) * layer_activation_bytes(model, tokens, tokens, *args)
    if last:
        rows = tokens if layout.sequence_parallel else read
        total += layer_activation_bytes(model, tokens, rows, *args)
        split = layout.tp if layout.sequence_parallel else 1
        total += norm_bytes(model.hidden_size, precision) * rows / layout.cp / split
    return total + (2 * b * head_dim(model) + 16) * tokens / layout.cp


def boundary_bytes(model: ModelConfig, tokens: float, precision: str, layout: Layout, stage: int) -> float:
    """What the pipeline schedule holds of ONE pack between stages: the hidden states received (in fp32 those are kept
    by the first norm anyway) and sent."""
    size = BYTES[precision] * model.hidden_size * tokens / layout.cp
    size /= layout.tp if layout.sequence_parallel else 1
    return size * ((stage > 0 and precision != "fp32") + (stage < layout.pp - 1))


def head_bytes(
    model: ModelConfig, vocab_rows: int, read: float, precision: str, layout: Layout, device: Device, gradients: bool
) -> float:
    """Of the language head on the last stage, one pack at a time: a chunk of logits, fp32 copy and scratch block of the
    PyTorch path; with gradients those of the hidden states and, in fp32, of the weight."""
    shard, rows = vocab_rows // layout.tp, read / layout.cp
    chunk = min(rows, max(1, HEAD_CHUNK[device] // shard))
    total = BYTES[precision] * chunk * shard
    if device == "cpu":
        total += 4 * chunk * shard * (precision != "fp32") + 4 * min(chunk, max(1, HEAD_BLOCK // shard)) * shard
    if gradients:
        total += BYTES[precision] * rows * model.hidden_size + 4 * shard * model.hidden_size
    return total


def working_bytes(model: ModelConfig, tokens: float, precision: str, layout: Layout) -> float:
    """Of a layer's forward that keeps nothing, at its widest: the MLP's 5 f (or the attention's projections, rotations
    and output) beside the residual, the norm and its input in fp32 or two more copies of h; one more with TP, and one
    for what comes from the stage before. Sequence parallelism gathers one h and divides the others."""
    s, b = Sizes.of(model, layout.tp), BYTES[precision]
    divided = layout.tp if layout.sequence_parallel else 1
    rows = s.h + 3 * s.h // divided + (s.h if layout.tp > divided else 0) + (s.h // divided if layout.pp > 1 else 0)
    widest = max(5 * s.f, 4 * s.q + 3 * s.kv)
    return b * (rows + widest + 2 * s.head_dim) * tokens / layout.cp


def backward_bytes(model: ModelConfig, tokens: float, precision: str, layout: Layout) -> float:
    """Of a layer's backward beside what was kept, at its widest: the gradients of gate and up."""
    return 2 * BYTES[precision] * Sizes.of(model, layout.tp).f * tokens / layout.cp


def cache_bytes_per_slot(model: ModelConfig, positions: int, precision: str, layout: Layout) -> int:
    """Keys and values of one sample on one rank: 2 (layers / p) (G D / t) positions b."""
    return 2 * model.num_layers // layout.pp * Sizes.of(model, layout.tp).kv * positions * BYTES[precision]


def decoder_copy_bytes(model: ModelConfig, vocab_rows: int, precision: str, layout: Layout, stage: int) -> int:
    """On a CPU in fp32 the generator holds a second copy of its matrices, laid out for oneDNN."""
    if precision != "fp32":
        return 0
    s = Sizes.of(model, layout.tp)
    copied = model.num_layers // layout.pp * ((2 * s.q + 2 * s.kv) * s.h + 3 * s.f * s.h)
    if stage == layout.pp - 1:
        copied += vocab_rows // layout.tp * s.h
    return 4 * copied
