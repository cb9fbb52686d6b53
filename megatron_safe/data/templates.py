"""Prompt templates: what is written around a prompt, as a format string or by a checkpoint's own chat template."""

import datetime
import functools
import json
import re
import string
from collections.abc import Iterable, Mapping
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox

from megatron_safe.errors import UserError

TEMPLATES = {
    # PKU-Alignment/safe-rlhf, safe_rlhf/configs/constants.py: PROMPT_BEGIN + PROMPT_USER + PROMPT_ASSISTANT.
    "safe-rlhf": "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:",
    # tatsu-lab/stanford_alpaca, train.py: PROMPT_DICT["prompt_no_input"].
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{prompt}\n\n### Response:"
    ),
    "plain": "{prompt}",
}
CHAT = "chat"  # the name of the checkpoint's own template


def parse_template(template: str) -> tuple[str, str]:
    """What stands before and after the prompt in a template, given by name (`TEMPLATES`) or as a format string.

    UserError unless the template holds ``{prompt}`` exactly once and no other field.
    """
    try:
        parts = list(string.Formatter().parse(TEMPLATES.get(template, template)))
    except ValueError as error:
        raise UserError(f"template {template[:40]!r}: expected {{prompt}} in a format string, found: {error}") from None
    # One part per literal with the field that follows it; {{ and }} are already undone.
    fields = [(i, part[1:]) for i, part in enumerate(parts) if part[1] is not None]
    if [field for _, field in fields] != [("prompt", "", None)]:
        found = ", ".join("{" + field[0] + "}" for _, field in fields) or "no field"
        known = ", ".join(TEMPLATES)
        raise UserError(
            f"template {template[:40]!r}: expected {{prompt}} once, or {CHAT}, or one of {known}; found {found}"
        )
    place = fields[0][0]
    return "".join(part[0] for part in parts[: place + 1]), "".join(part[0] for part in parts[place + 1 :])


class ChatTemplate:
    """A checkpoint's chat template (Jinja), rendered as `transformers`' ``apply_chat_template`` does.

    before, after: what it writes around the user's text, with the prompt for the assistant's turn after it.

    Where the user's text begins and ends is known by position, so nothing in a prompt can be taken for a part of the
    template. A template that writes today's date writes the date on which it was read.

    Raises UserError for a template that is broken, or does not write the user's text exactly once.
    """

    def __init__(self, source: str, names: Mapping[str, str], where: Path):
        """names: the special tokens by their roles (``bos_token``, ...); where: the file, for messages."""
        self._where = where
        self._names = dict(names)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise self._error(error) from None
        user, assistant = "theuserswords", "theassistantswords"  # which no template writes or changes
        parts = self._render(user).split(user)
        if len(parts) != 2:
            raise self._error(f"a template that writes the user's text {len(parts) - 1} times")
        self.before, self.after = parts
        self._user_turn = self._render(user, add_generation_prompt=False)
        dialogue = self._render(user, assistant, add_generation_prompt=False)
        if assistant not in dialogue:
            raise self._error("a template that drops the assistant's text")
        self._after_answer = dialogue.rpartition(assistant)[2]

    def fill(self, prompt: str) -> str:
        """The prompt as the template writes it between `before` and `after` (many strip it)."""
        text = self._render(prompt)
        end = len(text) - len(self.after)
        if end < len(self.before) or not (text.startswith(self.before) and text.endswith(self.after)):
            raise self._error(f"other text around the prompt {prompt[:40]!r}")
        return text[len(self.before) : end]

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

    def _render(self, user: str, assistant: str | None = None, add_generation_prompt: bool = True) -> str:
        messages = [{"role": "user", "content": user}]
        if assistant is not None:
            messages.append({"role": "assistant", "content": assistant})
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
        return UserError(f"{self._where}: expected a chat template for one prompt and its answer, found: {line}")


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
