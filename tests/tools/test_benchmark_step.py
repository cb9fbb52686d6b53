"""The step benchmark runs, its numbers hang together, and both sides do the same work. Their speed is not tested.

Legend: B samples, P longest prompt, L tokens, T = L - 1 actions.
"""

import copy
import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch

from megatron_safe.algorithms.lagrange import LagrangeMultiplier
from megatron_safe.config import ParallelConfig
from megatron_safe.data.batches import TokenBatch, collate
from megatron_safe.kernels.ppo_lag_loss import ppo_lag_loss, token_weights
from megatron_safe.kernels.shaped_gae import shaped_gae
from megatron_safe.kernels.value_loss import value_loss
from megatron_safe.rollout.generate import generate
from megatron_safe.runtime import start
from megatron_safe.training.experience import critics_of, read_values
from megatron_safe.training.ppo_lag import multiplier_settings

TOOLS = Path(__file__).resolve().parents[2] / "tools"
PHASES = ("generate", "score", "train")


@pytest.fixture(scope="module")
def tools():
    sys.path.insert(0, str(TOOLS))  # as `python tools/benchmark_step.py` does
    yield
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def tool(tools):
    import benchmark_step

    return benchmark_step


@pytest.fixture(scope="module")
def step_side(tools):
    import step_side

    return step_side


@pytest.fixture(scope="module")
def rival_step(tools):
    pytest.importorskip("transformers", reason="the rival needs transformers")
    import rival_step

    return rival_step


@pytest.fixture(scope="module")
def ours(step_side):
    with start(ParallelConfig(), 0) as runtime:
        yield step_side.Ours(step_side.WORKLOADS["tiny"], runtime)


@pytest.fixture()
def rival(step_side, rival_step):
    workload = step_side.WORKLOADS["tiny"]
    return rival_step.Rival(workload.settings(), workload.model, workload.vocab_size, 4, 4)


# The program.


@pytest.fixture(scope="module")
def measured(tool, tmp_path_factory):
    """(record, folder) of a run in one process and in a pipeline of two, with JSON and traces."""
    pytest.importorskip("transformers", reason="the rival needs transformers")
    folder = tmp_path_factory.mktemp("benchmark")
    arguments = ["--workload", "tiny", "--layouts", "pp2", "--repeats", "2"]
    assert tool.main([*arguments, "--out", str(folder / "b.json"), "--trace", str(folder / "traces")]) == 0
    return json.loads((folder / "b.json").read_text()), folder


def test_the_record_hangs_together(step_side, measured):
    record, folder = measured
    assert {"device", "date", "command", "workloads"} <= record.keys()
    found = record["workloads"]["tiny"]
    ours, rival, pp2 = found["ours"], found["rival"], found["layouts"]["pp2"]
    assert found["layouts"].keys() == {"pp2"}
    assert found["answer_tokens"] == step_side.WORKLOADS["tiny"].limits_B().sum()
    for side in (ours, rival, pp2):
        seconds = side["seconds"]
        assert all(seconds[phase] > 0 for phase in (*PHASES, "step"))
        assert seconds["step"] >= max(seconds[phase] for phase in PHASES)
        assert seconds["step"] == statistics.median(side["step_seconds_of_each_repeat"])
        for phase in ("generate", "step"):
            assert side["tokens_per_second"][phase] == pytest.approx(found["answer_tokens"] / seconds[phase])
        assert len(side["step_seconds_of_each_repeat"]) == found["repeats"] == 2
    for phase, label in (("generate", "generation"), ("score", "score"), ("train", "train"), ("step", "step")):
        assert found[f"{label}_speedup"] == pytest.approx(rival["seconds"][phase] / ours["seconds"][phase])
    for phase, label in (("generate", "generation"), ("step", "step")):
        assert pp2[f"{label}_of_one_process"] == pytest.approx(ours["seconds"][phase] / pp2["seconds"][phase])
    if Path("/proc/self/status").exists():
        assert found["memory_ratio"] == pytest.approx(ours["peak_bytes"] / rival["peak_bytes"])
        assert 0 < ours["peak_bytes"] < 2**30 and 0 < rival["peak_bytes"] < 2**30
    for side in ("one", "rival", "pp2"):
        assert "traceEvents" in json.loads((folder / "traces" / f"tiny-{side}.json").read_text())


def test_the_table_shows_every_side(tool, measured):
    lines = tool.table("tiny", measured[0]["workloads"]["tiny"]).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["ours", "rival", "pp2"]
    assert lines[-1].startswith("against the rival: generation x")


