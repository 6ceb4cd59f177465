#!/usr/bin/env bash
# The small slice of the lab that every `make test` measures anew and compares (tests/eval/test_ci_slice.py):
# results/ci-slice.json. Run it again only where a change of answers is meant, and say why in the commit.
#
#   bash runs/ci_slice.sh
#
# 180 questions, six arms; its time and hardware are in the file.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}

"$PYTHON" -m gripvlm eval --model lab --tasks lab --limit 30 --pruners random,grid,divprune,grip --keep 0.1 \
  --batch 15 --overwrite --out results/ci-slice.json
gzip -nf9 results/ci-slice.samples.jsonl
