"""A Llama's forward over the rows of a tick, straight from the module's parameters: Megatron's layers without their
wrappers, which cost more than the arithmetic of a small step.

Legend: R rows (C newest tokens of the samples, then X prompt rows), h hidden size, H query heads and G key/value heads
on this rank, q = H / G, D head size, K positions, n prompts of at most S rows, v this rank's vocabulary shard.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_safe.kernels.backend import use_triton
from megatron_safe.kernels.decode_attention import decode_attention
from megatron_safe.models.attention import causal_attention, window_of
from megatron_safe.models.llama import Llama
from megatron_safe.rollout.cache import SlotCache
from megatron_safe.rollout.slots import Tick


def _uses_blocks(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _blocks_of(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_ROWS)


_TYPICAL_ROWS = 64  # blocks that suit so many suit others as well


class Linear:
    """x -> x @ weight.T + bias.

    fp32 on a CPU goes through oneDNN with a copy of the weight in the blocks that its kernels read (what
    `torch.compile` does to frozen weights): 1.4 times faster than F.linear at 32 rows, 1.2 times than with a transposed
    copy; and what follows a product is done on its way to memory.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        weight = weight.detach()
        self._blocks = _uses_blocks(weight)
        self._weight, self._bias = _blocks_of(weight) if self._blocks else weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._blocks:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return F.linear(x, self._weight, self._bias)

    def plus(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y + x @ weight.T; for layers without a bias."""
        if self._blocks:
            return torch.ops.mkldnn._linear_pointwise.binary(x, y, self._weight, None, "add")
        return torch.addmm(y, x, self._weight.t())


class _SwiGlu:
    """x -> silu(x @ gate.T) * (x @ up.T), from gate and up stacked."""

    def __init__(self, weight: torch.Tensor):
        self._weight, self._blocks = weight.detach(), _uses_blocks(weight)
        if self._blocks:
            self._gate, self._up = map(_blocks_of, self._weight.chunk(2))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._blocks:
            gated = torch.ops.mkldnn._linear_pointwise(x, self._gate, None, "swish", [], "")
            return torch.ops.mkldnn._linear_pointwise.binary(x, gated, self._up, None, "mul")
        gate, up = F.linear(x, self._weight).chunk(2, dim=1)
        return F.silu(gate).mul_(up)


class _Norm:
    """RMSNorm before a projection. Where the projection's weight is copied anyway, the copy takes in the norm's own
    weight, and only the division by the root mean square is left."""

    def __init__(self, weight: torch.Tensor, eps: float, projection: torch.Tensor):
        self._weight, self._eps = weight.detach(), eps
        self._plain = _uses_blocks(weight)
        self._eps_tensor = torch.tensor(eps, device=weight.device)  # for addcmul
        self.projection = projection.detach() * self._weight if self._plain else projection

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self._plain:
            return F.rms_norm(x, self._weight.shape, self._weight, self._eps)
        # F.rms_norm is a chain of more and longer operations here.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(self._eps_tensor, norm, norm, value=1 / x.size(-1)).rsqrt_()


class _Layer:
    def __init__(self, layer, eps: float):
        attention, mlp = layer.self_attention, layer.mlp
        # Transformer Engine keeps the norm before a projection inside of it.
        attention_norm = getattr(attention.linear_qkv, "layer_norm_weight", None)
        if attention_norm is None:
            attention_norm = layer.input_layernorm.weight
        mlp_norm = getattr(mlp.linear_fc1, "layer_norm_weight", None)
        if mlp_norm is None:
            mlp_norm = layer.pre_mlp_layernorm.weight
        self.attention_norm = _Norm(attention_norm, eps, attention.linear_qkv.weight)
        self.qkv = Linear(self.attention_norm.projection, attention.linear_qkv.bias)
        self.query_norm = getattr(attention.q_layernorm, "weight", None)  # or an identity
        self.key_norm = getattr(attention.k_layernorm, "weight", None)
        self.proj = Linear(attention.linear_proj.weight)
        self.mlp_norm = _Norm(mlp_norm, eps, mlp.linear_fc1.weight)
        self.fc1 = _SwiGlu(self.mlp_norm.projection)
        self.fc2 = Linear(mlp.linear_fc2.weight)


class Decoder:
    """This rank's layers (and embedding, and head) for the length of a rollout: on a CPU it holds copies of weights."""

    def __init__(self, module: Llama, positions: int):
        """positions: as many as any sample may have."""
        config = module.config
        self.dtype, self.device = config.params_dtype, next(module.parameters()).device
        self._tp = module.pg_collection.tp
        self._eps = config.layernorm_epsilon
        self._groups = config.num_query_groups // config.tensor_model_parallel_size
        self._queries = config.num_attention_heads // config.num_query_groups
        self._head_size = config.kv_channels
        self._window = window_of(config)
        self._blocks = _uses_blocks(module.decoder.layers[0].self_attention.linear_qkv.weight)
        self._layers = [_Layer(layer, self._eps) for layer in module.decoder.layers]
        self._is_first, self.is_last = module.pre_process, module.post_process
        if module.pre_process:
            self._embedding = module.embedding.word_embeddings.weight
        if module.post_process:
            self._final_norm = _Norm(module.decoder.final_layernorm.weight, self._eps, module.output_weight())
            self._head = Linear(self._final_norm.projection)
            shard = module.output_weight().size(0)
            self._real = max(0, module.true_vocab_size - self._tp.rank() * shard)
        # "Packed": all positions, where Megatron-Core would give a context-parallel rank its own ones.
        angles_KD = module.rotary_pos_emb(positions, packed_seq=True)[:, 0, 0].float()
        # x cos + rotate_half(x) sin, with the sign of rotate_half in the sine.
        half = self._head_size // 2
        sin_KD = torch.cat([-angles_KD[:, :half].sin(), angles_KD[:, half:].sin()], dim=1)
        self._cos_K11D = angles_KD.cos()[:, None, None].to(self.dtype)
        self._sin_K11D = sin_KD[:, None, None].to(self.dtype)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def _add(self, hidden_Rh: torch.Tensor, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """hidden + what the ranks' parts of the layer make of x."""
        return linear.plus(x, hidden_Rh) if self._tp.size() == 1 else hidden_Rh.add_(self._reduce(linear(x)))

    def _reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self._tp.size() > 1:
            dist.all_reduce(x, group=self._tp)
        return x

    def embed(self, tokens_R: torch.Tensor) -> torch.Tensor:
        """[R, h]."""
        if self._tp.size() == 1:
            return F.embedding(tokens_R, self._embedding)
        local_R = tokens_R - self._tp.rank() * self._embedding.size(0)
        elsewhere_R = (local_R < 0) | (local_R >= self._embedding.size(0))
        hidden_Rh = F.embedding(local_R.masked_fill(elsewhere_R, 0), self._embedding)
        return self._reduce(hidden_Rh.masked_fill_(elsewhere_R[:, None], 0.0))

    def logits(self, hidden_Ch: torch.Tensor) -> torch.Tensor:
        """[C, v]; those of vocabulary rows that are only padding are the smallest finite number."""
        logits_Cv = self._head(self._final_norm(hidden_Ch))
        if self._real < logits_Cv.size(1):
            logits_Cv[:, self._real :] = torch.finfo(logits_Cv.dtype).min
        return logits_Cv

    def stage(self, given: torch.Tensor, tick: Tick, cache: SlotCache) -> torch.Tensor:
        """All that this stage computes in a tick, with no word to other stages and none from the host.

        given: tokens [R] on the first stage, else hidden states [R, h], which may be overwritten.

        Returns:
            Hidden states [R, h] for the next stage; logits [C, v] on the last.
        """
        hidden_Rh = self.embed(given) if self._is_first else given
        hidden_Rh = self.forward(hidden_Rh, tick, cache)
        return self.logits(hidden_Rh)[: tick.samples] if self.is_last else hidden_Rh[: given.size(0)]

    def _round_up(self, rows: int) -> int:
        """oneDNN compiles a product for each number of rows that it meets, and keeps half a MB of each."""
        if not self._blocks:
            return rows
        step = 16 if rows <= 160 else 64
        return -(-rows // step) * step

    def forward(self, hidden_Rh: torch.Tensor, tick: Tick, cache: SlotCache) -> torch.Tensor:
        """This stage's layers: [R, h]; [C, h] on the last stage, where prompt rows are needed no more. Rows that mean
        nothing may follow (`_round_up`)."""
        count, rows = tick.samples, hidden_Rh.size(0)
        positions_R = tick.positions_R
        if (more := self._round_up(rows) - rows) > 0:
            hidden_Rh, positions_R = F.pad(hidden_Rh, (0, 0, 0, more)), F.pad(positions_R, (0, more))
        cos_R11D, sin_R11D = self._cos_K11D[positions_R], self._sin_K11D[positions_R]
        cache.reserve(tick.longest + 1)
        cells = cache.cells(tick.slots_W, tick.positions_W)
        mask = None if use_triton(hidden_Rh) else self._mask(tick, cache.positions)
        padding = _Padding(tick.prompts, self.device) if tick.prompts else None
        for number, layer in enumerate(self._layers):
            qkv_RGpD = self._qkv(layer, hidden_Rh, cos_R11D, sin_R11D)
            self._write(number, cache, cells, qkv_RGpD[:rows], tick.rows_W)
            if self.is_last and number == len(self._layers) - 1:
                hidden_Rh, padding = hidden_Rh[: self._round_up(count)], None
            context = hidden_Rh.new_empty(hidden_Rh.size(0), self._groups * self._queries * self._head_size)
            query_CGqD, kept = qkv_RGpD[:count, :, : self._queries], cache.read(number, count)
            if mask is None:
                attended = decode_attention(query_CGqD, *kept, tick.positions_R[:count], self._window)
                context[:count] = attended.flatten(1)
            else:
                self._attend(query_CGqD, *kept, mask, context[:count])
            if padding is not None:
                self._attend_prompts(qkv_RGpD[count:rows], padding, context[count:rows])
            hidden_Rh = self._add(hidden_Rh, layer.proj, context)
            hidden_Rh = self._add(hidden_Rh, layer.fc2, layer.fc1(layer.mlp_norm(hidden_Rh)))
        return hidden_Rh

    def _qkv(self, layer: _Layer, hidden_Rh, cos_R11D, sin_R11D) -> torch.Tensor:
        """[R, G, q + 2, D]: a group's queries, its key, both rotated, and its value."""
        qkv = layer.qkv(layer.attention_norm(hidden_Rh))
        qkv_RGpD = qkv.view(-1, self._groups, self._queries + 2, self._head_size)
        if layer.query_norm is not None:
            queries, keys = qkv_RGpD[:, :, : self._queries], qkv_RGpD[:, :, self._queries]
            queries.copy_(F.rms_norm(queries, layer.query_norm.shape, layer.query_norm, self._eps))
            keys.copy_(F.rms_norm(keys, layer.key_norm.shape, layer.key_norm, self._eps))
        rotated = qkv_RGpD[:, :, : self._queries + 1]
        halves_swapped = rotated.roll(self._head_size // 2, -1)
        rotated.mul_(cos_R11D).addcmul_(halves_swapped, sin_R11D)
        return qkv_RGpD

    def _write(self, number: int, cache: SlotCache, cells, qkv_RGpD, rows_W) -> None:
        if rows_W is not None:
            qkv_RGpD = qkv_RGpD[rows_W]
        cache.write(number, cells, *qkv_RGpD.flatten(0, 1)[:, self._queries :].unbind(1))

    def _mask(self, tick: Tick, positions: int) -> torch.Tensor:
        """[C * G, q, K] to add to the scores of the samples' newest tokens."""
        positions_C1 = tick.positions_R[: tick.samples, None]
        cells_K = torch.arange(positions, device=self.device)
        hidden_CK = cells_K > positions_C1
        if self._window is not None:
            hidden_CK |= cells_K < positions_C1 - self._window
        mask_CK = torch.zeros(hidden_CK.shape, dtype=self.dtype, device=self.device)
        mask_CK.masked_fill_(hidden_CK, float("-inf"))
        return mask_CK[:, None, None].expand(-1, self._groups, self._queries, -1).flatten(0, 1)

    def _attend(self, query_CGqD, keys_CGKD, values_CGKD, mask_BqK, context_CX) -> None:
        """context [C, H * D]: one token of each sample against its slot. On a CPU faster than `decode_attention`, which
        does not know of one mask for all layers, nor that all cells are finite."""
        query_BqD, keys_BKD, values_BKD = (x.flatten(0, 1) for x in (query_CGqD, keys_CGKD, values_CGKD))
        scores_BqK = torch.baddbmm(mask_BqK, query_BqD, keys_BKD.transpose(1, 2), alpha=self._head_size**-0.5)
        torch.bmm(torch.softmax(scores_BqK, dim=-1), values_BKD, out=context_CX.view(query_BqD.shape))

    def _attend_prompts(self, qkv_XGpD, padding: "_Padding", context_XY) -> None:
        """context [X, H * D]: causal, each row within its own prompt."""
        query, key, value = padding.pad(qkv_XGpD).split([self._queries, 1, 1], dim=3)
        context_nSHD = causal_attention(query.flatten(2, 3), key.squeeze(3), value.squeeze(3), self._window)
        padding.unpad(context_nSHD.flatten(2), context_XY)


class _Padding:
    """Prompt rows that stand one after the other [X, ...], as a padded batch [n, S, ...] and back."""

    def __init__(self, lengths: list[int], device: torch.device):
        self._shape = len(lengths), max(lengths)
        self._rows_X = None
        if min(lengths) < self._shape[1]:
            lengths_n1 = torch.tensor(lengths, device=device)[:, None]
            columns_S = torch.arange(self._shape[1], device=device)
            inside_nS = columns_S < lengths_n1
            self._rows_X = inside_nS.flatten().nonzero()[:, 0]
            starts_n1 = lengths_n1.cumsum(0) - lengths_n1
            # A padding cell repeats a prompt's last row.
            self._from_nS = starts_n1 + torch.minimum(columns_S, lengths_n1 - 1)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, self._shape) if self._rows_X is None else x[self._from_nS]

    def unpad(self, x: torch.Tensor, out: torch.Tensor) -> None:
        if self._rows_X is None:
            out.copy_(x.flatten(0, 1))
        else:
            torch.index_select(x.flatten(0, 1), 0, self._rows_X, out=out)