def test_without_transformers_there_is_no_rival(tool, monkeypatch, capsys):
    asked = []

    def measure(name, sides, repeats, trace):
        asked.append((name, sides))
        run = {"seconds": {"generate": 1.0, "score": 1.0, "train": 2.0, "step": 4.0}, "tokens": 8, "peak_bytes": None}
        return tool.summary(name, 8, {side: [run] for side in sides})

    monkeypatch.setattr(tool, "measure", measure)
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    assert tool.main(["--layouts", "tp2"]) == 0
    assert asked == [("A", ["one", "tp2"]), ("B", ["one", "tp2"])]
    said = capsys.readouterr().out
    assert said.startswith("transformers: not installed") and "against the rival" not in said
    found = measure("A", ["one"], 1, None)
    assert found["rival"] is found["step_speedup"] is found["generation_speedup"] is found["memory_ratio"] is None


def test_a_side_that_fails_says_why(tool):
    side = tool.Side("no-such-workload", "one")
    try:
        with pytest.raises(tool.SideFailed, match="one failed:(.|\n)*KeyError: 'no-such-workload'"):
            side.ask("step 0")
    finally:
        side.close()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--workload", "C"], "'C'"),
        (["--layouts", "one,tp3"], "'tp3'"),
        (["--repeats", "0"], "found 0"),
        (["--repeats", "many"], "'many'"),
        (["--out", "/no/such/folder/b.json"], "/no/such/folder"),
        (["--out", "b.txt"], "b.txt"),
        (["--trace", __file__], "test_benchmark_step.py"),
        (["--colour"], "--colour"),
    ],
)
def test_bad_arguments_are_one_line(tool, capsys, arguments, words):
    with pytest.raises(SystemExit) as exit:
        tool.main(arguments)
    assert exit.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and words in said.err


# The lengths of answers.


def test_drawn_lengths(step_side):
    a, b = step_side.WORKLOADS["A"], step_side.WORKLOADS["B"]
    assert a.limits_B().tolist() == [64] * 32
    assert torch.equal(b.limits_B(), b.limits_B()) and b.limits_B().shape == (256,)
    many_B = dataclasses.replace(b, prompts=400_000).limits_B().double()
    stays = 1 - 1 / 24
    assert many_B.min() == 1 and many_B.max() == 64
    assert (many_B == 1).double().mean().item() == pytest.approx(1 / 24, rel=0.05)
    assert (many_B == 64).double().mean().item() == pytest.approx(stays**63, rel=0.05)
    assert many_B.mean().item() == pytest.approx(24 * (1 - stays**64), rel=0.01)


def test_our_answers_have_them(ours):
    trajectories = ours.generate(0)
    lengths_B = trajectories.batch.lengths_B - trajectories.batch.prompt_lengths_B
    assert len(set(ours.limits_b.tolist())) > 3
    assert torch.equal(lengths_B, ours.limits_b) and torch.equal(trajectories.mask_BT.sum(dim=1), ours.limits_b)
    assert not trajectories.ended_B.any()
    assert ((trajectories.log_probs_BT != 0) == trajectories.mask_BT).all()


@pytest.mark.parametrize("pad", [0, 3])
def test_a_limit_only_cuts(ours, pad):
    """With an EOS (3), which may be the padding too: whichever comes first ends an answer."""
    rows = [(torch.arange(5, 5 + n).tolist(), n) for n in (4, 1, 5, 3, 2, 4)]
    prompts, limits_B = collate(rows, pad), torch.tensor([9, 1, 4, 7, 9, 2])
    endings = set()
    for seed in range(12):
        whole, cut = (
            generate(ours.roles["actor"], prompts, torch.arange(6), ours.config.rollout, seed, 3, pad, limits)
            for limits in (None, limits_B)
        )
        counts_B = whole.batch.lengths_B - whole.batch.prompt_lengths_B
        kept_B = torch.minimum(counts_B, limits_B)
        assert torch.equal(cut.batch.lengths_B - cut.batch.prompt_lengths_B, kept_B)
        assert torch.equal(cut.ended_B, whole.ended_B & (counts_B <= limits_B))
        endings |= set(zip(cut.ended_B.tolist(), whole.ended_B.tolist(), strict=True))
        for i, end in enumerate(cut.batch.lengths_B.tolist()):
            assert torch.equal(cut.batch.tokens_BL[i, :end], whole.batch.tokens_BL[i, :end])
            assert (cut.batch.tokens_BL[i, end:] == pad).all()
            torch.testing.assert_close(cut.log_probs_BT[i, : end - 1], whole.log_probs_BT[i, : end - 1])
            assert (cut.log_probs_BT[i, end - 1 :] == 0).all()
    assert {(False, False), (True, True)} <= endings


