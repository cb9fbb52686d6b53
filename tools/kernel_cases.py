"""What tools/profile_kernels.py measures: each operation of `kernels/` on a model's shapes, and its rivals.

Legend: N tokens, v = V/p this rank's vocabulary shard, h hidden size, B sequences, T actions; C samples, G key/value
heads, q query heads of each, D head size, K cells of a cache slot.
"""

import importlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from eager import (
    eager_decode_attention,
    eager_gae,
    eager_lagrange_step,
    eager_logprob,
    eager_loss,
    eager_sample,
    eager_value_loss,
)

CLIP = 0.2
SHAPING = dict(kl_coeff=0.02, score_clip=50.0, gamma=1.0, lam=0.95)
RULE = dict(lambda_lr=0.05, threshold=0.0, lambda_min=0.01, lambda_max=10.0)


@dataclass(frozen=True)
class Shape:
    name: str
    vocabulary: int  # this rank's v
    hidden: int
    tokens: tuple[int, ...]
    heads: tuple[int, int, int]  # this rank's G, q and D
    sequences: int = 512  # of a rollout batch: shaped_gae, value_loss, lagrangian, and rows of a decoding step
    actions: int = 2048
    decoding: tuple[int, ...] = (1, 8, 64)  # C of decode_attention
    cells: int = 4096

    def with_tokens(self, tokens: list[int]) -> "Shape":
        return replace(self, tokens=tuple(tokens))


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-7b", 32_000, 4096, (4096, 16384, 65536), (32, 1, 128)),
        Shape("llama3-8b", 128_256, 4096, (4096, 16384, 65536), (8, 4, 128)),
        Shape("llama3-70b-tp8", 128_256 // 8, 8192, (4096, 16384, 65536), (1, 8, 128)),
        # A hidden size that a CPU can be asked for.
        Shape("laptop", 32_000, 256, (4096,), (4, 1, 64), decoding=(32, 256), cells=256),
        Shape("tiny", 1000, 64, (256,), (2, 2, 16), 16, 128, (3,), 40),
    )
}


@dataclass
class Contender:
    """`run(prepare(i))` is one run on input set number i; only `run` is timed."""

    prepare: Callable[[int], Any]
    run: Callable[[Any], Any]


@dataclass
class Case:
    """One row of the table. flops: of the matrix products; where there are none, about that many scalar operations."""

    name: str
    shape: str
    bytes: int
    flops: int
    contenders: dict[str, Contender] = field(default_factory=dict)  # "ours" first
    matmul: bool = False


def rivals_here(wanted: list[str]) -> tuple[set[str], list[str]]:
    """Which of the wanted rivals are installed, and a line about each that is not."""
    modules = {"liger": "liger_kernel.transformers", "flash-attn": "flash_attn.ops.triton.cross_entropy"}
    present, lines = set(), []
    for rival in wanted:
        try:
            if rival in modules:
                importlib.import_module(modules[rival])
            present.add(rival)
        except ImportError:
            lines.append(f"{rival}: not installed, skipped")
    return present, lines


def operation(name: str):
    """A public function of kernels/, by its name; its file has the same one."""
    return getattr(importlib.import_module(f"megatron_safe.kernels.{name}"), name)


