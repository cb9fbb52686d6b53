"""A run folder as a user meets it: claimed, stopped, damaged, resumed; one process, the sft stage."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_safe.cli import parse, run_stage
from megatron_safe.errors import UserError


def truncate(checkpoint: Path) -> Path:
    file = max((checkpoint / "weights").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-7])
    return file


@pytest.fixture
def sft(project, runtime, tmp_path):
    """Run the sft stage into tmp_path/sft with these settings."""

    def run(*more: str):
        run_stage("sft", parse("sft", project.arguments("sft", tmp_path / "sft", "one", *more)), runtime)
        return tmp_path / "sft"

    return run


def test_a_run_folder_is_not_overwritten(sft):
    sft("--run.stop_after=1")
    with pytest.raises(UserError, match="run.out .*sft: holds a run already; .*--run.resume auto"):
        sft()


def test_resuming_with_another_seed(sft):
    sft("--run.stop_after=1")
    with pytest.raises(UserError, match="run.seed: expected 0, the seed of the run in .*, found 3"):
        sft("--run.resume=auto", "--run.seed=3")


def test_resuming_another_stages_run(sft, project, runtime, tmp_path):
    folder = sft("--run.stop_after=1")
    arguments = project.arguments("reward", tmp_path / "reward", "one", f"--run.out={folder}", "--run.resume=auto")
    with pytest.raises(UserError, match="run.out .*: expected a run of reward or a new folder, found one of sft"):
        run_stage("reward", parse("reward", arguments), runtime)


def test_resuming_with_another_tokenizer(sft, project, tmp_path):
    sft("--run.stop_after=1")
    other = shutil.copytree(project.data / "tokenizer", tmp_path / "tokenizer") / "tokenizer.json"
    content = json.loads(other.read_text())
    content["model"]["vocab"]["one-more"] = 43
    other.write_text(json.dumps(content))
    with pytest.raises(UserError, match="expected the tokenizer's vocabulary of 44 tokens, found a model of 43"):
        sft("--run.resume=auto", f"--tokenizer.path={other.parent}")


def test_resuming_from_the_last_good_one_repeats_what_was_lost(sft, metrics_of, tmp_path, capfd):
    whole = metrics_of(sft("--run.save_every=1", "--run.keep_last=9"))
    shutil.rmtree(tmp_path / "sft")
    folder = sft("--run.save_every=1", "--run.keep_last=9", "--run.stop_after=3")
    file = truncate(folder / "checkpoints" / "step_00000003")
    (folder / "checkpoints" / "step_00000002" / "manifest.json").unlink()
    sft("--run.save_every=1", "--run.keep_last=9", "--run.resume=auto")
    assert f"warning: checkpoint is damaged, using the one before: {file}" in capfd.readouterr().out
    assert metrics_of(folder) == whole and len(whole) == 4


def test_resuming_where_all_is_damaged(sft):
    folder = sft("--run.stop_after=1")
    file = truncate(folder / "checkpoints" / "step_00000001")
    with pytest.raises(UserError, match=f"no good checkpoint is left: {file}: expected .* bytes, found"):
        sft("--run.resume=auto")