@pytest.fixture()
def rollout(rival):
    """A rollout of the rival from prompts of unequal lengths, padded on the left; and those lengths."""
    lengths_B = torch.tensor([5, 2, 4, 1, 3, 5, 2, 5])
    attention_BP = (torch.arange(5) >= 5 - lengths_B[:, None]).long()
    tokens_BP = torch.randint(1, 64, (8, 5), generator=torch.Generator().manual_seed(1)) * attention_BP
    limits_B = torch.tensor([9, 1, 4, 2, 8, 3, 6, 5])
    return rival.generate(tokens_BP, attention_BP, limits_B, 0), tokens_BP, lengths_B, limits_B


def test_the_rivals_answers_have_them(rollout):
    found, tokens_BP, lengths_B, limits_B = rollout
    assert found.tokens_BL.shape == (8, 14) and torch.equal(found.tokens_BL[:, :5], tokens_BP)
    assert torch.equal(found.attention_mask_BL.sum(dim=1), lengths_B + limits_B)
    at_L = torch.arange(14)
    assert torch.equal(found.mask_BT, (at_L[1:] >= 5) & (at_L[1:] < 5 + limits_B[:, None]))
    assert (found.tokens_BL[at_L >= 5 + limits_B[:, None]] == 0).all()  # `generate` took each row for ended there
    assert (found.tokens_BL[:, 1:][found.mask_BT] != 0).float().mean() > 0.8


# The same work.


def test_the_rivals_scores_are_those_of_rows_without_padding(rival, rollout):
    found, _, lengths_B, limits_B = rollout
    scored = rival.score(found)
    with torch.no_grad():
        for i, (prompt, new) in enumerate(zip(lengths_B.tolist(), limits_B.tolist(), strict=True)):
            row_1L = found.tokens_BL[i : i + 1, 5 - prompt : 5 + new]
            for name, model in (("log_probs_BT", rival.actor), ("ref_log_probs_BT", rival.reference)):
                expected_L = model(row_1L).logits[0, :-1].log_softmax(dim=-1).gather(1, row_1L[0, 1:, None])[:, 0]
                torch.testing.assert_close(getattr(scored, name)[i][found.mask_BT[i]], expected_L[prompt - 1 :])
            for name in ("reward", "cost"):
                whole, critic = getattr(rival, f"{name}_model"), getattr(rival, f"{name}_critic")
                scores_L = whole.head(whole.trunk(row_1L).last_hidden_state)[0, :, 0]
                torch.testing.assert_close(getattr(scored, f"{name}s_B")[i], scores_L[-1])
                values_L = critic.head(critic.trunk(row_1L).last_hidden_state)[0, :, 0]
                values_T = getattr(scored, f"{name}_values_BT")[i][found.mask_BT[i]]
                torch.testing.assert_close(values_T, values_L[prompt - 1 : -1])


def test_the_rival_learns_what_the_kernels_say(rival, rollout):
    """Losses, and the weights after the step, from inputs that clip ratios and values."""
    ppo = rival.config.ppo
    torch.manual_seed(0)
    scored = rival.score(rollout[0])
    scored = dataclasses.replace(
        scored,
        log_probs_BT=scored.log_probs_BT + 0.4 * torch.randn_like(scored.log_probs_BT),
        ref_log_probs_BT=scored.ref_log_probs_BT + torch.randn_like(scored.log_probs_BT),
        rewards_B=8 * torch.randn(8),
        costs_B=8 * torch.randn(8),
        reward_values_BT=scored.reward_values_BT + 8 * torch.randn_like(scored.log_probs_BT),
        cost_values_BT=scored.cost_values_BT + 8 * torch.randn_like(scored.log_probs_BT),
    )
    tokens_BL, attention_BL, mask_BT = rollout[0].tokens_BL, rollout[0].attention_mask_BL, rollout[0].mask_BT
    multiplier = LagrangeMultiplier(**multiplier_settings(rival.config.lagrange))
    multiplier.step(0, scored.costs_B)
    gae = shaped_gae(
        scored.log_probs_BT, scored.ref_log_probs_BT, scored.rewards_B, scored.costs_B, scored.reward_values_BT,
        scored.cost_values_BT, mask_BT, ppo.kl_coeff, ppo.score_clip, ppo.gamma, ppo.gae_lambda,
    )  # fmt: skip
    weights_BT = token_weights(mask_BT, "sequence", 8.0)
    before = {name: copy.deepcopy(getattr(rival, name)) for name in ("actor", "reward_critic", "cost_critic")}
    models, losses = copy.deepcopy(before), {}
    logits_NV = models["actor"](tokens_BL, attention_mask=attention_BL).logits[:, :-1].flatten(0, 1)
    flat = [x.flatten() for x in (tokens_BL[:, 1:], scored.log_probs_BT, gae.reward_advantages_BT)]
    flat += [x.flatten() for x in (gae.cost_advantages_BT, mask_BT, weights_BT)]
    losses["actor"], statistics_4 = ppo_lag_loss(logits_NV, *flat, multiplier.value, ppo.clip_ratio)
    assert 5 < statistics_4[1] < mask_BT.sum()  # clipped
    for name, old_BT, returns_BT in (
        ("reward_critic", scored.reward_values_BT, gae.reward_returns_BT),
        ("cost_critic", scored.cost_values_BT, gae.cost_returns_BT),
    ):
        values_BT = models[name](tokens_BL, attention_BL)[:, :-1]
        assert 5 < ((values_BT - old_BT).abs() > ppo.clip_value)[mask_BT].sum() < mask_BT.sum()
        losses[name] = value_loss(values_BT, old_BT, returns_BT, weights_BT, ppo.clip_value)
    for name, model in models.items():
        losses[name].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0).step()

    found = rival.train(scored)
    assert rival.lam == pytest.approx(float(multiplier.value)) and rival.lam != 1.0
    assert [abs(loss) > 1e-3 for loss in found.values()] == [True] * 3
    assert list(found.values()) == pytest.approx([losses[name].item() for name in models], rel=1e-4)
    for name, model in models.items():
        assert all(x.grad is None for x in getattr(rival, name).parameters())  # the next step starts from nothing
        for wanted, moved, old in zip(
            model.parameters(), getattr(rival, name).parameters(), before[name].parameters(), strict=True
        ):
            # Adam's first step is the sign of the gradient; where that is nothing but rounding, signs may differ.
            assert ((moved - wanted).abs() > 2e-6).float().mean() < 0.02, name
            assert ((moved - old).abs() > 8e-6).float().mean() > 0.4, name


