#!/usr/bin/env bash
# Sets up .venv where needed and runs the tests: bash tests/run.sh [pytest arguments, paths from the repository root]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
# One thread a process: the multi-process tests would otherwise fight over the cores.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest "$@"
