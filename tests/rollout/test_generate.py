"""Generation with a key/value cache in one process: against full forwards, in any company, with every kind of ending.

Legend: B samples, L tokens, T = L - 1 predictions, V vocabulary.
"""

import dataclasses

import pytest
import torch

from megatron_safe.config import ModelConfig, ParallelConfig, RolloutConfig
from megatron_safe.data.batches import TokenBatch, collate
from megatron_safe.models.roles import Role
from megatron_safe.rollout.generate import generate
from megatron_safe.runtime import start

VOCABULARY = 21
NEVER = -1  # an end of sequence that no model draws
PAD = 3
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2,
    max_sequence_length=64, vocab_multiple=8, init_std=0.3,
)  # fmt: skip
LENGTHS = [1, 4, 9, 2, 7, 1]
ROLLOUT = RolloutConfig(max_new_tokens=8)
GREEDY = RolloutConfig(max_new_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def runtime():
    with start(ParallelConfig(), 0) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def make_actor(runtime):
    made = {}

    def make(model=MODEL, precision="fp32") -> Role:
        key = (str(model), precision)
        if key not in made:
            made[key] = Role("actor", model, runtime, VOCABULARY, precision, seed=2)
        return made[key]

    return make


def make_prompts(lengths=LENGTHS, seed=4) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    return collate([(torch.randint(VOCABULARY, (n,), generator=generator).tolist(), n) for n in lengths], PAD)


def run(actor, prompts, rollout=ROLLOUT, eos=NEVER, seed=0, ids=None):
    ids = torch.arange(len(prompts)) if ids is None else torch.tensor(ids)
    return generate(actor, prompts, ids, rollout, seed, eos, PAD)


def answers(trajectories) -> list[list[int]]:
    """The sampled tokens of each row, read off the batch by the lengths alone."""
    batch = trajectories.batch
    return [
        row[first:last]
        for row, first, last in zip(
            batch.tokens_BL.tolist(), batch.prompt_lengths_B.tolist(), batch.lengths_B.tolist(), strict=True
        )
    ]


def full_forward(actor, tokens_BS):
    """Logits [B, S, V] of forwards without a cache."""
    return actor.module.logits(actor.module(tokens_BS)).transpose(0, 1)


def full_forward_log_probs(actor, row, temperature):
    """log softmax(z / temperature) of each token of one row after the first, in float64, from a forward of the row."""
    with torch.no_grad():
        logits_TV = full_forward(actor, torch.tensor([row]))[0, :-1].double()
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
                tokens.append(int(full_forward(actor, torch.tensor([tokens]))[0, -1].argmax()))
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
    steps, decoder = [], type(actor.module.decoder)
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda self, *a, **k: steps.append(1) or forward(self, *a, **k))
    expected = []
    for eos in range(VOCABULARY):
        run(actor, prompts, cold, eos)
        expected.append(max(text.index(eos) + 1 if eos in text else ROLLOUT.max_new_tokens for text in endless))
        assert len(steps) == sum(expected)
    assert min(expected) < ROLLOUT.max_new_tokens and endless[0] != endless[1]


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
            log_probs = torch.log_softmax(full_forward(actor, tokens_BL[:, :-1]), -1).gather(2, tokens_BL[:, 1:, None])
        means.append(float(log_probs[..., 0][trajectories.mask_BT].mean()))
    assert means[0] > means[1] + 0.2 > means[2] + 0.4


def test_first_tokens_follow_the_models_distribution(make_actor):
    """Chi-square of 20,000 first tokens against softmax of a full forward."""
    actor, n = make_actor(), 20_000
    prompts = make_prompts([4]).select([0] * n)
    first_B = torch.tensor([text[0] for text in answers(run(actor, prompts, RolloutConfig(max_new_tokens=1)))])
    with torch.no_grad():
        p_V = torch.softmax(full_forward(actor, prompts.tokens_BL[:1])[0, -1, :VOCABULARY].double(), dim=0)
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
