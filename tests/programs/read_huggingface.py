"""Started by torchrun: what Hugging Face folders compute in one layout.

usage: read_huggingface.py PLAN.json

The plan: {"tp": 1, "pp": 1, "folders": {name: folder}, "tokens": [[...]]}. Logits [B, S, V] or scores [B, S] of each
are written to PLAN.safetensors under their names.
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
from megatron_safe.models.pipeline import forward
from megatron_safe.models.roles import Role
from megatron_safe.runtime import start


def whole_logits(module, hidden_SBh) -> torch.Tensor:
    """[B, S, V / p of each of p ranks, one after the other]"""
    shard = module.logits(hidden_SBh).transpose(0, 1).contiguous()
    parts = [torch.empty_like(shard) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    torch.distributed.all_gather(parts, shard, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)


def main(path: Path) -> None:
    plan = json.loads(path.read_text())
    tokens_BS = torch.tensor(plan["tokens"])
    found = {}
    with start(ParallelConfig(plan["tp"], plan["pp"], timeout_seconds=120.0), 0) as runtime:
        for name, folder in plan["folders"].items():
            source = HuggingFaceModel.open(Path(folder))
            description = source.description
            model = ModelConfig(**architecture(description.model) | {"checkpoint": folder, "vocab_multiple": 16})
            scalar = description.head == "scalar"
            role = Role("reward_model" if scalar else "actor", model, runtime, description.vocab_size, "fp32", 0)
            with torch.no_grad():  # what is not loaded shall be noticed
                for parameter in role.module.parameters():
                    parameter.fill_(torch.nan)
            load_weights(role.module, 16, source)
            like = tokens_BS if scalar else torch.empty(*tokens_BS.shape, -(-description.vocab_size // 16) * 16)
            read = (lambda scores, _: scores) if scalar else (lambda hidden, _, m=role.module: whole_logits(m, hidden))
            output = forward(role, {"tokens": tokens_BS, "like": like}, read, len(tokens_BS))
            found[name] = output if scalar else output[..., : description.vocab_size].contiguous()
        if runtime.is_main:
            save_file(found, path.with_suffix(".safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
