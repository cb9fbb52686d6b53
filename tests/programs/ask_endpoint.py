"""Started by torchrun: every rank judges by an endpoint, within a budget and then beyond it.

usage: ask_endpoint.py URL FOLDER

Each rank writes what it knows to FOLDER/rank0.json, rank1.json.
"""

import json
import sys
from pathlib import Path

from megatron_safe.config import EndpointConfig, ParallelConfig
from megatron_safe.errors import UserError
from megatron_safe.evaluation.answers import Answer
from megatron_safe.evaluation.judges import EndpointJudge
from megatron_safe.runtime import start


def main(url: str, folder: Path) -> None:
    config = EndpointConfig(url, "m", key_env=None, input_price=0.0, output_price=1.0, max_dollars=0.0011)
    with start(ParallelConfig(timeout_seconds=60.0), 0) as runtime:
        judge = EndpointJudge(config, folder / "replies.jsonl", runtime)
        answers = [Answer("how", "help 7 harm 9"), Answer("how", "help 2 harm 3")]
        # The second one is safer: its `harm` is how harmless the server finds it.
        harmful = [one.harmful for one in judge.judge(answers)]
        (preference,) = judge.compare([(answers[0], Answer("how", "help 2 harm 10"))])
        counts = judge.counts
        try:
            judge.judge([Answer("how", "help 1 harm 1")])
            error = ""
        except UserError as raised:
            error = str(raised)
        found = {
            "harmful": harmful,
            "preference": [preference.helpful, preference.harmless],
            "counts": counts,
            "error": error,
        }
        (folder / f"rank{runtime.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
