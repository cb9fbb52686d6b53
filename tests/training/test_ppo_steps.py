"""The actor's and the critics' optimizer step against autograd on the formulas, one sample and one token at a time.

Legend: B rows, L tokens, T = L - 1 actions (column t predicts token t + 1), V vocabulary.
"""

import dataclasses
import math

import pytest
import torch
from whole_rows import outputs

from megatron_safe.config import ModelConfig, OptimizerConfig, PpoTrainingConfig
from megatron_safe.data.batches import TokenBatch, collate
from megatron_safe.kernels.shaped_gae import ShapedGae
from megatron_safe.models.roles import Role
from megatron_safe.rollout.generate import Trajectories
from megatron_safe.training.experience import Experience
from megatron_safe.training.ppo_steps import Mix, actor_step, critic_step

VOCABULARY, PAD = 21, 3
MODEL = ModelConfig(
    num_layers=1, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2,
    max_sequence_length=64, vocab_multiple=8, init_std=0.3,
)  # fmt: skip
# No step and no clipping: the gradient stays where it is, to be read.
STILL = OptimizerConfig(lr=0.0, clip_grad=0.0, schedule="constant")
CONFIG = PpoTrainingConfig(max_tokens_per_micro_batch=1, clip_ratio=0.2, clip_value=0.5)
LAMBDA = 0.75
# (prompt tokens, answer tokens): an ordinary row, one action, a long one, all but one token prompt.
SHAPES = [(3, 5), (4, 1), (1, 7), (6, 2)]


@pytest.fixture(scope="module")
def actor(runtime):
    return Role("actor", MODEL, runtime, VOCABULARY, "fp32", 1, STILL, total_steps=10)


@pytest.fixture(scope="module")
def critic(runtime):
    return Role("cost_critic", MODEL, runtime, VOCABULARY, "fp32", 2, STILL, total_steps=10)


def draw_rows(shapes, seed=0) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    return collate(
        [(torch.randint(VOCABULARY, (n + m,), generator=generator).tolist(), n) for n, m in shapes], PAD
    )


def log_probs_and_entropies(actor, row, temperature):
    """[T] each, with a graph, of one row alone."""
    logits_TV = outputs(actor.module, torch.tensor([row]))[0, :-1, :VOCABULARY]
    log_p_TV = torch.log_softmax(logits_TV.double() / temperature, dim=1)
    picked_T = log_p_TV.gather(1, torch.tensor(row[1:])[:, None])[:, 0]
    return picked_T, -(log_p_TV.exp() * log_p_TV).sum(dim=1)


def make_experience(
    batch: TokenBatch, log_probs_BT=None, advantages_BT=None, old_values_BT=None, returns_BT=None
) -> Experience:
    """Only what the steps read; the rest is NaN, to be noticed where it is not only carried along.

    advantages_BT: what the advantages of reward and cost shall mix to at λ = LAMBDA.
    old_values_BT, returns_BT: the cost critic's.
    """
    nothing = torch.full((len(batch), batch.tokens_BL.size(1) - 1), math.nan)
    reward_BT = cost_BT = nothing
    if advantages_BT is not None:
        cost_BT = torch.randn(nothing.shape, generator=torch.Generator().manual_seed(5))
        reward_BT = advantages_BT * (1 + LAMBDA) + LAMBDA * cost_BT
    trajectories = Trajectories(
        batch, nothing if log_probs_BT is None else log_probs_BT, torch.ones(len(batch), dtype=torch.bool)
    )
    fields = {field.name: nothing for field in dataclasses.fields(Experience)}
    gae = ShapedGae(reward_BT, cost_BT, nothing, nothing if returns_BT is None else returns_BT, nothing)
    values_BT = nothing if old_values_BT is None else old_values_BT
    return Experience(**fields | {"trajectories": trajectories, "cost_values_BT": values_BT, "gae": gae})


