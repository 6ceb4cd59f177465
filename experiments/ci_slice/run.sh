#!/usr/bin/env bash
# The small slice of the lab that every `make test` measures anew and compares (tests/eval/test_ci_slice.py). Run it again
# only where a change of answers is meant, and say why in the commit. 180 questions, six settings, a minute.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=experiments/ci_slice/results/ci-slice
"${PYTHON:-.venv/bin/python}" -m gripvlm eval --model lab --tasks lab --limit 30 --pruners random,grid,divprune,grip \
  --keep 0.1 --batch 15 --overwrite --out $OUT.json
gzip -nf9 $OUT.samples.jsonl
