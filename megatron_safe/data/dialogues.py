"""Dialogues as data sets write them down, as history, the user's last turn and the assistant's reply to it."""

import re
from collections.abc import Sequence

from megatron_safe.data.records import History
from megatron_safe.data.rows import Row, describe

Turn = tuple[str, str]
"""(role, text), the role "user" or "assistant"."""

_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_HUMAN_ASSISTANT = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def turns_of_messages(row: Row) -> list[Turn]:
    """Field `messages`: a list of {"role": "user" or "assistant", "content": text}, oldest first."""
    expected = 'a list of {"role": "user" or "assistant", "content": text}'
    messages = row.get("messages", expected)
    if not isinstance(messages, list):
        raise row.wrong("messages", expected, describe(messages))
    turns = []
    for at, message in enumerate(messages):
        if not isinstance(message, dict):
            raise row.wrong(f"messages[{at}]", "an object with role and content", describe(message))
        role = message.get("role")
        if role not in ("user", "assistant"):
            found = "system" if role == "system" else describe(role)
            raise row.wrong(f"messages[{at}].role", "user or assistant", found)
        name = f"messages[{at}].content"
        turns.append((role, row.check_text(name, message.get("content"), may_be_empty=role == "assistant")))
    return turns


def turns_of_transcript(row: Row, name: str) -> list[Turn]:
    """Text in which each turn begins with "\\n\\nHuman:" or "\\n\\nAssistant:", as hh-rlhf's. Turns of one speaker that
    follow each other, which its files do have, are one turn."""
    expected = "turns that begin with 'Human:' and 'Assistant:', a human's first"
    before, *parts = _HUMAN_ASSISTANT.split(row.text(name))
    speakers, texts = parts[::2], [text.strip() for text in parts[1::2]]
    if before or not speakers or speakers[0] != "Human":
        first = f"{speakers[0]}'s first" if speakers and not before else f"{len(before)} characters before any"
        raise row.wrong(name, expected, first)
    turns: list[Turn] = []
    for speaker, text in zip(speakers, texts, strict=True):
        role = _SPEAKERS[speaker]
        if turns and turns[-1][0] == role:
            text = f"{turns.pop()[1]}\n\n{text}"
        turns.append((role, row.check_text(name, text, may_be_empty=role == "assistant")))
    return turns


def asked(row: Row, name: str, turns: Sequence[Turn]) -> tuple[History, str]:
    """History and prompt of turns that end with the user's. Raises BadRow for other turns."""
    expected = "turns by user and assistant in turn, from a user's to a user's"
    roles = [role for role, _ in turns]
    if len(turns) % 2 == 0 or roles != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise row.wrong(name, expected, f"{len(turns)} turns" + (f", the last by {roles[-1]}" if roles else ""))
    texts = [text for _, text in turns]
    return tuple(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1]


def answered(row: Row, name: str, turns: Sequence[Turn]) -> tuple[History, str, str]:
    """History, prompt and response of turns that end with the assistant's. Raises BadRow for other turns."""
    if not turns or turns[-1][0] != "assistant":
        last = f", the last by {turns[-1][0]}" if turns else ""
        raise row.wrong(name, "turns that end with the assistant's", f"{len(turns)} turns{last}")
    return *asked(row, name, turns[:-1]), turns[-1][1]
