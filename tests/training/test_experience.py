"""`score` and `estimate` against the same made from full forwards of each row alone and Python loops in float64.

Legend: B rows, L tokens, T = L - 1 actions (column t predicts token t + 1).
"""

import dataclasses

import pytest
import torch
from whole_rows import outputs

from megatron_safe.config import ModelConfig, ParallelConfig, PpoTrainingConfig, RolloutConfig
from megatron_safe.data.batches import collate
from megatron_safe.kernels.shaped_gae import ShapedGae
from megatron_safe.models.roles import Role
from megatron_safe.rollout.generate import generate
from megatron_safe.runtime import start
from megatron_safe.training.experience import Experience, estimate, score

VOCABULARY, PAD, NEVER = 21, 3, -1
MODEL = ModelConfig(
    num_layers=1, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2,
    max_sequence_length=64, vocab_multiple=8, init_std=0.4,
)  # fmt: skip
CONFIG = PpoTrainingConfig(  # two updates a rollout batch, for which critics are scored beforehand
    mini_batch_size=32, max_tokens_per_score_micro_batch=20, kl_coeff=0.3, gamma=0.9, gae_lambda=0.8,
    missing_eos_penalty=0.7,
)  # fmt: skip
NAMES = ("actor", "reference", "reward_model", "cost_model", "reward_critic", "cost_critic")


@pytest.fixture(scope="module")
def roles():
    with start(ParallelConfig(), 0) as runtime:
        roles = {name: Role(name, MODEL, runtime, VOCABULARY, "fp32", seed) for seed, name in enumerate(NAMES)}
        for name, role in roles.items():
            if role.module.head == "scalar":  # a fresh bias is 0, which would hide where it is counted
                torch.nn.init.constant_(role.module.output_layer.bias, 0.1 * len(name))
        yield roles


def roll_out(roles, lengths, new_tokens=6, eos=NEVER, temperature=1.0, seed=3):
    generator = torch.Generator().manual_seed(seed)
    rows = [(torch.randint(VOCABULARY, (n,), generator=generator).tolist(), n) for n in lengths]
    rollout = RolloutConfig(max_new_tokens=new_tokens, temperature=temperature)
    return generate(roles["actor"], collate(rows, PAD), torch.arange(len(rows)), rollout, seed, eos, PAD)


def clip(x, limit):
    return max(-limit, min(limit, x))


def reference(roles, trajectories, config, temperature) -> dict[str, list]:
    """Field of Experience or of its `gae` -> [B] or [B, T] as Python floats."""

    def read(name, tokens):
        with torch.no_grad():
            if name not in roles:
                return None
            return outputs(roles[name].module, torch.tensor([tokens]))[0].double()

    batch, width = trajectories.batch, trajectories.log_probs_BT.size(1)
    fields = (*(field.name for field in dataclasses.fields(Experience)), *ShapedGae._fields)
    result = {name: [] for name in fields if name not in ("trajectories", "gae", "sums_6")}
    for row, prompt, length, ended, log_probs in zip(
        batch.tokens_BL.tolist(), batch.prompt_lengths_B.tolist(), batch.lengths_B.tolist(),
        trajectories.ended_B.tolist(), trajectories.log_probs_BT.tolist(), strict=True,
    ):  # fmt: skip
        tokens, actions = row[:length], range(prompt - 1, length - 1)
        log_softmax = torch.log_softmax(read("reference", tokens) / temperature, dim=1)
        ref = [float(log_softmax[t, tokens[t + 1]]) if t in actions else 0.0 for t in range(width)]
        result["ref_log_probs_BT"].append(ref)
        for kind, sign in (("reward", -1.0), ("cost", 1.0)):
            scores = read(f"{kind}_model", tokens)
            episode = 0.0 if scores is None else float(scores[-1])
            if kind == "reward" and not ended:
                episode -= config.missing_eos_penalty
            critic = read(f"{kind}_critic", tokens)
            values = [float(critic[t]) if critic is not None and t in actions else 0.0 for t in range(width)]
            advantages, returns = [0.0] * width, [0.0] * width
            next_advantage = next_value = 0.0
            for t in reversed(actions):
                token = sign * config.kl_coeff * (log_probs[t] - ref[t]) + (episode if t == length - 2 else 0.0)
                delta = clip(token, config.score_clip) + config.gamma * next_value - values[t]
                next_advantage = delta + config.gamma * config.gae_lambda * next_advantage
                next_value = values[t]
                advantages[t], returns[t] = next_advantage, next_advantage + values[t]
            result[f"{kind}s_B"].append(episode)
            result[f"{kind}_values_BT"].append(values)
            result[f"{kind}_advantages_BT"].append(advantages)
            result[f"{kind}_returns_BT"].append(returns)
    return result


