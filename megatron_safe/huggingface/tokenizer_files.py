"""The tokenizer's part of a folder, for a model that came with none: its files, and the ids of its special tokens."""

import json
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import tokenizers

from megatron_safe.data.tokenizer import load_tokenizer

_BESIDE = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclass(frozen=True)
class TokenizerFiles:
    """files: by the name that `transformers` looks for: one to copy, or the text of a new one.

    special_ids: for config.json. generation_ids: for generation_config.json, where several tokens may end an answer.
    """

    files: dict[str, Path | str]
    special_ids: dict[str, int]
    generation_ids: dict[str, int | list[int]]

    @staticmethod
    def of(path: Path, template: str = "plain") -> "TokenizerFiles":
        """Raises UserError as `load_tokenizer`."""
        tokenizer = load_tokenizer(path, template)
        file = tokenizer.file
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_token_id}
        if tokenizer.pad_id != tokenizer.eos_token_id:  # else it stands for one
            ids["pad_token_id"] = tokenizer.pad_id
        ids = {role: found for role, found in ids.items() if found is not None}
        sentencepiece_model = file.suffix == ".model"
        files: dict[str, Path | str] = {"tokenizer.model" if sentencepiece_model else "tokenizer.json": file}
        files |= {name: file.with_name(name) for name in _BESIDE if file.with_name(name).is_file()}
        if "tokenizer_config.json" not in files:
            if sentencepiece_model:
                name_of = sentencepiece.SentencePieceProcessor(model_file=str(file)).id_to_piece
            else:
                name_of = tokenizers.Tokenizer.from_file(str(file)).id_to_token
            names = {role.removesuffix("_id"): name_of(found) for role, found in ids.items()}
            kind = "LlamaTokenizer" if sentencepiece_model else "PreTrainedTokenizerFast"
            files["tokenizer_config.json"] = json.dumps({"tokenizer_class": kind} | names, indent=2) + "\n"
        generation: dict[str, int | list[int]] = dict(ids)
        if tokenizer.eos_id != tokenizer.eos_token_id:
            generation["eos_token_id"] = [tokenizer.eos_id, tokenizer.eos_token_id]
        return TokenizerFiles(files, ids, generation)
