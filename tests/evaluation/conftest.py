"""A tokenizer of words, and one report of a run made up by hand, drawn once."""

import warnings

import pytest
from made_up_report import SCORES, SUMMARY, remember_figures, write_runs
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_safe.data.tokenizer import load_tokenizer
from megatron_safe.evaluation.report import write_report

WORDS = [
    "ask", "say", "water", "the", "fern", "twice", "a", "week", "warm", "lamp", "rice", "boil", "sweep", "floor",
    "green", "is", "how", "to", "please", "no",
]  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A word a token; <unk> 0, <s> 1, </s> 2, <pad> 3."""
    folder = tmp_path_factory.mktemp("words")
    vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """The folder of the report, and the figures behind its pictures."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib complains of what it cannot draw
        figures = remember_figures(patch)
        write_report(folder / "new" / "report", SUMMARY, write_runs(folder), SCORES)
    return folder / "new" / "report", figures
