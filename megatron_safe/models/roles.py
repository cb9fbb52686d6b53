"""The six roles of Safe RLHF: a model, and for those that learn, its optimizer."""

import math

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_safe.config import ModelConfig, OptimizerConfig
from megatron_safe.huggingface.origin import Origin
from megatron_safe.models.adamw import load_state, prepare_state
from megatron_safe.models.llama import Head, build
from megatron_safe.runtime import Runtime

HEADS: dict[str, Head] = {
    "actor": "language",
    "reference": "language",
    "reward_model": "scalar",
    "cost_model": "scalar",
    "reward_critic": "scalar",
    "cost_critic": "scalar",
}


class Role:
    """One of the six: its model (this rank's part), and its optimizer and schedule when it is trained.

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
        self.module = build(model, runtime, HEADS[name], vocab_size, precision, seed, predictable)
        self.trainable: DistributedDataParallel | None = None
        self.optimizer = None
        self.schedule = None
        if optimizer is None:
            self.module.requires_grad_(False)
        else:
            self._make_trainable(optimizer, precision, max(1, total_steps))

    def _make_trainable(self, config: OptimizerConfig, precision: str, total_steps: int) -> None:
        self.trainable = DistributedDataParallel(
            self.module.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=config.distributed, overlap_grad_reduce=False
            ),
            self.module,
        )
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
            ),
            [self.trainable],
        )
        prepare_state(self.optimizer)
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

    def zero_grad(self) -> None:
        self.trainable.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self) -> dict[str, float]:
        """Reduce gradients over the layout, clip, and step the optimizer and its schedule.

        Returns:
            `grad_norm` (before clipping, over the whole model), `lr` (of this step) and `skipped` (1.0 when a
            non-finite gradient made the step a no-op).
        """
        finalize_model_grads([self.trainable])
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
