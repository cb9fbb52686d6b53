"""Prompt templates: what is written around a prompt, as a format string or by a checkpoint's own chat template.

A format string writes a dialogue turn by turn: what stands before ``{turn}`` once, then for each exchange the rest with
the user's text in it, the assistant's text, and EOS; last the rest with the prompt in it. One without ``{turn}`` is
repeated as a whole.
"""

import datetime
import functools
import itertools
import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox

from megatron_safe.data.records import History
from megatron_safe.errors import UserError

TEMPLATES = {
    # PKU-Alignment/safe-rlhf, safe_rlhf/configs/constants.py: PROMPT_BEGIN + PROMPT_USER + PROMPT_ASSISTANT.
    "safe-rlhf": "BEGINNING OF CONVERSATION: {turn}USER: {prompt} ASSISTANT:",
    # tatsu-lab/stanford_alpaca, train.py: PROMPT_DICT["prompt_no_input"].
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "{turn}### Instruction:\n{prompt}\n\n### Response:"
    ),
    "plain": "{prompt}",
}
CHAT = "chat"  # the name of the checkpoint's own template


class Template(NamedTuple):
    """once: what begins a dialogue. before, after: what stands around the user's text in each of its turns."""

    once: str
    before: str
    after: str


def parse_template(template: str) -> Template:
    """The pieces of a template, given by name (`TEMPLATES`) or as a format string.

    UserError unless the template holds ``{prompt}`` once, at most once ``{turn}`` before it, and no other field.
    """
    try:
        parts = list(string.Formatter().parse(TEMPLATES.get(template, template)))
    except ValueError as error:
        raise UserError(f"template {template[:40]!r}: expected {{prompt}} in a format string, found: {error}") from None
    # A part is a literal ({{ and }} are already undone) and the field that follows it, or None.
    fields = [part[1:] for part in parts if part[1] is not None]
    turn, prompt = ("turn", "", None), ("prompt", "", None)
    if fields not in ([prompt], [turn, prompt]):
        found = ", ".join("{" + field[0] + "}" for field in fields) or "no field"
        others = f", or {CHAT}, or one of {', '.join(TEMPLATES)}"
        if turn in fields:
            others = " and {turn} at most once, before it"
        raise UserError(f"template {template[:40]!r}: expected {{prompt}} once{others}; found {found}")
    pieces = [""]
    for literal, field, *_ in parts:
        pieces[-1] += literal
        if field is not None:
            pieces.append("")
    return Template(*pieces) if len(pieces) == 3 else Template("", *pieces)


class ChatTemplate:
    """A checkpoint's chat template (Jinja), rendered as `transformers`' ``apply_chat_template`` does.

    Where each text of a dialogue begins and ends is known by position, so nothing in a turn can be taken for a part of
    the template. A template that writes today's date writes the date on which it was read.

    Raises UserError for a template that is broken, or does not write the user's text exactly once.
    """

    def __init__(self, source: str, names: Mapping[str, str], where: Path):
        """names: the special tokens by their roles (``bos_token``, ...); where: the file, for messages."""
        self._where = where
        self._names = dict(names)
        self._pieces: dict[int, list[str]] = {}  # by the number of texts
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise self._error(error) from None
        self._find_pieces(1)
        user, assistant = _stand_ins(2)
        self._user_turn = self._render([user], add_generation_prompt=False)
        dialogue = self._render([user, assistant], add_generation_prompt=False)
        if assistant not in dialogue:
            raise self._error("a template that drops the assistant's text")
        self._after_answer = dialogue.rpartition(assistant)[2]

    def fill(self, prompt: str, history: History = ()) -> tuple[list[str], list[str]]:
        """A dialogue with the prompt for the assistant's turn after it: what the template writes between the texts, and
        the texts as it writes them (many strip them). Piece, text, piece, ..., text, piece are the rendering.

        UserError where what it writes between the texts depends on them, or it cannot write so many turns.
        """
        texts = [text for exchange in history for text in exchange] + [prompt]
        pieces, stand_ins = self._find_pieces(len(texts)), _stand_ins(len(texts))
        written = []
        for at, text in enumerate(texts):
            # One text at a time among stand-ins: what is not the known rest is what the template makes of it.
            before = "".join(map("".join, zip(pieces[:at], stand_ins, strict=False))) + pieces[at]
            after = pieces[at + 1] + "".join(map("".join, zip(stand_ins[at + 1 :], pieces[at + 2 :], strict=True)))
            rendering = self._render([*stand_ins[:at], text, *stand_ins[at + 1 :]])
            end = len(rendering) - len(after)
            if end < len(before) or not (rendering.startswith(before) and rendering.endswith(after)):
                raise self._error(f"other text around a turn of {len(text)} characters")
            written.append(rendering[len(before) : end])
        whole = pieces[0] + "".join(map("".join, zip(written, pieces[1:], strict=True)))
        if len(texts) > 1 and self._render(texts) != whole:
            raise self._error(f"other text between the {len(texts)} turns of a dialogue")
        return pieces, written

    def turn_names(self, names: Iterable[str]) -> set[str]:
        """Which of the tokens named make up the turns: those around a user's text, and the one after an answer.

        A prompt must not be able to write these. Not among them is what only begins an answer (``<think>``).
        """
        names = [name for name in names if name.strip()]
        return {*any_of(names).findall(self._user_turn), self.ending(names)} - {None}

    def ending(self, names: Iterable[str]) -> str | None:
        """Which of the tokens named ends the assistant's turn; None where it ends with something else."""
        found = any_of(names).match(self._after_answer.lstrip())
        return found and found.group()

    def _find_pieces(self, count: int) -> list[str]:
        """What is written around and between `count` texts, whatever they are."""
        if count not in self._pieces:
            rendering, stand_ins = self._render(_stand_ins(count)), _stand_ins(count)
            if count == 1 and (times := rendering.count(*stand_ins)) != 1:
                raise self._error(f"a template that writes the user's text {times} times")
            pieces = any_of(stand_ins).split(rendering)
            if pieces[1::2] != stand_ins:
                raise self._error(f"a template that does not write {count} turns once each, in their order")
            self._pieces[count] = pieces[::2]
        return self._pieces[count]

    def _render(self, texts: Sequence[str], add_generation_prompt: bool = True) -> str:
        """texts: the user's and the assistant's in turn."""
        roles = itertools.cycle(("user", "assistant"))
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._names,
            )
        except Exception as error:  # a template is a program: it can fail in any way
            raise self._error(error) from None

    def _error(self, found: object) -> UserError:
        line = " ".join(str(found).split())
        return UserError(f"{self._where}: expected a chat template for prompts and answers, found: {line}")