class Inputs:
    """Random tensors on the device; `sets` says how many copies rotate so that none is found in the cache."""

    def __init__(self, device: torch.device, cache_bytes: int):
        self.device, self.cache_bytes = device, cache_bytes
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(self, *size, dtype=torch.float32):
        return torch.randn(size, device=self.device, dtype=dtype)

    def sets(self, bytes_each: int) -> int:
        return max(1, min(16, -(-2 * self.cache_bytes // max(bytes_each, 1))))

    def tokens(self, number: int, vocabulary: int) -> dict[str, torch.Tensor]:
        """What the loss needs beside the logits."""
        mask_N = torch.ones(number, dtype=torch.bool, device=self.device)
        return dict(
            targets_N=torch.randint(vocabulary, (number,), device=self.device),
            old_N=self.normal(number) * 0.1 - 7.0,
            reward_N=self.normal(number), cost_N=self.normal(number), mask_N=mask_N,
            weights_N=mask_N / number, lam=torch.tensor(0.5, device=self.device),
        )  # fmt: skip


def passes(name, shape, functions, sources, one_pass_bytes, flops, whole_only=()) -> Iterator[Case]:
    """Three cases of one differentiable function: forward, backward, and both. functions: {contender: f(leaf) -> 0-d}.

    sources: the rotating inputs. The backward pass may consume its input, so every run starts from a fresh copy of a
    pristine one (untimed). whole_only: contenders that make the gradient in the forward pass.
    """
    pristine = sources[0].clone()

    def leaf(i):
        return sources[i % len(sources)].detach().copy_(pristine).requires_grad_()

    def contender(function, which):
        def both(x):
            return torch.autograd.grad(function(x), x)

        def forwarded(i):
            x = leaf(i)
            return function(x), x

        if which == "forward":
            return Contender(leaf, function)
        if which == "backward":
            return Contender(forwarded, lambda state: torch.autograd.grad(*state))
        return Contender(leaf, both)

    for which, factor in (("forward", 1), ("backward", 2), ("forward+backward", 3)):
        chosen = {key: f for key, f in functions.items() if which == "forward+backward" or key not in whole_only}
        contenders = {key: contender(f, which) for key, f in chosen.items()}
        yield Case(f"{name} {which}", shape, factor * one_pass_bytes, factor * flops, contenders)


def compiled(function, rivals):
    if "compile" not in rivals:
        return {}
    torch.compiler.reset()  # each shape is compiled for itself; past the recompile limit it would run eagerly, unsaid
    return {"compile": torch.compile(function, dynamic=False)}


def eager(function, rivals):
    return {"eager": function} if "eager" in rivals else {}


def logits_cases(name: str, shape: Shape, inputs: Inputs, rivals: set[str]) -> Iterator[Case]:
    ours, v = operation(name), shape.vocabulary
    for n in shape.tokens:
        size = n * v * inputs.dtype.itemsize
        logits = [inputs.normal(n, v, dtype=inputs.dtype) for _ in range(inputs.sets(size))]
        t = inputs.tokens(n, v)
        functions: dict[str, Callable] = {}
        if name == "vocab_parallel_logprob":
            functions["ours"] = lambda x, t=t: ours(x, t["targets_N"])[0].sum()
            plain = lambda x, t=t: eager_logprob(x, t["targets_N"])[0].sum()  # noqa: E731
        else:
            functions["ours"] = lambda x, t=t: ours(x, *t.values(), CLIP)[0]
            plain = lambda x, t=t: eager_loss(x, **t, clip_ratio=CLIP)[0]  # noqa: E731
        functions |= eager(plain, rivals) | compiled(plain, rivals)
        if "liger" in rivals:
            liger = importlib.import_module("liger_kernel.transformers").LigerCrossEntropyLoss(reduction="sum")
            functions["liger"] = lambda x, t=t, liger=liger: liger(x, t["targets_N"])
        if "flash-attn" in rivals:
            flash = importlib.import_module("flash_attn.ops.triton.cross_entropy").cross_entropy_loss
            functions["flash-attn"] = lambda x, t=t, f=flash: f(x, t["targets_N"], inplace_backward=True)[0].sum()
        yield from passes(name, f"{shape.name} N={n} v={v}", functions, logits, size, 8 * n * v, ("liger",))


def linear_cases(name: str, shape: Shape, inputs: Inputs, rivals: set[str]) -> Iterator[Case]:
    """Scoring (forward under no_grad) for linear_logprob; forward and backward together for the loss."""
    ours, v, h = operation(name), shape.vocabulary, shape.hidden
    weight_vh = (inputs.normal(v, h, dtype=inputs.dtype) / h**0.5).requires_grad_()
    training = name == "linear_ppo_lag_loss"
    for n in shape.tokens:
        hidden_Nh = inputs.normal(n, h, dtype=inputs.dtype).requires_grad_()
        t = inputs.tokens(n, v)
        targets_N = t["targets_N"]
        if training:
            functions = {"ours": lambda x, w, t=t: ours(x, w, *t.values(), CLIP)[0]}
            plain = lambda x, w, t=t: eager_loss(x @ w.t(), **t, clip_ratio=CLIP)[0]  # noqa: E731
        else:
            functions = {"ours": lambda x, w, y=targets_N: ours(x, w, y)}
            plain = lambda x, w, y=targets_N: eager_logprob(x @ w.t(), y)  # noqa: E731
        functions |= eager(plain, rivals) | compiled(plain, rivals)
        if training and "liger" in rivals:
            liger = importlib.import_module("liger_kernel.transformers")
            fused = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum")
            functions["liger"] = lambda x, w, y=targets_N, fused=fused: fused(w, x, y)

        def run(function, x=hidden_Nh):
            if training:
                return torch.autograd.grad(function(x, weight_vh), (x, weight_vh))
            with torch.no_grad():
                return function(x, weight_vh)

        def gemms(x=hidden_Nh):
            """The bare matrix products of the operation, in chunks as it takes them."""
            rows = max(1, (2**28 if inputs.device.type == "cuda" else 2**24) // v)
            with torch.no_grad():
                for part in x.split(rows):
                    logits = part @ weight_vh.t()
                    if training:
                        logits @ weight_vh
                        logits.t() @ part

        contenders = {key: Contender(lambda i: None, lambda _, f=f: run(f)) for key, f in functions.items()}
        contenders["gemms"] = Contender(lambda i: None, lambda _: gemms())
        moved = (hidden_Nh.nbytes + weight_vh.nbytes) * (2 if training else 1)
        label = name + (" forward+backward" if training else " forward")
        products = 3 if training else 1
        yield Case(label, f"{shape.name} N={n} v={v} h={h}", moved, products * 2 * n * h * v, contenders, matmul=True)


def gae_cases(name: str, shape: Shape, inputs: Inputs, rivals: set[str]) -> Iterator[Case]:
    ours, b, t = operation(name), shape.sequences, shape.actions
    moved = b * t * (8 * 4 + 1)
    mask_BT = torch.ones(b, t, dtype=torch.bool, device=inputs.device)
    sets = [
        [*(inputs.normal(b, t) for _ in range(2)), inputs.normal(b), inputs.normal(b),
         *(inputs.normal(b, t) for _ in range(2)), mask_BT]
        for _ in range(inputs.sets(moved))
    ]  # fmt: skip
    # No "compile": it would unroll the loop over T.
    functions = {"ours": lambda x: ours(*x, **SHAPING)} | eager(lambda x: eager_gae(*x, **SHAPING), rivals)
    contenders = {key: Contender(lambda i: sets[i % len(sets)], f) for key, f in functions.items()}
    yield Case(name, f"{shape.name} B={b} T={t}", moved, b * t * 40, contenders)


def value_loss_cases(name: str, shape: Shape, inputs: Inputs, rivals: set[str]) -> Iterator[Case]:
    ours, size = operation(name), (shape.sequences, shape.actions)
    values = [inputs.normal(*size) for _ in range(inputs.sets(shape.sequences * shape.actions * 16))]
    constants = [inputs.normal(*size), inputs.normal(*size), torch.rand(size, device=inputs.device)]
    plain = lambda x: eager_value_loss(x, *constants, CLIP)  # noqa: E731
    functions = {"ours": lambda x: ours(x, *constants, CLIP)} | eager(plain, rivals) | compiled(plain, rivals)
    label = f"{shape.name} B={size[0]} T={size[1]}"
    for case in passes(name, label, functions, values, 0, 10 * values[0].numel()):
        # Forward: four read, the gradient written; backward: it is read and written.
        case.bytes = values[0].nbytes * {"forward": 5, "backward": 2, "forward+backward": 5}[case.name.split()[-1]]
        yield case


def lagrangian_cases(name: str, shape: Shape, inputs: Inputs, rivals: set[str]) -> Iterator[Case]:
    module = importlib.import_module("megatron_safe.kernels.lagrangian")
    state, costs_B = module.lagrange_state(1.0, 256, inputs.device), inputs.normal(shape.sequences)
    lambda_, costs_W = 1.0, deque(maxlen=256)

    def on_the_host(_):
        nonlocal lambda_
        lambda_ = eager_lagrange_step(lambda_, costs_W, costs_B, **RULE)

    functions = {"ours": lambda _: module.lagrange_step(state, costs_B, None, True, **RULE)}
    contenders = {key: Contender(lambda i: None, f) for key, f in (functions | eager(on_the_host, rivals)).items()}
    moved = costs_B.nbytes + 2 * 256 * 8
    yield Case(name, f"{shape.name} B={shape.sequences} W=256", moved, 4 * shape.sequences, contenders)


def sample_cases(name: str, shape: Shape, inputs: Inputs, rivals: set[str]) -> Iterator[Case]:
    ours, b, v = operation(name), shape.sequences, shape.vocabulary
    module = importlib.import_module("megatron_safe.kernels.sample")
    size = b * v * inputs.dtype.itemsize
    logits = [inputs.normal(b, v, dtype=inputs.dtype) for _ in range(inputs.sets(size))]
    ids_B = torch.arange(b, device=inputs.device)
    position_B = torch.full_like(ids_B, 3)
    key = module.NoiseKey(1, ids_B, position_B)
    functions = {"ours": lambda x: ours(x, module.philox_uniform(1, ids_B, position_B), noise_key=key)}
    functions |= eager(eager_sample, rivals) | compiled(eager_sample, rivals)
    contenders = {name: Contender(lambda i: logits[i % len(logits)], f) for name, f in functions.items()}
    yield Case(name, f"{shape.name} B={b} v={v}", size, 20 * b * v, contenders)


def decode_attention_cases(name: str, shape: Shape, inputs: Inputs, rivals: set[str]) -> Iterator[Case]:
    """A layer's step over slots that are full to a quarter, to the whole, and evenly between."""
    ours, (g, q, d), k = operation(name), shape.heads, shape.cells
    for c in shape.decoding:
        positions_C = torch.linspace(k - 1, k // 4 if c > 1 else k - 1, c).long()
        seen = int((positions_C + 1).sum())
        positions_C = positions_C.to(inputs.device)
        sets = [
            (inputs.normal(c, g, q, d, dtype=inputs.dtype),
             *(inputs.normal(c, g, k, d, dtype=inputs.dtype) for _ in range(2)), positions_C)
            for _ in range(inputs.sets(2 * seen * g * d * inputs.dtype.itemsize))
        ]  # fmt: skip
        functions: dict[str, Callable] = {"ours": lambda x: ours(*x)}
        plain = lambda x: eager_decode_attention(*x)  # noqa: E731
        functions |= eager(plain, rivals) | compiled(plain, rivals)
        if "flash-attn" in rivals:
            flash = importlib.import_module("flash_attn").flash_attn_with_kvcache
            functions["flash-attn"] = lambda x, flash=flash: flash(
                x[0].flatten(1, 2)[:, None], x[1].transpose(1, 2), x[2].transpose(1, 2),
                cache_seqlens=(x[3] + 1).int(),
            )  # fmt: skip
        contenders = {key: Contender(lambda i, sets=sets: sets[i % len(sets)], f) for key, f in functions.items()}
        moved = 2 * (seen * g + c * g * q) * d * inputs.dtype.itemsize
        yield Case(name, f"{shape.name} C={c} G={g} q={q} D={d} K={k}", moved, 4 * seen * g * q * d, contenders)


OPERATIONS: dict[str, Callable[[str, Shape, Inputs, set[str]], Iterator[Case]]] = {
    "vocab_parallel_logprob": logits_cases,
    "ppo_lag_loss": logits_cases,
    "linear_logprob": linear_cases,
    "linear_ppo_lag_loss": linear_cases,
    "shaped_gae": gae_cases,
    "value_loss": value_loss_cases,
    "lagrangian": lagrangian_cases,
    "sample": sample_cases,
    "decode_attention": decode_attention_cases,
}
