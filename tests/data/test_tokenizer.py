"""Both kinds of tokenizer behind one interface, and every way in which a path can hold neither."""

import json
import shutil

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_safe.data.tokenizer import load_tokenizer
from megatron_safe.errors import UserError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
BYTE_CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def make_word_tokenizer(file, words):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(file))
    return file


def edit_config(byte_folder, tmp_path, **changes):
    folder = shutil.copytree(byte_folder, tmp_path / "edited")
    (folder / "tokenizer_config.json").write_text(json.dumps(BYTE_CONFIG | changes))
    return folder


def test_special_ids(byte_tokenizer, piece_tokenizer):
    assert (byte_tokenizer.vocab_size, byte_tokenizer.bos_id, byte_tokenizer.eos_id, byte_tokenizer.pad_id) == (
        259, 256, 257, 258,
    )
    assert (piece_tokenizer.bos_id, piece_tokenizer.eos_id) == (1, 2)
    assert piece_tokenizer.pad_id == piece_tokenizer.eos_id  # there is no pad token to use


@given(text=TEXTS)
def test_bytes_round_trip(byte_tokenizer, text):
    ids = byte_tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert byte_tokenizer.decode(ids) == text


@given(words=st.lists(st.sampled_from("the fern lamp is green warm rice twice 🍚".split()), min_size=1, max_size=9))
def test_pieces_round_trip(piece_tokenizer, words):
    assert piece_tokenizer.decode(piece_tokenizer.encode(" ".join(words))) == " ".join(words)


@given(texts=st.lists(TEXTS, max_size=5))
def test_batches_encode_as_single_texts(byte_tokenizer, piece_tokenizer, texts):
    for tokenizer in (byte_tokenizer, piece_tokenizer):
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_decode_leaves_special_tokens_out(any_tokenizer):
    tokenizer = any_tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode("the fern"), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "the fern"
    assert tokenizer.decode([]) == ""


def test_decode_refuses_ids_outside_the_vocabulary(any_tokenizer):
    for wrong in (-1, any_tokenizer.vocab_size):
        with pytest.raises(ValueError, match="vocabulary"):
            any_tokenizer.decode([3, wrong])


def test_special_tokens_in_text_stay_text(any_tokenizer):
    ids = any_tokenizer.encode("the </s> fern<s>")
    assert not {any_tokenizer.eos_id, any_tokenizer.bos_id} & set(ids)


def test_split_special_finds_special_tokens(any_tokenizer):
    bos, eos = any_tokenizer.bos_id, any_tokenizer.eos_id
    assert any_tokenizer.split_special("<s>a</s></s>b") == ["", bos, "a", eos, "", eos, "b"]
    assert any_tokenizer.split_special("no such thing") == ["no such thing"]


def test_saved_truncation_and_padding_are_undone(byte_folder, tmp_path):
    folder = shutil.copytree(byte_folder, tmp_path / "saved")
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=6)
    backend.save(str(folder / "tokenizer.json"))
    assert [len(ids) for ids in load_tokenizer(folder).encode_batch(["ab", "abcdefgh"])] == [2, 8]


def test_names_come_from_the_config_then_the_map(byte_folder, tmp_path):
    folder = edit_config(byte_folder, tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<pad>"}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": {"content": "</s>"}}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (258, 257)


def test_config_may_say_that_there_is_no_bos_or_pad(byte_folder, tmp_path):
    tokenizer = load_tokenizer(edit_config(byte_folder, tmp_path, bos_token=None, pad_token=None))
    assert tokenizer.bos_id is None
    assert tokenizer.pad_id == tokenizer.eos_id


def test_add_bos_token_false_is_respected(byte_folder, tmp_path):
    assert load_tokenizer(edit_config(byte_folder, tmp_path, add_bos_token=False)).bos_id is None


def test_lone_tokenizer_json_by_its_usual_names(tmp_path):
    # The names are plain words here, not marked special: they must be treated as special all the same.
    file = make_word_tokenizer(tmp_path / "tokenizer.json", ["<pad>", "<s>", "</s>", "<unk>", "fern"])
    tokenizer = load_tokenizer(file)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 2, 5)
    assert tokenizer.encode("fern lamp") == [4, 3]
    assert tokenizer.decode([1, 4, 2, 0]) == "fern"


def test_vocab_size_covers_the_largest_id(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "far": 90}, unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).vocab_size == 91


def test_folder_with_both_kinds_uses_tokenizer_json(byte_folder, piece_file, tmp_path):
    folder = shutil.copytree(byte_folder, tmp_path / "both")
    shutil.copy(piece_file, folder / "tokenizer.model")
    assert load_tokenizer(folder).vocab_size == 259


def test_sentencepiece_folder_with_any_name(piece_file, tmp_path):
    shutil.copy(piece_file, tmp_path / "spiece.model")
    assert load_tokenizer(str(tmp_path)).eos_id == 2


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
    return make_word_tokenizer(tmp_path / "tokenizer.json", ["<unk>", "fern"]), "expected an end-of-sequence token"


def two_usual_eos(tmp_path):
    words = ["<unk>", "</s>", "<|endoftext|>"]  # which of them ends a text is not ours to guess
    return make_word_tokenizer(tmp_path / "tokenizer.json", words), "expected an end-of-sequence token, found none"


def null_eos(tmp_path):
    make_word_tokenizer(tmp_path / "tokenizer.json", ["<unk>", "</s>"])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    return tmp_path, "expected an end-of-sequence token, found none"


def unknown_eos(tmp_path):
    make_word_tokenizer(tmp_path / "tokenizer.json", ["<unk>", "</s>"])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    return tmp_path, "expected 'eos_token' to name a token of tokenizer.json, found '<end>'"


def unknown_pad(tmp_path):
    make_word_tokenizer(tmp_path / "tokenizer.json", ["<unk>", "</s>"])
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": 7}')
    return tmp_path, "expected 'pad_token' to name a token of tokenizer.json, found '7'"


def bad_config(tmp_path):
    make_word_tokenizer(tmp_path / "tokenizer.json", ["<unk>", "</s>"])
    (tmp_path / "tokenizer_config.json").write_text("{eos_token: </s>}")
    return tmp_path, "tokenizer_config.json: expected a JSON object, found an unreadable file"


def list_config(tmp_path):
    make_word_tokenizer(tmp_path / "tokenizer.json", ["<unk>", "</s>"])
    (tmp_path / "tokenizer_config.json").write_text("[]")
    return tmp_path, "tokenizer_config.json: expected a JSON object, found list"


def damaged_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    return tmp_path, "tokenizer.model: expected a SentencePiece model, found an unreadable file"


def empty_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    return tmp_path, "tokenizer.model: expected a SentencePiece model, found an unreadable file"


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
    ],
)  # fmt: skip
def test_bad_tokenizers_are_refused(make, tmp_path):
    path, message = make(tmp_path)
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
