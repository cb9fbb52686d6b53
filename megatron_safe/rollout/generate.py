"""KV-cached generation inside the training process group, for any TP x PP x DP.

Samples sit in slots; as soon as one has ended, the next of the queue takes its slot, and its prompt is computed in one
forward with the others' newest tokens. With p pipeline stages there are p groups of slots that rotate: while the last
stage samples group 0, the one before it already works on group 1, so no stage waits. Tokens go from the last stage to
all others; from them every stage derives by itself who has ended, who comes next, and the shape of the hidden states.

Legend: B samples on this data-parallel rank, C of them in the slots of a group, P longest prompt, N most new tokens,
L longest row, T = L - 1, R rows of a forward, h hidden size.
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
from megatron_safe.rollout.cache import SlotCache
from megatron_safe.rollout.decoder import Decoder
from megatron_safe.rollout.graphs import DecodeGraphs
from megatron_safe.rollout.slots import Queue, Slots, Tick
from megatron_safe.runtime import Runtime

CPU_SLOTS = 128
"""More are no faster on a CPU."""
MEMORY_SHARE = 0.8
"""Of a GPU's free memory, for the cache."""
TICKS_A_ROUND = {"cpu": 1, "cuda": 8}
"""Ticks from one look at who has ended to the next. A look makes the host wait for the device, and a GPU run dry;
in between nobody is replaced."""


@dataclass(frozen=True)
class Trajectories:
    """Prompts with the answers that a policy sampled.

    `batch` holds tokens [B, L] and lengths; `log_probs_BT` [B, T] fp32 the log-probability of each sampled token in the
    column that predicts it, 0 elsewhere; `ended_B` whether the answer ended with EOS; `importance_BT` [B, T] fp32 each
    token's weight in the actor's loss, where `training.off_policy` corrects for the rollout's inaccuracy.
    """

    batch: TokenBatch
    log_probs_BT: torch.Tensor
    ended_B: torch.Tensor
    importance_BT: torch.Tensor | None = None

    @property
    def mask_BT(self) -> torch.Tensor:
        return self.batch.response_mask_BT


class _Wires:
    """Point-to-point messages between stages. Sends do not block; their buffers live until they are through."""

    def __init__(self, role: Role):
        self.runtime = role.runtime
        self._pending: list[tuple[dist.Work, torch.Tensor]] = []
        if self.runtime.pp_size > 1:
            self._stages = parallel_state.get_pipeline_model_parallel_group()
            # First and last stage also share the embedding group. Tokens return through it because nccl orders the
            # messages of one group: behind the hidden states they would deadlock. Stages between them have none.
            self._ends = parallel_state.get_embedding_group(check_initialized=False)

    def _send(self, tensor: torch.Tensor, rank: int, group) -> None:
        self._pending = [(work, kept) for work, kept in self._pending if not work.is_completed()]
        self._pending.append((dist.isend(tensor, rank, group=group), tensor))

    def to_next(self, tensor: torch.Tensor) -> None:
        self._send(tensor, parallel_state.get_pipeline_model_parallel_next_rank(), self._stages)

    def from_previous(self, buffer: torch.Tensor) -> torch.Tensor:
        dist.recv(buffer, parallel_state.get_pipeline_model_parallel_prev_rank(), group=self._stages)
        return buffer

    def to_first(self, tensor: torch.Tensor) -> None:
        """From the last stage: tokens, or hidden states for the first one's next chunk."""
        self._send(tensor, parallel_state.get_pipeline_model_parallel_first_rank(), self._ends)

    def receive_hidden(self, buffer_Rh: torch.Tensor) -> torch.Tensor:
        """What the stage before has sent on; before the first one's later chunks comes the last stage."""
        if not self.runtime.is_first_stage:
            return self.from_previous(buffer_Rh)
        dist.recv(buffer_Rh, parallel_state.get_pipeline_model_parallel_last_rank(), group=self._ends)
        return buffer_Rh

    def receive_tokens(self, buffer_C: torch.Tensor) -> torch.Tensor:
        """On all stages but the last: the first passes on what it hears from the last, and so on."""
        if self.runtime.is_first_stage:
            dist.recv(buffer_C, parallel_state.get_pipeline_model_parallel_last_rank(), group=self._ends)
        else:
            self.from_previous(buffer_C)
        if self.runtime.pp_rank + 2 < self.runtime.pp_size:
            self.to_next(buffer_C)
        return buffer_C

    def drain(self) -> None:
        for work, _ in self._pending:
            work.wait()


class _Part:
    """A chunk of this stage's layers, and what they keep of a group."""

    def __init__(self, decoder: Decoder, cache: SlotCache, slots: int):
        self._decoder, self.cache = decoder, cache
        self._graphs = DecodeGraphs(decoder, cache, slots) if decoder.device.type == "cuda" else None

    def run(self, given: torch.Tensor, tick: Tick) -> torch.Tensor:
        if self._graphs is not None and not tick.prompts:
            return self._graphs.run(given, tick)
        return self._decoder.stage(given, tick, self.cache)