def read_chat_template(folder: Path, config: Mapping, names: Mapping[str, str | None]) -> ChatTemplate:
    """A folder's chat template: chat_template.jinja, else that of `config` (the content of tokenizer_config.json: one
    template, or the one called "default"), else chat_template.json.

    names: the special tokens by their roles (``bos_token``, ...), as far as `config` does not tell.
    UserError where there is no template, or a broken one.
    """
    file = folder / "chat_template.jinja"
    source: object = None
    try:
        if file.exists():
            source = file.read_text(encoding="utf-8")
        elif config.get("chat_template") is not None:
            file, source = folder / "tokenizer_config.json", config["chat_template"]
        elif (folder / "chat_template.json").exists():
            file = folder / "chat_template.json"
            source = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}
        if isinstance(source, dict):
            source = source["default"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: expected a chat template, found none that can be read ({error!r})") from None
    if source is None:
        raise UserError(
            f"{folder}: expected a chat template for tokenizer.template 'chat', found none in tokenizer_config.json, "
            "chat_template.jinja or chat_template.json"
        )
    if not isinstance(source, str):
        raise UserError(f"{file}: expected the text of a chat template, found {type(source).__name__}")
    others = {role: token_text(config.get(role)) for role in ("unk_token", "sep_token", "cls_token", "mask_token")}
    return ChatTemplate(source, {role: name for role, name in (others | names).items() if name}, file)


def token_text(name: object) -> object:
    """A token's text; configurations have it as such, or as a serialised AddedToken."""
    return name.get("content") if isinstance(name, dict) else name


def any_of(names: Iterable[str]) -> re.Pattern:
    """Any of the names, as a group. Longest first: where one begins another, the longer one is meant."""
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def _stand_ins(count: int) -> list[str]:
    """For as many texts of a dialogue, by turns: words that no template writes or changes."""
    return [f"the{('users', 'assistants')[at % 2]}{at}words" for at in range(count)]


@functools.cache
def _environment() -> jinja2.Environment:
    """The surroundings in which `transformers` renders chat templates. They are programs from strangers: sandboxed."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json  # Jinja's own would escape HTML
    now = datetime.datetime.now()  # once: a run that passes midnight must not change its prompts
    environment.globals |= {
        "raise_exception": _raise_exception, "strftime_now": now.strftime, "dict": _Dict(), "namespace": _Namespace
    }  # fmt: skip
    return environment


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for those who want to know them; the text is unchanged."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Dict:
    """`dict` without the attributes of the type."""

    def __call__(self, *args, **kwargs) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs) -> dict:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, which keeps out names that reach into Python."""

    def __init__(*args, **kwargs):  # without `self`, which a template may want to store
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name, value):
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot store {name!r}")


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
