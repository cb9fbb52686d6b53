"""Templates, rows and padded batches, against plain Python counting."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from megatron_safe.data.batches import collate, encode_dialogue, encode_prompt, encode_prompts
from megatron_safe.data.templates import TEMPLATES, parse_template
from megatron_safe.data.tokenizer import load_tokenizer
from megatron_safe.errors import UserError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@st.composite
def token_rows(draw):
    """(tokens, prompt length) rows with at least one token of prompt, and of response or not."""
    rows = draw(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=12), min_size=1, max_size=5))
    return [(tokens, draw(st.integers(1, len(tokens)))) for tokens in rows]


@given(rows=token_rows(), pad_id=st.integers(0, 99), multiple=st.integers(1, 5))
def test_collate_pads_on_the_right(rows, pad_id, multiple):
    batch = collate(rows, pad_id, multiple=multiple)
    width = batch.tokens_BL.shape[1]
    longest = max(len(tokens) for tokens, _ in rows)
    assert width % multiple == 0 and longest <= width < longest + multiple
    assert batch.tokens_BL.tolist() == [tokens + [pad_id] * (width - len(tokens)) for tokens, _ in rows]
    assert batch.prompt_lengths_B.tolist() == [prompt_length for _, prompt_length in rows]
    assert batch.lengths_B.tolist() == [len(tokens) for tokens, _ in rows]
    assert {t.dtype for t in (batch.tokens_BL, batch.prompt_lengths_B, batch.lengths_B)} == {torch.int64}
    assert len(batch) == len(rows)


@given(rows=token_rows(), extra=st.integers(0, 4))
def test_response_mask_marks_the_columns_that_predict_response_tokens(rows, extra):
    length = max(len(tokens) for tokens, _ in rows) + extra
    mask = collate(rows, pad_id=0, length=length).response_mask_BT
    assert mask.dtype == torch.bool and mask.shape == (len(rows), length - 1)
    for row, (tokens, prompt_length) in zip(mask.tolist(), rows, strict=True):
        assert sum(row) == len(tokens) - prompt_length
        assert [t + 1 for t, is_response in enumerate(row) if is_response] == list(range(prompt_length, len(tokens)))


def test_mask_goes_by_length_where_pad_and_eos_are_one_token():
    eos = 2
    batch = collate([([5, 6, 7, eos], 2), ([5, eos], 1)], pad_id=eos)
    assert batch.response_mask_BT.tolist() == [[False, True, True], [True, False, False]]


def test_select_keeps_the_width():
    batch = collate([([1, 2, 3], 1), ([4], 1), ([5, 6], 2)], pad_id=0)
    for rows in ([2, 1], torch.tensor([2, 1])):
        picked = batch.select(rows)
        assert picked.tokens_BL.tolist() == [[5, 6, 0], [4, 0, 0]]
        assert (picked.prompt_lengths_B.tolist(), picked.lengths_B.tolist()) == ([2, 1], [2, 1])
    assert batch.select(slice(1, 2)).tokens_BL.tolist() == [[4, 0, 0]]


def test_to_moves_every_tensor():
    moved = collate([([1, 2], 1)], pad_id=0).to("meta")
    assert {t.device.type for t in (moved.tokens_BL, moved.prompt_lengths_B, moved.lengths_B)} == {"meta"}


def test_collate_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="a row of 3 tokens does not fit a length of 2"):
        collate([([1, 2, 3], 1)], pad_id=0, length=2)
    with pytest.raises(ValueError, match="at least one row"):
        collate([], pad_id=0)


def test_named_templates():
    assert parse_template("safe-rlhf") == ("BEGINNING OF CONVERSATION: ", "USER: ", " ASSISTANT:")
    assert parse_template("plain") == ("", "", "")
    once, before, after = parse_template("alpaca")
    assert once.startswith("Below is an instruction") and once.endswith("request.\n\n")
    assert before == "### Instruction:\n"
    assert after == "\n\n### Response:"


@given(before=TEXTS, after=TEXTS)
def test_own_templates_are_format_strings(before, after):
    escaped = (text.replace("{", "{{").replace("}", "}}") for text in (before, after))
    assert parse_template("{prompt}".join(escaped)) == ("", before, after)


@pytest.mark.parametrize(
    "template, found",
    [
        ("", "found no field"),
        ("safe_rlhf", "found no field"),
        ("USER: {input}", "found {input}"),
        ("{prompt} {prompt}", "found {prompt}, {prompt}"),
        ("{prompt.__class__}", "found {prompt.__class__}"),
        ("{{prompt}}", "found no field"),
        ("{}", "found {}"),
        ("{prompt", "found: expected '}'"),
        ("{prompt}}", "found: Single '}'"),
        ("{prompt} {turn}", "expected {prompt} once and {turn} at most once, before it; found {prompt}, {turn}"),
        ("{turn}{turn}{prompt}", "found {turn}, {turn}, {prompt}"),
        ("{turn}", "found {turn}"),
        ("{turn!r}{prompt}", "found {turn}, {prompt}"),
    ],
)
def test_bad_templates_are_refused(template, found, byte_tokenizer):
    with pytest.raises(UserError) as caught:
        encode_prompt(byte_tokenizer, template, "a")
    assert found in str(caught.value) and "expected {prompt}" in str(caught.value)


def test_a_bad_template_is_told_the_known_names():
    with pytest.raises(UserError, match="or one of safe-rlhf, alpaca, plain; found"):
        parse_template("llama")


@given(prompt=TEXTS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_encode_prompt_is_bos_and_the_filled_template(byte_tokenizer, template, prompt):
    ids = encode_prompt(byte_tokenizer, template, prompt)
    assert ids[0] == byte_tokenizer.bos_id
    assert byte_tokenizer.decode(ids) == TEMPLATES[template].format(turn="", prompt=prompt)


def test_no_bos_where_the_tokenizer_has_none(byte_folder, tmp_path):
    folder = shutil.copytree(byte_folder, tmp_path / "no_bos")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": None}))
    tokenizer = load_tokenizer(folder)
    assert encode_prompt(tokenizer, "plain", "fern") == tokenizer.encode("fern")


@given(prompt=TEXTS, response=TEXTS)
def test_dialogue_begins_with_its_prompt_and_ends_with_eos(byte_tokenizer, piece_tokenizer, prompt, response):
    for tokenizer in (byte_tokenizer, piece_tokenizer):
        tokens, prompt_length = encode_dialogue(tokenizer, "safe-rlhf", prompt, response)
        assert tokens[:prompt_length] == encode_prompt(tokenizer, "safe-rlhf", prompt)
        assert tokens[prompt_length:] == [*tokenizer.encode(response), tokenizer.eos_id]
        unended = encode_dialogue(tokenizer, "safe-rlhf", prompt, response, add_eos=False)
        assert unended == (tokens[:-1], prompt_length)


def test_dialogue_gives_the_response_back(any_tokenizer):
    tokens, prompt_length = encode_dialogue(any_tokenizer, "safe-rlhf", "is the lamp warm", "the lamp is warm")
    assert any_tokenizer.decode(tokens[prompt_length:]) == "the lamp is warm"


def test_prompts_together_are_prompts_alone(any_tokenizer):
    prompts = ["the fern", "rice 🍚", "a </s> b"]
    together = encode_prompts(any_tokenizer, "alpaca", prompts)
    assert together == [encode_prompt(any_tokenizer, "alpaca", prompt) for prompt in prompts]


def test_special_tokens_work_in_templates_and_not_in_prompts(byte_tokenizer):
    t = byte_tokenizer
    ids = encode_prompt(t, "<s>system</s>user: {prompt}</s>answer:", "say </s> now")
    assert ids == [
        t.bos_id, *t.encode("system"), t.eos_id, *t.encode("user: say </s> now"), t.eos_id, *t.encode("answer:"),
    ]  # one BOS, as the template begins with it


def test_text_around_the_prompt_is_encoded_with_it(piece_tokenizer):
    # SentencePiece marks the space before a word: encoding the pieces apart would give other tokens.
    ids = encode_prompt(piece_tokenizer, "the {prompt} is green", "fern")
    assert ids == [piece_tokenizer.bos_id, *piece_tokenizer.encode("the fern is green")]


def test_a_prompt_of_no_tokens_is_refused(byte_folder, tmp_path):
    folder = shutil.copytree(byte_folder, tmp_path / "dropping")
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": None}))
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode(" ").ids == []
    with pytest.raises(UserError, match="prompt: expected at least one token"):
        encode_prompts(load_tokenizer(folder), "plain", ["a", " "])
