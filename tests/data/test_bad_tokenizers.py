"""Every way in which a path can hold no tokenizer of ours."""

import pytest
import sentencepiece
from small_tokenizers import of_words, train

from megatron_safe.data.tokenizer import load_tokenizer
from megatron_safe.errors import UserError


def missing(tmp_path):
    return tmp_path / "nowhere", "nowhere: expected a tokenizer folder or file, found nothing there"


def empty_folder(tmp_path):
    return tmp_path, "expected tokenizer.json or one SentencePiece .model file, found neither"


def several_models(tmp_path):
    for name in ("a.model", "b.model"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path, "found several .model files: a.model, b.model"


def other_file(tmp_path):
    (tmp_path / "vocab.txt").write_text("fern")
    return tmp_path / "vocab.txt", "vocab.txt: expected a tokenizer ending in .json or .model, found 'vocab.txt'"


def cut_json(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", ')
    return tmp_path, "tokenizer.json: expected a Hugging Face tokenizer, found an unreadable file"


def binary_json(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    return tmp_path, "tokenizer.json: expected a Hugging Face tokenizer, found an unreadable file"


def other_json(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"hidden_size": 64}')
    return tmp_path, "tokenizer.json: expected a Hugging Face tokenizer, found an unreadable file"


def no_eos(tmp_path):
    return of_words(tmp_path / "tokenizer.json", ["<unk>", "fern"]), "expected an end-of-sequence token"


def two_usual_eos(tmp_path):
    words = ["<unk>", "</s>", "<|endoftext|>"]  # which of them ends a text is not ours to guess
    return of_words(tmp_path / "tokenizer.json", words), "expected an end-of-sequence token, found none"


def null_eos(tmp_path):
    of_words(tmp_path / "tokenizer.json", ["<unk>", "</s>"])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    return tmp_path, "expected an end-of-sequence token, found none"


def unknown_eos(tmp_path):
    of_words(tmp_path / "tokenizer.json", ["<unk>", "</s>"])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    return tmp_path, "expected 'eos_token' to name a token of tokenizer.json, found '<end>'"


def unknown_pad(tmp_path):
    of_words(tmp_path / "tokenizer.json", ["<unk>", "</s>"])
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": 7}')
    return tmp_path, "expected 'pad_token' to name a token of tokenizer.json, found '7'"


def bad_config(tmp_path):
    of_words(tmp_path / "tokenizer.json", ["<unk>", "</s>"])
    (tmp_path / "tokenizer_config.json").write_text("{eos_token: </s>}")
    return tmp_path, "tokenizer_config.json: expected a JSON object, found an unreadable file"


def list_config(tmp_path):
    of_words(tmp_path / "tokenizer.json", ["<unk>", "</s>"])
    (tmp_path / "tokenizer_config.json").write_text("[]")
    return tmp_path, "tokenizer_config.json: expected a JSON object, found list"


def damaged_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    return tmp_path, "tokenizer.model: expected a SentencePiece model, found an unreadable file"


def empty_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    return tmp_path, "tokenizer.model: expected a SentencePiece model, found an unreadable file"


def gap_in_added_tokens(tmp_path):
    of_words(tmp_path / "tokenizer.json", ["<unk>", "</s>"])
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 5}')
    return tmp_path, "expected the added token '[PAD]' to have id 2, as tokenizer.json has it or room for it, found 5"


def gap_beside_a_model(tmp_path):
    train("sentencepiece", tmp_path, ["the fern is green"] * 20, 300)
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"1": {"content": "</s>"}}}')
    return tmp_path, "expected the added token '</s>' to have id 2, as tokenizer.model has it or room for it, found 1"


def list_of_added_tokens(tmp_path):
    of_words(tmp_path / "tokenizer.json", ["<unk>", "</s>"])
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": [{"content": "[PAD]"}]}')
    return tmp_path, "tokenizer_config.json: expected added tokens with their ids, found something else"


def added_token_without_id(tmp_path):
    train("sentencepiece", tmp_path, ["the fern is green"] * 20, 300)
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": "next"}')
    return tmp_path, "added_tokens.json: expected added tokens with their ids, found something else"


def unknown_eos_of_a_model(tmp_path):
    train("sentencepiece", tmp_path, ["the fern is green"] * 20, 300)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    return tmp_path, "expected 'eos_token' to name a token of tokenizer.model, found '<end>'"


def model_without_eos(tmp_path):
    with (tmp_path / "tokenizer.model").open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the fern"] * 9),
            model_writer=writer,
            vocab_size=30,
            hard_vocab_limit=False,
            minloglevel=2,
            eos_id=-1,
        )
    return tmp_path, "tokenizer.model: expected an end-of-sequence token, found none"


@pytest.mark.parametrize(
    "make",
    [
        missing, empty_folder, several_models, other_file, cut_json, binary_json, other_json, no_eos, two_usual_eos,
        null_eos, unknown_eos, unknown_pad, bad_config, list_config, damaged_model, empty_model, model_without_eos,
        gap_in_added_tokens, gap_beside_a_model, list_of_added_tokens, added_token_without_id, unknown_eos_of_a_model,
    ],
)  # fmt: skip
def test_bad_tokenizers_are_refused(make, tmp_path):
    path, message = make(tmp_path)
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
