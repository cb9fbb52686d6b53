"""KV-cached generation inside the training process group, for any TP x PP x DP.

With p pipeline stages the samples are split into p groups that rotate: while the last stage samples group 0, the one
before it already works on group 1, so no stage waits. Tokens go back from the last stage to the first; everything a
stage needs besides hidden states (positions, when to stop) it derives itself or reads from one flag that travels with
the hidden states.

Legend: B samples on this data-parallel rank, b of them in a group, P longest prompt, N new tokens, L = P + N,
T = L - 1, h hidden size, v this rank's vocabulary shard.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_safe.config import RolloutConfig
from megatron_safe.data.batches import TokenBatch
from megatron_safe.kernels.sample import NoiseKey, philox_uniform, sample
from megatron_safe.models.roles import Role
from megatron_safe.rollout.cache import KVCache


@dataclass(frozen=True)
class Trajectories:
    """Prompts with the answers that a policy sampled.

    `batch` holds tokens [B, L] and lengths; `log_probs_BT` [B, T] fp32 the log-probability of each sampled token in the
    column that predicts it, 0 elsewhere; `ended_B` whether the answer ended with EOS.
    """

    batch: TokenBatch
    log_probs_BT: torch.Tensor
    ended_B: torch.Tensor

    @property
    def mask_BT(self) -> torch.Tensor:
        return self.batch.response_mask_BT


class _Group:
    """The samples that move through the stages together."""

    def __init__(
        self,
        role: Role,
        prompts: TokenBatch,
        seed: int,
        sample_ids_b: torch.Tensor,
        uniforms_bN: torch.Tensor,
        pad_id: int,
    ):
        module, device = role.module, role.runtime.device
        self.prompt_tokens_bP = prompts.tokens_BL
        self.prompt_lengths_b = prompts.prompt_lengths_B
        self.longest_prompt = self.prompt_tokens_bP.size(1)
        self.seed, self.sample_ids_b, self.uniforms_bN = seed, sample_ids_b, uniforms_bN
        max_new_tokens = uniforms_bN.size(1)
        size = self.prompt_tokens_bP.size(0)
        first_layer = module.decoder.layers[0].layer_number
        self.cache = KVCache(
            module.config,
            range(first_layer, first_layer + len(module.decoder.layers)),
            size,
            self.longest_prompt + max_new_tokens,
            device,
        )
        self.ended_b = torch.zeros(size, dtype=torch.bool, device=device)
        self.new_tokens_bN = torch.full((size, max_new_tokens), pad_id, dtype=torch.long, device=device)
        self.log_probs_bN = torch.zeros((size, max_new_tokens), dtype=torch.float32, device=device)
        self.stopped = False


class _Wires:
    """Point-to-point messages between stages. Sends do not block; their buffers live until they are through."""

    def __init__(self, role: Role):
        self.runtime = role.runtime
        self.config = role.module.config
        self._pending: list[tuple[dist.Work, torch.Tensor]] = []
        if self.runtime.pp_size > 1:
            self._stages = parallel_state.get_pipeline_model_parallel_group()
            # First and last stage also share the embedding group. Tokens return through it because nccl orders the
            # messages of one group: behind the hidden states they would deadlock.
            if self.runtime.is_first_stage or self.runtime.is_last_stage:
                self._ends = parallel_state.get_embedding_group()

    def _send(self, tensor: torch.Tensor, rank: int, group) -> None:
        self._pending = [(work, kept) for work, kept in self._pending if not work.is_completed()]
        self._pending.append((dist.isend(tensor, rank, group=group), tensor))

    def send_hidden(self, hidden_Sbh: torch.Tensor | None, length: int, size: int) -> None:
        """To the next stage; None tells it that this group has stopped."""
        message = torch.zeros(length * size * self.config.hidden_size + 1, dtype=self.config.params_dtype,
                              device=self.runtime.device)  # fmt: skip
        if hidden_Sbh is None:
            message[-1] = 1
        else:
            message[:-1] = hidden_Sbh.flatten()
        self._send(message, parallel_state.get_pipeline_model_parallel_next_rank(), self._stages)

    def receive_hidden(self, length: int, size: int) -> torch.Tensor | None:
        message = torch.empty(length * size * self.config.hidden_size + 1, dtype=self.config.params_dtype,
                              device=self.runtime.device)  # fmt: skip
        dist.recv(message, parallel_state.get_pipeline_model_parallel_prev_rank(), group=self._stages)
        return None if bool(message[-1]) else message[:-1].view(length, size, self.config.hidden_size)

    def send_tokens(self, tokens_b: torch.Tensor) -> None:
        self._send(tokens_b, parallel_state.get_pipeline_model_parallel_first_rank(), self._ends)

    def receive_tokens(self, tokens_b: torch.Tensor) -> torch.Tensor:
        dist.recv(tokens_b, parallel_state.get_pipeline_model_parallel_last_rank(), group=self._ends)
        return tokens_b

    def drain(self) -> None:
        for work, _ in self._pending:
            work.wait()


@torch.no_grad()
def generate(
    role: Role,
    prompts: TokenBatch,
    sample_ids_B: torch.Tensor,
    config: RolloutConfig,
    seed: int,
    eos_id: int,
    pad_id: int,
) -> Trajectories:
    """Sample one answer to each prompt.

    Args:
        role: a language role.
        prompts: [B, P] right-padded, the same on every tensor- and pipeline-parallel rank of this replica.
        sample_ids_B: [B] int64, unique over the run: with `seed` and the position they key the randomness, so the
            same sample gets the same answer whatever the layout and whoever shares its batch.
        config: lengths and sampling.
        eos_id, pad_id: token ids.

    Returns:
        Trajectories on every rank of the replica, trimmed to the longest answer.
    """
    runtime, module = role.runtime, role.module
    uniforms_BN = philox_uniform(
        seed, sample_ids_B[:, None], torch.arange(config.max_new_tokens, device=runtime.device)[None, :]
    )
    size = prompts.tokens_BL.size(0)
    parts = torch.arange(size, device=runtime.device).tensor_split(min(size, runtime.pp_size))
    groups = [
        _Group(role, prompts.select(rows), seed, sample_ids_B[rows], uniforms_BN[rows], pad_id) for rows in parts
    ]
    rope = module.rotary_pos_emb(prompts.tokens_BL.size(1) + config.max_new_tokens)
    wires = _Wires(role)
    for step in range(config.max_new_tokens):
        for group in groups:
            if not group.stopped:
                _advance(role, group, step, rope, wires, config, eos_id, pad_id)
        if all(group.stopped for group in groups):
            break
    wires.drain()

    new_tokens_BN = runtime.broadcast_from_last_stage(torch.cat([group.new_tokens_bN for group in groups]))
    log_probs_BN = runtime.broadcast_from_last_stage(torch.cat([group.log_probs_bN for group in groups]))
    return _assemble(prompts, new_tokens_BN, log_probs_BN, eos_id, pad_id)


def _advance(
    role: Role, group: _Group, step: int, rope, wires: _Wires, config: RolloutConfig, eos_id: int, pad_id: int
) -> None:
    """This stage's share of decoding token `step` of a group; step 0 is the prefill."""
    runtime, module = role.runtime, role.module
    size = group.prompt_tokens_bP.size(0)
    length = group.longest_prompt if step == 0 else 1

    hidden = None
    if runtime.is_first_stage:
        tokens = group.prompt_tokens_bP
        if step > 0:
            tokens = group.new_tokens_bN[:, step - 1]
            if not runtime.is_last_stage:
                tokens = wires.receive_tokens(torch.empty_like(tokens))
                group.ended_b |= tokens == eos_id
            tokens = tokens[:, None]
        group.stopped = bool(group.ended_b.all())
        if not group.stopped:
            hidden = module.embedding(input_ids=tokens, position_ids=None)
    else:
        hidden = wires.receive_hidden(length, size)
        group.stopped = hidden is None

    if not group.stopped:
        if not runtime.is_first_stage:
            module.decoder.set_input_tensor(hidden)
        if step == 0:
            positions_emb = rope[:length]
        else:
            positions_b = group.prompt_lengths_b + (step - 1)
            group.cache.start_step(positions_b, group.longest_prompt + step - 1)
            positions_emb = rope[positions_b].permute(1, 0, 2, 3)  # [1, b, 1, D]
        hidden = module.decoder(hidden_states=hidden, attention_mask=group.cache, rotary_pos_emb=positions_emb)

    if not runtime.is_last_stage:
        wires.send_hidden(None if group.stopped else hidden, length, size)
    elif not group.stopped:
        if step == 0:
            hidden = hidden[group.prompt_lengths_b - 1, torch.arange(size, device=runtime.device)][None]
        tokens_b = _sample(role, group, hidden, step, config, eos_id, pad_id)
        if not runtime.is_first_stage and step + 1 < config.max_new_tokens:
            wires.send_tokens(tokens_b)