class _Group:
    """The samples that move through the stages together."""

    def __init__(self, queue: Queue, parts: list[_Part], size: int, eos_id: int):
        def copy(source: int, target: int, positions: int) -> None:
            for part in parts:
                part.cache.copy(source, target, positions)

        self.slots, self.parts = Slots(size, queue, eos_id, copy), parts
        self.most_positions = parts[0].cache.most_positions
        self.tick: Tick | None = None  # the last one
        self.ticks_left = 0  # of this round
        self.sampled: list[torch.Tensor] = []  # tokens [C] of each tick of this round


class _Answers:
    """What the last stage has sampled, a place in [B, N] for each token."""

    def __init__(self, role: Role, config: RolloutConfig, seed: int, sample_ids_B: torch.Tensor, pad_id: int):
        self._config, self._tp = config, role.module.pg_collection.tp
        self._seed, self._sample_ids_B = seed, sample_ids_B
        draws_N = torch.arange(config.max_new_tokens, device=sample_ids_B.device)
        uniforms_BN = philox_uniform(seed, sample_ids_B[:, None], draws_N)
        self._uniforms = uniforms_BN.flatten()
        # One place more, for what is sampled after an end.
        self._shape, self.nowhere = uniforms_BN.shape, uniforms_BN.numel()
        self._new_tokens = torch.full((self.nowhere + 1,), pad_id, device=sample_ids_B.device)
        self._log_probs = torch.zeros(self.nowhere + 1, device=sample_ids_B.device)

    def sample(self, logits_Cv: torch.Tensor, places_C: torch.Tensor) -> torch.Tensor:
        config = self._config
        draws_C = places_C.clamp(max=self.nowhere - 1)
        key = NoiseKey(
            self._seed, self._sample_ids_B[draws_C // config.max_new_tokens], draws_C % config.max_new_tokens
        )
        tokens_C, log_probs_C = sample(
            logits_Cv, self._uniforms[draws_C], config.temperature, config.top_k, config.top_p, self._tp, key
        )
        self._new_tokens[places_C] = tokens_C
        self._log_probs[places_C] = log_probs_C
        return tokens_C

    @property
    def new_tokens_BN(self) -> torch.Tensor:
        return self._new_tokens[:-1].view(self._shape)

    @property
    def log_probs_BN(self) -> torch.Tensor:
        return self._log_probs[:-1].view(self._shape)


def generate(
    role: Role,
    prompts: TokenBatch,
    sample_ids_B: torch.Tensor,
    config: RolloutConfig,
    seed: int,
    eos_id: int,
    pad_id: int,
    max_new_tokens_B: torch.Tensor | None = None,
) -> Trajectories:
    """Sample one answer to each prompt. Context-parallel ranks, which have the same prompts, share them.

    Args:
        role: a language role.
        prompts: [B, P] right-padded, the same on every tensor-, pipeline- and context-parallel rank of this replica.
            Equal prompts next to each other are computed once.
        sample_ids_B: [B] int64, unique over the run: with `seed` and the position they key the randomness, so the
            same sample gets the same answer whatever the layout and whoever shares its batch.
        config: lengths, sampling and slots.
        eos_id, pad_id: token ids.
        max_new_tokens_B: [B] int64, 1 to `config.max_new_tokens`: the longest answer of each sample, EOS included
            (default: `config.max_new_tokens` for all). An answer cut there has not ended.

    Returns:
        Trajectories on every rank of the replica, trimmed to the longest answer.
    """
    runtime = role.runtime
    if max_new_tokens_B is None:
        max_new_tokens_B = torch.full_like(prompts.lengths_B, config.max_new_tokens)
    mine = _share(len(prompts), runtime)
    answers = _Answers(role, config, seed, sample_ids_B[mine], pad_id)
    if len(answers.new_tokens_BN):
        queue = Queue(prompts.select(mine), config.max_new_tokens, max_new_tokens_B[mine])
        # What outlives this was made outside of it: autograd takes no tensors of inference mode.
        with torch.inference_mode():
            _decode(role, queue, config, answers, eos_id)
    new_tokens_BN, log_probs_BN = (
        runtime.broadcast_from_last_stage(_together(part, mine, len(prompts), runtime))
        for part in (answers.new_tokens_BN, answers.log_probs_BN)
    )
    return _assemble(prompts, new_tokens_BN, log_probs_BN, max_new_tokens_B, eos_id, pad_id)


def _share(samples: int, runtime: Runtime) -> slice:
    """This context-parallel rank's samples; neighbours, which may share a prompt, stay together."""
    bounds = [samples * rank // runtime.cp_size for rank in (runtime.cp_rank, runtime.cp_rank + 1)]
    return slice(*bounds)


def _together(part: torch.Tensor, mine: slice, samples: int, runtime: Runtime) -> torch.Tensor:
    """[B, N] of all context-parallel ranks' parts."""
    if runtime.cp_size == 1:
        return part
    whole_BN = part.new_zeros(samples, part.size(1))
    whole_BN[mine] = part
    return runtime.sum_over_context_parallel(whole_BN)


def _decode(role: Role, queue: Queue, config: RolloutConfig, answers: _Answers, eos_id: int) -> None:
    runtime = role.runtime
    positions = max(queue.lengths) + config.max_new_tokens - 1  # the last token is never read
    decoders = [Decoder(chunk, positions) for chunk in role.chunks]
    size = -(-_slots(role, config, len(queue.lengths), positions) // runtime.pp_size)

    def part(decoder: Decoder) -> _Part:
        cache = SlotCache(role.module.config, decoder.num_layers, size, positions, runtime.device)
        return _Part(decoder, cache, size)

    groups = [
        _Group(queue, [part(decoder) for decoder in decoders], size, eos_id) for _ in range(runtime.pp_size)
    ]
    wires = _Wires(role)
    while groups:
        # An interleaved pipeline's hidden states go through all stages once for each chunk.
        for chunk in range(len(decoders)):
            for group in groups:
                _advance(role, group, chunk, wires, answers, eos_id)
        groups = [group for group in groups if group.slots]
    wires.drain()


def _slots(role: Role, config: RolloutConfig, samples: int, positions: int) -> int:
    """How many samples are decoded at once on this replica, the same on each of its ranks."""
    if config.slots:
        return min(config.slots, samples)
    if role.runtime.device.type == "cpu":
        return min(CPU_SLOTS, samples)
    free, _ = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    layers = sum(len(chunk.decoder.layers) for chunk in role.chunks)
    fit = (free + reserved) * MEMORY_SHARE / SlotCache.bytes_per_slot(role.module.config, layers, positions)
    fit = torch.tensor(min(int(fit), samples), device=role.runtime.device)
    dist.all_reduce(fit, dist.ReduceOp.MIN, group=parallel_state.get_model_parallel_group())
    return max(1, int(fit))


def _advance(role: Role, group: _Group, chunk: int, wires: _Wires, answers: _Answers, eos_id: int) -> None:
    """One chunk of this stage's share of one tick of a group."""
    runtime = role.runtime
    if chunk == 0:
        _next_tick(runtime, group, wires, answers, eos_id)
    if not group.slots:
        return
    tick = group.tick
    if runtime.is_first_stage and chunk == 0:
        given = tick.tokens_R
    else:
        config = role.module.config
        shape = tick.tokens_R.size(0), config.hidden_size
        given = wires.receive_hidden(torch.empty(shape, dtype=config.params_dtype, device=runtime.device))
    result = group.parts[chunk].run(given, tick)
    if not runtime.is_last_stage:
        wires.to_next(result)
    elif chunk + 1 < len(group.parts):
        wires.to_first(result)
    else:
        group.sampled.append(answers.sample(result, tick.places_C))
        if not runtime.is_first_stage:
            wires.to_first(group.sampled[-1])


def _next_tick(runtime: Runtime, group: _Group, wires: _Wires, answers: _Answers, eos_id: int) -> None:
    """What the group does next, after what was sampled in its last tick; it is left without slots where nothing is."""
    if group.tick is not None and not runtime.is_last_stage:
        group.sampled.append(wires.receive_tokens(torch.empty_like(group.tick.places_C)))
    if group.ticks_left:
        group.tick = group.tick.next(group.sampled[-1], eos_id, answers.nowhere, group.most_positions)
    else:
        if group.sampled:
            group.slots.learn(torch.stack(group.sampled))
            group.sampled = []
        group.slots.admit()
        if not group.slots:
            return
        group.tick = group.slots.tick(runtime.device)
        group.ticks_left = min(TICKS_A_ROUND[runtime.device.type], group.slots.most_left())
    group.ticks_left -= 1


def _assemble(prompts: TokenBatch, new_tokens_BN, log_probs_BN, limits_B, eos_id: int, pad_id: int) -> Trajectories:
    is_eos_BN = new_tokens_BN == eos_id
    # EOS belongs to the answer: the value of ending is learnt there.
    ends_B = torch.where(is_eos_BN.any(dim=1), is_eos_BN.int().argmax(dim=1) + 1, new_tokens_BN.size(1) + 1)
    ended_B = ends_B <= limits_B  # past the limit stands padding, which may be EOS itself
    counts_B = torch.minimum(ends_B, limits_B)
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
