"""Tokenizers from local files: Hugging Face fast tokenizers and SentencePiece models behind one small interface.

Nothing is downloaded. Text is always encoded as plain text: a prompt that contains the characters ``</s>`` cannot
smuggle an end-of-sequence token into a row. Special tokens come only from us (BOS, EOS) and from the template. The one
exception is a word-level vocabulary that lists ``</s>`` among its words: there text and token are the same thing.
"""

import json
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import sentencepiece
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from megatron_safe.data.templates import CHAT, ChatTemplate, any_of, parse_template, read_chat_template, token_text
from megatron_safe.errors import UserError

# Names tried only when no configuration file names the token, and only if exactly one of them exists.
_USUAL_NAMES = {
    "eos_token": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>"),
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>"),
    "pad_token": ("<pad>", "[PAD]", "<|pad|>"),
}
# Unicode's White_Space, which an added token with lstrip or rstrip takes away (Python's strip() takes some more).
_SPACES = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"


class Tokenizer:
    """What the rest of the library sees of a tokenizer; made by :func:`load_tokenizer`.

    file: where it was read.
    vocab_size: one more than the largest id, so a model with this many embeddings has a row for every token.
    eos_id: ends every response. With the template "chat" it is the token that ends the assistant's turn there
        (``<|im_end|>``), so that rows, generation and decoding all agree with the chat format by this one id; where
        that template ends the turn with no token of its own, and with every other template, it is `eos_token_id`.
    eos_token_id: the token that the tokenizer itself calls EOS.
    pad_id: fills rows on the right; the EOS id where the tokenizer has no pad token (lengths, never ids, tell padding).
    bos_id: starts every prompt; None where the tokenizer has none or its configuration says ``add_bos_token: false``.
    chat: the checkpoint's chat template, where it was asked for.
    """

    def __init__(
        self,
        file: Path,
        vocab_size: int,
        names: dict[str, str | None],
        special_ids: dict[str, int],
        config: dict,
        chat: ChatTemplate | None,
    ):
        """names: "bos_token", "eos_token", "pad_token"; special_ids: of every special token, by its text."""
        ids = {role: special_ids.get(name) for role, name in names.items()}
        self.file = file
        self.vocab_size = vocab_size
        self.eos_token_id = ids["eos_token"]
        self.chat = chat
        ending = None if chat is None else chat.ending(special_ids)
        self.eos_id = self.eos_token_id if ending is None else special_ids[ending]
        self.pad_id = self.eos_token_id if ids["pad_token"] is None else ids["pad_token"]
        self.bos_id = None if config.get("add_bos_token") is False else ids["bos_token"]
        self._special_ids = special_ids
        self._special_pattern = any_of(special_ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; adds no special tokens and recognises none in the text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many texts at once, which is several times faster."""
        return self.encode_parts([[text] for text in texts])

    def encode_parts(self, rows: list[list[str | int]]) -> list[list[int]]:
        """Token ids of rows as `split_special` cuts them: plain text at even places, special token ids at odd ones.

        The ids are those that `transformers` finds in the uncut text, without adding special tokens to it: what
        follows a special token is the middle of a text (which SentencePiece may start without its usual space).
        """
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """Text of token ids without special tokens. ValueError for an id outside the vocabulary."""
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"token ids from {min(ids)} to {max(ids)} do not fit a vocabulary of {self.vocab_size}")
        return self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def split_special(self, text: str) -> list[str | int]:
        """Cut text at the special tokens named in it: plain text at even places, special token ids at odd ones.

        For text we trust (templates), never for prompts or responses.
        """
        parts: list[str | int] = list(self._special_pattern.split(text))
        parts[1::2] = [self._special_ids[name] for name in parts[1::2]]
        return parts


class _HuggingFace(Tokenizer):
    def __init__(self, file: Path, template: str):
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            found = f"an unreadable file ({error})"
            raise UserError(f"{file}: expected a Hugging Face tokenizer, found {found}") from None
        # A saved tokenizer may carry padding and truncation from its training, which would silently cut our rows.
        backend.no_padding()
        backend.no_truncation()
        config = _read_config(file)
        added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        for token_id, token in (declared := _declared_tokens(file, config)):
            if token.content not in added:
                backend.add_tokens([token])
                added[token.content] = token
            _check_id(file, token, token_id, backend.token_to_id(token.content))
        names = {
            role: _role_name(role, usual, backend.token_to_id, config, file) for role, usual in _USUAL_NAMES.items()
        }
        if names["eos_token"] is None:
            advice = "name one as 'eos_token' in tokenizer_config.json beside it"
            raise UserError(f"{file}: expected an end-of-sequence token, found none ({advice})")
        chat = read_chat_template(file.parent, config, names) if template == CHAT else None
        for name in _special_names(config, names, chat, declared, added):
            if backend.token_to_id(name) is not None and not (name in added and added[name].special):
                token = added.get(name, tokenizers.AddedToken(name, normalized=False))
                token.special = True
                backend.add_special_tokens([token])
        backend.encode_special_tokens = True  # in the library's words: encode them like any other text
        special = {i: token for i, token in backend.get_added_tokens_decoder().items() if token.special}
        super().__init__(
            file=file,
            vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
            names=names,
            special_ids={token.content: token_id for token_id, token in special.items()},
            config=config,
            chat=chat,
        )
        # Each special token has a double that is found in text just as that token would be. No prompt can hold the
        # text of a double: it is drawn at random.
        nonce = secrets.token_hex(16)
        self._doubles = {token_id: f"<{nonce} {token_id}>" for token_id in special}
        for token_id, token in special.items():
            flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
            backend.add_tokens([tokenizers.AddedToken(self._doubles[token_id], normalized=False, **flags)])
        self._originals = {backend.token_to_id(double): token_id for token_id, double in self._doubles.items()}
        self._backend = backend

    def encode_parts(self, rows: list[list[str | int]]) -> list[list[int]]:
        texts = ["".join(part if isinstance(part, str) else self._doubles[part] for part in row) for row in rows]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [
            encoding.ids if len(row) == 1 else [self._originals.get(i, i) for i in encoding.ids]
            for row, encoding in zip(rows, encodings, strict=True)
        ]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)


class _SentencePiece(Tokenizer):
    """A SentencePiece model, read by its own library. `transformers` gives the same ids, but for a text that begins
    with a space: version 5 drops that space, as SentencePiece itself and Llama's own code do not.
    """

    def __init__(self, file: Path, template: str):
        model = ModelProto()
        try:
            model.ParseFromString(file.read_bytes())
            backend = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        except (RuntimeError, OSError, DecodeError):
            model.Clear()
        if not model.pieces:
            raise UserError(f"{file}: expected a SentencePiece model, found an unreadable file")
        vocab = {piece.piece: token_id for token_id, piece in enumerate(model.pieces)}
        config = _read_config(file)
        for token_id, token in (declared := _declared_tokens(file, config)):
            _check_id(file, token, token_id, vocab.setdefault(token.content, len(vocab)))
        own = {"eos_token": backend.eos_id(), "bos_token": backend.bos_id(), "pad_token": backend.pad_id()}
        names = {
            role: _role_name(role, [model.pieces[i].piece] if i >= 0 else [], vocab.get, config, file)
            for role, i in own.items()
        }
        if names["eos_token"] is None:
            raise UserError(f"{file}: expected an end-of-sequence token, found none (trained with eos_id -1)")
        chat = read_chat_template(file.parent, config, names) if template == CHAT else None
        added = {token.content: token for _, token in declared}
        defined = [piece.piece for piece in model.pieces if piece.type == piece.USER_DEFINED]
        special = _special_names(config, names, chat, declared, [*added, *defined])
        special = {p.piece for p in model.pieces if p.type == p.CONTROL} | (special & vocab.keys())
        super().__init__(
            file=file,
            vocab_size=len(vocab),
            names=names,
            special_ids={name: vocab[name] for name in special},
            config=config,
            chat=chat,
        )
        self._added_ids = {name: vocab[name] for name in added if name not in special}
        self._added_names = {token_id: name for name, token_id in self._added_ids.items()}
        self._added_pattern = any_of(self._added_ids)
        self._strip_before = {vocab[name] for name, token in added.items() if token.lstrip}
        self._strip_after = {vocab[name] for name, token in added.items() if token.rstrip}
        # Symbols defined by the user are found in plain text: what is special must not be. Control symbols are not.
        for piece in model.pieces:
            if piece.type == piece.USER_DEFINED and piece.piece in special:
                piece.type = piece.CONTROL
        if config.get("add_prefix_space") is False:
            model.normalizer_spec.add_dummy_prefix = False
        self._first = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        if config.get("legacy") is not True:  # Llama's older files put the space after every special token too
            model.normalizer_spec.add_dummy_prefix = False
        self._later = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    def encode_parts(self, rows: list[list[str | int]]) -> list[list[int]]:
        rows = [self._cut_added(row) for row in rows]
        first = iter(self._first.encode([row[0] for row in rows]))
        later = iter(self._later.encode([text for row in rows for text in row[2::2]]))
        return [
            next(first) + [i for part in row[1:] for i in ([part] if isinstance(part, int) else next(later))]
            for row in rows
        ]

    def _cut_added(self, row: list[str | int]) -> list[str | int]:
        """The row cut at its added tokens as well."""
        parts: list[str | int] = []
        for part in row:
            cut = self._added_pattern.split(part) if isinstance(part, str) else [part]
            parts += [self._added_ids[text] if at % 2 else text for at, text in enumerate(cut)]
        for at in range(1, len(parts), 2):
            if parts[at] in self._strip_before:
                parts[at - 1] = parts[at - 1].rstrip(_SPACES)
            if parts[at] in self._strip_after:
                parts[at + 1] = parts[at + 1].lstrip(_SPACES)
        return parts

    def _decode(self, ids: list[int]) -> str:
        text, run, backend = "", [], self._first
        skipped = set(self._special_ids.values())
        for i in ids:
            if i in self._added_names:
                text += backend.decode(run) + self._added_names[i]
                run, backend = [], self._later
            elif i not in skipped:
                run.append(int(i))
        return text + backend.decode(run)


def load_tokenizer(path: str | Path, template: str = "plain") -> Tokenizer:
    """Load a tokenizer from a folder, a ``tokenizer.json`` or a SentencePiece ``.model`` file.

    In a folder, ``tokenizer.json`` wins over a ``.model`` (Llama's folders hold both, with the same tokens). Beside it,
    ``tokenizer_config.json`` and then ``special_tokens_map.json`` name the special tokens, and ``added_tokens_decoder``
    in the former or ``added_tokens.json`` lists tokens that were added later (Alpaca's ``[PAD]``).

    Args:
        template: the template that prompts will be encoded with; "chat" reads the checkpoint's own (see
            `Tokenizer.eos_id`), any other is only checked.

    Raises UserError for a missing path, a folder or file of neither kind, an unreadable file, no EOS token, or a bad
    template.
    """
    path = Path(path)
    if template != CHAT:
        parse_template(template)
    if not path.exists():
        raise UserError(f"{path}: expected a tokenizer folder or file, found nothing there")
    file = _file_in_folder(path) if path.is_dir() else path
    kinds = {".json": _HuggingFace, ".model": _SentencePiece}
    if file.suffix not in kinds:
        raise UserError(f"{file}: expected a tokenizer ending in .json or .model, found {file.name!r}")
    return kinds[file.suffix](file, template)


def _file_in_folder(folder: Path) -> Path:
    if (folder / "tokenizer.json").exists():
        return folder / "tokenizer.json"
    models = sorted(folder.glob("*.model"))
    if len(models) != 1:
        found = "neither" if not models else "several .model files: " + ", ".join(model.name for model in models)
        raise UserError(f"{folder}: expected tokenizer.json or one SentencePiece .model file, found {found}")
    return models[0]


def check_special_tokens(tokenizer: Tokenizer, config: dict, where: Path) -> list[str]:
    """Whether a tokenizer fits a Hugging Face model: one line for each thing to warn of.

    Args:
        config: the content of the model's config.json: vocab_size, bos_token_id, eos_token_id (an id or a list of
            ids), pad_token_id; what it does not state is not checked.
        where: that file, for messages.

    Raises UserError where the tokenizer has more tokens than the model has rows, or its EOS is not among the model's.
    """
    file, rows = tokenizer.file, config.get("vocab_size")
    if isinstance(rows, int) and tokenizer.vocab_size > rows:
        raise UserError(f"{file}: expected at most {rows} tokens, vocab_size in {where}; found {tokenizer.vocab_size}")
    warnings = []
    known = config.get("eos_token_id")
    if known is not None:
        known = known if isinstance(known, list) else [known]
        if tokenizer.eos_token_id not in known:
            raise UserError(
                f"{file}: expected its eos_token to be among {known}, eos_token_id in {where}; "
                f"found id {tokenizer.eos_token_id}"
            )
        if tokenizer.eos_id not in known:
            warnings.append(
                f"{file}: its chat template ends a turn with token {tokenizer.eos_id}, which is not among {known}, "
                f"eos_token_id in {where}: whoever generates with this model must be told to stop there"
            )
    # Where padding is EOS there is no pad token, or as good as none.
    pad_id = None if tokenizer.pad_id == tokenizer.eos_token_id else tokenizer.pad_id
    for role, token_id in (("bos_token", tokenizer.bos_id), ("pad_token", pad_id)):
        other = config.get(f"{role}_id")
        if None not in (token_id, other) and token_id != other and other != -1:  # -1: Llama 1's way to say none
            warnings.append(f"{file}: its {role} has id {token_id}, {role}_id in {where} is {other}")
    return warnings


def _role_name(
    role: str, usual: Sequence[str], token_to_id: Callable[[str], int | None], config: dict, file: Path
) -> str | None:
    """The text of a special token, as the configuration names it; by its usual name where that says nothing."""
    name = token_text(config.get(role, ""))
    if name is None:  # an explicit null means that there is none
        return None
    if name == "":  # Llama 1's files name all of them so
        usual = [name for name in usual if token_to_id(name) is not None]
        return usual[0] if len(usual) == 1 else None
    if not isinstance(name, str) or token_to_id(name) is None:
        found = repr(str(name)[:40])
        raise UserError(f"{file.parent}: expected '{role}' to name a token of {file.name}, found {found}")
    return name


def _special_names(
    config: dict,
    names: dict[str, str | None],
    chat: ChatTemplate | None,
    declared: list[tuple[int, tokenizers.AddedToken]],
    added: Iterable[str],
) -> set[str]:
    """The tokens that text must not be taken for, as far as the configuration and the chat template tell."""
    special = {token.content for _, token in declared if token.special} | {name for name in names.values() if name}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(key) or []
        texts = [token_text(name) for name in (extra.values() if isinstance(extra, dict) else extra)]
        special |= {text for text in texts if isinstance(text, str)}
    if chat is not None:  # some checkpoints forget to mark the tokens between turns
        special |= chat.turn_names(added)
    return special


def _declared_tokens(file: Path, config: dict) -> list[tuple[int, tokenizers.AddedToken]]:
    """Tokens that were added to a tokenizer, by the files beside it, in the order of their ids."""
    source = file.with_name("tokenizer_config.json")
    try:
        entries = config.get("added_tokens_decoder")
        if entries is None:
            source = file.with_name("added_tokens.json")
            entries = {token_id: {"content": content} for content, token_id in _read_json(source).items()}
        flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
        tokens = [
            (int(i), tokenizers.AddedToken(entry["content"], **{flag: entry[flag] for flag in flags if flag in entry}))
            for i, entry in entries.items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}: expected added tokens with their ids, found something else ({error!r})") from None
    return sorted(tokens, key=lambda item: item[0])


def _check_id(file: Path, token: tokenizers.AddedToken, declared: int, given: int) -> None:
    if given != declared:
        raise UserError(
            f"{file.parent}: expected the added token {token.content[:40]!r} to have id {given}, as {file.name} has "
            f"it or room for it, found {declared} in the files beside it"
        )


def _read_config(file: Path) -> dict:
    """What the files beside a tokenizer say of it; the last one has the last word."""
    return _read_json(file.with_name("special_tokens_map.json")) | _read_json(file.with_name("tokenizer_config.json"))


def _read_json(file: Path) -> dict:
    """A JSON object, or an empty one where the (optional) file does not exist."""
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: expected a JSON object, found an unreadable file ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value
