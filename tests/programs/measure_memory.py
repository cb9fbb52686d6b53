"""Started by torchrun: bytes that roles really take, part by part, and at the peak of a training and a scoring pass.

usage: measure_memory.py OUT.json LAYOUTS

LAYOUTS: JSON, name -> the settings of `parallel`; each runs in a process group of its own. OUT.json: name -> for each
rank a list of dicts, one for each case of CASES.
"""

import functools
import json
import os
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_safe.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_safe.runtime import start

CASES = [
    # (role, precision, key/value heads, distributed optimizer)
    ("actor", "fp32", 4, False),
    ("actor", "bf16", 2, True),
    ("reward_critic", "fp32", 2, True),
    ("critic", "bf16", 4, False),
]
MODEL = dict(num_layers=4, hidden_size=64, ffn_hidden_size=176, num_attention_heads=4, qkv_bias=True)
VOCABULARY, ROWS, COLUMNS, MAX_TOKENS = 500, 16, 100, 800
ANSWER = slice(20, 60)


class Held(TorchDispatchMode):
    """Bytes of tensors made in here that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._alive = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self._alive and storage._cdata not in before:
                    self._alive.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _drop(self, which, size):
        self._alive.discard(which)
        self.now -= size


def size_of(tensors) -> int:
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def optimizer_size(role) -> int:
    """Moments and master weights, without what is a view of the model's own."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in role.module.parameters()}
    tensors = []
    for part in getattr(role.optimizer, "chained_optimizers", [role.optimizer]):
        tensors += [x for state in part.optimizer.state.values() for x in state.values()]
        tensors += [x for group in part.optimizer.param_groups for x in group["params"]]
    return size_of(x for x in tensors if x.untyped_storage().data_ptr() not in owned)


def measure(case, runtime) -> dict:
    from megatron_safe.kernels.linear_ppo_lag_loss import linear_ppo_lag_loss
    from megatron_safe.models.heads import head_options, token_log_probs
    from megatron_safe.models.packing import Sequences, pack
    from megatron_safe.models.pipeline import forward, forward_backward
    from megatron_safe.models.roles import Role

    name, precision, groups, distributed = case
    model = ModelConfig(**MODEL, num_query_groups=groups)
    role = Role(name, model, runtime, VOCABULARY, precision, 0, OptimizerConfig(distributed=distributed), 10)
    lengths_B = torch.arange(COLUMNS - ROWS + 1, COLUMNS + 1)
    read_BS = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    read_BS[:, ANSWER] = True
    tokens_BS = torch.randint(VOCABULARY, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(0))
    sequences = Sequences(tokens_BS, lengths_B, read_BS)
    places = int(read_BS.sum())
    ones_N, lam = torch.ones(places), torch.tensor(1.0)
    inputs = {"targets": tokens_BS[read_BS], "weights": ones_N / places, "ones": ones_N}

    def loss(output, part):
        if name != "actor":
            value = output.float().square().sum()
            return value, {"loss": value}
        value, _ = linear_ppo_lag_loss(
            output, role.module.output_weight(), part["targets"], part["ones"], part["ones"], part["ones"],
            part["ones"].bool(), part["weights"], lam, 0.2, 1.0, **head_options(role.module),
        )  # fmt: skip
        return value, {"loss": value}

    def read(output, part):
        return token_log_probs(role.module, output, part["targets"]) if name == "actor" else output

    stages = runtime.pp_size
    packs = pack(sequences, MAX_TOKENS, 1 if stages == 1 else 2 * stages, 1, stages > 1, runtime.tp_size)
    found = {
        "weights": size_of(role.module.parameters()),
        "gradients": size_of(buffer.grad_data for chunk in role.trainable for buffer in chunk.buffers),
        "optimizer": optimizer_size(role),
        "stage": runtime.pp_rank,
        "packs": len(packs),
        "tokens": max(pack.tokens_1T.size(1) for pack in packs),
        "read": max(len(pack.read_N) for pack in packs),
    }
    for phase in ("train", "score"):
        peaks = []
        for _ in range(4):
            with Held() as held:
                if phase == "train":
                    role.zero_grad()
                    forward_backward(role, sequences, MAX_TOKENS, loss, ("loss",), inputs)
                else:
                    forward(role, sequences, MAX_TOKENS, read, inputs, shape=(2,) if name == "critic" else ())
            peaks.append(held.most)
        # Not the first, which makes what stays; and a message's buffer may be let go late.
        found[phase] = min(peaks[1:])
    return found | {"kept": kept_bytes(role, packs[0])} if runtime.pp_size == 1 else found


def kept_bytes(role, pack) -> int:
    """Unique storages that a forward of one pack saves for its backward, without the weights."""
    own, kept = {x.untyped_storage().data_ptr() for x in role.module.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        role.trainable[0](pack)
    return size_of(x for x in kept if x.untyped_storage().data_ptr() not in own)


def main(path: Path, layouts: dict[str, dict]) -> None:
    place = dict(rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # torchrun's
    init, results = dist.init_process_group, {}
    for name, settings in layouts.items():
        # Under a prefix of its own: a group would else meet the addresses that the one before it left.
        dist.init_process_group = functools.partial(init, store=dist.PrefixStore(name, store), **place)
        with start(ParallelConfig(**settings, timeout_seconds=120.0), 0) as runtime:
            found = [measure(case, runtime) for case in CASES]
            ranks = results[name] = [None] * runtime.world_size
            dist.all_gather_object(ranks, found)
    if place["rank"] == 0:
        path.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
