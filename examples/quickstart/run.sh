#!/usr/bin/env bash
# Safe RLHF on a tiny world, from SFT to three rounds of PPO-Lag, on a CPU.
#   bash examples/quickstart/run.sh [--layout tp2|pp2|dp2|tp2pp2|single] [--seed N] [--out DIR] [--ablations] [--resume]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash tools/setup.sh
exec .venv/bin/python examples/quickstart/main.py "$@"
