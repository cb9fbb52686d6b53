"""Attention within each sequence of a pack, RoPE, and the last layer on the rows that are read.

Legend: T tokens of a pack, N of them read, H query heads, G key/value heads, D head size, h hidden size.
"""

import math

import pytest
import torch

from megatron_safe.config import ModelConfig
from megatron_safe.models.attention import packed_attention
from megatron_safe.models.llama import build
from megatron_safe.models.packing import Pack, Sequences, pack
from megatron_safe.models.rope import rotate, rotation

LENGTHS = [5, 2, 2, 1, 9, 2]
HEADS = [(4, 4), (4, 2), (6, 1)]
WINDOWS = [None, 0, 1, 4, 8, 100]


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pack_of(lengths, device="cpu") -> Pack:
    """Without tokens of interest, nor places."""
    offsets = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32, device=device)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    return Pack(nothing[None], nothing, tuple(lengths), offsets, nothing, nothing)


def attend(query_THD, key_TGD, value_TGD, lengths, window):
    """softmax(q · k / sqrt(D)) v, token by token and head by head; a token sees itself and `window` before it."""
    per_group = query_THD.size(1) // key_TGD.size(1)
    rows, begin = [], 0
    for length in lengths:
        for t in range(begin, begin + length):
            seen = slice(begin if window is None else max(begin, t - window), t + 1)
            for head in range(query_THD.size(1)):
                group = head // per_group
                logits = key_TGD[seen, group] @ query_THD[t, head] / math.sqrt(query_THD.size(2))
                weights = logits.exp() / logits.exp().sum()
                rows.append(weights @ value_TGD[seen, group])
        begin += length
    return torch.stack(rows).view(query_THD.shape)


def inputs(heads, groups, lengths, size, dtype, device="cpu"):
    return [
        random(sum(lengths), count, size, dtype=dtype, seed=seed).to(device).requires_grad_()
        for seed, count in enumerate((heads, groups, groups))
    ]


def compare_with_the_formula(qkv, lengths, window, tolerance):
    """What comes out, and the gradients of queries, keys and values."""
    exact = [x.detach().cpu().double().requires_grad_() for x in qkv]
    output, wanted = packed_attention(*qkv, pack_of(lengths, qkv[0].device), window), attend(*exact, lengths, window)
    slope = random(*output.shape, dtype=output.dtype, seed=7)
    gradients = torch.autograd.grad(output, qkv, slope.to(output.device))
    wanted_gradients = torch.autograd.grad(wanted, exact, slope.double())
    for found, expected in zip((output, *gradients), (wanted, *wanted_gradients), strict=True):
        torch.testing.assert_close(found.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads, groups", HEADS)
def test_packed_attention_and_its_gradients_are_the_formula(heads, groups, window, dtype, tolerance):
    compare_with_the_formula(inputs(heads, groups, LENGTHS, 8, dtype), LENGTHS, window, tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float32, 1e-4)])
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("heads, groups", HEADS)
def test_packed_attention_on_a_gpu_is_the_formula(heads, groups, window, dtype, tolerance):
    lengths = [60, 2, 1, 135, 2]
    compare_with_the_formula(inputs(heads, groups, lengths, 64, dtype, "cuda"), lengths, window, tolerance)


def test_a_sequence_is_what_it_is_alone():
    """Whatever else is in its pack, and wherever it stands there."""
    query, key, value = (x.detach() for x in inputs(4, 2, LENGTHS, 8, torch.float32))
    packed = packed_attention(query, key, value, pack_of(LENGTHS)).split(LENGTHS)
    parts = zip(packed, *(x.split(LENGTHS) for x in (query, key, value)), strict=True)
    for found, *alone in parts:
        torch.testing.assert_close(found, packed_attention(*alone, pack_of([len(found)])), rtol=0, atol=1e-6)


# RoPE.

FREQUENCIES = torch.tensor([1.0, 0.37, 0.1, 0.004], dtype=torch.float64)


def turn(x_THD, positions_T):
    """Pairs (i, i + D/2) as complex numbers, times e^(i position frequency)."""
    z = torch.complex(*x_THD.chunk(2, dim=-1))
    rows = []
    for row, position in zip(z, positions_T.tolist(), strict=True):
        rows.append(row * torch.polar(torch.ones_like(FREQUENCIES), position * FREQUENCIES))
    turned = torch.stack(rows)
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("positions", [[0], [0, 1, 2, 0, 1, 0], [29, 3, 3, 0]])
def test_rotate_is_a_product_of_complex_numbers(positions):
    positions_T = torch.tensor(positions)
    x_THD = random(len(positions), 3, 8)
    expected = turn(x_THD, positions_T)
    found = rotate(x_THD.float(), *rotation(positions_T, max(positions) + 1, FREQUENCIES.float(), torch.float32))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    exact = rotation(positions_T, max(positions) + 1, FREQUENCIES, torch.float64)
    torch.testing.assert_close(rotate(x_THD, *exact), expected, rtol=0, atol=1e-12)
    if max(positions) > 0:
        assert (expected - x_THD).abs().max() > 0.5


