"""Both kinds of tokenizer behind one interface."""

import json
import shutil

import pytest
import small_tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from megatron_safe.data.tokenizer import check_special_tokens, load_tokenizer
from megatron_safe.errors import UserError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
BYTE_CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


CORPUS = [
    "the fern is green", "water the fern twice a week", "the lamp is warm  and \t red", "🍚 rice\n\nneeds water é"
] * 20  # fmt: skip
AWKWARD = [
    "", " ", "   ", "\n", "\t\ttabs\t", "  two before, two after  ", "a" + " " * 300 + "b", "the fern\r\n\r\nis\n",
    "🍚🌿", "👩\u200d👩\u200d👧\u200d👦 👍🏽 🇫🇷", "e\u0301 vs é, n\u0303, Z\u0351\u036b\u0343", "שלום\u200e, مرحبا",
    "日本語と한국어", "\x01\x02\x1b[0m\x7f",
    "\u00a0\u200b\u2028\ufeff", "\U0010ffff\ue000", "<0x41>", "</s", "x" * 500,
]  # fmt: skip


KINDS = ("bytes", "llama", "metaspace", "sentencepiece")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{kind: folder of a trained tokenizer, without a configuration}"""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        small_tokenizers.train(kind, folder, CORPUS, 340)
    return folders


@pytest.fixture(scope="module")
def loaded(trained):
    return {kind: load_tokenizer(folder) for kind, folder in trained.items()}


def theirs(folder):
    """transformers' tokenizer of the same folder."""
    transformers = pytest.importorskip("transformers", reason="transformers is what these ids are compared with")
    of_json = (folder / "tokenizer.json").exists()
    return (transformers.PreTrainedTokenizerFast if of_json else transformers.LlamaTokenizer).from_pretrained(folder)


def with_files(source, folder, **files):
    """A copy of a tokenizer's folder with JSON files in it."""
    shutil.copytree(source, folder)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


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


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize("kind", KINDS)
def test_awkward_text_comes_back(loaded, kind, text):
    tokenizer = loaded[kind]
    # Metaspace takes one space at the beginning for its own; Llama's normalizer and SentencePiece do not.
    expected = text.removeprefix(" ") if kind == "metaspace" else text
    assert tokenizer.decode(tokenizer.encode(text)) == expected


@pytest.mark.parametrize("kind", ["bytes", "llama", "sentencepiece"])
@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40))  # ▁ is a space
def test_any_text_comes_back(loaded, kind, text):
    assert loaded[kind].decode(loaded[kind].encode(text)) == text


@pytest.fixture(scope="module")
def with_added(trained, tmp_path_factory):
    """{kind: (ours, transformers', first added id)} of tokenizers with one special token more, and two plain ones."""
    pairs = {}
    for kind, source in trained.items():
        size = load_tokenizer(source).vocab_size
        added = {
            str(size): {"content": "<turn>", "special": True},
            str(size + 1): {"content": "<tool>", "special": False, "normalized": False, "rstrip": True},
            str(size + 2): {"content": "  ", "special": False, "normalized": False},
        }
        config = {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": added}
        folder = with_files(source, tmp_path_factory.mktemp(kind) / "added", tokenizer_config=config)
        pairs[kind] = load_tokenizer(folder), theirs(folder), size
    return pairs


PIECES = ["the fern", " is", "  ", "   ", "<tool>", "<too", "\n", "\t", "é", "🍚", "x", "l>"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=8))
@example(pieces=["the fern", "<tool>", "  ", "is", "   ", "green"])
def test_ids_are_those_of_transformers(with_added, kind, pieces):
    ours, other, _ = with_added[kind]
    text = "".join(pieces)
    if kind == "sentencepiece" and text.startswith(" ") and not text.startswith("  "):
        text = "x" + text  # transformers drops the first space of a text; with two, there is an added token
    assert ours.encode(text) == other.encode(text, add_special_tokens=False)
    assert ours.vocab_size == len(other)


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens(with_added, kind):
    tokenizer, _, size = with_added[kind]
    assert tokenizer.vocab_size == size + 3
    ids = tokenizer.encode("the <turn> fern<tool>is")
    assert [i for i in ids if i >= size] == [size + 1]  # special tokens are not found in text, others are
    space = " " if kind == "llama" else ""  # its normalizer puts one before whatever follows a token
    assert tokenizer.decode(ids) == f"the <turn> fern<tool>{space}is"
    assert tokenizer.decode([*tokenizer.encode("the fern"), size]) == "the fern"
    assert tokenizer.split_special("a<turn><tool>b") == ["a", size, "<tool>b"]


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(st.sampled_from(["", "the fern", " is", "x<tool> y", "\n"]), min_size=1, max_size=4))
def test_encode_parts_is_encoding_the_uncut_text(with_added, kind, texts):
    ours, other, size = with_added[kind]
    if kind == "sentencepiece":
        texts = ["x" + texts[0], *texts[1:]]  # as above
    row = [part for text in texts for part in (text, size)][:-1]
    assert ours.encode_parts([row, ["x"]])[0] == other.encode("<turn>".join(texts), add_special_tokens=False)