def actor_experience(actor, batch, temperature=1.0, seed=2):
    """Old log-probs such that ratios fall below, within and above 1 ± ε; advantages of both signs."""
    mask_BT, generator = batch.response_mask_BT, torch.Generator().manual_seed(seed)
    old_BT = torch.zeros(mask_BT.shape)
    with torch.no_grad():
        for row, tokens in enumerate(batch.tokens_BL.tolist()):
            length = int(batch.lengths_B[row])
            old_BT[row, : length - 1] = log_probs_and_entropies(actor, tokens[:length], temperature)[0].float()
    old_BT = torch.where(mask_BT, old_BT + 0.4 * torch.randn(mask_BT.shape, generator=generator), 0.0)
    advantages_BT = torch.where(mask_BT, torch.randn(mask_BT.shape, generator=generator), 0.0)
    return make_experience(batch, old_BT, advantages_BT), advantages_BT


def expected_actor_loss(actor, experience, advantages_BT, rows, config, temperature, normalizer):
    """-min(ρ Â, clip(ρ) Â) token by token, and the sums behind the statistics."""
    batch, total, sums = experience.trajectories.batch, 0.0, dict.fromkeys(("clipped", "kl", "entropy", "tokens"), 0.0)
    kinds = set()
    for row in rows:
        length, prompt = int(batch.lengths_B[row]), int(batch.prompt_lengths_B[row])
        log_probs_T, entropy_T = log_probs_and_entropies(actor, batch.tokens_BL[row, :length].tolist(), temperature)
        losses = []
        for t in range(prompt - 1, length - 1):
            log_ratio = log_probs_T[t] - float(experience.trajectories.log_probs_BT[row, t])
            ratio, advantage = log_ratio.exp(), float(advantages_BT[row, t])
            clipped = ratio.clamp(1 - config.clip_ratio, 1 + config.clip_ratio)
            losses.append(-min(ratio * advantage, clipped * advantage))
            side = (ratio > 1 + config.clip_ratio) * 1 - (ratio < 1 - config.clip_ratio) * 1
            kinds.add((int(side), advantage > 0))
            sums["clipped"] += float(side != 0)
            sums["kl"] += float((ratio - 1 - log_ratio).detach())
            sums["entropy"] += float(entropy_T[t])
            sums["tokens"] += 1
        weight = 1 / len(losses) if config.loss_reduction == "sequence" else 1.0
        total = total + sum(losses) * weight / normalizer
    return total, sums, kinds


def gradients(role) -> dict[str, torch.Tensor]:
    """What the step left in the gradient buffers."""
    return {name: parameter.main_grad.double().clone() for name, parameter in role.module.named_parameters()}


def check_gradients(role, loss):
    names, parameters = zip(*role.module.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    assert sum(float(gradient.abs().sum()) for gradient in expected.values()) > 1e-2
    for name, found in gradients(role).items():
        scale = max(1e-3, float(expected[name].abs().max()))
        torch.testing.assert_close(found, expected[name].double(), rtol=1e-3, atol=1e-4 * scale)
    return math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in expected.values()))


def step_actor(actor, experience, rows, config, temperature=1.0, normalizer=None, ptx=None, whitening=()):
    mix = Mix(torch.tensor(LAMBDA, dtype=torch.float64), *whitening)
    normalizer = normalizer or float(rows.stop - rows.start)
    return actor_step(actor, experience, mix, rows, config, temperature, normalizer, ptx)


