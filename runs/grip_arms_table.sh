#!/usr/bin/env bash
# The arms of runs/grip_arms.sh on the lab's test sample: results/grip-arms-SEED.json, docs/grip-study.md.
#
#   bash runs/grip_arms_table.sh
#
# Ctrl-C and repeat: it goes on. Two seeds at a time, one thread each. LIMIT: questions a family. Files
# results/grip-arms-SEED-*.json with further arms of that seed are read as well; no arm may be in two.
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=${WORK:-.lab/grip}
PYTHON=${PYTHON:-.venv/bin/python}
JOBS=${JOBS:-2}
SEEDS=${SEEDS:-0 1 2}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE LIMIT=${LIMIT:-120} OTHERS=

one() { # SEED
  local arms=()
  for folder in "$WORK"/arms/*-"$1"; do
    [ -f "$folder/scorer.json" ] && name=$(basename "$folder") && arms+=("${name%-*}=$folder")
  done
  arms+=("told_6=$WORK/arms/grpo-$1@0.06")
  OUT=grip-arms-$1.json "$PYTHON" runs/grip_study.py "${arms[@]}"
  gzip -kf9 "results/grip-arms-$1.samples.jsonl"
}
# shellcheck source=runs/jobs.sh
. runs/jobs.sh
# shellcheck disable=SC2086
each $SEEDS
"$PYTHON" runs/grip_arms_train.py "$WORK/arms"
"$PYTHON" runs/write_arms.py
