"""A Llama, or one of its relatives, as a Megatron-Core GPTModel with a language head or a scalar head."""

import dataclasses
import hashlib
import math
from typing import Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_safe.config import ModelConfig
from megatron_safe.errors import UserError
from megatron_safe.models.attention import Layer, Packed, PackedCoreAttention
from megatron_safe.models.norm import RMSNorm
from megatron_safe.models.packing import Pack
from megatron_safe.models.rope import head_dim, rope_frequencies, rotation
from megatron_safe.runtime import Runtime

Head = Literal["language", "scalar"]
_RECOMPUTE = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """The vocabulary as stored: the same in every layout, so that checkpoints and draws do not depend on it."""
    return math.ceil(vocab_size / multiple) * multiple


def check_model_fits(model: ModelConfig, tp_size: int, pp_size: int, section: str, chunks: int = 1) -> None:
    """Raise UserError, naming the field, when the model cannot be split over the layout."""
    groups = model.num_query_groups or model.num_attention_heads
    wholes = {
        "num_layers": (
            model.num_layers, pp_size * chunks,
            "pipeline_model_parallel_size" + " x virtual_pipeline_model_parallel_size" * (chunks > 1),
        ),
        "num_attention_heads": (model.num_attention_heads, tp_size, "tensor_model_parallel_size"),
        "num_query_groups": (groups, tp_size, "tensor_model_parallel_size"),
        "ffn_hidden_size": (model.ffn_hidden_size, tp_size, "tensor_model_parallel_size"),
        "vocab_multiple": (model.vocab_multiple, tp_size, "tensor_model_parallel_size"),
    }
    for name, (value, parts, what) in wholes.items():
        if value <= 0 or value % parts:
            allowed = ", ".join(str(size) for size in range(1, max(value, 0) + 1) if value % size == 0)
            raise UserError(
                f"{section}.{name}: expected a positive multiple of {what} {parts}, found {value}"
                + (f" (which allows {allowed})" if value > 0 else "")
            )
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        raise UserError(
            f"{section}.hidden_size: expected a multiple of num_attention_heads {model.num_attention_heads}, "
            f"found {model.hidden_size}"
        )
    if head_dim(model) <= 0 or head_dim(model) % 2:
        raise UserError(
            f"{section}.{'hidden_size' if model.head_dim is None else 'head_dim'}: RoPE needs an even head size, "
            f"found {head_dim(model)}"
        )
    if model.rope_type == "llama3" and model.rope_high_freq_factor <= model.rope_low_freq_factor:
        raise UserError(
            f"{section}.rope_high_freq_factor: expected more than rope_low_freq_factor {model.rope_low_freq_factor}, "
            f"found {model.rope_high_freq_factor}"
        )
    if model.num_attention_heads % groups:
        raise UserError(
            f"{section}.num_query_groups: expected a divisor of num_attention_heads {model.num_attention_heads}, "
            f"found {groups}"
        )


class ScalarHead(torch.nn.Module):
    """hidden -> (W h + b - mean) / std, replicated over tensor-parallel ranks; stands for GPTModel's output layer."""

    def __init__(self, model: ModelConfig, outputs: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, model.hidden_size, dtype=dtype, device=device))
        self.bias = torch.nn.Parameter(torch.empty(outputs, dtype=dtype, device=device)) if model.score_bias else None
        self.mean, self.std = model.score_mean, model.score_std

    def forward(self, hidden, weight=None, runtime_gather_output=None):
        score = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return score if (self.mean, self.std) == (0.0, 1.0) else (score - self.mean) / self.std, None