# The actor.


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1)])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_actor_gradient_of_one_sample(actor, shape, temperature):
    experience, advantages_BT = actor_experience(actor, draw_rows([shape]), temperature)
    values = step_actor(actor, experience, slice(0, 1), CONFIG, temperature)
    loss, sums, _ = expected_actor_loss(actor, experience, advantages_BT, [0], CONFIG, temperature, 1.0)
    if float(loss.detach()) != 0 and sums["clipped"] < sums["tokens"]:
        norm = check_gradients(actor, loss)
        assert values["actor_grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert values["actor_loss"] == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-5)
    assert values["clip_fraction"] == pytest.approx(sums["clipped"] / sums["tokens"])
    assert values["approximate_kl"] == pytest.approx(sums["kl"] / sums["tokens"], rel=1e-3, abs=1e-5)
    assert values["entropy"] == pytest.approx(sums["entropy"] / sums["tokens"], rel=1e-4)
    assert (values["actor_lr"], values["actor_skipped"]) == (0.0, 0.0)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("tokens", [1, 12, 100])
def test_actor_gradient_of_a_batch_with_every_kind_of_clipping(actor, reduction, tokens):
    config = dataclasses.replace(CONFIG, loss_reduction=reduction, max_tokens_per_micro_batch=tokens)
    experience, advantages_BT = actor_experience(actor, draw_rows(SHAPES))
    normalizer = 4.0 if reduction == "sequence" else float(experience.trajectories.mask_BT.sum())
    step_actor(actor, experience, slice(0, 4), config, normalizer=normalizer)
    loss, _, kinds = expected_actor_loss(actor, experience, advantages_BT, range(4), config, 1.0, normalizer)
    assert kinds == {(side, sign) for side in (-1, 0, 1) for sign in (True, False)}
    check_gradients(actor, loss)


def test_whitening_shifts_and_scales_the_mix(actor):
    experience, advantages_BT = actor_experience(actor, draw_rows(SHAPES))
    moments = torch.tensor(0.3, dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64)
    step_actor(actor, experience, slice(0, 4), CONFIG, whitening=moments)
    whitened_BT = (advantages_BT - 0.3) * 1.7
    loss, _, _ = expected_actor_loss(actor, experience, whitened_BT, range(4), CONFIG, 1.0, 4.0)
    check_gradients(actor, loss)


def test_only_the_rows_asked_for_count(actor):
    experience, advantages_BT = actor_experience(actor, draw_rows(SHAPES))
    step_actor(actor, experience, slice(1, 3), CONFIG)
    loss, _, _ = expected_actor_loss(actor, experience, advantages_BT, [1, 2], CONFIG, 1.0, 2.0)
    check_gradients(actor, loss)


@pytest.mark.parametrize("log_ratio, advantage, moves", [
    (0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False), (0.1, 1.0, True), (-0.1, -1.0, True),
])  # fmt: skip
def test_a_clipped_ratio_has_no_gradient(actor, log_ratio, advantage, moves):
    batch = draw_rows([(3, 4)])
    with torch.no_grad():
        new_T = log_probs_and_entropies(actor, batch.tokens_BL[0].tolist(), 1.0)[0].float()
    old_BT = torch.where(batch.response_mask_BT, new_T - log_ratio, 0.0)
    experience = make_experience(batch, old_BT, torch.where(batch.response_mask_BT, advantage, 0.0))
    values = step_actor(actor, experience, slice(0, 1), CONFIG)
    assert (values["actor_grad_norm"] > 1e-3) == moves and (values["actor_grad_norm"] == 0) == (not moves)
    ratio = math.exp(log_ratio)
    expected = -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert values["actor_loss"] == pytest.approx(expected, rel=1e-5)


def test_what_stands_outside_the_answers_does_not_matter(actor):
    """There the ratio means nothing; at an old log-probability of -10,000 it would overflow."""
    experience, advantages_BT = actor_experience(actor, draw_rows(SHAPES))
    step_actor(actor, experience, slice(0, 4), CONFIG)
    expected = gradients(actor)
    mask_BT = experience.trajectories.mask_BT
    junk_BT = torch.where(mask_BT, experience.trajectories.log_probs_BT, -1e4)
    other = make_experience(experience.trajectories.batch, junk_BT, torch.where(mask_BT, advantages_BT, 3.0))
    values = step_actor(actor, other, slice(0, 4), CONFIG)
    assert values["actor_skipped"] == 0
    assert all(torch.equal(found, expected[name]) for name, found in gradients(actor).items())


# The PTX term.


@pytest.mark.parametrize("coefficient", [0.5, 4.0])
def test_ptx_adds_the_loss_on_demonstrations(actor, coefficient):
    config = dataclasses.replace(CONFIG, ptx_coeff=coefficient, max_tokens_per_micro_batch=12)
    experience, advantages_BT = actor_experience(actor, draw_rows(SHAPES))
    demonstrations = draw_rows([(2, 6), (5, 1)], seed=8)
    values = step_actor(actor, experience, slice(0, 4), config, temperature=1.0, ptx=demonstrations)
    negative_log_probs = []
    for row, (n, m) in enumerate([(2, 6), (5, 1)]):
        log_probs_T, _ = log_probs_and_entropies(actor, demonstrations.tokens_BL[row, : n + m].tolist(), 1.0)
        negative_log_probs += [-log_probs_T[t] for t in range(n - 1, n + m - 1)]
    ptx_loss = sum(negative_log_probs) / 7  # the mean over response tokens
    loss, _, _ = expected_actor_loss(actor, experience, advantages_BT, range(4), config, 1.0, 4.0)
    check_gradients(actor, loss + coefficient * ptx_loss)
    assert values["ptx_loss"] == pytest.approx(float(ptx_loss.detach()), rel=1e-4)
    assert values["actor_loss"] == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-5)


