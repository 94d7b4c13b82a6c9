#!/usr/bin/env bash
# Run every benchmark that has data and write OUT/report.html and OUT/results.json:
#     evaluation/run_all.sh EXPORT DATA OUT [--prompts vlgpt-i] [--clip DIR] [--num-processes N] [--device cuda] ...
# A killed run goes on where it stopped when the same command is given again.
set -euo pipefail
if [ "$#" -lt 3 ]; then
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
fi
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m evaluation.run_all "$@"
