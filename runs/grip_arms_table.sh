#!/usr/bin/env bash
# The arms of runs/grip_arms.sh on the lab's test sample: results/grip-arms-SEED.json, docs/grip-study.md.
#
#   bash runs/grip_arms_table.sh
#   PART=more bash runs/grip_arms_table.sh      into results/grip-arms-SEED-more.json
#
# Ctrl-C and repeat: it goes on. Two seeds at a time, one thread each. LIMIT: questions a family. Arms that another of
# results/grip-arms-SEED*.json has are left alone; so, in a clone, only new ones are tried, unless those files are removed.
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=${WORK:-.lab/grip}
PYTHON=${PYTHON:-.venv/bin/python}
JOBS=${JOBS:-2}
SEEDS=${SEEDS:-0 1 2}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE LIMIT=${LIMIT:-120} OTHERS=

one() { # SEED
  local arms=() name folder file mine=grip-arms-$1${PART:+-$PART} known=""
  for file in results/grip-arms-"$1"{,-*}.json; do
    [ "$(basename "$file" .json)" = "$mine" ] || [ ! -f "$file" ] || known+=" $("$PYTHON" -c "
import json, sys
print(*{row['pruner'] for row in json.load(open(sys.argv[1]))['means']})" "$file")"
  done
  for folder in "$WORK"/arms/*-"$1"; do
    name=$(basename "$folder") && name=${name%-*}
    [ ! -f "$folder/scorer.json" ] || [[ " $known " = *" $name "* ]] || arms+=("$name=$folder")
  done
  for name in conditional label_free soft soft_slower soft_probability straight perturbed diffprune diffprune_faster; do
    folder=$WORK/arms/$name-$1
    [ ! -f "$folder/scorer.json" ] || [[ " $known " = *" ${name}_last "* ]] || arms+=("${name}_last=$folder@last")
  done
  [[ " $known " = *" told_6 "* ]] || arms+=("told_6=$WORK/arms/grpo-$1@0.06")
  [ ${#arms[@]} -gt 0 ] || return 0
  [ -f "results/$mine.samples.jsonl" ] || [ ! -f "results/$mine.json" ] || gunzip -k "results/$mine.samples.jsonl.gz"
  OUT=$mine.json "$PYTHON" runs/grip_study.py "${arms[@]}"
  gzip -kf9 "results/$mine.samples.jsonl"
}
# shellcheck source=runs/jobs.sh
. runs/jobs.sh
# shellcheck disable=SC2086
each $SEEDS
"$PYTHON" runs/grip_arms_train.py "$WORK/arms"
"$PYTHON" runs/write_arms.py