def test_demonstrations_are_read_at_temperature_one(actor):
    config = dataclasses.replace(CONFIG, ptx_coeff=1.0)
    experience, advantages_BT = actor_experience(actor, draw_rows([SHAPES[0]]), temperature=0.5)
    demonstrations = draw_rows([(2, 6)], seed=8)
    values = step_actor(actor, experience, slice(0, 1), config, temperature=0.5, ptx=demonstrations)
    log_probs_T, _ = log_probs_and_entropies(actor, demonstrations.tokens_BL[0].tolist(), 1.0)
    assert values["ptx_loss"] == pytest.approx(float(-log_probs_T[1:].mean().detach()), rel=1e-4)


# The optimizer behind it.


def test_a_step_raises_what_had_a_positive_advantage(runtime):
    optimizer = OptimizerConfig(lr=3e-3, schedule="constant", clip_grad=1.0)
    learner = Role("actor", MODEL, runtime, VOCABULARY, "fp32", 1, optimizer, total_steps=4)
    batch = draw_rows([(3, 5)])
    row = batch.tokens_BL[0].tolist()

    def now():
        with torch.no_grad():
            return log_probs_and_entropies(learner, row, 1.0)[0].float()

    before_T, old_BT = now(), torch.where(batch.response_mask_BT, now(), 0.0)
    advantages_BT = torch.where(batch.response_mask_BT, 1.0, 0.0)
    values = step_actor(learner, make_experience(batch, old_BT, advantages_BT), slice(0, 1), CONFIG)
    assert values["actor_lr"] == pytest.approx(3e-3) and values["approximate_kl"] == pytest.approx(0, abs=1e-9)
    assert values["actor_loss"] == pytest.approx(-1.0, rel=1e-5)
    mask_T = batch.response_mask_BT[0]
    assert (now() - before_T)[mask_T].mean() > 0.01


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_steps_nothing(runtime, precision):
    learner = Role("actor", MODEL, runtime, VOCABULARY, precision, 1, OptimizerConfig(lr=1e-2), total_steps=4)
    experience, advantages_BT = actor_experience(learner, draw_rows(SHAPES))
    before = {name: parameter.detach().clone() for name, parameter in learner.module.named_parameters()}
    for bad in (math.inf, math.nan):
        broken_BT = torch.where(experience.trajectories.mask_BT, bad, advantages_BT)
        broken = make_experience(experience.trajectories.batch, experience.trajectories.log_probs_BT, broken_BT)
        values = step_actor(learner, broken, slice(0, 4), CONFIG)
        assert values["actor_skipped"] == 1.0
        assert all(torch.equal(before[name], parameter) for name, parameter in learner.module.named_parameters())
    values = step_actor(learner, experience, slice(0, 4), CONFIG)  # and the next step is as ever
    assert values["actor_skipped"] == 0.0 and values["actor_grad_norm"] > 0
    assert not torch.equal(before["output_layer.weight"], learner.module.output_layer.weight)


