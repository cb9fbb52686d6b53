"""Datasets: what is kept, left out and cut, and in which order the two sides of a comparison come."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_safe.data.batches import encode_dialogue, encode_prompt
from megatron_safe.data.datasets import ComparisonDataset, DemonstrationDataset, PromptDataset
from megatron_safe.data.records import Comparison, Demonstration, Prompt
from megatron_safe.data.sources import read_comparisons
from megatron_safe.errors import UserError

FIXTURE = Path(__file__).parent / "fixtures" / "comparisons.jsonl"
REAL_DATA = Path(os.environ.get("MEGATRON_SAFE_DATA", Path(__file__).parents[3] / "shared" / "data"))

# With the byte tokenizer and the plain template, a row has 1 (BOS) + len(prompt) + len(response) + 1 (EOS) tokens.


def rows_of(batch):
    """(tokens without padding, prompt length) of each row."""
    return [
        (tokens[:length], prompt_length)
        for tokens, length, prompt_length in zip(
            batch.tokens_BL.tolist(), batch.lengths_B.tolist(), batch.prompt_lengths_B.tolist(), strict=True
        )
    ]


@given(
    texts=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=8),
    max_length=st.integers(3, 16),
)
def test_demonstrations_are_kept_left_out_or_cut(byte_tokenizer, texts, max_length):
    records = [Demonstration("p" * prompt, "r" * response) for prompt, response in texts]
    expected, kept, cut = [], [], 0
    for record in records:
        tokens, prompt_length = encode_dialogue(byte_tokenizer, "plain", record.prompt, record.response)
        if prompt_length < max_length:
            expected.append((tokens[:max_length], prompt_length))
            kept.append(record)
            cut += len(tokens) > max_length
    if not kept:
        with pytest.raises(UserError, match=f"demonstrations: expected at least one .* found none in {len(records)}"):
            DemonstrationDataset(records, byte_tokenizer, "plain", max_length)
        return
    dataset = DemonstrationDataset(records, byte_tokenizer, "plain", max_length)
    assert rows_of(dataset.batch(range(len(dataset)))) == expected
    assert dataset.records == kept
    assert dataset.lengths(range(len(dataset))) == [len(tokens) for tokens, _ in expected]
    assert dataset.report() == (
        f"demonstrations: kept {len(kept)} of {len(records)} rows, up to {max_length} tokens for prompt and response; "
        f"{len(records) - len(kept)} left out (prompt too long), {cut} responses cut"
    )


def test_demonstrations_at_the_edges(byte_tokenizer):
    records = [Demonstration("abc", "de"), Demonstration("abc", "def"), Demonstration("abcde", "f")]
    dataset = DemonstrationDataset([*records, Demonstration("abcdef", "")], byte_tokenizer, "plain", max_length=7)
    fits, cut, one_left = rows_of(dataset.batch([0, 1, 2]))
    assert fits[0][-1] == byte_tokenizer.eos_id
    assert byte_tokenizer.decode(cut[0]) == "abcdef" and byte_tokenizer.eos_id not in cut[0]
    assert one_left == ([256, *byte_tokenizer.encode("abcdef")], 6)
    assert len(dataset) == 3
    assert dataset.report().endswith("1 left out (prompt too long), 2 responses cut")


def test_batch_takes_rows_in_the_order_asked_and_widths(byte_tokenizer):
    dataset = DemonstrationDataset([Demonstration(c, c) for c in "xyz"], byte_tokenizer, "plain", 8)
    batch = dataset.batch([2, 0, 2])
    assert [byte_tokenizer.decode(tokens) for tokens, _ in rows_of(batch)] == ["zz", "xx", "zz"]
    assert batch.tokens_BL.shape == (3, 4)
    assert dataset.batch([1], multiple=3).tokens_BL.shape == (1, 6)
    padded = dataset.batch([1], length=8).tokens_BL
    assert padded[0, 4:].tolist() == [byte_tokenizer.pad_id] * 4


@pytest.fixture
def comparisons():
    return read_comparisons([FIXTURE])


def texts_of(tokenizer, batch):
    return [tokenizer.decode(tokens[prompt_length:]) for tokens, prompt_length in rows_of(batch)]


def test_reward_order_is_better_then_worse(byte_tokenizer, comparisons):
    batch = ComparisonDataset(comparisons, byte_tokenizer, "safe-rlhf", 256, "reward").batch([0, 1, 2, 3])
    assert texts_of(byte_tokenizer, batch.first) == [
        comparisons[0].response_0, comparisons[1].response_0, comparisons[2].response_0, comparisons[3].response_1,
    ]
    assert texts_of(byte_tokenizer, batch.second) == [
        comparisons[0].response_1, comparisons[1].response_1, comparisons[2].response_1, comparisons[3].response_0,
    ]
    assert batch.first_sign_B.tolist() == [1, -1, 1, -1]
    assert batch.second_sign_B.tolist() == [1, 1, -1, -1]


def test_cost_order_is_unsafer_then_safer(byte_tokenizer, comparisons):
    batch = ComparisonDataset(comparisons, byte_tokenizer, "safe-rlhf", 256, "cost").batch([0, 1, 2, 3])
    assert texts_of(byte_tokenizer, batch.first) == [
        comparisons[0].response_1, comparisons[1].response_0, comparisons[2].response_1, comparisons[3].response_1,
    ]
    assert texts_of(byte_tokenizer, batch.second) == [
        comparisons[0].response_0, comparisons[1].response_1, comparisons[2].response_0, comparisons[3].response_0,
    ]
    assert batch.first_sign_B.tolist() == [1, -1, -1, -1]
    assert batch.second_sign_B.tolist() == [1, 1, 1, -1]


@given(better=st.integers(0, 1), safer=st.integers(0, 1), safe=st.tuples(st.booleans(), st.booleans()))
def test_each_order_depends_on_its_own_label_alone(byte_tokenizer, better, safer, safe):
    record = Comparison("p", "zero", "one", better, safer, *safe)
    sign = [1.0 if is_safe else -1.0 for is_safe in safe]
    for which, first in (("reward", better), ("cost", 1 - safer)):
        batch = ComparisonDataset([record], byte_tokenizer, "plain", 32, which).batch([0])
        assert texts_of(byte_tokenizer, batch.first) == [("zero", "one")[first]]
        assert texts_of(byte_tokenizer, batch.second) == [("zero", "one")[1 - first]]
        assert (batch.first_sign_B.item(), batch.second_sign_B.item()) == (sign[first], sign[1 - first])
        assert batch.first_sign_B.dtype == batch.second_sign_B.dtype == torch.float32


def test_both_sides_share_a_width_and_a_prompt(byte_tokenizer, comparisons):
    dataset = ComparisonDataset(comparisons, byte_tokenizer, "safe-rlhf", 256, "reward")
    batch = dataset.batch([1, 3], multiple=8)
    assert batch.first.tokens_BL.shape == batch.second.tokens_BL.shape
    assert batch.first.tokens_BL.shape[1] % 8 == 0
    assert dataset.lengths([1, 3]) == (batch.first.lengths_B + batch.second.lengths_B).tolist()
    assert torch.equal(batch.first.prompt_lengths_B, batch.second.prompt_lengths_B)
    for row, index in enumerate((1, 3)):
        prompt = encode_prompt(byte_tokenizer, "safe-rlhf", comparisons[index].prompt)
        for side in (batch.first, batch.second):
            assert side.tokens_BL[row, : len(prompt)].tolist() == prompt
    picked = batch.select([1]).to("cpu")
    assert len(picked) == 1 and torch.equal(picked.second.tokens_BL[0], batch.second.tokens_BL[1])
    assert torch.equal(picked.first_sign_B, batch.first_sign_B[1:])


def test_comparisons_are_left_out_and_cut(byte_tokenizer):
    records = [
        Comparison("ab", "cd", "cdefgh", 0, 1, True, False),  # one response is cut
        Comparison("abcdefgh", "c", "d", 0, 1, True, False),  # no room for a response
        Comparison("ab", "cdefg", "cdefgh", 1, 1, True, False),  # both are cut
    ]
    dataset = ComparisonDataset(records, byte_tokenizer, "plain", 6, "cost")
    assert dataset.records == [records[0], records[2]]
    assert dataset.report() == (
        "comparisons: kept 2 of 3 rows, up to 6 tokens for prompt and response; "
        "1 left out (prompt too long), 3 responses cut"
    )
    assert texts_of(byte_tokenizer, dataset.batch([0]).second) == ["cde"]


def test_a_kind_of_comparison_that_does_not_exist_is_refused(byte_tokenizer, comparisons):
    with pytest.raises(ValueError, match="expected 'reward' or 'cost', found 'harm'"):
        ComparisonDataset(comparisons, byte_tokenizer, "plain", 64, "harm")


def test_prompts(byte_tokenizer):
    records = [Prompt("ab"), Prompt("abcdef", True, "x"), Prompt("abcd", True, "y")]
    dataset = PromptDataset(records, byte_tokenizer, "plain", max_prompt_length=5)
    assert dataset.records == [records[0], records[2]] and len(dataset) == 2
    assert dataset.report() == (
        "prompts: kept 2 of 3 rows, up to 5 tokens for a prompt; 1 left out (prompt too long), 0 responses cut"
    )
    batch = dataset.batch([1, 0])
    encode = byte_tokenizer.encode
    assert rows_of(batch.tokens) == [([256, *encode("abcd")], 5), ([256, *encode("ab")], 3)]
    assert torch.equal(batch.tokens.prompt_lengths_B, batch.tokens.lengths_B)
    assert not batch.tokens.response_mask_BT.any()
    assert batch.red_team_B.dtype == torch.bool and batch.red_team_B.tolist() == [True, False]
    picked = batch.select([1]).to("cpu")
    assert len(picked) == 1 and picked.red_team_B.tolist() == [False]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda t: DemonstrationDataset([], t, "plain", 9), "demonstrations: .* within 9 tokens, found none in 0"),
        (
            lambda t: ComparisonDataset([Comparison("abc", "d", "e", 0, 0, True, True)], t, "plain", 4, "cost"),
            "comparisons: expected at least one row with room for prompt and response within 4 tokens, found none in 1",
        ),
        (lambda t: PromptDataset([Prompt("abc")], t, "safe-rlhf", 9), "prompts: .* a prompt within 9 tokens, found no"),
        (lambda t: PromptDataset([Prompt("abc")], t, "no field", 9), "template 'no field': expected {prompt} once"),
    ],
)
def test_datasets_with_nothing_to_give_are_refused(make, message, byte_tokenizer):
    with pytest.raises(UserError, match=message):
        make(byte_tokenizer)


def test_more_records_than_are_tokenised_at_a_time(byte_tokenizer):
    dataset = PromptDataset([Prompt(str(i)) for i in range(9000)], byte_tokenizer, "plain", 8)
    assert byte_tokenizer.decode(dataset.batch([8999]).tokens.tokens_BL[0].tolist()) == "8999"
    assert byte_tokenizer.decode(dataset.batch([4096]).tokens.tokens_BL[0].tolist()) == "4096"


def test_real_pairs_survive_the_way_from_file_to_batch(any_tokenizer, tmp_path):
    source = REAL_DATA / "pku-saferlhf-pairs-2000.json"
    if not source.exists():
        pytest.skip(f"no real data at {source}; set MEGATRON_SAFE_DATA to its folder")
    pairs = json.loads(source.read_text(encoding="utf-8"))
    file = tmp_path / "pairs.jsonl"
    with file.open("w", encoding="utf-8") as writer:
        for i, pair in enumerate(pairs):
            safe = i % 2  # the file does not say which response is more helpful: 0 stands in
            responses = {f"response_{safe}": pair["safe_response"], f"response_{1 - safe}": pair["unsafe_response"]}
            labels = {"better_response_id": 0, "safer_response_id": safe}
            flags = {"is_response_0_safe": safe == 0, "is_response_1_safe": safe == 1}
            writer.write(json.dumps({"prompt": pair["prompt"], **responses, **labels, **flags}) + "\n")
    dataset = ComparisonDataset(read_comparisons([file]), any_tokenizer, "safe-rlhf", 4096, "cost")
    assert dataset.report().startswith("comparisons: kept 2000 of 2000 rows")
    batch = dataset.batch(range(0, 2000, 97))
    assert (batch.first_sign_B == -1).all() and (batch.second_sign_B == 1).all()
    # By bytes a text comes back as it was; SentencePiece folds spaces and letter forms, so a second pass must agree.
    for text, index in zip(texts_of(any_tokenizer, batch.second), range(0, 2000, 97), strict=True):
        same = text == pairs[index]["safe_response"] if any_tokenizer.vocab_size == 259 else True
        assert same and any_tokenizer.decode(any_tokenizer.encode(text)) == text, f"row {index} came back changed"
