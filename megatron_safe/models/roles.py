"""The roles of Safe RLHF: a model, and for those that learn, its optimizer."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_safe.config import ModelConfig, OptimizerConfig
from megatron_safe.huggingface.origin import Origin
from megatron_safe.models.adamw import load_state, prepare_state
from megatron_safe.models.llama import Head, Llama, build
from megatron_safe.runtime import Runtime

HEADS: dict[str, Head] = {
    "actor": "language",
    "reference": "language",
    "reward_model": "scalar",
    "cost_model": "scalar",
    "reward_critic": "scalar",
    "cost_critic": "scalar",
    "critic": "scalar",
}
"""The paper's six; and `critic`, one for reward and cost in place of two."""
VALUES: dict[str, tuple[int, ...]] = {"reward_critic": (0,), "cost_critic": (1,), "critic": (0, 1)}
"""What a critic's outputs are the values of: 0 the reward, 1 the cost."""


class Role:
    """One of them: its model (this rank's part), and its optimizer and schedule when it is trained.

    Gradients of losses are SUMS over micro-batches and data-parallel ranks; a loss divides by the size of the global
    batch itself (see `models.pipeline.forward_backward`).
    """

    def __init__(
        self,
        name: str,
        model: ModelConfig,
        runtime: Runtime,
        vocab_size: int,
        precision: str,
        seed: int,
        optimizer: OptimizerConfig | None = None,
        total_steps: int = 0,
        predictable: int | None = None,
        origin: Origin | None = None,
    ):
        """Build the role, with fresh weights unless `model.checkpoint` names what is going to fill it.

        Args:
            name: a key of `HEADS`.
            model: architecture.
            vocab_size: rows of the embedding (see `llama.build`).
            optimizer: how it learns; None for a frozen role.
            total_steps: optimizer steps that the learning-rate schedule spans.
            predictable: tokens that the tokenizer knows (default: vocab_size).
            origin: goes into the role's checkpoints.
        """
        self.name = name
        self.model = model
        self.runtime = runtime
        self.vocab_size = vocab_size
        self.origin = origin
        outputs = len(VALUES.get(name, (None,)))
        self._chunks = [
            build(model, runtime, HEADS[name], vocab_size, precision, seed, predictable, outputs, chunk)
            for chunk in range(runtime.parallel.virtual_pipeline_model_parallel_size)
        ]
        self.trainable: list[DistributedDataParallel] = []  # of the chunks, where it learns
        self.optimizer = None
        self.schedule = None
        if optimizer is None:
            for chunk in self._chunks:
                chunk.requires_grad_(False)
        else:
            self._make_trainable(optimizer, precision, max(1, total_steps))

    @property
    def chunks(self) -> list[Llama]:
        """This rank's parts of the model: one, but for an interleaved pipeline. Outside of a training forward, which
        waits for each layer's parameters by itself, they are to be read through here: after a step with
        `overlap_param_gather` other ranks may hold what this one lacks."""
        for chunk in self.trainable:
            if chunk.use_forward_hook:
                for group in chunk.bucket_groups:
                    group.finish_param_sync(skip_next_bucket_dispatch=True)
        return self._chunks

    @property
    def module(self) -> Llama:
        """The last of the chunks: on the last stage, the one with the head."""
        return self.chunks[-1]

    def _make_trainable(self, config: OptimizerConfig, precision: str, total_steps: int) -> None:
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=config.distributed,
            overlap_grad_reduce=config.overlap_grad_reduce,
            overlap_param_gather=config.overlap_param_gather,
        )
        self.trainable = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in self._chunks]
        self.optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=config.min_lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                adam_eps=config.eps,
                clip_grad=config.clip_grad,
                bf16=precision == "bf16",
                params_dtype=self.module.config.params_dtype,
                use_distributed_optimizer=config.distributed,
                overlap_param_gather=config.overlap_param_gather,
            ),
            self.trainable,
        )
        prepare_state(self.optimizer)
        if config.overlap_grad_reduce:
            # Megatron's schedules go through all packs but the last one without a reduction.
            no_syncs = [chunk.no_sync for chunk in self.trainable]
            self._chunks[0].config.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]
        self.schedule = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.lr if config.schedule == "constant" else config.min_lr,
            lr_warmup_steps=config.warmup_steps,
            lr_decay_steps=max(total_steps, config.warmup_steps + 1),
            lr_decay_style=config.schedule,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=total_steps,
            wd_incr_style="constant",
        )

    def reload_master_weights(self) -> None:
        """After weights were loaded into the module: what the optimizer holds follows them."""
        if self.optimizer is not None:
            self.optimizer.reload_model_params()

    def load_optimizer(self, optimizer: dict, schedule: dict) -> None:
        """Restore what `optimizer.sharded_state_dict` and `schedule.state_dict` gave, loaded for this layout."""
        load_state(self.optimizer, optimizer)
        self.schedule.load_state_dict(schedule)

    @contextmanager
    def without_reduction(self) -> Iterator[None]:
        """For a backward that another one follows before the step: gradients may only be reduced once."""
        config = self._chunks[0].config
        no_sync, config.no_sync_func = config.no_sync_func, None
        with ExitStack() as stack:
            stack.callback(setattr, config, "no_sync_func", no_sync)
            for chunk in self.trainable:
                stack.enter_context(chunk.no_sync())
            yield

    def zero_grad(self) -> None:
        for chunk in self.trainable:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self) -> dict[str, float]:
        """Reduce gradients over the layout, clip, and step the optimizer and its schedule.

        Returns:
            `grad_norm` (before clipping, over the whole model), `lr` (of this step) and `skipped` (1.0 when a
            non-finite gradient made the step a no-op).
        """
        finalize_model_grads(self.trainable)
        lr = self.optimizer.param_groups[0]["lr"]
        # The parts of Megatron-Core's own `step`, which looks for NaN only where it scales losses (fp16); here one
        # would end up in every weight.
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        skipped = not math.isfinite(grad_norm)
        if not skipped:
            limit, parameters = self.optimizer.config.clip_grad, self.optimizer.get_parameters()
            if limit > 0 and parameters:  # a distributed optimizer may leave a rank without any
                clip_grad_by_total_norm_fp32(parameters, limit, grad_norm)
            self.optimizer.step_with_ready_grads()
        self.schedule.step(increment=1)
        return {"grad_norm": grad_norm, "lr": lr, "skipped": float(skipped)}
