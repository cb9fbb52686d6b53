"""Dialogues in format strings, and what is dropped where they are too long, against rows that are written by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_safe.data.batches import collate, encode_contexts, encode_dialogue, encode_prompt, encode_prompts
from megatron_safe.data.datasets import ComparisonDataset, DemonstrationDataset, PromptDataset
from megatron_safe.data.records import Comparison, Demonstration, Prompt
from megatron_safe.errors import UserError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
HISTORIES = st.lists(st.tuples(TEXTS, TEXTS), max_size=3).map(tuple)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
# Template, what begins a dialogue, and what stands around a user's text.
WRITTEN = {
    "safe-rlhf": ("BEGINNING OF CONVERSATION: ", "USER: ", " ASSISTANT:"),
    "alpaca": (ALPACA, "### Instruction:\n", "\n\n### Response:"),
    "plain": ("", "", ""),
    "ask {prompt} say": ("", "ask ", " say"),
    "be kind{turn} ask {prompt}{{": ("be kind", " ask ", "{"),
    "<s>be</s>{turn}\nask</s>{prompt}<s>say": ("<s>be</s>", "\nask</s>", "<s>say"),
}


def by_hand(tokenizer, template, history, prompt):
    """(tokens, turns) byte by byte, as the authors write them: see `format_prompt` in their datasets/utils.py."""

    def ids(text):
        special = {"<s>": tokenizer.bos_id, "</s>": tokenizer.eos_id}
        for name, token in special.items():
            if name in text:
                before, _, after = text.partition(name)
                return ids(before) + [token] + ids(after)
        return tokenizer.encode(text)

    once, before, after = WRITTEN[template]
    tokens, turns = [] if once.startswith("<s>") else [tokenizer.bos_id], []
    tokens += ids(once)
    for user, assistant in history:
        tokens += ids(before) + tokenizer.encode(user) + ids(after)
        begin = len(tokens)
        tokens += [*tokenizer.encode(assistant), tokenizer.eos_id]
        turns.append((begin, len(tokens)))
    return tokens + ids(before) + tokenizer.encode(prompt) + ids(after), turns


@pytest.mark.parametrize("template", WRITTEN)
@given(history=HISTORIES, prompt=TEXTS)
def test_a_dialogue_is_written_turn_by_turn(byte_tokenizer, template, history, prompt):
    context, = encode_contexts(byte_tokenizer, template, [Prompt(prompt, history=history)], [10**6])
    assert (context.tokens, context.turns) == by_hand(byte_tokenizer, template, history, prompt)
    assert context.dropped == 0
    assert encode_prompt(byte_tokenizer, template, prompt, history) == context.tokens
    assert encode_dialogue(byte_tokenizer, template, prompt, "so", history=history) == (
        [*context.tokens, *byte_tokenizer.encode("so"), byte_tokenizer.eos_id], len(context.tokens),
    )  # fmt: skip


@pytest.mark.parametrize("template", WRITTEN)
@given(history=HISTORIES.filter(bool), prompt=TEXTS)
def test_a_dialogue_begins_with_what_its_earlier_turns_were(byte_tokenizer, piece_tokenizer, template, history, prompt):
    # What a policy was given, and what it said to it, stands in front of the next turn to the token.
    for tokenizer in (byte_tokenizer, piece_tokenizer):
        (whole,) = encode_contexts(tokenizer, template, [Prompt(prompt, history=history)], [10**6])
        for turn, (user, assistant) in enumerate(history):
            tokens, prompt_length = encode_dialogue(tokenizer, template, user, assistant, history=history[:turn])
            assert whole.tokens[: len(tokens)] == tokens
            assert whole.turns[turn] == (prompt_length, len(tokens))


def test_texts_write_no_special_tokens_in_any_turn(byte_tokenizer):
    history = (("a </s> b", "c <s> </s> d"), ("<pad>", "e"))
    ids = encode_prompt(byte_tokenizer, "safe-rlhf", "</s>", history)
    assert [i for i in ids if i >= 256] == [256, 257, 257]  # BOS, and EOS after each answer
    for text in ("a </s> b", "c <s> </s> d", "<pad>"):
        assert text in byte_tokenizer.decode(ids)


def test_dialogues_together_are_dialogues_alone(any_tokenizer):
    prompts, histories = ["the fern", "rice", "a"], [(), (("b", "c"), ("d", "")), (("e </s>", "f"),)]
    together = encode_prompts(any_tokenizer, "alpaca", prompts, histories)
    alone = [encode_prompt(any_tokenizer, "alpaca", *pair) for pair in zip(prompts, histories, strict=True)]
    assert together == alone


# Truncation. `fitting` is the slow way: every history that is left when the oldest exchanges go, one after another.


def fitting(tokenizer, template, history, prompt, room):
    """How many exchanges go, and the tokens that are left; those of the prompt alone where nothing fits."""
    for dropped in range(len(history) + 1):
        tokens, _ = by_hand(tokenizer, template, history[dropped:], prompt)
        if len(tokens) <= room:
            break
    return dropped, tokens


DIALOGUES = st.lists(st.tuples(HISTORIES, TEXTS, TEXTS, TEXTS), min_size=1, max_size=6)
ROOM = st.integers(8, 90)
TRUNCATED = "be kind{turn} ask {prompt}{{"


def reported(line, kept, total, left_out, cut, lost):
    """What the report must say of these counts."""
    ends = f"; {left_out} left out (prompt too long), {cut} responses cut"
    ends += f", {lost} lost their oldest turns" if lost else ""
    return f"kept {kept} of {total} rows" in line and line.endswith(ends)


@given(dialogues=DIALOGUES, room=ROOM)
def test_prompts_lose_their_oldest_turns(byte_tokenizer, dialogues, room):
    records = [Prompt(prompt, history=history) for history, prompt, *_ in dialogues]
    found = [fitting(byte_tokenizer, TRUNCATED, record.history, record.prompt, room) for record in records]
    kept = [(record, *each) for record, each in zip(records, found, strict=True) if len(each[1]) <= room]
    if not kept:
        with pytest.raises(UserError, match="prompts: expected at least one row"):
            PromptDataset(records, byte_tokenizer, TRUNCATED, room)
        return
    data = PromptDataset(records, byte_tokenizer, TRUNCATED, room)
    tokens = data.batch(range(len(data))).tokens
    rows = [row[:length] for row, length in zip(tokens.tokens_BL.tolist(), tokens.lengths_B.tolist(), strict=True)]
    assert rows == [tokens for _, _, tokens in kept]
    assert data.shortened() == [Prompt(r.prompt, history=r.history[dropped:]) for r, dropped, _ in kept]
    assert [id(record) for record in data.records] == [id(record) for record, *_ in kept]  # which others look up
    lost = sum(dropped > 0 for _, dropped, _ in kept)
    assert reported(data.report(), len(kept), len(records), len(records) - len(kept), 0, lost)


@given(dialogues=DIALOGUES, room=ROOM, turns=st.sampled_from(["last", "all"]))
def test_demonstrations_lose_old_turns_before_a_response_is_cut(byte_tokenizer, dialogues, room, turns):
    expected, learnt, cut, lost = [], [], 0, 0
    for history, prompt, response, _ in dialogues:
        answer = [*byte_tokenizer.encode(response), byte_tokenizer.eos_id]
        dropped, tokens = fitting(byte_tokenizer, TRUNCATED, history, prompt, room - len(answer))
        if len(tokens) < room:
            whole = tokens + answer
            expected.append(whole[:room])
            spans = by_hand(byte_tokenizer, TRUNCATED, history[dropped:], prompt)[1] if turns == "all" else []
            spans.append((len(tokens), min(room, len(whole))))
            learnt.append({at for begin, end in spans for at in range(begin, end)})
            cut += len(whole) > room
            lost += dropped > 0
    records = [Demonstration(prompt, response, history) for history, prompt, response, _ in dialogues]
    if not expected:
        return
    data = DemonstrationDataset(records, byte_tokenizer, TRUNCATED, room, turns)
    batch = data.batch(range(len(data)))
    rows = [row[:length] for row, length in zip(batch.tokens_BL.tolist(), batch.lengths_B.tolist(), strict=True)]
    assert rows == expected and data.lengths(range(len(data))) == [len(row) for row in rows]
    predicted = [{t + 1 for t, learns in enumerate(row) if learns} for row in batch.learnt_mask_BT.tolist()]
    assert predicted == learnt
    assert (batch.earlier_turns_BT is None) == (turns == "last")
    assert reported(data.report(), len(expected), len(records), len(records) - len(expected), cut, lost)
    moved = batch.select([len(rows) - 1]).to("cpu")
    assert torch.equal(moved.learnt_mask_BT[0], batch.learnt_mask_BT[-1])


@given(dialogues=DIALOGUES, room=ROOM)
def test_both_answers_of_a_comparison_follow_the_same_turns(byte_tokenizer, dialogues, room):
    expected, lost = [], 0
    for history, prompt, *responses in dialogues:
        answers = [[*byte_tokenizer.encode(response), byte_tokenizer.eos_id] for response in responses]
        dropped, tokens = fitting(byte_tokenizer, TRUNCATED, history, prompt, room - max(map(len, answers)))
        if len(tokens) < room:
            expected.append([(tokens + answer)[:room] for answer in answers])
            lost += dropped > 0
    if not expected:
        return
    records = [Comparison(p, *r, 0, 1, None, True, history=history) for history, p, *r in dialogues]
    data = ComparisonDataset(records, byte_tokenizer, TRUNCATED, room, "reward")
    batch = data.batch(range(len(data)))
    for side, tokens in enumerate((batch.first, batch.second)):
        rows = [row[:length] for row, length in zip(tokens.tokens_BL.tolist(), tokens.lengths_B.tolist(), strict=True)]
        assert rows == [pair[side] for pair in expected]
    assert ("lost their oldest turns" in data.report()) == (lost > 0)


# Labels that nobody asked.


def test_comparisons_without_the_other_label(byte_tokenizer):
    helpful = Comparison("p", "zero", "one", 1, None, None, None)
    harmless = Comparison("p", "zero", "one", None, 0, True, None)
    batch = ComparisonDataset([helpful], byte_tokenizer, "plain", 32, "reward").batch([0])
    assert (batch.first_sign_B.tolist(), batch.second_sign_B.tolist()) == ([0.0], [0.0])
    assert byte_tokenizer.decode(batch.first.tokens_BL[0].tolist()) == "pone"
    batch = ComparisonDataset([harmless], byte_tokenizer, "plain", 32, "cost").batch([0])
    assert (batch.first_sign_B.tolist(), batch.second_sign_B.tolist()) == ([0.0], [1.0])  # unsafer, safer
    with pytest.raises(ValueError, match="expected better_response_id in every record, found 1 without it"):
        ComparisonDataset([helpful, harmless], byte_tokenizer, "plain", 32, "reward")
    with pytest.raises(ValueError, match="expected safer_response_id in every record, found 1 without it"):
        ComparisonDataset([helpful, harmless], byte_tokenizer, "plain", 32, "cost")


def test_a_turn_at_the_very_beginning_has_no_column_for_its_first_token():
    # Where neither BOS nor template nor the user's text has a token, nothing predicts it.
    batch = collate([([5, 6, 7, 8, 9], 4)], pad_id=0, turns=[[(0, 2)]])
    assert batch.learnt_mask_BT.tolist() == [[True, False, False, True]]
