"""Run `megatron-safe` with the arguments after the first; each rank writes its exit code to FOLDER/code-RANK.

Exits 0 itself: torchrun would stop the other ranks.
"""

import os
import sys
from pathlib import Path

from megatron_safe.cli import main

if __name__ == "__main__":  # saving a checkpoint starts processes that import this file
    folder, *arguments = sys.argv[1:]
    code = main(arguments)
    (Path(folder) / f"code-{os.environ['RANK']}").write_text(str(code))
