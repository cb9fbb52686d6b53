"""Accuracies and intervals of the real-text example, and the split by prompt, on made-up pairs."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from megatron_safe.data.sources import read_comparisons
from megatron_safe.data.tokenizer import load_tokenizer
from megatron_safe.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "real-text"))

import verdict  # noqa: E402
from pairs import (  # noqa: E402
    Pair,
    comparison,
    read_pairs,
    repeated_responses,
    split,
    thinned,
    write_jsonl,
    write_tokenizer,
)


@pytest.fixture
def pairs() -> list[Pair]:
    draw = random.Random(3)

    def text(least: int) -> str:
        return " ".join(f"word{draw.randint(0, 40)}" for _ in range(draw.randint(least, 9)))

    prompts = [f"How {i}?" for i in range(60)]
    variants = [lambda p: p, str.upper, lambda p: f"  {p}! "]
    return [Pair(draw.choice(variants)(draw.choice(prompts)), text(0), text(1)) for _ in range(300)]


def test_split_keeps_prompts_apart_whatever_the_order(pairs):
    train, held_out = split(pairs, 0.1)
    assert sorted(map(str, train + held_out)) == sorted(map(str, pairs))
    assert not {pair.group for pair in train} & {pair.group for pair in held_out}
    largest = max(sum(pair.group == group for pair in pairs) for group in {pair.group for pair in pairs})
    assert 30 <= len(held_out) < 30 + largest
    again, held_out_again = split(random.Random(1).sample(pairs, len(pairs)), 0.1)
    assert {pair.group for pair in held_out_again} == {pair.group for pair in held_out}
    assert {pair.group for pair in split(pairs, 0.1, seed=1)[1]} != {pair.group for pair in held_out}
    assert len(again) == len(train)


def test_split_needs_two_prompts():
    with pytest.raises(UserError, match="at least two different prompts, found 1"):
        split([Pair("Why?", "a", "b"), Pair(" why ", "c", "d")], 0.1)


def test_repeated_responses_are_counted():
    train = [Pair("a", "no", "yes"), Pair("b", "never", "no")]
    assert repeated_responses(train, [Pair("c", "no", "No"), Pair("d", "yes", "never")]) == 3


def test_comparisons_say_which_answer_is_safe(pairs, tmp_path):
    records = read_comparisons([write_jsonl(tmp_path / "pairs.jsonl", map(comparison, pairs))])
    places = []
    for record, pair in zip(records, pairs, strict=True):
        safe = record.safer_response_id
        assert (record.responses[safe], record.responses[1 - safe]) == (pair.safe_response, pair.unsafe_response)
        assert record.is_safe[safe] and not record.is_safe[1 - safe]
        places.append(safe)
    assert 100 < sum(places) < 200  # 150 in the mean, 8.7 the standard deviation


def test_thinned_pairs_leave_words_out_and_make_none(pairs):
    before = [text.split() for pair in pairs for text in (pair.safe_response, pair.unsafe_response)]
    others = thinned(pairs, 0.4, random.Random(0))
    after = [text.split() for pair in others for text in (pair.safe_response, pair.unsafe_response)]
    for words, kept in zip(before, after, strict=True):
        rest = iter(words)
        assert all(word in rest for word in kept)  # a subsequence
    share = sum(map(len, after)) / sum(map(len, before))
    assert abs(share - 0.6) < 0.04  # about 3,000 words: 0.009 is the standard deviation
    assert all(pair.prompt.strip() for pair in others)
    assert thinned(pairs, 0.0, random.Random(0)) == [
        Pair(pair.prompt.strip(), pair.safe_response, pair.unsafe_response) for pair in pairs
    ]


def test_tokenizer_is_one_the_stages_read(pairs, tmp_path):
    write_tokenizer(tmp_path, pairs, 300)
    tokenizer = load_tokenizer(tmp_path, "{prompt}<sep>")
    assert tokenizer.vocab_size <= 300
    assert tokenizer.decode(tokenizer.encode("How word3 ÅÉ?")).strip() == "how word3 åé?"
    assert tokenizer.eos_id not in tokenizer.encode("</s><sep>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a JSON array of pairs, found JSONDecodeError"),
        ("[]", "expected a JSON array of pairs, found list without rows"),
        ('[{"prompt": "p", "safe_response": "a", "unsafe_response": 3}]', "row 0, field 'unsafe_response'.*found int"),
        ('[{"prompt": " ", "safe_response": "a", "unsafe_response": "b"}]', "row 0, field 'prompt'"),
        ('["secret"]', "row 0, field 'prompt': expected a text, found NoneType"),
    ],
)
def test_what_is_no_pair_is_refused_by_row(content, message, tmp_path):
    file = tmp_path / "pairs.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message) as refused:
        read_pairs(file)
    assert "secret" not in str(refused.value)


def test_correct_counts_signs_and_order():
    costs_P2 = np.array([[-1.0, 2.0], [1.0, 2.0], [-2.0, -1.0], [1.0, -1.0], [0.0, 0.0], [np.nan, 1.0]])
    found = verdict.correct(costs_P2)
    assert found["sign"].tolist() == [1.0, 0.5, 0.5, 0.0, 0.0, 0.5]
    assert found["ranking"].tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_interval_of_single_pairs_is_scipys_bootstrap():
    values_P = np.random.default_rng(5).random(80)
    wanted = stats.bootstrap((values_P,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert np.allclose(verdict.interval(values_P, [str(i) for i in range(80)]), wanted, atol=0.004)


def test_interval_is_wider_where_answers_of_a_prompt_agree():
    draw = np.random.default_rng(6)
    groups = [str(i // 8) for i in range(160)]
    values_P = np.repeat(draw.integers(2, size=20), 8).astype(float)
    low, high = verdict.interval(values_P, groups)
    alone_low, alone_high = verdict.interval(values_P, [str(i) for i in range(160)])
    assert high - low > 2 * (alone_high - alone_low)  # sqrt(8) times


def test_compare_takes_the_mean_of_seeds_and_draws_it(tmp_path):
    draw = np.random.default_rng(7)
    groups = [str(i // 3) for i in range(60)]
    ours, baseline_P2 = [draw.normal(size=(60, 2)) for _ in range(3)], draw.normal(size=(60, 2))
    summary = verdict.compare(ours, baseline_P2, groups)
    for metric in verdict.METRICS:
        found = summary[metric]
        assert found["ours"]["mean"] == pytest.approx(sum(found["seeds"]) / 3)
        assert found["difference"]["mean"] == pytest.approx(found["ours"]["mean"] - found["baseline"]["mean"])
        for name in ("ours", "baseline", "difference"):
            low, high = found[name]["interval"]
            assert low < found[name]["mean"] < high
    json.dumps(summary)
    verdict.draw(tmp_path / "accuracy.png", summary)
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
