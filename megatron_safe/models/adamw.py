"""What Megatron-Core's optimizers assume of Adam's state, and torch's AdamW does not keep.

Megatron-Core is written for the fused Adams of Transformer Engine and Apex. Where neither is installed it takes torch's
AdamW, which makes its state at the first step and has a `step` tensor per parameter. Version 0.16.1 then cannot
save and load an optimizer that has not stepped (critic warm-up), and its DistributedOptimizer cannot load at all, or
loads wrongly. The two functions here close that; with a fused Adam they change nothing.
"""

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def prepare_state(optimizer: MegatronOptimizer) -> None:
    """Call once, before the first step, save or load."""
    for part in _with_torch_adamw(optimizer):
        # The state that AdamW would make at its first step. Without it there is nothing to save before that step, and
        # in a fresh process DistributedOptimizer finds no tensors to load into.
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                part.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
        if isinstance(part, DistributedOptimizer):
            part._set_main_param_and_optimizer_states = _setter_that_keeps_step(part)


def load_state(optimizer: MegatronOptimizer, loaded: dict) -> None:
    """`optimizer.load_state_dict`; the state may be that of an optimizer that never stepped."""
    parts = _with_torch_adamw(optimizer)
    if any(not isinstance(part, DistributedOptimizer) for part in parts):
        # They leave out a `step` of 0 when they save.
        loaded.get("optimizer", loaded)["state"].setdefault("common_step", torch.zeros((), dtype=torch.float32))
    optimizer.load_state_dict(loaded)
    for part in parts:
        for state in part.optimizer.state.values():
            # DistributedOptimizer gives all parameters the same `step` tensor: AdamW would advance it once for each.
            state["step"] = state["step"].clone()


def _with_torch_adamw(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if isinstance(part.optimizer, torch.optim.AdamW)]


def _setter_that_keeps_step(part: DistributedOptimizer):
    """DistributedOptimizer copies every tensor of a parameter's state from the loaded ones, among which `step` is not:
    it was restored with the parameter groups. So it is given the one it has."""
    plain = part._set_main_param_and_optimizer_states

    def set_state(model_param, tensors):
        group, order = part.model_param_group_index_map[model_param]
        main_param = part.optimizer.param_groups[group]["params"][order]
        plain(model_param, {"step": part.optimizer.state[main_param]["step"], **tensors})

    return set_state
