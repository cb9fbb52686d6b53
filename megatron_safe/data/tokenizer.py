"""Tokenizers from local files: Hugging Face fast tokenizers and SentencePiece models behind one small interface.

Nothing is downloaded. Text is always encoded as plain text: a prompt that contains the characters ``</s>`` cannot
smuggle an end-of-sequence token into a row. Special tokens come only from us (BOS, EOS) and from the template. The one
exception is a word-level vocabulary that lists ``</s>`` among its words: there text and token are the same thing.
"""

import json
import re
from pathlib import Path

import sentencepiece
import tokenizers

from megatron_safe.errors import UserError

# Names tried only when no configuration file names the token, and only if exactly one of them exists.
_USUAL_NAMES = {
    "eos_token": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>"),
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>"),
    "pad_token": ("<pad>", "[PAD]", "<|pad|>"),
}


class Tokenizer:
    """What the rest of the library sees of a tokenizer; made by :func:`load_tokenizer`.

    vocab_size: one more than the largest id, so a model with this many embeddings has a row for every token.
    eos_id: ends every response.
    pad_id: fills rows on the right; the EOS id where the tokenizer has no pad token (lengths, never ids, tell padding).
    bos_id: starts every prompt; None where the tokenizer has none or its configuration says ``add_bos_token: false``.
    """

    def __init__(
        self, vocab_size: int, eos_id: int, pad_id: int | None, bos_id: int | None, special_ids: dict[str, int]
    ):
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        self.bos_id = bos_id
        self._special_ids = special_ids
        # Longest first: where one special token begins another, the longer one is meant.
        names = sorted(filter(None, special_ids), key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; adds no special tokens and recognises none in the text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many texts at once, which is several times faster."""
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
        parts: list[str | int] = list(self._special_pattern.split(text)) if self._special_pattern else [text]
        parts[1::2] = [self._special_ids[name] for name in parts[1::2]]
        return parts


class _HuggingFace(Tokenizer):
    def __init__(self, file: Path):
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            found = f"an unreadable file ({error})"
            raise UserError(f"{file}: expected a Hugging Face tokenizer, found {found}") from None
        # A saved tokenizer may carry padding and truncation from its training, which would silently cut our rows.
        backend.no_padding()
        backend.no_truncation()
        config = _read_json(file.with_name("special_tokens_map.json"))
        config |= _read_json(file.with_name("tokenizer_config.json"))
        names = {role: self._token_name(backend, config, role, file) for role in _USUAL_NAMES}
        if names["eos_token"] is None:
            raise UserError(
                f"{file}: expected an end-of-sequence token, found none (name one as 'eos_token' in "
                "tokenizer_config.json beside it)"
            )
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        backend.add_special_tokens([name for name in names.values() if name is not None and name not in special])
        backend.encode_special_tokens = True  # in the library's words: encode them like any other text
        self._backend = backend
        added = backend.get_added_tokens_decoder().items()
        ids = {role: None if name is None else backend.token_to_id(name) for role, name in names.items()}
        super().__init__(
            vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
            eos_id=ids["eos_token"],
            pad_id=ids["pad_token"],
            bos_id=None if config.get("add_bos_token") is False else ids["bos_token"],
            special_ids={token.content: token_id for token_id, token in added if token.special},
        )

    @staticmethod
    def _token_name(backend: tokenizers.Tokenizer, config: dict, role: str, file: Path) -> str | None:
        name = config.get(role)
        if isinstance(name, dict):  # a serialised AddedToken
            name = name.get("content")
        if name is None:
            if role in config:  # an explicit null means that there is none
                return None
            usual = [name for name in _USUAL_NAMES[role] if backend.token_to_id(name) is not None]
            return usual[0] if len(usual) == 1 else None
        if not isinstance(name, str) or backend.token_to_id(name) is None:
            found = repr(str(name)[:40])
            raise UserError(f"{file.parent}: expected '{role}' to name a token of {file.name}, found {found}")
        return name

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)


class _SentencePiece(Tokenizer):
    def __init__(self, file: Path):
        try:
            backend = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
            size = backend.get_piece_size()
        except (RuntimeError, OSError):
            size = 0
        if size == 0:
            raise UserError(f"{file}: expected a SentencePiece model, found an unreadable file")
        if backend.eos_id() < 0:
            raise UserError(f"{file}: expected an end-of-sequence token, found none (trained with eos_id -1)")
        self._backend = backend
        super().__init__(
            vocab_size=size,
            eos_id=backend.eos_id(),
            pad_id=None if backend.pad_id() < 0 else backend.pad_id(),
            bos_id=None if backend.bos_id() < 0 else backend.bos_id(),
            special_ids={backend.id_to_piece(i): i for i in range(size) if backend.is_control(i)},
        )

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._backend.encode(list(texts))

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode([int(i) for i in ids])  # control tokens decode to nothing


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder, a ``tokenizer.json`` or a SentencePiece ``.model`` file.

    In a folder, ``tokenizer.json`` wins over a ``.model`` (Llama's folders hold both, with the same tokens). Beside it,
    ``tokenizer_config.json`` and then ``special_tokens_map.json`` name the special tokens.

    Raises UserError for a missing path, a folder or file of neither kind, an unreadable file, or no EOS token.
    """
    path = Path(path)
    if path.is_dir():
        return _load_file(_file_in_folder(path))
    if not path.exists():
        raise UserError(f"{path}: expected a tokenizer folder or file, found nothing there")
    return _load_file(path)


def _file_in_folder(folder: Path) -> Path:
    if (folder / "tokenizer.json").exists():
        return folder / "tokenizer.json"
    models = sorted(folder.glob("*.model"))
    if len(models) != 1:
        found = "neither" if not models else "several .model files: " + ", ".join(model.name for model in models)
        raise UserError(f"{folder}: expected tokenizer.json or one SentencePiece .model file, found {found}")
    return models[0]


def _load_file(file: Path) -> Tokenizer:
    if file.suffix == ".json":
        return _HuggingFace(file)
    if file.suffix == ".model":
        return _SentencePiece(file)
    raise UserError(f"{file}: expected a tokenizer ending in .json or .model, found {file.name!r}")


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
