#!/usr/bin/env bash
# Makes .venv in the repository root with everything installed; returns at once when that is already so.
#
#   bash tools/setup.sh                     # with python3
#   PYTHON=python3.12 bash tools/setup.sh   # with another interpreter, 3.10 to 3.12
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly CPU_INDEX=https://download.pytorch.org/whl/cpu
readonly log=.venv/setup.log
readonly stamp=.venv/setup.stamp            # three lines: the folder, the torch build, the fingerprint
readonly unfinished=.venv/setup.unfinished  # there while an installation runs, and after one that was cut off

# Settings of the caller's shell that would send packages, or other versions of them, elsewhere.
unset PIP_CONSTRAINT PIP_USER PIP_TARGET PIP_PREFIX

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
supported() { [[ "$(version_of "$1")" =~ ^3\.1[012]$ ]]; }
has_gpu() { [[ "$(nvidia-smi -L 2>/dev/null)" == *GPU* ]]; }
stamp_line() { sed -n "$1p" "$stamp" 2>/dev/null; }
fingerprint() { { cat setup.py tools/constraints.txt tools/setup.sh; .venv/bin/python -VV; } | sha256sum | cut -d' ' -f1; }

# Why an existing .venv cannot be built upon; prints nothing when it can.
spoiled() {
  if ! supported .venv/bin/python; then
    echo "its Python does not run or is not 3.10 to 3.12"
  elif [[ -n "${PYTHON:-}" && "$(version_of "$PYTHON")" != "$(version_of .venv/bin/python)" ]]; then
    echo "it has another Python than PYTHON=$PYTHON"
  elif [[ -e "$unfinished" ]]; then
    echo "an earlier installation did not finish"
  elif [[ -f "$stamp" && "$(stamp_line 1)" != "$PWD" ]]; then
    echo "it was made for another folder"
  elif [[ "$(stamp_line 2)" == cpu ]] && has_gpu; then
    echo "it has torch's CPU build and there is a GPU now"
  fi
}

ready() { [[ -f "$stamp" && -z "$(spoiled)" && "$(stamp_line 3)" == "$(fingerprint)" ]]; }

make_venv() {
  local python=${PYTHON:-python3} found reason output
  if [[ -d .venv ]]; then
    reason=$(spoiled)
    if [[ -z "$reason" ]]; then return; fi
    say "starting .venv afresh: $reason"
  fi
  supported "$python" || {
    found=$(version_of "$python") || found="nothing that runs"
    die "Python 3.10, 3.11 or 3.12 is needed, '$python' is $found. Choose one: PYTHON=python3.12 bash tools/setup.sh"
  }
  if [[ -L .venv ]]; then rm .venv; fi  # what it links to is somebody else's
  say "making .venv with $("$python" -V)"
  output=$("$python" -m venv --clear .venv 2>&1) || {
    rm -rf .venv
    die "'$python -m venv' failed (on Debian and Ubuntu: apt install python3-venv). It said: $output"
  }
}

pip_install() {
  .venv/bin/python -m pip install --no-input --disable-pip-version-check -c tools/constraints.txt "$@" >>"$log" 2>&1 || {
    tail -n 20 "$log" >&2
    die "pip failed; the whole log is $log"
  }
}

# `timeout` and not only urlopen's own: that one does not bound the name look-up.
cpu_index_answers() {
  timeout 3 .venv/bin/python -c "import urllib.request; urllib.request.urlopen('$CPU_INDEX/torch/', timeout=3)" 2>/dev/null
}

install_torch() {
  local torch
  torch=$(grep '^torch==' tools/constraints.txt)
  if [[ "$1" == cuda ]]; then
    say "installing $torch, CUDA build (several GB)"
    pip_install "$torch"
  elif cpu_index_answers; then
    say "installing $torch, CPU build from PyTorch's own index"
    # Without dependencies: that index keeps only some versions of them, the next call takes the pinned ones.
    pip_install --no-deps --index-url "$CPU_INDEX" "$torch"
  else
    say "installing $torch from the configured package index (PyTorch's CPU index did not answer in 3 s)"
    pip_install "$torch"
  fi
}

if ready; then
  say ".venv is up to date"
  exit
fi

# One installation at a time. The lock sits on a file that is always there, since .venv may be thrown away meanwhile.
if command -v flock >/dev/null; then
  exec 9>>tools/constraints.txt
  flock -n 9 || { say "another setup is running here, waiting for it"; flock 9; }
  if ready; then
    say ".venv is up to date"
    exit
  fi
fi

SECONDS=0
make_venv
touch "$unfinished"
rm -f "$stamp"
date >"$log"
build=cpu
if has_gpu; then build=cuda; fi
pip_install setuptools  # builds this package below, so that no build environment has to be downloaded
install_torch "$build"
say "installing megatron-safe and what its tests need"
pip_install --no-build-isolation -e '.[test]'
.venv/bin/python -c 'import torch, megatron.core, megatron_safe' >>"$log" 2>&1 || {
  tail -n 20 "$log" >&2
  die "installed, but importing torch, megatron.core and megatron_safe failed; the whole log is $log"
}
printf '%s\n' "$PWD" "$build" "$(fingerprint)" >"$stamp"
rm "$unfinished"
say "done in $SECONDS s"
