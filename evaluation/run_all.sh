#!/usr/bin/env bash
# Run every benchmark that has data and write OUT/report.html and OUT/results.json:
#     evaluation/run_all.sh EXPORT DATA OUT [--prompts vlgpt-i] [--clip DIR] [--num-processes N] [--device cuda] ...
# `evaluation/run_all.sh --help` lists all options.
# A killed run goes on where it stopped when the same command is given again.
set -euo pipefail
# The caller's folder stays the working folder: its relative paths and its own packages are meant.
export PYTHONPATH="$(cd "$(dirname "$0")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m evaluation.run_all "$@"
