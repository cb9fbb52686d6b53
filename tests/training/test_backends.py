"""A whole training step with Triton's kernels (in its interpreter, where there is no GPU) and with PyTorch's paths."""

import pytest
import torch

from megatron_safe.algorithms.lagrange import LagrangeMultiplier
from megatron_safe.config import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PpoConfig,
    PpoTrainingConfig,
    RolloutConfig,
)
from megatron_safe.data.batches import collate
from megatron_safe.data.datasets import DemonstrationDataset
from megatron_safe.data.mixture import read
from megatron_safe.data.tokenizer import load_tokenizer
from megatron_safe.kernels.backend import set_backend
from megatron_safe.models.roles import HEADS, Role
from megatron_safe.rollout.generate import generate
from megatron_safe.runtime import start
from megatron_safe.training.experience import score
from megatron_safe.training.ppo_lag import PtxDemonstrations, train

ROWS, LEARNERS = 8, ("actor", "reward_critic", "cost_critic")


@pytest.fixture
def runtime():
    with start(ParallelConfig(), 0) as runtime:
        yield runtime
    set_backend("auto")


@pytest.fixture
def steps(project, runtime):
    """Rolls out once, then takes one rollout batch's training step with each backend, from the same weights:
    {backend: (experience, λ, what was measured, weights after it)}."""
    tokenizer = load_tokenizer(project.data / "tokenizer")
    rows = read("demonstrations", "data.ptx", [str(project.data / "demonstrations.jsonl")])
    data = DemonstrationDataset(rows.records, tokenizer, "ask {prompt} answer", 24)
    demonstrations = PtxDemonstrations(data, rows.stream(data.records, 4, 0))
    optimizer = OptimizerConfig(lr=5e-3, eps=1e-5, schedule="constant")

    def make(precision: str, tied: bool, reduction: str):
        model = ModelConfig(
            num_layers=1, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, max_sequence_length=64,
            vocab_multiple=32, init_std=0.3, tie_embeddings=tied,
        )  # fmt: skip
        config = PpoConfig(
            ppo=PpoTrainingConfig(
                rollout_batch_size=ROWS, mini_batch_size=4, max_tokens_per_micro_batch=24, kl_coeff=0.3,
                whiten_advantages=True, ptx_coeff=0.5, loss_reduction=reduction, score_clip=2.0, clip_value=0.3,
            ),
            rollout=RolloutConfig(max_new_tokens=7, temperature=0.8),
            precision=precision,
        )  # fmt: skip

        def roles():
            return {
                name: Role(
                    name, model, runtime, tokenizer.vocab_size, precision, seed,
                    optimizer if name in LEARNERS else None, 10,
                )
                for seed, name in enumerate(HEADS)
                if name != "critic"
            }  # fmt: skip

        draw = torch.Generator().manual_seed(4)
        prompts = [torch.randint(5, 43, (n,), generator=draw).tolist() for n in (1, 4, 7, 2, 5, 3, 6, 4)]
        batch = collate([(row, len(row)) for row in prompts], tokenizer.pad_id).to(runtime.device)
        ids_B = torch.arange(ROWS, device=runtime.device)
        # A frequent word ends the answers, so that their lengths differ.
        trajectories = generate(roles()["actor"], batch, ids_B, config.rollout, 1, 20, tokenizer.pad_id)
        assert len(set(trajectories.mask_BT.sum(dim=1).tolist())) > 1

        found = {}
        for backend in ("torch", "triton"):
            set_backend(backend)
            trained = roles()
            scores = score(trained, trajectories, config.ppo, config.rollout.temperature)
            multiplier = LagrangeMultiplier(0.8, 5.0, 0.3, -0.4, 0, 6, device=runtime.device)
            multiplier.step(0, scores.costs_B)
            experience, values = train(config, trained, scores, multiplier.value, demonstrations, 0, runtime)
            weights = {
                f"{name}.{key}": parameter.detach().clone()
                for name in LEARNERS
                for key, parameter in trained[name].module.named_parameters()
            }
            found[backend] = experience, float(multiplier.value), values, weights
        return found

    return make


@pytest.mark.parametrize("tied, reduction", [(False, "sequence"), (True, "token")])
def test_a_training_step_is_the_same_with_both_backends(steps, tied, reduction):
    found = steps("fp32", tied, reduction)
    (plain, lam, values, weights), (fused, fused_lam, fused_values, fused_weights) = found["torch"], found["triton"]
    assert lam != 0.8 and fused_lam == pytest.approx(lam, rel=1e-5)
    for name in ("ref_log_probs_BT", "rewards_B", "costs_B", "reward_values_BT", "cost_values_BT"):
        torch.testing.assert_close(getattr(fused, name), getattr(plain, name), rtol=1e-5, atol=1e-5)
    for name, expected in plain.gae._asdict().items():
        torch.testing.assert_close(getattr(fused.gae, name), expected, rtol=1e-5, atol=1e-5)
    assert values["clip_fraction"] > 0 and values["actor_skipped"] == 0  # the second mini-batch's ratios moved
    assert fused_values == {name: pytest.approx(value, rel=1e-5, abs=1e-5) for name, value in values.items()}
    for name, expected in weights.items():
        torch.testing.assert_close(fused_weights[name], expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m)


def test_in_bf16_they_differ_by_no_more_than_its_roundings(steps):
    found = steps("bf16", True, "sequence")
    (_, lam, values, _), (_, fused_lam, fused_values, _) = found["torch"], found["triton"]
    assert fused_lam == pytest.approx(lam, rel=1e-3)
    # A token near the edge of the clip is on one side or the other.
    at_edge = {"clip_fraction": 0.06}
    assert fused_values == {
        name: pytest.approx(value, rel=0.03, abs=at_edge.get(name, 0.01)) for name, value in values.items()
    }
