"""Generation with a key/value cache in one process: against full forwards, in any company, with every kind of ending.

Legend: B samples, L tokens, T = L - 1 predictions, V vocabulary.
"""

import dataclasses

import pytest
import torch
from rollouts import GREEDY, LENGTHS, MANY, MODEL, PAD, ROLLOUT, VOCABULARY, answers, make_prompts, run, watch
from whole_rows import outputs

from megatron_safe.config import RolloutConfig
from megatron_safe.rollout import cache, slots
from megatron_safe.rollout.generate import generate


def full_forward_log_probs(actor, row, temperature):
    """log softmax(z / temperature) of each token of one row after the first, in float64, from a forward of the row."""
    with torch.no_grad():
        logits_TV = outputs(actor.module, torch.tensor([row]))[0, :-1].double()
    return torch.log_softmax(logits_TV / (temperature or 1.0), dim=1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.7])
@pytest.mark.parametrize("changes", [
    {}, {"num_query_groups": 2}, {"num_query_groups": 1}, {"sliding_window": 4}, {"sliding_window": 1},
    {"qk_norm": True, "head_dim": 6, "num_query_groups": 2, "sliding_window": 7},
    {"qkv_bias": True, "rope_type": "llama3", "rope_factor": 4.0, "rope_original_max_position": 16},
])  # fmt: skip
def test_cached_log_probs_are_those_of_a_full_forward(make_actor, changes, temperature):
    actor = make_actor(dataclasses.replace(MODEL, **changes))
    rollout = dataclasses.replace(ROLLOUT, temperature=temperature)
    prompts = make_prompts()
    endless = answers(run(actor, prompts, rollout))
    eos = next(v for v in range(VOCABULARY) if 0 < sum(v in text for text in endless) < len(endless))
    trajectories = run(actor, prompts, rollout, eos)
    batch = trajectories.batch
    assert set(trajectories.ended_B.tolist()) == {True, False}
    for i, (tokens, length) in enumerate(zip(batch.tokens_BL.tolist(), batch.lengths_B.tolist(), strict=True)):
        expected = full_forward_log_probs(actor, tokens[:length], temperature)
        first = LENGTHS[i] - 1
        found = trajectories.log_probs_BT[i].double()
        torch.testing.assert_close(found[first : length - 1], expected[first:], rtol=0, atol=1e-5)
        assert (found[:first] == 0).all() and (found[length - 1 :] == 0).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("groups", [None, 2])
def test_greedy_text_is_that_of_a_loop_without_a_cache(make_actor, groups, tied):
    actor = make_actor(dataclasses.replace(MODEL, num_query_groups=groups, tie_embeddings=tied))
    prompts = make_prompts()
    found = answers(run(actor, prompts, GREEDY, eos=5))
    for row, length, answer in zip(prompts.tokens_BL.tolist(), LENGTHS, found, strict=True):
        tokens = row[:length]
        while len(tokens) < length + GREEDY.max_new_tokens and 5 not in tokens[length:]:
            with torch.no_grad():
                tokens.append(int(outputs(actor.module, torch.tensor([tokens]))[0, -1].argmax()))
        assert answer == tokens[length:]
    assert len({tuple(answer) for answer in found}) == len(found)


@pytest.mark.parametrize("rollout", [ROLLOUT, GREEDY, dataclasses.replace(ROLLOUT, top_k=4, top_p=0.9)])
def test_an_answer_does_not_depend_on_its_company(make_actor, rollout):
    actor, prompts, ids = make_actor(), make_prompts(), [7, 2**40, 0, 12, 3, 99]
    together = run(actor, prompts, rollout, eos=5, ids=ids)
    texts = answers(together)
    for order in ([5, 3, 1, 0, 4, 2], [2, 0], [1], [0, 0, 0]):
        batch = prompts.select(order)
        width = int(batch.prompt_lengths_B.max())
        for padded_to in (width, prompts.tokens_BL.size(1)):
            narrow = dataclasses.replace(batch, tokens_BL=batch.tokens_BL[:, :padded_to])
            other = run(actor, narrow, rollout, eos=5, ids=[ids[i] for i in order])
            assert answers(other) == [texts[i] for i in order]
            for row, i in enumerate(order):
                same = min(other.log_probs_BT.size(1), together.log_probs_BT.size(1))
                torch.testing.assert_close(
                    other.log_probs_BT[row, :same], together.log_probs_BT[i, :same], rtol=0, atol=1e-5
                )


