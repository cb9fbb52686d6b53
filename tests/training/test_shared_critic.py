"""One critic with two outputs: its losses, where it starts, how it is kept, and where it has no place.

Its numbers in every layout are in test_one_update.py. Legend: B rows, L tokens, T = L - 1 actions.
"""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_safe.cli import parse, run_stage
from megatron_safe.config import ModelConfig, OptimizerConfig, PpoConfig, PpoTrainingConfig
from megatron_safe.data.batches import collate
from megatron_safe.data.tokenizer import load_tokenizer
from megatron_safe.errors import UserError
from megatron_safe.huggingface.exporting import Export
from megatron_safe.kernels.shaped_gae import ShapedGae
from megatron_safe.models.packing import Sequences, pack
from megatron_safe.models.roles import Role
from megatron_safe.rollout.generate import Trajectories
from megatron_safe.training import checkpoint
from megatron_safe.training.experience import Experience, read_values
from megatron_safe.training.ppo_lag import check
from megatron_safe.training.ppo_steps import critic_step
from megatron_safe.training.setup import build_role, resolve_role

TOOL = Path(__file__).parents[2] / "tools" / "convert_hf.py"
VOCABULARY, PAD = 43, 3
MODEL = ModelConfig(
    num_layers=1, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2,
    max_sequence_length=64, vocab_multiple=8, init_std=0.3, score_mean=0.4, score_std=1.5,
)  # fmt: skip
# No step and no clipping: the gradient stays where it is, to be read.
STILL = OptimizerConfig(lr=0.0, clip_grad=0.0, schedule="constant")
MOVING = OptimizerConfig(lr=1e-2, schedule="constant")
SHAPES = [(3, 5), (4, 1), (1, 7), (6, 2)]  # (prompt tokens, answer tokens)


@pytest.fixture(scope="module")
def tokenizer(project):
    return load_tokenizer(project.data / "tokenizer")


@pytest.fixture(scope="module")
def trajectories() -> Trajectories:
    draw = torch.Generator().manual_seed(0)
    rows = [(torch.randint(VOCABULARY, (n + m,), generator=draw).tolist(), n) for n, m in SHAPES]
    batch = collate(rows, PAD)
    return Trajectories(batch, torch.zeros(batch.response_mask_BT.shape), torch.ones(len(rows), dtype=torch.bool))


def outputs_T2(critic: Role, tokens: list[int]) -> torch.Tensor:
    """Of one row alone, with a graph."""
    row_1T = torch.tensor([tokens])
    everywhere = Sequences(row_1T, torch.tensor([len(tokens)]), torch.ones(row_1T.shape, dtype=torch.bool))
    return critic.module(pack(everywhere, 1000)[0])


def weights_of(role: Role) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in role.module.named_parameters()}


# Its step.


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_gradient_is_that_of_both_losses(runtime, trajectories, reduction):
    critic = Role("critic", MODEL, runtime, VOCABULARY, "fp32", 2, STILL, 10)
    config = PpoTrainingConfig(clip_value=0.5, loss_reduction=reduction, max_tokens_per_micro_batch=14)
    batch, mask_BT, draw = trajectories.batch, trajectories.mask_BT, torch.Generator().manual_seed(8)
    noise_22BT = torch.randn(2, 2, *mask_BT.shape, generator=draw)
    values_2BT = read_values([critic], trajectories, 20)
    old_2BT, returns_2BT = values_2BT + 0.8 * noise_22BT[0], values_2BT + noise_22BT[1]
    nothing = torch.full(mask_BT.shape, math.nan)
    experience = Experience(
        trajectories, nothing, nothing[:, 0], nothing[:, 0], *old_2BT, ShapedGae(nothing, nothing, *returns_2BT, None)
    )
    normalizer = 2.0 if reduction == "sequence" else float(mask_BT[1:3].sum())
    measured = critic_step(critic, experience, slice(1, 3), config, normalizer)

    losses, clipped = [0.0, 0.0], [set(), set()]
    for row in (1, 2):
        length, prompt = int(batch.lengths_B[row]), int(batch.prompt_lengths_B[row])
        found_T2 = outputs_T2(critic, batch.tokens_BL[row, : length - 1].tolist()).double()
        weight = 1 / (length - prompt) if reduction == "sequence" else 1.0
        for t in range(prompt - 1, length - 1):
            for kind in (0, 1):
                value, old, target = found_T2[t, kind], float(old_2BT[kind, row, t]), float(returns_2BT[kind, row, t])
                bounded = value.clamp(old - 0.5, old + 0.5)
                squares = torch.maximum((value - target) ** 2, (bounded - target) ** 2)
                losses[kind] = losses[kind] + 0.5 * weight / normalizer * squares
                clipped[kind].add(abs(float(value.detach()) - old) > 0.5)
    assert clipped == [{True, False}] * 2
    names, parameters = zip(*critic.module.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(sum(losses), parameters), strict=True))
    assert (expected["output_layer.weight"].norm(dim=1) > 0.1).tolist() == [True, True]
    for name, parameter in critic.module.named_parameters():
        scale = max(1e-3, float(expected[name].abs().max()))
        torch.testing.assert_close(parameter.main_grad, expected[name], rtol=1e-3, atol=1e-4 * scale)
    assert measured == {
        "reward_critic_value_loss": pytest.approx(float(losses[0].detach()), rel=1e-4),
        "cost_critic_value_loss": pytest.approx(float(losses[1].detach()), rel=1e-4),
        "critic_grad_norm": pytest.approx(math.sqrt(sum(float((g**2).sum()) for g in expected.values())), rel=1e-3),
        "critic_skipped": 0.0,
    }


