"""A rollout whose log-probabilities are wrong by known amounts: measured, and corrected for in the actor's loss.

Legend: B rows, L tokens, T = L - 1 actions (column t predicts token t + 1), V vocabulary.
"""

import dataclasses
import math

import pytest
import torch
from whole_rows import outputs

from megatron_safe.config import ModelConfig, OptimizerConfig, PpoConfig, PpoTrainingConfig
from megatron_safe.data.batches import collate
from megatron_safe.errors import UserError
from megatron_safe.kernels.shaped_gae import ShapedGae
from megatron_safe.models.roles import Role
from megatron_safe.ranges import check_ranges
from megatron_safe.rollout.generate import Trajectories
from megatron_safe.training.experience import Experience, answer_log_probs
from megatron_safe.training.off_policy import verify
from megatron_safe.training.ppo_lag import learn
from megatron_safe.training.ppo_steps import Mix, actor_step

VOCABULARY, PAD, TOKENS = 21, 3, 12
MODEL = ModelConfig(
    num_layers=1, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2,
    max_sequence_length=64, vocab_multiple=8, init_std=0.3,
)  # fmt: skip
STILL = OptimizerConfig(lr=0.0, clip_grad=0.0, schedule="constant")
SHAPES = [(3, 5), (4, 1), (1, 7), (6, 2)]  # (prompt tokens, answer tokens)
LAMBDA = torch.tensor(0.75, dtype=torch.float64)


@pytest.fixture(scope="module")
def actor(runtime):
    return Role("actor", MODEL, runtime, VOCABULARY, "fp32", 1, STILL, total_steps=10)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.randint(VOCABULARY, (n + m,), generator=generator).tolist(), n) for n, m in SHAPES]
    return collate(rows, PAD)


def log_probs_of(actor, row, temperature=1.0):
    """[T], float64 from the logits on and with a graph, of one row alone."""
    tokens_1S = torch.tensor([row])
    logits_SV = outputs(actor.module, tokens_1S)[0, :, :VOCABULARY].double()
    return torch.log_softmax(logits_SV / temperature, dim=1)[:-1].gather(1, tokens_1S[0, 1:, None])[:, 0]


def actions_of(batch):
    """(row, column) of each token that an answer has."""
    bounds = zip(batch.prompt_lengths_B.tolist(), batch.lengths_B.tolist(), strict=True)
    return [(row, t) for row, (prompt, length) in enumerate(bounds) for t in range(prompt - 1, length - 1)]