def test_what_stands_in_the_padding_does_not_matter(make_actor):
    actor, prompts = make_actor(), make_prompts()
    other = prompts.tokens_BL.clone()
    beyond = torch.arange(other.size(1)) >= prompts.lengths_B[:, None]
    other[beyond] = 11
    texts = answers(run(actor, prompts))
    assert answers(run(actor, dataclasses.replace(prompts, tokens_BL=other))) == texts


def test_randomness_is_keyed_by_seed_sample_and_position(make_actor):
    actor = make_actor()
    prompts = make_prompts([3]).select([0] * 6)
    first = run(actor, prompts, ids=[0, 1, 2, 0, 1, 2])
    texts = answers(first)
    assert texts[:3] == texts[3:] and len({tuple(text) for text in texts}) == 3
    again = run(actor, prompts, ids=[0, 1, 2, 0, 1, 2])
    assert answers(again) == texts and torch.equal(again.log_probs_BT, first.log_probs_BT)
    others = answers(run(actor, prompts, ids=[0, 1, 2, 0, 1, 2], seed=1))
    assert all(other != text for other, text in zip(others, texts, strict=True))
    longer = answers(run(actor, prompts, dataclasses.replace(ROLLOUT, max_new_tokens=12), ids=[0, 1, 2, 0, 1, 2]))
    assert [text[:8] for text in longer] == texts


def test_no_step_is_taken_after_the_last_answer_has_ended(make_actor, monkeypatch):
    actor, prompts = make_actor(), make_prompts([5, 5, 5]).select([0] * 3)
    cold = dataclasses.replace(ROLLOUT, temperature=0.4)  # the same tokens in all three, at different places
    endless = answers(run(actor, prompts, cold))
    steps = watch(monkeypatch)
    expected = []
    for eos in range(VOCABULARY):
        run(actor, prompts, cold, eos)
        expected.append(max(text.index(eos) + 1 if eos in text else ROLLOUT.max_new_tokens for text in endless))
        assert len(steps) == sum(expected)
    assert min(expected) < ROLLOUT.max_new_tokens and endless[0] != endless[1]


@pytest.mark.parametrize("changes", [
    {}, {"num_query_groups": 4, "sliding_window": 5}, {"qk_norm": True, "qkv_bias": True, "tie_embeddings": True},
])  # fmt: skip
@pytest.mark.parametrize("slots_size", [1, 2, 3, 7, len(MANY), 100])
def test_refilled_slots_give_what_all_at_once_gives(make_actor, monkeypatch, changes, slots_size):
    actor, prompts = make_actor(dataclasses.replace(MODEL, **changes)), make_prompts(MANY)
    rollout = RolloutConfig(max_new_tokens=20, temperature=1.5)
    at_once = run(actor, prompts, rollout, eos=5)
    assert len({len(text) for text in answers(at_once)}) > 4
    ticks = watch(monkeypatch)
    found = run(actor, prompts, dataclasses.replace(rollout, slots=slots_size), eos=5)
    assert answers(found) == answers(at_once) and torch.equal(found.ended_B, at_once.ended_B)
    torch.testing.assert_close(found.log_probs_BT, at_once.log_probs_BT, rtol=0, atol=1e-5)
    # A row for each token that was sampled or read, and no other.
    counts = [len(text) for text in answers(found)]
    assert [tick.samples for tick in ticks[:-1]] == sorted((tick.samples for tick in ticks[:-1]), reverse=True)
    assert ticks[0].samples == min(slots_size, len(MANY))
    assert sum(tick.samples for tick in ticks) == sum(counts)
    assert sum(tick.tokens_R.size(0) for tick in ticks) == sum(counts) + sum(MANY) - len(MANY)