# Where it starts, and how it is kept.


@pytest.fixture(scope="module")
def reward_model(runtime, tmp_path_factory):
    """A reward model whose head has a bias that is not 0, and the run folder that it is saved in."""
    role = Role("reward_model", MODEL, runtime, VOCABULARY, "fp32", 5)
    torch.nn.init.constant_(role.module.output_layer.bias, 0.3)
    run = tmp_path_factory.mktemp("reward")
    checkpoint.save(run, 1, [role], {}, 0, runtime, keep_last=0)
    return role, run


@pytest.mark.parametrize("published", [False, True])
def test_it_starts_as_the_reward_model_with_values_of_the_cost_of_0(
    runtime, tokenizer, project, trajectories, reward_model, tmp_path, published
):
    model, source = reward_model
    if published:
        found = checkpoint.find(source, runtime)
        source = tmp_path / "published"
        saved = found.roles["reward_model"]
        Export.of(found.path, "reward_model", saved, tokenizer=project.data / "tokenizer").write(source)
    start_from = ModelConfig(checkpoint=str(source), vocab_multiple=8, init_std=0.5)
    plan = resolve_role("critic", start_from, tokenizer, runtime, None)
    critic = build_role(plan, "fp32", 0, tokenizer, runtime, STILL, 10)
    expected = weights_of(model)
    for name, found in weights_of(critic).items():
        rows = 1 if name.startswith("output_layer.") else VOCABULARY if "embedding" in name else None  # not its padding
        assert torch.equal(found[:rows], expected[name][:rows]), name
    values_2BT = read_values([critic], trajectories, 100)
    assert (values_2BT[1] == 0).all() and values_2BT[0].std() > 0.1
    for row, (n, m) in enumerate(SHAPES):
        tokens = trajectories.batch.tokens_BL[row, : n + m - 1].tolist()
        scores_T = outputs_T2(model, tokens)[n - 1 :]
        torch.testing.assert_close(values_2BT[0, row, n - 1 : n + m - 1], scores_T, rtol=1e-4, atol=1e-5)


def random_step(critic: Role, trajectories: Trajectories, seed: int) -> dict[str, float]:
    shape = trajectories.mask_BT.shape
    draw_4BT = torch.randn(4, *shape, generator=torch.Generator().manual_seed(seed))
    gae = ShapedGae(draw_4BT[0], draw_4BT[0], *draw_4BT[:2], None)
    experience = Experience(trajectories, draw_4BT[0], draw_4BT[0, :, 0], draw_4BT[0, :, 0], *draw_4BT[2:], gae)
    return critic_step(critic, experience, slice(0, 4), PpoTrainingConfig(), 4.0)


def test_a_checkpoint_keeps_it_with_its_optimizer(runtime, tokenizer, trajectories, tmp_path):
    critic = Role("critic", MODEL, runtime, VOCABULARY, "fp32", 2, MOVING, 10)
    random_step(critic, trajectories, 0)
    checkpoint.save(tmp_path, 1, [critic], {}, 0, runtime, keep_last=0)
    expected = random_step(critic, trajectories, 1), weights_of(critic)

    saved = checkpoint.find(tmp_path, runtime)
    plan = resolve_role("critic", ModelConfig(), tokenizer, runtime, saved)
    again = build_role(plan, "fp32", 0, tokenizer, runtime, MOVING, 10)
    checkpoint.load_training([again], saved)
    assert random_step(again, trajectories, 1) == expected[0]
    assert all(torch.equal(expected[1][name], found) for name, found in weights_of(again).items())
    # And another run may start from it, both outputs as they are.
    other = build_role(
        resolve_role("critic", ModelConfig(checkpoint=str(tmp_path)), tokenizer, runtime, None), "fp32", 0, tokenizer,
        runtime, MOVING, 10,
    )  # fmt: skip
    assert weights_of(other)["output_layer.weight"].abs().min(dim=1).values.gt(0).all()


def test_it_is_not_exported(runtime, project, tmp_path):
    roles = [Role(name, MODEL, runtime, VOCABULARY, "fp32", 2) for name in ("critic", "reward_model")]
    checkpoint.save(tmp_path / "run", 1, roles, {}, 0, runtime, keep_last=0)

    def convert(*arguments) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True)

    done = convert(
        "export", "--checkpoint", tmp_path / "run", "--role", "critic", "--out", tmp_path / "out",
        "--tokenizer", project.data / "tokenizer",
    )  # fmt: skip
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    (line,) = done.stderr.splitlines()
    assert "critic: expected one output, found two" in line and "train with `critics: separate`" in line
    done = convert("inspect", tmp_path / "run")
    assert "two scores" in done.stdout and "score with bias, normalized" in done.stdout