# A critic.


def expected_value_loss(critic, experience, old_BT, returns_BT, rows, config, normalizer):
    batch, total, kinds = experience.trajectories.batch, 0.0, set()
    for row in rows:
        length, prompt = int(batch.lengths_B[row]), int(batch.prompt_lengths_B[row])
        values_T = outputs(critic.module, batch.tokens_BL[row : row + 1, : length - 1])[0].double()
        losses = []
        for t in range(prompt - 1, length - 1):
            old, target = float(old_BT[row, t]), float(returns_BT[row, t])
            clipped = values_T[t].clamp(old - config.clip_value, old + config.clip_value)
            losses.append(0.5 * max((values_T[t] - target) ** 2, (clipped - target) ** 2))
            moved = float(values_T[t]) - old
            kinds.add((moved > config.clip_value) - (moved < -config.clip_value))
        weight = 1 / len(losses) if config.loss_reduction == "sequence" else 1.0
        total = total + sum(losses) * weight / normalizer
    return total, kinds


def critic_targets(critic, batch, seed=8):
    """Old values on both sides of the critic's, within and beyond the clip; returns on both sides too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        values_BT = outputs(critic.module, batch.tokens_BL[:, :-1])
    noise_2BT = torch.randn((2, *values_BT.shape), generator=generator)
    return values_BT + 0.8 * noise_2BT[0], values_BT + noise_2BT[1]


def step_critic(critic, batch, old_BT, returns_BT, rows, config, normalizer):
    experience = make_experience(batch, old_values_BT=old_BT, returns_BT=returns_BT)
    return critic_step(critic, experience, rows, config, normalizer)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1)])
def test_critic_gradient_of_one_sample(critic, shape):
    batch = draw_rows([shape])
    old_BT, returns_BT = critic_targets(critic, batch)
    values = step_critic(critic, batch, old_BT, returns_BT, slice(0, 1), CONFIG, 1.0)
    loss, _ = expected_value_loss(critic, make_experience(batch), old_BT, returns_BT, [0], CONFIG, 1.0)
    norm = check_gradients(critic, loss)
    assert values == {
        "cost_critic_value_loss": pytest.approx(float(loss.detach()), rel=1e-4),
        "cost_critic_grad_norm": pytest.approx(norm, rel=1e-3),
        "cost_critic_skipped": 0.0,
    }


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("tokens", [1, 100])
def test_critic_gradient_of_a_batch_with_clipping_on_both_sides(critic, reduction, tokens):
    config = dataclasses.replace(CONFIG, loss_reduction=reduction, max_tokens_per_micro_batch=tokens)
    batch = draw_rows(SHAPES)
    old_BT, returns_BT = critic_targets(critic, batch)
    normalizer = 4.0 if reduction == "sequence" else float(batch.response_mask_BT.sum())
    step_critic(critic, batch, old_BT, returns_BT, slice(0, 4), config, normalizer)
    loss, kinds = expected_value_loss(critic, make_experience(batch), old_BT, returns_BT, range(4), config, normalizer)
    assert kinds == {-1, 0, 1}
    check_gradients(critic, loss)


def test_only_the_critics_rows_asked_for_count(critic):
    batch = draw_rows(SHAPES)
    old_BT, returns_BT = critic_targets(critic, batch)
    values = step_critic(critic, batch, old_BT, returns_BT, slice(2, 4), CONFIG, 2.0)
    loss, _ = expected_value_loss(critic, make_experience(batch), old_BT, returns_BT, [2, 3], CONFIG, 2.0)
    assert values["cost_critic_value_loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    check_gradients(critic, loss)