@pytest.mark.parametrize("slots_size", [1, 2, 5, 12])
def test_a_prompt_that_is_sampled_several_times_is_read_once(make_actor, monkeypatch, slots_size):
    actor, repeated = make_actor(), make_prompts([6, 1, 4]).select([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2])
    apart = [answers(run(actor, repeated.select([i]), ids=[i], eos=5))[0] for i in range(12)]
    ticks = watch(monkeypatch)
    found = run(actor, repeated, dataclasses.replace(ROLLOUT, slots=slots_size), eos=5)
    assert answers(found) == apart and len({tuple(text) for text in apart}) > 6
    for i in (0, 5, 11):
        row = found.batch.tokens_BL[i, : found.batch.lengths_B[i]].tolist()
        first = int(repeated.prompt_lengths_B[i]) - 1
        log_probs_T = found.log_probs_BT[i, first : len(row) - 1].double()
        torch.testing.assert_close(log_probs_T, full_forward_log_probs(actor, row, 1.0)[first:], rtol=0, atol=1e-5)
    prompt_rows = sum(tick.tokens_R.size(0) - tick.samples for tick in ticks)
    assert prompt_rows == 5 + 3 if slots_size == 12 else 5 + 3 <= prompt_rows <= 4 * 5 + 5 * 3


