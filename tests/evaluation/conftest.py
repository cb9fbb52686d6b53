"""One report of a run made up by hand, drawn once."""

import warnings

import pytest
from made_up_report import SCORES, SUMMARY, remember_figures, write_runs

from megatron_safe.evaluation.report import write_report


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """The folder of the report, and the figures behind its pictures."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib complains of what it cannot draw
        figures = remember_figures(patch)
        write_report(folder / "new" / "report", SUMMARY, write_runs(folder), SCORES)
    return folder / "new" / "report", figures