def test_the_gradient_of_rotate():
    positions_T = torch.tensor([0, 1, 2, 5])
    cos_T1D, sin_T1D = rotation(positions_T, 6, FREQUENCIES, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos_T1D, sin_T1D), random(4, 2, 8).requires_grad_())


def test_angles_are_those_of_fp32_in_any_precision():
    """A bf16 position of 301 would be 302."""
    cos_T1D, sin_T1D = rotation(torch.tensor([301]), 302, FREQUENCIES.float(), torch.bfloat16)
    assert cos_T1D.dtype == sin_T1D.dtype == torch.bfloat16 and cos_T1D.shape == sin_T1D.shape == (1, 1, 8)
    torch.testing.assert_close(cos_T1D[0, 0, :4].double(), (301 * FREQUENCIES).cos(), rtol=0, atol=4e-3)
    torch.testing.assert_close(sin_T1D[0, 0, 4:].double(), (301 * FREQUENCIES).sin(), rtol=0, atol=4e-3)


# The model on a pack.

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2, qk_norm=True,
    qkv_bias=True, max_sequence_length=32, vocab_multiple=8, init_std=0.3,
)  # fmt: skip
ROWS = [6, 1, 11, 6, 3]


def sequences(read_BS=None):
    """Ragged rows, read everywhere or as said."""
    lengths_B, generator = torch.tensor(ROWS), torch.Generator().manual_seed(3)
    tokens_BS = torch.randint(21, (len(ROWS), max(ROWS)), generator=generator)
    inside_BS = torch.arange(max(ROWS)) < lengths_B[:, None]
    return Sequences(tokens_BS, lengths_B, inside_BS if read_BS is None else inside_BS & read_BS)


def run(module, rows: Sequences, **how):
    """[N] or [N, h], in the order of the rows; from one pack or several."""
    parts = [(one.places_N, module(one)) for one in pack(rows, **{"max_tokens": 100} | how)]
    places_N, output = (torch.cat(part) for part in zip(*parts, strict=True))
    return output[places_N.argsort()]


@pytest.mark.parametrize("head", ["language", "scalar"])
def test_outputs_of_a_pack_are_those_of_each_row_alone(runtime, head):
    module, rows = build(MODEL, runtime, head, 21, "fp32", 0), sequences()
    with torch.no_grad():
        alone = [
            run(module, Sequences(tokens_S[None, :n], torch.tensor([n]), torch.ones(1, n, dtype=torch.bool)))
            for tokens_S, n in zip(rows.tokens_BS, ROWS, strict=True)
        ]
        expected = torch.cat(alone)
        assert expected.std() > 0.3
        for how in ({}, {"max_tokens": 12}, {"at_least": 4}, {"at_least": 3, "equal": True}):
            torch.testing.assert_close(run(module, rows, **how), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", ["language", "scalar"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_reading_some_rows_is_running_all_and_selecting(runtime, head, layers, share):
    """The values, and the gradients of all parameters; where nothing is read, there is nothing and no gradient."""
    model = ModelConfig(**vars(MODEL) | {"num_layers": layers})
    module = build(model, runtime, head, 21, "fp32", 0)
    read_BS = torch.rand(len(ROWS), max(ROWS), generator=torch.Generator().manual_seed(4)) < share
    some, every = sequences(read_BS), sequences()
    selected_N = some.read_BS[every.read_BS]
    seen = []
    hook = module.decoder.layers[-1].mlp.register_forward_hook(lambda _, given, __: seen.append(given[0].size(0)))
    found = run(module, some)
    hook.remove()
    expected = run(module, every)[selected_N]
    assert seen == [len(found)] == [int(selected_N.sum())]  # the last MLP saw no other row
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    slope = random(*found.shape, dtype=torch.float32, seed=5)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = [torch.autograd.grad(output, parameters, slope, allow_unused=True) for output in (found, expected)]
    read = 0.0
    for name, one, other in zip(names, *gradients, strict=True):
        if other is None:  # the language head's, which is not run here
            assert one is None and name == "output_layer.weight" and head == "language"
            continue
        scale = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")
        read += scale
    assert (read > 1e-2) == (share > 0)
