"""Started by torchrun: what Hugging Face folders compute in one layout.

usage: read_huggingface.py PLAN.json

The plan: {"parallel": settings of ParallelConfig, "folders": {name: folder}, "tokens": [[...]]}. Logits [B, S, V] or
scores [B, S] of each are written to PLAN.safetensors under their names.
"""

import json
import sys
from pathlib import Path

import torch
from megatron.core import parallel_state
from safetensors.torch import save_file

from megatron_safe.config import ModelConfig, ParallelConfig
from megatron_safe.huggingface.loading import HuggingFaceModel, load_weights
from megatron_safe.models.llama import architecture
from megatron_safe.models.packing import Sequences
from megatron_safe.models.pipeline import forward
from megatron_safe.models.roles import Role
from megatron_safe.runtime import start

BUDGET = 24  # tokens of a pack: more than one row, not all of them


def whole_logits(module, hidden_nh) -> torch.Tensor:
    """[n, V / p of each of p ranks, one after the other]"""
    shard = module.logits(hidden_nh).contiguous()
    parts = [torch.empty_like(shard) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    torch.distributed.all_gather(parts, shard, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)


def output_of(role: Role, tokens_BS: torch.Tensor) -> torch.Tensor:
    """[B, S, V] logits or [B, S] scores, on every rank."""
    rows = Sequences(tokens_BS, torch.full((len(tokens_BS),), tokens_BS.size(1)), torch.ones_like(tokens_BS).bool())
    if role.module.head == "scalar":
        return forward(role, rows, BUDGET, lambda scores_n, _: scores_n).view(tokens_BS.shape)
    logits_NV = torch.empty(tokens_BS.numel(), -(-role.vocab_size // 16) * 16)

    def keep(hidden_nh, part):
        logits_NV[part["place"]] = whole_logits(role.module, hidden_nh)
        return torch.zeros(len(hidden_nh))

    forward(role, rows, BUDGET, keep, {"place": torch.arange(len(logits_NV))})
    logits_NV = role.runtime.broadcast_from_last_stage(logits_NV)
    return logits_NV[:, : role.vocab_size].contiguous().unflatten(0, tokens_BS.shape)


def main(path: Path) -> None:
    plan = json.loads(path.read_text())
    tokens_BS = torch.tensor(plan["tokens"])
    found = {}
    with start(ParallelConfig(**plan["parallel"], timeout_seconds=120.0), 0) as runtime:
        for name, folder in plan["folders"].items():
            source = HuggingFaceModel.open(Path(folder))
            description = source.description
            model = ModelConfig(**architecture(description.model) | {"checkpoint": folder, "vocab_multiple": 16})
            scalar = description.head == "scalar"
            role = Role("reward_model" if scalar else "actor", model, runtime, description.vocab_size, "fp32", 0)
            for chunk in role.chunks:
                with torch.no_grad():  # what is not loaded shall be noticed
                    for parameter in chunk.parameters():
                        parameter.fill_(torch.nan)
                load_weights(chunk, 16, source)
            found[name] = output_of(role, tokens_BS)
        if runtime.is_main:
            save_file(found, path.with_suffix(".safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