def compare(roles, trajectories, config=CONFIG, temperature=1.0):
    scores = score(roles, trajectories, config, temperature)
    experience = estimate(scores, scores.values_2BT, config)
    assert experience.trajectories is trajectories
    for name, expected in reference(roles, trajectories, config, temperature).items():
        found = getattr(experience, name, None)
        found = getattr(experience.gae, name) if found is None else found
        assert found.dtype == torch.float32, name
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        if name.endswith("_BT"):
            assert (found[~trajectories.mask_BT] == 0).all(), name
    return experience


@pytest.fixture(scope="module")
def common_eos(roles):
    """A token that ends some of the answers below and not others."""
    trajectories = roll_out(roles, [1, 4, 7, 2, 5])
    batch = trajectories.batch
    answers = [row[a:b] for row, a, b in zip(batch.tokens_BL, batch.prompt_lengths_B, batch.lengths_B, strict=True)]
    counts = {v: sum(bool((answer == v).any()) for answer in answers) for v in range(VOCABULARY)}
    return next(v for v, count in counts.items() if 0 < count < len(answers))


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("score_clip", [50.0, 0.4])
def test_ragged_answers(roles, common_eos, temperature, score_clip):
    trajectories = roll_out(roles, [1, 4, 7, 2, 5], eos=common_eos, temperature=temperature)
    if temperature == 1.0:
        assert set(trajectories.ended_B.tolist()) == {True, False}
    experience = compare(roles, trajectories, dataclasses.replace(CONFIG, score_clip=score_clip), temperature)
    assert experience.rewards_B.std() > 0.1 and experience.costs_B.std() > 0.1
    mask_BT = trajectories.mask_BT
    assert (experience.gae.reward_advantages_BT[mask_BT] != experience.gae.cost_advantages_BT[mask_BT]).all()


@pytest.mark.parametrize("size", [1, 30, 1000])
def test_how_many_tokens_at_a_time_does_not_matter(roles, common_eos, size):
    trajectories = roll_out(roles, [1, 4, 7, 2, 5], eos=common_eos)
    compare(roles, trajectories, dataclasses.replace(CONFIG, max_tokens_per_score_micro_batch=size))


def test_all_answers_are_eos_alone(roles):
    lengths = [4, 4, 4]
    greedy = roll_out(roles, lengths[:1], new_tokens=1, temperature=0.0)
    eos = int(greedy.batch.tokens_BL[0, 4])
    prompt = (greedy.batch.tokens_BL[0, :4].tolist(), 4)
    rollout = RolloutConfig(max_new_tokens=6, temperature=0.0)
    trajectories = generate(roles["actor"], collate([prompt] * 3, PAD), torch.arange(3), rollout, 0, eos, PAD)
    assert trajectories.mask_BT.sum(dim=1).tolist() == [1, 1, 1] and trajectories.ended_B.all()
    experience = compare(roles, trajectories)
    # One action: its advantage is its token reward less its value, whatever gamma and λ_GAE.
    token_reward_B = experience.rewards_B - 0.3 * (trajectories.log_probs_BT - experience.ref_log_probs_BT)[:, 3]
    torch.testing.assert_close(experience.gae.reward_returns_BT[:, 3], token_reward_B, rtol=0, atol=1e-5)


def test_one_action_column(roles):
    trajectories = roll_out(roles, [1, 1, 1], new_tokens=1)
    assert trajectories.mask_BT.shape == (3, 1)
    compare(roles, trajectories)


@pytest.mark.parametrize("lengths, new_tokens", [([5], 6), ([1], 1)])
def test_a_batch_of_one(roles, lengths, new_tokens):
    compare(roles, roll_out(roles, lengths, new_tokens))


def test_a_baseline_without_cost(roles, common_eos):
    rewarded = {name: role for name, role in roles.items() if not name.startswith("cost")}
    trajectories = roll_out(roles, [1, 4, 7, 2, 5], eos=common_eos)
    experience = compare(rewarded, trajectories, dataclasses.replace(CONFIG, kl_coeff=0.0))
    gae = experience.gae
    for found in (experience.costs_B, experience.cost_values_BT, gae.cost_advantages_BT, gae.cost_returns_BT):
        assert (found == 0).all()
    # A cost model without a critic, as `ppo` may have one to watch: the score is there, values are 0.
    watched = rewarded | {"cost_model": roles["cost_model"]}
    assert (compare(watched, trajectories).costs_B != 0).all()


def test_the_penalty_is_for_answers_cut_off_alone(roles, common_eos):
    trajectories = roll_out(roles, [1, 4, 7, 2, 5], eos=common_eos)
    without = score(roles, trajectories, dataclasses.replace(CONFIG, missing_eos_penalty=0.0), 1.0)
    difference_B = without.rewards_B - score(roles, trajectories, CONFIG, 1.0).rewards_B
    torch.testing.assert_close(difference_B, 0.7 * (~trajectories.ended_B).float(), rtol=0, atol=1e-5)
