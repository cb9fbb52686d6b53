"""Small tokenizers, made here, and files of rows."""

import json
import os
import shutil
from pathlib import Path

import pytest
import sentencepiece
from chat_checkpoints import BACKENDS, CORPUS, SHAPES, added, theirs, write_config
from small_tokenizers import train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_safe.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory):
    """A Hugging Face folder whose tokens are the 256 bytes, then <s>, </s> and <pad>."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    folder = tmp_path_factory.mktemp("byte")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer(byte_folder):
    """One token a byte; BOS 256, EOS 257, pad 258."""
    return load_tokenizer(byte_folder)


@pytest.fixture(scope="session")
def piece_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("piece") / "tokenizer.model"
    sentences = ["the fern is green", "water the fern twice a week", "the lamp is warm", "rice needs water"] * 4
    with file.open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=writer,
            vocab_size=300,
            hard_vocab_limit=False,
            byte_fallback=True,
            minloglevel=2,
        )
    return file


@pytest.fixture(scope="session")
def piece_tokenizer(piece_file):
    """SentencePiece's default special tokens: unknown 0, BOS 1, EOS 2, no pad."""
    return load_tokenizer(piece_file)


@pytest.fixture(params=["byte", "piece"])
def any_tokenizer(request):
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture
def write_lines(tmp_path):
    """Write objects (as JSON), strings or bytes as the lines of a file."""

    def write(*lines, name="rows.jsonl"):
        raw = [
            line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
            for line in lines
        ]
        file = tmp_path / name
        file.write_bytes(b"".join(line + b"\n" for line in raw))
        return file

    return write


@pytest.fixture
def real_data():
    """The folder of published files, which are not part of the project."""
    folder = Path(os.environ.get("MEGATRON_SAFE_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not folder.exists():
        pytest.skip(f"no real data at {folder}; set MEGATRON_SAFE_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """{backend: (folder, number of tokens)}, without a configuration."""
    found = {}
    for name in BACKENDS:
        folder = tmp_path_factory.mktemp(name)
        found[name] = folder, train(name, folder, CORPUS, 400 if name == "metaspace" else 380)
    return found


@pytest.fixture(scope="session")
def checkpoints(trained, tmp_path_factory):
    """{(backend, shape): (our tokenizer, transformers')}"""
    pairs = {}
    for backend, (source, size) in trained.items():
        for shape, (template, names, _) in SHAPES.items():
            folder = tmp_path_factory.mktemp(f"{backend}_{shape}") / "checkpoint"
            shutil.copytree(source, folder)
            config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
            write_config(folder, config | {"added_tokens_decoder": added(size, names)})
            pairs[backend, shape] = load_tokenizer(folder, "chat"), theirs(folder, backend)
    return pairs
