#!/usr/bin/env bash
# Make .venv with everything in it: called by `make setup`, safe to run again at any time, also after an interruption.
#
#   PYTHON       the interpreter to build on (default: the first of python3, python3.14 ... that is 3.11 or newer)
#   TORCH_INDEX  where pip takes torch from, for a build that your default package index does not carry
#   VENV         the environment (default: .venv)
#   CONSTRAINTS  pip's file of constraints (default: constraints-cpu.txt where no NVIDIA GPU is found)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
installing=$venv/.installing # holds the process that is at it; left behind only by an interruption

fresh_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if fresh_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: ${PYTHON:-python3} is not a working Python 3.11 or newer; say which one to use: make PYTHON=python3.12 ..." >&2
    exit 2
}

if [ -f "$installing" ]; then
    if kill -0 "$(cat "$installing")" 2>/dev/null; then
        echo "setup: another set-up is at work here (process $(cat "$installing")); wait for it; if there is none, remove $venv." >&2
        exit 2
    fi
    echo "setup: the last set-up was interrupted; starting over."
    rm -rf "$venv"
fi
if [ -e "$venv" ] && ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "setup: $venv does not work (any more); creating it again."
    rm -rf "$venv"
fi
if [ ! -e "$venv" ]; then
    python=$(find_python)
    mkdir "$venv"
    echo $$ >"$installing"
    "$python" -m venv "$venv"
fi
echo $$ >"$installing"

pip=
trap 'kill $pip 2>/dev/null || true; exit 130' INT TERM HUP # or pip would go on without us

pip_install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input -qq "$@" &
    pip=$!
    wait "$pip"
}

# torch goes first and alone: left to the resolver, a machine without a GPU would get gigabytes of CUDA libraries.
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    echo "setup: an NVIDIA GPU is here: installing torch with CUDA."
    pins=(${CONSTRAINTS:+-c "$CONSTRAINTS"})
else
    echo "setup: no NVIDIA GPU is here: installing torch for the CPU."
    pins=(-c "${CONSTRAINTS:-constraints-cpu.txt}")
fi
pip_install ${pins[@]+"${pins[@]}"} ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
echo "setup: installing the rest (about two minutes)."
pip_install ${pins[@]+"${pins[@]}"} -e '.[dev,docs]'

rm "$installing"
touch "$venv/.ready"
echo "setup: done. The commands titans-video and accelerate are in $venv/bin."