class Llama(GPTModel):
    """GPTModel that ends with its last hidden states, or with a scalar head.

    What a language model makes of its hidden states is `models.heads`' business: training never holds their logits.
    """

    def __init__(self, *args, model: ModelConfig, head: Head, outputs: int, true_vocab_size: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.head = head
        device = next(self.parameters()).device
        if head == "scalar" and self.post_process:
            self.output_layer = ScalarHead(model, outputs, self.config.params_dtype, device)
        self.true_vocab_size = true_vocab_size
        self.rotary_pos_emb.inv_freq = rope_frequencies(model).to(device)

    @torch.no_grad()
    def mute_outputs(self, first: int) -> None:
        """Make the outputs of a scalar head 0 from `first` on, until they learn."""
        if self.post_process:
            self.output_layer.weight[first:] = 0.0
            if self.output_layer.bias is not None:
                self.output_layer.bias[first:] = self.output_layer.mean

    def output_weight(self) -> torch.Tensor:
        """[V/p, h] of the language head, tied to the embedding or not; on the last stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def logits(self, hidden_Nh: torch.Tensor) -> torch.Tensor:
        """[N, V/p]; those of vocabulary rows that are only padding are the smallest finite number."""
        logits_Nv, _ = self.output_layer(hidden_Nh, weight=self.output_weight())
        shard = logits_Nv.size(-1)
        first = self.pg_collection.tp.rank() * shard
        if first + shard > self.true_vocab_size:
            logits_Nv[..., max(0, self.true_vocab_size - first) :] = torch.finfo(logits_Nv.dtype).min
        return logits_Nv

    def forward(self, pack: Pack) -> torch.Tensor:
        """What the pack reads, on the last stage: scores [N] of a scalar head ([N, outputs] if it has several), hidden
        states [N, h] of a language model. On the others hidden states [T, 1, h] for the next one."""
        cos_T1D, sin_T1D = rotation(
            pack.positions_T, pack.longest, self.rotary_pos_emb.inv_freq, self.config.params_dtype
        )
        return super().forward(pack.tokens_1T, None, None, packed_seq_params=Packed(pack, cos_T1D, sin_T1D))

    def _preprocess(self, input_ids, *_, **__):
        """GPTModel's own would make RoPE's angles for a batch of rows."""
        hidden_T1h = self.embedding(input_ids=input_ids, position_ids=None) if self.pre_process else None
        return hidden_T1h, None, None, None, None, None

    def _postprocess(self, hidden_states, *_, packed_seq_params: Packed, **__):
        """GPTModel's own would make the logits."""
        if not self.post_process:
            return hidden_states
        hidden_Nh = hidden_states.squeeze(1)
        if self.config.sequence_parallel:
            # The heads treat hidden states as replicated, gradients included; so each rank takes its tokens' part back.
            hidden_Th = gather_from_sequence_parallel_region(
                hidden_Nh, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
            hidden_Nh = hidden_Th.index_select(0, packed_seq_params.pack.read_N)
        return self.output_layer(hidden_Nh)[0].squeeze(-1) if self.head == "scalar" else hidden_Nh


def _block_spec(config: TransformerConfig, vp_stage: int | None) -> ModuleSpec | TransformerBlockSubmodules:
    """Transformer Engine's layers where it is installed beside a GPU, else Megatron-Core's own with our norms; our
    layer and core attention in both, because packs are ours."""
    spec = None
    if torch.cuda.is_available():
        try:
            from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

            spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        except ImportError:
            pass
    fused = spec is not None
    spec = spec or get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    spec.module = Layer
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    attention.core_attention = ModuleSpec(module=PackedCoreAttention)
    if fused:
        return spec
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules([spec] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm)


def build(
    model: ModelConfig,
    runtime: Runtime,
    head: Head,
    vocab_size: int,
    precision: str,
    seed: int,
    predictable: int | None = None,
    outputs: int = 1,
    chunk: int = 0,
) -> Llama:
    """This rank's part of a Llama (a chunk of it, where an interleaved pipeline gives it several), the same function in
    every layout.

    Its weights are fresh, but for the trunk where `model.checkpoint` names what is going to fill it: drawing a 7B trunk
    six times over would cost minutes.

    Args:
        model: the architecture.
        runtime: where this rank stands.
        head: `language` (logits) or `scalar` (scores).
        vocab_size: rows of the embedding; stored padded to `model.vocab_multiple`.
        precision: `fp32` or `bf16` (weights and compute).
        seed: of the fresh weights.
        predictable: token ids from this one on have a probability of 0 (default: from `vocab_size` on).
        outputs: scores of a scalar head.
        chunk: which one of this rank's.
    """
    chunks = runtime.parallel.virtual_pipeline_model_parallel_size
    vp_stage = chunk if chunks > 1 else None
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    keep = lambda weight: weight  # noqa: E731  weights are drawn by name below, once Megatron has marked the shards
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=head_dim(model),
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        window_size=None if model.sliding_window is None else (model.sliding_window - 1, 0),
        layernorm_epsilon=model.norm_epsilon,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        sequence_parallel=runtime.parallel.sequence_parallel,
        **_RECOMPUTE[runtime.parallel.recompute],
        context_parallel_size=runtime.cp_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        tensor_model_parallel_size=runtime.tp_size,
        pipeline_model_parallel_size=runtime.pp_size,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        batch_p2p_comm=False,
        # Losses here are sums over a known global batch: no division by micro-batches or ranks anywhere.
        calculate_per_token_loss=True,
        init_method=keep,
        output_layer_init_method=keep,
    )
    module = Llama(
        config=config,
        transformer_layer_spec=_block_spec(config, vp_stage),
        vp_stage=vp_stage,
        true_vocab_size=predictable or vocab_size,
        model=model,
        head=head,
        outputs=outputs,
        vocab_size=padded_vocab_size(vocab_size, model.vocab_multiple),
        max_sequence_length=model.max_sequence_length,
        pre_process=runtime.is_first_stage and chunk == 0,
        post_process=runtime.is_last_stage and chunk == chunks - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=model.tie_embeddings and head == "language",
        position_embedding_type="rope",
    )
    initialize_weights(module, model, seed)
    # Megatron-Core's optimizer for bf16 cannot save weights of two types, and makes norms in fp32 without being asked.
    return module.to(runtime.device, dtype)


def global_name(module: Llama, name: str) -> str:
    """A parameter's name with its layer counted over the whole pipeline."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(module.decoder.layers[int(parts[2])].layer_number - 1)
    return ".".join(parts)


@torch.no_grad()
def initialize_weights(module: Llama, model: ModelConfig, seed: int) -> None:
    """Draw every fresh weight from a generator keyed by (seed, name) and keep this rank's shard of it.

    Normal with `init_std`; projections back into the residual stream with `init_std / sqrt(2 num_layers)`
    (Megatron-LM's scaled init); norms 1, biases 0. Megatron's own init depends on the layout; this one does not.
    """
    tp = module.pg_collection.tp
    for name, parameter in module.named_parameters():
        name = global_name(module, name)
        if model.checkpoint is not None and not (module.head == "scalar" and name.startswith("output_layer.")):
            continue
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            if module.share_embeddings_and_output_weights and name == "output_layer.weight":
                name = "embedding.word_embeddings.weight"
            std = model.init_std
            if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                std /= math.sqrt(2 * model.num_layers)
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            shape = list(parameter.shape)
            dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
            if dim is not None:
                shape[dim] *= tp.size()
            full = torch.randn(shape, generator=generator) * std
            if dim is not None:
                # SwiGLU stores gate and up stacked in each shard, so each half is split by itself.
                halves = full.chunk(2, dim) if name.endswith("linear_fc1.weight") else (full,)
                full = torch.cat([half.chunk(tp.size(), dim)[tp.rank()] for half in halves], dim)
            parameter.copy_(full)


def architecture(model: ModelConfig) -> dict:
    """The fields that a checkpoint records and that replace a config's when it starts from that checkpoint."""
    return {key: value for key, value in dataclasses.asdict(model).items() if key not in ("checkpoint", "init_std")}