# Its settings.


def settings(**changes) -> PpoConfig:
    config = PpoConfig()
    for model in (config.actor, config.reward_model, config.cost_model):
        model.checkpoint = "somewhere"
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize("algorithm, changes, message", [
    ("ppo", dict(critics="shared"), "critics: expected separate, because ppo has no critic of the cost; found shared"),
    ("ppo-lag", dict(critics="shared", reward_critic=MODEL), "reward_critic: expected none, because critics is shared"),
    ("ppo-lag", dict(critics="shared", cost_critic=MODEL), "cost_critic: expected none, because critics is shared"),
    ("ppo-lag", dict(critic=MODEL), "critic: expected none, because critics is separate; found one"),
])  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(runtime, algorithm, changes, message):
    with pytest.raises(UserError, match=message):
        check(settings(**changes), runtime, algorithm)
    check(settings(critics="shared", critic=MODEL), runtime, "ppo-lag")
    check(settings(), runtime, "ppo")


def test_the_command_line_sets_it():
    config = parse("ppo-lag", ["--critics=shared", "--critic.checkpoint=runs/reward"])
    assert (config.critics, config.critic.checkpoint) == ("shared", "runs/reward")
    assert parse("ppo-lag", []).critics == "separate"


# Runs of the stage.


@pytest.fixture(scope="module")
def runs(project, runtime, torchrun, tmp_path_factory):
    """Run folders of PPO-Lag with the shared critic: `whole`; `resumed`, stopped after its first step in one process;
    and both with two pipeline stages."""
    folder = tmp_path_factory.mktemp("shared")
    more = ("--critics=shared", "--ppo.mini_batch_size=16")

    def arguments(stage, out, layout="one", *more):
        return project.arguments(stage, folder / out, layout, *more, models=folder)

    def one(stage, out, *more):
        run_stage(stage, parse(stage, arguments(stage, out, "one", *more)), runtime)

    for stage in ("sft", "reward", "cost"):
        one(stage, stage, "--training.steps=1")
    one("ppo-lag", "whole", *more)
    one("ppo-lag", "resumed", *more, "--run.stop_after=1")
    shutil.copytree(folder / "resumed", folder / "resumed-pp2")
    shutil.copytree(folder / "resumed", folder / "stopped")
    one("ppo-lag", "resumed", *more, "--run.resume=auto")
    stages = [
        ("ppo-lag", arguments("ppo-lag", "whole-pp2", "pp2", *more)),
        ("ppo-lag", arguments("ppo-lag", "resumed-pp2", "pp2", *more, "--run.resume=auto")),
    ]
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"tp": 1, "pp": 2, "seed": 0, "runs": stages}))
    torchrun(2, "run_stages.py", str(plan))
    assert json.loads(plan.with_suffix(".out.json").read_text()) == ["", ""]
    return folder


def test_a_resumed_run_is_the_one_that_never_stopped(runs, metrics_of):
    whole = metrics_of(runs / "whole")
    assert metrics_of(runs / "resumed") == whole and len(whole) == 2
    names = "reward_critic_value_loss", "cost_critic_value_loss", "critic_grad_norm", "critic_skipped"
    assert set(names) < whole[0].keys()
    state = json.loads((runs / "whole" / "checkpoints" / "step_00000002" / "state.json").read_text())
    assert set(state["roles"]) == {"actor", "critic"}


@pytest.mark.parametrize("run", ["whole-pp2", "resumed-pp2"])
def test_two_stages_give_the_same_numbers(runs, metrics_of, run):
    for found, wanted in zip(metrics_of(runs / run), metrics_of(runs / "whole"), strict=True):
        assert found == {name: pytest.approx(value, rel=2e-5, abs=3e-6) for name, value in wanted.items()}


def test_a_run_keeps_its_critics(runs, project, runtime):
    more = "--run.resume=auto", "--ppo.mini_batch_size=16"
    config = parse("ppo-lag", project.arguments("ppo-lag", runs / "stopped", "one", *more, models=runs))
    with pytest.raises(UserError, match="critics: expected those of .*, which trains actor, critic; found separate"):
        run_stage("ppo-lag", config, runtime)


def test_reward_alone_goes_on_without_a_cost_critic(runs, project, runtime, metrics_of):
    for out, more in (("reward-alone", ()), ("stopped-alone", ("--run.stop_after=1",))):
        run_stage("ppo", parse("ppo", project.arguments("ppo-lag", runs / out, "one", *more, models=runs)), runtime)
    again = project.arguments("ppo-lag", runs / "stopped-alone", "one", "--run.resume=auto", models=runs)
    run_stage("ppo", parse("ppo", again), runtime)
    assert metrics_of(runs / "stopped-alone") == metrics_of(runs / "reward-alone")
