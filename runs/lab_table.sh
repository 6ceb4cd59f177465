#!/usr/bin/env bash
# The lab table: every pruner at 50, 25, 10, 5 and 2.5 % of the tokens, then docs/results.md, its plot and the README's
# numbers. Ctrl-C and repeat: it goes on. Its time and hardware are in results/lab.json.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}

"$PYTHON" -m gripvlm eval --model lab --tasks lab --pruners full,oracle,random,grid,norm,pool,divprune \
  --keep 0.5,0.25,0.1,0.05,0.025 --limit "${LIMIT:-100000}" --batch 16 --out results/lab.json "$@"
gzip -kf9 results/lab.samples.jsonl
"$PYTHON" runs/write_results.py