def test_alpaca_added_a_pad_token_to_llamas(trained, tmp_path):
    size = load_tokenizer(trained["sentencepiece"]).vocab_size
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "[PAD]", "unk_token": "<unk>"}
    folder = with_files(
        trained["sentencepiece"], tmp_path / "alpaca", added_tokens={"[PAD]": size}, special_tokens_map=names,
        tokenizer_config={"eos_token": "", "model_max_length": 512},
    )  # fmt: skip
    for path in (folder, folder / "tokenizer.model"):
        tokenizer = load_tokenizer(path)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, size)
        assert tokenizer.vocab_size == size + 1
        assert size not in tokenizer.encode("a [PAD] b") and tokenizer.decode(tokenizer.encode("[PAD]")) == "[PAD]"
        assert tokenizer.decode([*tokenizer.encode("the fern"), 2, size, size]) == "the fern"
    (folder / "tokenizer_config.json").unlink()  # transformers does not understand the empty name
    other = theirs(folder)
    assert (other.pad_token_id, len(other)) == (size, size + 1)


@pytest.mark.parametrize("kind", ["llama", "sentencepiece"])
def test_roles_from_the_configuration(trained, tmp_path, kind):
    size = load_tokenizer(trained[kind]).vocab_size
    config = {"bos_token": None, "eos_token": "<end>", "pad_token": "<unk>"}
    added = {"<end>": size}
    tokenizer = load_tokenizer(with_files(trained[kind], tmp_path / "a", tokenizer_config=config, added_tokens=added))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, size, 0)
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
    assert load_tokenizer(with_files(trained[kind], tmp_path / "b", tokenizer_config=config)).bos_id is None


@pytest.mark.parametrize("extra", [["<tool>"], [{"content": "<tool>"}], {"tool_token": "<tool>"}])
@pytest.mark.parametrize("kind", KINDS)
def test_additional_special_tokens_are_special(trained, tmp_path, kind, extra):
    size = load_tokenizer(trained[kind]).vocab_size
    key = "extra_special_tokens" if isinstance(extra, dict) else "additional_special_tokens"
    files = {"added_tokens": {"<tool>": size}, "tokenizer_config": {"eos_token": "</s>", key: extra}}
    tokenizer = load_tokenizer(with_files(trained[kind], tmp_path / "extra", **files))
    assert size not in tokenizer.encode("a<tool>b")
    assert tokenizer.split_special("a<tool>b") == ["a", size, "b"]


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
    file = small_tokenizers.of_words(tmp_path / "tokenizer.json", ["<pad>", "<s>", "</s>", "<unk>", "fern"])
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


# byte_tokenizer: 259 tokens, BOS 256, EOS 257, pad 258. piece_tokenizer: BOS 1, EOS 2, no pad.
FITTING = [
    {},
    {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258},
    {"vocab_size": 300, "bos_token_id": None, "eos_token_id": [7, 257], "pad_token_id": -1},
]


@pytest.mark.parametrize("config", FITTING)
def test_a_tokenizer_that_fits_its_model(byte_tokenizer, tmp_path, config):
    assert check_special_tokens(byte_tokenizer, config, tmp_path / "config.json") == []


def test_a_missing_pad_token_is_no_difference(piece_tokenizer, tmp_path):
    config = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert check_special_tokens(piece_tokenizer, config, tmp_path / "config.json") == []


def test_other_bos_and_pad_are_warned_of(byte_tokenizer, byte_folder, tmp_path):
    config, where = {"bos_token_id": 1, "eos_token_id": 257, "pad_token_id": 0}, tmp_path / "config.json"
    file = byte_folder / "tokenizer.json"
    assert check_special_tokens(byte_tokenizer, config, where) == [
        f"{file}: its bos_token has id 256, bos_token_id in {where} is 1",
        f"{file}: its pad_token has id 258, pad_token_id in {where} is 0",
    ]


@pytest.mark.parametrize(
    "config, found",
    [
        ({"vocab_size": 258}, "expected at most 258 tokens, vocab_size in {where}; found 259"),
        ({"eos_token_id": 2}, "expected its eos_token to be among [2], eos_token_id in {where}; found id 257"),
        ({"eos_token_id": [2, 3]}, "expected its eos_token to be among [2, 3], eos_token_id in {where}; found id 257"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(byte_tokenizer, byte_folder, tmp_path, config, found):
    where = tmp_path / "config.json"
    with pytest.raises(UserError) as caught:
        check_special_tokens(byte_tokenizer, config, where)
    assert str(caught.value) == f"{byte_folder / 'tokenizer.json'}: " + found.format(where=where)


def test_an_ending_of_turns_that_the_model_does_not_know_is_warned_of(byte_folder, tmp_path):
    template = "{% for message in messages %}{{ message.content }}<pad>{% endfor %}"
    tokenizer = load_tokenizer(edit_config(byte_folder, tmp_path, chat_template=template), "chat")
    assert (tokenizer.eos_id, tokenizer.eos_token_id) == (258, 257)
    (warning,) = check_special_tokens(tokenizer, {"eos_token_id": 257}, tmp_path / "config.json")
    assert "ends a turn with token 258, which is not among [257], eos_token_id in" in warning
    assert check_special_tokens(tokenizer, {"eos_token_id": [257, 258]}, tmp_path / "config.json") == []