@pytest.mark.parametrize("slots_size", [1, 3, 0])
def test_answers_of_one_token_leave_at_once(make_actor, monkeypatch, slots_size):
    actor, prompts = make_actor(), make_prompts([5, 1, 5, 5, 1, 5, 5]).select([0, 2, 3, 5, 6, 1, 4])
    rollout = dataclasses.replace(ROLLOUT, slots=slots_size, max_new_tokens=1)
    expected = [text[:1] for text in answers(run(actor, prompts))]
    ticks = watch(monkeypatch)
    assert answers(run(actor, prompts, rollout)) == expected
    assert len(ticks) == -(-7 // (slots_size or 7))
    same = make_prompts([5]).select([0] * 7)
    first = answers(run(actor, same, GREEDY))[0][0]
    del ticks[:]
    found = run(actor, same, dataclasses.replace(GREEDY, slots=slots_size), eos=first)
    assert answers(found) == [[first]] * 7 and found.ended_B.all()
    assert len(ticks) == -(-7 // (slots_size or 7))


@pytest.mark.parametrize("slots_size", [3, 0])
def test_slots_that_grow_keep_what_they_hold(make_actor, monkeypatch, slots_size):
    actor, prompts = make_actor(), make_prompts(MANY)
    rollout = RolloutConfig(max_new_tokens=20, slots=slots_size)
    expected = run(actor, prompts, rollout, eos=5)
    sizes, reserve = [], cache.SlotCache.reserve
    monkeypatch.setattr(cache, "STEP", 4)
    monkeypatch.setattr(
        cache.SlotCache, "reserve", lambda self, n: (reserve(self, n), sizes.append((n, self.positions)))
    )
    found = run(actor, prompts, rollout, eos=5)
    assert answers(found) == answers(expected)
    torch.testing.assert_close(found.log_probs_BT, expected.log_probs_BT, rtol=0, atol=1e-5)
    assert {size for _, size in sizes} > {12, 16, 20, 24} and sizes[-1][1] <= max(MANY) + 20 - 1
    assert all(needed <= size for needed, size in sizes)


def test_newcomers_wait_when_their_prompts_are_too_long_together(make_actor, monkeypatch):
    actor, prompts = make_actor(), make_prompts(MANY)
    expected = answers(run(actor, prompts, eos=5))
    monkeypatch.setattr(slots, "PREFILL_ROWS", 10)
    ticks = watch(monkeypatch)
    assert answers(run(actor, prompts, eos=5)) == expected
    assert max(tick.tokens_R.size(0) - tick.samples for tick in ticks) == 11  # one that is longer goes alone


def test_weights_and_results_can_be_trained_on(make_actor):
    """Nothing of the rollout's inference mode is left on what it returns."""
    actor = make_actor()
    trajectories = run(actor, make_prompts())
    for tensor in (trajectories.batch.tokens_BL, trajectories.log_probs_BT, trajectories.ended_B):
        assert not tensor.is_inference()
    weight = torch.zeros(VOCABULARY, 2, requires_grad=True)
    torch.nn.functional.embedding(trajectories.batch.tokens_BL, weight).sum().backward()
    assert weight.grad.sum() == 2 * trajectories.batch.tokens_BL.numel()


@pytest.mark.parametrize("rollout", [ROLLOUT, GREEDY])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_an_answer_ends_with_its_first_eos(make_actor, rollout, pad_is_eos):
    """Whatever token is named EOS, an answer is what it was without one, up to and with the first."""
    actor, prompts = make_actor(), make_prompts()
    endless = answers(run(actor, prompts, rollout))
    assert all(len(text) == rollout.max_new_tokens for text in endless)
    any_ended = False
    for eos in range(VOCABULARY):
        pad = eos if pad_is_eos else PAD
        padding_BL = torch.arange(prompts.tokens_BL.size(1)) >= prompts.lengths_B[:, None]
        prompts = dataclasses.replace(prompts, tokens_BL=prompts.tokens_BL.masked_fill(padding_BL, pad))
        found = generate(actor, prompts, torch.arange(len(prompts)), rollout, 0, eos, pad)
        expected = [text[: text.index(eos) + 1] if eos in text else text for text in endless]
        assert answers(found) == expected
        assert found.ended_B.tolist() == [eos in text for text in endless]
        any_ended |= bool(found.ended_B.any())

        batch = found.batch
        assert torch.equal(batch.prompt_lengths_B, prompts.prompt_lengths_B)
        assert batch.tokens_BL.shape == (len(prompts), int(batch.lengths_B.max()))
        assert found.log_probs_BT.shape == found.mask_BT.shape == (len(prompts), batch.tokens_BL.size(1) - 1)
        for row, length in enumerate(batch.lengths_B.tolist()):
            n = LENGTHS[row]
            assert batch.tokens_BL[row, :n].tolist() == prompts.tokens_BL[row, :n].tolist()
            assert set(batch.tokens_BL[row, length:].tolist()) <= {pad}
            mask = [n - 1 <= t < length - 1 for t in range(batch.tokens_BL.size(1) - 1)]
            assert found.mask_BT[row].tolist() == mask
            assert [bool(value) for value in found.log_probs_BT[row] < 0] == mask
    assert any_ended


@pytest.mark.parametrize("slots_size", [1, 4, 0])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_an_answer_is_cut_at_its_own_limit(make_actor, monkeypatch, slots_size, pad_is_eos):
    """One that is cut has not ended; one whose EOS stands at the limit has; nothing is computed past it."""
    actor, prompts, eos = make_actor(), make_prompts(MANY), 5
    rollout = dataclasses.replace(ROLLOUT, slots=slots_size)
    whole = run(actor, prompts, rollout, eos)
    texts = answers(whole)
    limits = [1 + (3 * i) % 8 for i in range(len(MANY))]
    at_its_eos = next(i for i, text in enumerate(texts) if text[-1] == eos)
    limits[at_its_eos] = len(texts[at_its_eos])
    ticks = watch(monkeypatch)
    found = run(actor, prompts, rollout, eos, limits=limits, pad=eos if pad_is_eos else PAD)
    assert answers(found) == [text[:limit] for text, limit in zip(texts, limits, strict=True)]
    assert found.ended_B.tolist() == [eos in text[:limit] for text, limit in zip(texts, limits, strict=True)]
    assert found.ended_B[at_its_eos] and set(found.ended_B.tolist()) == {True, False}
    assert (found.ended_B != whole.ended_B).any() and sum(tick.samples for tick in ticks) == found.mask_BT.sum()


def test_all_end_with_the_first_token(make_actor):
    actor, prompts = make_actor(), make_prompts([5]).select([0] * 4)
    first = answers(run(actor, prompts, GREEDY))[0][0]
    trajectories = run(actor, prompts, GREEDY, eos=first)
    assert answers(trajectories) == [[first]] * 4
    assert trajectories.ended_B.all() and trajectories.batch.tokens_BL.shape == (4, 6)
    assert trajectories.mask_BT.sum().item() == 4 and trajectories.mask_BT[:, 4].all()
    expected = full_forward_log_probs(actor, trajectories.batch.tokens_BL[0].tolist(), 0.0)[-1]
    torch.testing.assert_close(trajectories.log_probs_BT[:, 4].double(), expected.expand(4), rtol=0, atol=1e-5)


def test_one_new_token_and_prompts_of_one(make_actor):
    actor = make_actor()
    for lengths in ([1], [1, 1, 1], [6, 1]):
        prompts = make_prompts(lengths)
        trajectories = run(actor, prompts, dataclasses.replace(ROLLOUT, max_new_tokens=1), ids=range(len(lengths)))
        assert trajectories.batch.lengths_B.tolist() == [n + 1 for n in lengths]
        whole = answers(run(actor, prompts, ids=range(len(lengths))))
        assert answers(trajectories) == [text[:1] for text in whole]
        assert trajectories.mask_BT.sum(dim=1).tolist() == [1] * len(lengths)


@pytest.mark.parametrize("temperature", [0.5, 3.0, 50.0])
def test_padding_of_the_vocabulary_is_never_drawn(make_actor, temperature):
    prompts = make_prompts([2]).select([0] * 300)
    rollout = RolloutConfig(max_new_tokens=4, temperature=temperature)
    trajectories = run(make_actor(), prompts, rollout)
    drawn = {token for text in answers(trajectories) for token in text}
    assert max(drawn) < VOCABULARY and trajectories.log_probs_BT.isfinite().all()
    assert temperature < 50 or drawn == set(range(VOCABULARY))  # nearly uniform: everything real is drawn


def test_temperature_sharpens(make_actor):
    """The colder, the likelier the drawn tokens are under the model itself."""
    actor, prompts = make_actor(), make_prompts([3]).select([0] * 200)
    means = []
    for temperature in (0.25, 1.0, 4.0):
        trajectories = run(actor, prompts, RolloutConfig(max_new_tokens=3, temperature=temperature))
        tokens_BL = trajectories.batch.tokens_BL
        with torch.no_grad():
            log_probs = torch.log_softmax(outputs(actor.module, tokens_BL[:, :-1]), -1)
        log_probs = log_probs.gather(2, tokens_BL[:, 1:, None])
        means.append(float(log_probs[..., 0][trajectories.mask_BT].mean()))
    assert means[0] > means[1] + 0.2 > means[2] + 0.4


def test_first_tokens_follow_the_models_distribution(make_actor):
    """Chi-square of 20,000 first tokens against softmax of a full forward."""
    actor, n = make_actor(), 20_000
    prompts = make_prompts([4]).select([0] * n)
    first_B = torch.tensor([text[0] for text in answers(run(actor, prompts, RolloutConfig(max_new_tokens=1)))])
    with torch.no_grad():
        p_V = torch.softmax(outputs(actor.module, prompts.tokens_BL[:1])[0, -1, :VOCABULARY].double(), dim=0)
    counts_V = torch.bincount(first_B, minlength=VOCABULARY).double()
    enough_V = p_V * n > 5
    chi_square = float(((counts_V - n * p_V) ** 2 / (n * p_V))[enough_V].sum())
    assert int(enough_V.sum()) > 10 and chi_square < 21 + 6 * (2 * 21) ** 0.5


def test_bf16_generates_near_its_own_full_forward(make_actor):
    actor, prompts = make_actor(precision="bf16"), make_prompts()
    trajectories = run(actor, prompts)
    assert trajectories.log_probs_BT.dtype == torch.float32
    for i, tokens in enumerate(trajectories.batch.tokens_BL.tolist()):
        length = int(trajectories.batch.lengths_B[i])
        expected = full_forward_log_probs(actor, tokens[:length], 1.0)[LENGTHS[i] - 1 :]
        found = trajectories.log_probs_BT[i, LENGTHS[i] - 1 : length - 1].double()
        assert (found - expected).abs().mean() < 0.1
