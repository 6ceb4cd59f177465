#!/usr/bin/env bash
# Grip against everything else on the lab's test sample: results/grip.json and docs/grip-results.md.
#
#   bash runs/grip_table.sh [ARM=FOLDER ...]      further scorers, such as warmup=.lab/grip/warmup
#
# Ctrl-C and repeat: it goes on. Its time and hardware are in results/grip.json.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}

"$PYTHON" runs/grip_study.py "$@"
gzip -kf9 results/grip.samples.jsonl
"$PYTHON" runs/write_grip.py
