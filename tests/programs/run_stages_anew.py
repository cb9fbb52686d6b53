"""Started by torchrun: run stages one after another, each in a process group and layout of its own, as from the
command line but without the seconds that a start takes.

usage: run_stages_anew.py PLAN.json

The plan: [[stage, arguments...], ...]. Ends with 1 where one of them does not end well.
"""

import functools
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_safe.cli import main


def run(plan: list[list[str]]) -> bool:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    place = dict(rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    store = dist.TCPStore(host, port, is_master=False)  # torchrun's
    init = dist.init_process_group
    for i, arguments in enumerate(plan):
        # Under a prefix of its own: a group would else meet the addresses that the one before it left.
        dist.init_process_group = functools.partial(init, store=dist.PrefixStore(str(i), store), **place)
        if main(arguments) != 0:
            return False
    return True


if __name__ == "__main__":  # saving a checkpoint starts a process that imports this file again
    sys.exit(not run(json.loads(Path(sys.argv[1]).read_text())))
