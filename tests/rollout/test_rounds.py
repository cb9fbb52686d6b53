"""What generation does on a GPU: several ticks between two looks of the host, graphs of ticks, its own attention."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from rollouts import MANY, MODEL, NEVER, VOCABULARY, answers, make_prompts, run, watch

from megatron_safe.config import ParallelConfig, RolloutConfig
from megatron_safe.kernels.backend import set_backend
from megatron_safe.models.roles import Role
from megatron_safe.rollout.generate import TICKS_A_ROUND
from megatron_safe.runtime import start

ROLLOUT = RolloutConfig(max_new_tokens=20, temperature=1.5)
LIMITS = [20, 1, 7, 2, 20, 3, 19, 8, 20, 1, 5, 20, 11]


def equal(found, expected) -> None:
    assert answers(found) == answers(expected) and torch.equal(found.ended_B, expected.ended_B)
    torch.testing.assert_close(found.log_probs_BT, expected.log_probs_BT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eos", [5, NEVER])
@pytest.mark.parametrize("limits", [None, LIMITS])
@pytest.mark.parametrize("slots_size, ticks", [(1, 3), (3, 2), (5, 8), (0, 50)])
def test_rounds_of_several_ticks_give_the_same_answers(make_actor, monkeypatch, slots_size, ticks, limits, eos):
    actor, prompts = make_actor(), make_prompts(MANY)
    expected = run(actor, prompts, ROLLOUT, eos, limits=limits)
    monkeypatch.setitem(TICKS_A_ROUND, "cpu", ticks)
    done = watch(monkeypatch)
    equal(run(actor, prompts, dataclasses.replace(ROLLOUT, slots=slots_size), eos, limits=limits), expected)
    prompts_read = [number for number, tick in enumerate(done) if tick.prompts]
    if not limits and eos == NEVER:
        assert all(later - earlier >= min(ticks, 20) for earlier, later in pairwise(prompts_read))
        waves = -(-len(MANY) // (slots_size or len(MANY)))
        assert len(done) == 20 * waves  # a round is no longer than what is left of its samples


@pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter where there is a GPU: -m gpu")
@pytest.mark.parametrize("changes", [{}, {"num_query_groups": 4, "sliding_window": 5, "qk_norm": True}])
def test_the_kernels_of_a_gpu_give_the_same_text(make_actor, monkeypatch, changes):
    pytest.importorskip("triton")
    actor, prompts = make_actor(dataclasses.replace(MODEL, **changes)), make_prompts(MANY)
    greedy = RolloutConfig(max_new_tokens=6, temperature=0.0, slots=4)  # other noise draws other samples
    expected = run(actor, prompts, greedy, 5)
    monkeypatch.setitem(TICKS_A_ROUND, "cpu", 3)
    set_backend("triton")
    try:
        equal(run(actor, prompts, greedy, 5), expected)
    finally:
        set_backend("auto")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("slots_size", [3, 0])
def test_graphs_give_what_ticks_without_them_give(monkeypatch, slots_size, temperature):
    rollout = RolloutConfig(max_new_tokens=20, temperature=temperature, slots=slots_size)
    with start(ParallelConfig(), 0) as runtime:
        actor = Role("actor", MODEL, runtime, VOCABULARY, "fp32", seed=2)
        prompts = make_prompts(MANY).to(runtime.device)
        ids = torch.arange(len(MANY), device=runtime.device).tolist()
        found = run(actor, prompts, rollout, 5, ids=ids)
        monkeypatch.setattr("megatron_safe.rollout.generate.DecodeGraphs", lambda *_: None)
        equal(found, run(actor, prompts, rollout, 5, ids=ids))