def _sample(role: Role, group: _Group, hidden_1bh, step: int, config: RolloutConfig, eos_id: int, pad_id: int):
    tokens_b, log_probs_b = sample(
        role.module.logits(hidden_1bh)[0],
        group.uniforms_bN[:, step],
        config.temperature,
        config.top_k,
        config.top_p,
        parallel_state.get_tensor_model_parallel_group(),
        NoiseKey(group.seed, group.sample_ids_b, step),
    )
    tokens_b = tokens_b.masked_fill(group.ended_b, pad_id)
    group.new_tokens_bN[:, step] = tokens_b
    group.log_probs_bN[:, step] = log_probs_b.masked_fill(group.ended_b, 0.0)
    group.ended_b |= tokens_b == eos_id
    return tokens_b


def _assemble(prompts: TokenBatch, new_tokens_BN, log_probs_BN, eos_id: int, pad_id: int) -> Trajectories:
    is_eos_BN = new_tokens_BN == eos_id
    ended_B = is_eos_BN.any(dim=1)
    # EOS belongs to the answer: the value of ending is learnt there.
    counts_B = torch.where(ended_B, is_eos_BN.int().argmax(dim=1) + 1, new_tokens_BN.size(1))
    lengths_B = prompts.prompt_lengths_B + counts_B
    size, longest = new_tokens_BN.size(0), int(lengths_B.max())
    tokens_BL = torch.full((size, longest), pad_id, dtype=torch.long, device=new_tokens_BN.device)
    prompt_width = min(longest, prompts.tokens_BL.size(1))
    tokens_BL[:, :prompt_width] = prompts.tokens_BL[:, :prompt_width]
    batch = dataclasses.replace(prompts, tokens_BL=tokens_BL, lengths_B=lengths_B)
    log_probs_BT = torch.zeros((size, longest - 1), dtype=torch.float32, device=new_tokens_BN.device)
    # Row-major order of both masks is sample by sample, token by token.
    mask_BT = batch.response_mask_BT
    taken_BN = torch.arange(new_tokens_BN.size(1), device=new_tokens_BN.device) < counts_B[:, None]
    tokens_BL[:, 1:][mask_BT] = new_tokens_BN[taken_BN]
    log_probs_BT[mask_BT] = log_probs_BN[taken_BN]
    return Trajectories(batch, log_probs_BT, ended_B)