def noise(batch, scale, seed):
    noise_BT = scale * torch.randn(batch.response_mask_BT.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(batch.response_mask_BT, noise_BT, 0.0)


def wrong_rollout(actor, batch, scale=0.5, temperature=1.0):
    """Trajectories whose log-probabilities are too high by what is returned beside them, [B, T]."""
    true_BT = torch.zeros(batch.response_mask_BT.shape, dtype=torch.float64)
    with torch.no_grad():
        for row, t in actions_of(batch):
            tokens = batch.tokens_BL[row, : batch.lengths_B[row]].tolist()
            true_BT[row, t] = log_probs_of(actor, tokens, temperature)[t]
    error_BT = noise(batch, scale, seed=2)
    return Trajectories(batch, (true_BT + error_BT).float(), torch.ones(len(batch), dtype=torch.bool)), error_BT


def experience_of(trajectories, advantages_BT):
    """Only what the actor reads; the rest is NaN."""
    nothing = torch.full(advantages_BT.shape, math.nan)
    gae = ShapedGae((1 + LAMBDA.float()) * advantages_BT, torch.zeros_like(nothing), nothing, nothing, nothing)
    fields = {field.name: nothing for field in dataclasses.fields(Experience)}
    return Experience(**fields | {"trajectories": trajectories, "gae": gae})


def gradients(role):
    return {name: parameter.main_grad.double().clone() for name, parameter in role.module.named_parameters()}


def k3(differences):
    return sum(math.exp(d) - 1 - d for d in differences) / len(differences)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_difference_is_measured(actor, batch, temperature):
    trajectories, error_BT = wrong_rollout(actor, batch, temperature=temperature)
    found, measured = verify(actor, trajectories, TOKENS, temperature)
    assert found is trajectories
    differences = [-float(error_BT[place]) for place in actions_of(batch)]
    assert measured == {
        "rollout_logprob_difference": pytest.approx(sum(map(abs, differences)) / len(differences), rel=1e-5),
        "rollout_logprob_difference_max": pytest.approx(max(map(abs, differences)), rel=1e-5),
        "rollout_kl": pytest.approx(k3(differences), rel=1e-4),
    }


def test_what_stands_outside_the_answers_is_not_measured(actor, batch):
    trajectories, _ = wrong_rollout(actor, batch)
    junk_BT = torch.where(trajectories.mask_BT, trajectories.log_probs_BT, -math.inf)
    junk = dataclasses.replace(trajectories, log_probs_BT=junk_BT)
    (found, measured), (expected, wanted) = (verify(actor, each, TOKENS, 1.0, 2.0) for each in (junk, trajectories))
    assert measured == wanted
    assert torch.equal(found.importance_BT, expected.importance_BT)


@pytest.mark.parametrize("cap", [1.0, 1.3, 100.0])
def test_weights_are_truncated_ratios(actor, batch, cap):
    trajectories, error_BT = wrong_rollout(actor, batch)
    found, _ = verify(actor, trajectories, TOKENS, 1.0, cap)
    truncated = 0
    for row in range(len(batch)):
        for t in range(error_BT.size(1)):
            weight, log_prob = 1.0, 0.0
            if (row, t) in actions_of(batch):
                weight = min(math.exp(-float(error_BT[row, t])), cap)
                log_prob = float(trajectories.log_probs_BT[row, t]) - float(error_BT[row, t])
                truncated += weight == cap
            assert float(found.importance_BT[row, t]) == pytest.approx(weight, rel=1e-4)
            assert float(found.log_probs_BT[row, t]) == pytest.approx(log_prob, rel=1e-4, abs=1e-5)
    assert (truncated > 0) == (cap < 100) and truncated < len(actions_of(batch))
    assert found.batch is trajectories.batch and found.ended_B is trajectories.ended_B


def test_a_ratio_that_overflows_is_the_cap(actor, batch):
    trajectories, _ = wrong_rollout(actor, batch)
    impossible = dataclasses.replace(trajectories, log_probs_BT=torch.full_like(trajectories.log_probs_BT, -2000.0))
    found, _ = verify(actor, impossible, TOKENS, 1.0, 4.0)
    assert (found.importance_BT[trajectories.mask_BT] == 4.0).all()


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_weights_enter_the_actors_loss(actor, batch, reduction):
    """The formula, with π_θ moved away from π_old: as after some updates."""
    config = PpoTrainingConfig(max_tokens_per_micro_batch=TOKENS, loss_reduction=reduction)
    trajectories, error_BT = wrong_rollout(actor, batch)
    corrected, _ = verify(actor, trajectories, TOKENS, 1.0, 1.3)
    moved_BT, advantages_BT = noise(batch, 0.3, seed=5), noise(batch, 1.0, seed=6)
    corrected = dataclasses.replace(corrected, log_probs_BT=corrected.log_probs_BT - moved_BT)
    normalizer = float(len(batch) if reduction == "sequence" else len(actions_of(batch)))
    values = actor_step(
        actor, experience_of(corrected, advantages_BT), Mix(LAMBDA), slice(0, 4), config, 1.0, normalizer, None
    )

    loss, clipped = 0.0, 0
    for row, t in actions_of(batch):
        tokens = batch.tokens_BL[row, : batch.lengths_B[row]].tolist()
        log_prob = log_probs_of(actor, tokens)[t]
        ratio = (log_prob - (log_prob.detach() - float(moved_BT[row, t]))).exp()
        advantage, weight = float(advantages_BT[row, t]), min(math.exp(-float(error_BT[row, t])), 1.3)
        surrogate = min(ratio * advantage, ratio.clamp(1 - config.clip_ratio, 1 + config.clip_ratio) * advantage)
        loss = loss - weight * surrogate / normalizer / (SHAPES[row][1] if reduction == "sequence" else 1)
        clipped += not 1 - config.clip_ratio < float(ratio.detach()) < 1 + config.clip_ratio
    assert 0 < clipped < len(actions_of(batch))
    assert values["actor_loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    names, parameters = zip(*actor.module.named_parameters(), strict=True)
    for name, expected in zip(names, torch.autograd.grad(loss, parameters), strict=True):
        scale = max(1e-3, float(expected.abs().max()))
        torch.testing.assert_close(gradients(actor)[name], expected.double(), rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("cap", [1.0, 7.0])
def test_equal_policies_change_nothing(actor, batch, cap):
    trajectories, _ = wrong_rollout(actor, batch)
    equal_BT = answer_log_probs(actor, trajectories, TOKENS, 1.0)
    equal = dataclasses.replace(trajectories, log_probs_BT=equal_BT)
    corrected, measured = verify(actor, equal, TOKENS, 1.0, cap)
    assert set(measured.values()) == {0.0}
    assert torch.equal(corrected.log_probs_BT, equal_BT)
    advantages_BT, results = noise(batch, 1.0, seed=6), []
    for each in (equal, corrected):
        config = PpoTrainingConfig(max_tokens_per_micro_batch=TOKENS)
        values = actor_step(
            actor, experience_of(each, advantages_BT), Mix(LAMBDA), slice(0, 4), config, 1.0, 4.0, None
        )
        results.append((values, gradients(actor)))
    (values, plain), (wanted, with_weights) = results
    assert values == wanted and values["actor_grad_norm"] > 1e-3
    assert all(torch.equal(plain[name], with_weights[name]) for name in plain)


def test_the_first_update_tells_the_difference_for_nothing(runtime, batch):
    """Of the first mini-batch, before any step; the second update's KL is of a policy that has moved."""
    learner = Role("actor", MODEL, runtime, VOCABULARY, "fp32", 1, OptimizerConfig(lr=0.03), total_steps=4)
    config = PpoConfig(ppo=PpoTrainingConfig(rollout_batch_size=4, mini_batch_size=2))
    trajectories, error_BT = wrong_rollout(learner, batch, scale=0.1)
    experience = experience_of(trajectories, noise(batch, 1.0, seed=6))
    values = learn(config, learner, [], experience, Mix(LAMBDA), None, 0, runtime)
    differences = [-float(error_BT[row, t]) for row, t in actions_of(batch) if row < 2]
    assert values["rollout_kl"] == pytest.approx(k3(differences), rel=1e-3)
    assert values["approximate_kl"] > 2 * values["rollout_kl"]


def test_without_an_actors_step_there_is_nothing_to_tell(runtime, actor, batch):
    config = PpoConfig(ppo=PpoTrainingConfig(rollout_batch_size=4, mini_batch_size=2, critic_warmup_steps=1))
    trajectories, _ = wrong_rollout(actor, batch)
    experience = experience_of(trajectories, noise(batch, 1.0, seed=6))
    assert learn(config, actor, [], experience, Mix(LAMBDA), None, 0, runtime) == {}


@pytest.mark.parametrize("cap", [0.5, math.nan, math.inf])
def test_a_cap_that_is_none_is_refused(cap):
    with pytest.raises(UserError, match="^ppo.importance_cap: expected 1 or more, found"):
        check_ranges(PpoConfig(ppo=PpoTrainingConfig(importance_cap=cap)))