def copy_weights(module, trunk, head) -> None:
    """A Role's weights into a Hugging Face Llama; neither grouped queries nor parallel layouts."""
    dim = module.config.kv_channels
    trunk.embed_tokens.weight.copy_(module.embedding.word_embeddings.weight)
    trunk.norm.weight.copy_(module.decoder.final_layernorm.weight)
    head.weight.copy_(module.output_layer.weight)
    if head.bias is not None:
        head.bias.copy_(module.output_layer.bias)
    for ours, theirs in zip(module.decoder.layers, trunk.layers, strict=True):
        qkv = ours.self_attention.linear_qkv.weight.unflatten(0, (-1, 3, dim))  # heads, then their q, k and v
        for i, name in enumerate("qkv"):
            getattr(theirs.self_attn, f"{name}_proj").weight.copy_(qkv[:, i].flatten(0, 1))
        theirs.self_attn.o_proj.weight.copy_(ours.self_attention.linear_proj.weight)
        gate, up = ours.mlp.linear_fc1.weight.chunk(2)
        theirs.mlp.gate_proj.weight.copy_(gate)
        theirs.mlp.up_proj.weight.copy_(up)
        theirs.mlp.down_proj.weight.copy_(ours.mlp.linear_fc2.weight)
        theirs.input_layernorm.weight.copy_(ours.input_layernorm.weight)
        theirs.post_attention_layernorm.weight.copy_(ours.pre_mlp_layernorm.weight)


def test_with_the_same_weights_and_answers_both_sides_measure_the_same(ours, rival, rival_step):
    with torch.no_grad():
        for name, role in ours.roles.items():
            theirs = getattr(rival, name)
            if role.module.head == "language":
                copy_weights(role.module, theirs.model, theirs.lm_head)
            else:
                copy_weights(role.module, theirs.trunk, theirs.head)
    trajectories = ours.generate(3)
    batch: TokenBatch = trajectories.batch
    attention_BL = (torch.arange(batch.tokens_BL.size(1)) < batch.lengths_B[:, None]).long()
    mask_BT = trajectories.mask_BT
    scores = ours.score(trajectories)
    scored = rival.score(rival_step.Rollout(batch.tokens_BL, attention_BL, mask_BT))
    torch.testing.assert_close(scored.log_probs_BT[mask_BT], trajectories.log_probs_BT[mask_BT], rtol=1e-4, atol=1e-5)
    values_2BT = read_values(critics_of(ours.roles), trajectories, ours.workload.score_tokens)
    for name, expected_BT in (
        ("ref_log_probs_BT", scores.ref_log_probs_BT), ("reward_values_BT", values_2BT[0]),
        ("cost_values_BT", values_2BT[1]),
    ):  # fmt: skip
        torch.testing.assert_close(getattr(scored, name)[mask_BT], expected_BT[mask_BT], rtol=1e-4, atol=1e-5)
    for name in ("rewards_B", "costs_B"):
        torch.testing.assert_close(getattr(scored, name), getattr(scores, name), rtol=1e-4, atol=1e-5)

    losses, statistics = rival.train(scored), ours.train(0, scores)
    assert rival.lam == pytest.approx(float(ours.multiplier.value))
    for name, loss in losses.items():
        assert math.isfinite(loss) and loss == pytest.approx(statistics[name], rel=1e-3, abs=1e-6)
