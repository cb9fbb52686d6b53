"""Tokenizers made here, of every kind that there is, without a configuration."""

import json
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def of_words(file: Path, words: list[str]) -> Path:
    """A word a token."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(file))
    return file


def train(kind: str, folder: Path, corpus: list[str], size: int) -> int:
    """Train a tokenizer of about `size` tokens, with <s> and </s>; how many it has.

    Args:
        kind: "bytes" (BPE over bytes), "llama" (Llama 2's tokenizer.json), "metaspace" (with the pre-tokenizer that has
            taken its normalizer's place) or "sentencepiece".
    """
    if kind == "sentencepiece":
        return _train_sentencepiece(folder, corpus, size)
    return (_train_bytes if kind == "bytes" else _train_llama)(folder, corpus, size, kind == "metaspace")


def _train_bytes(folder: Path, corpus: list[str], size: int, _) -> int:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"],
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def _train_llama(folder: Path, corpus: list[str], size: int, metaspace: bool) -> int:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = ["<unk>", "<s>", "</s>", *BYTES]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = definition["added_tokens"][:3]  # the bytes are ordinary tokens
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return tokenizer.get_vocab_size()


def _train_sentencepiece(folder: Path, corpus: list[str], size: int) -> int:
    with (folder / "tokenizer.model").open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_writer=writer, vocab_size=size, hard_vocab_limit=False,
            model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            minloglevel=2,
        )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
