#!/usr/bin/env bash
# The three scorers that ship for the lab VLM, from nothing: questions, warm-up, GRPO, export. Interrupt it at any time;
# the same command goes on.
#
#   bash runs/train_grip.sh
#
# Needs `pip install -e .[lab,train]`. Two chains at a time (JOBS=2), one thread each: the scorer that reads the question,
# and the other two. Run in one pass on 2026-11-23, 83 minutes on two cores that did other work besides: questions 1.5,
# both chains 56, validation and export 26. In that pass all three had BUDGETS below; only its blind scorer ships. The other
# two are of 2026-11-22 and -23, made by these commands one by one (docs/log.md says how they compare).
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=${WORK:-.lab/grip}
PYTHON=${PYTHON:-.venv/bin/python}
JOBS=${JOBS:-2}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE # spinning OpenMP threads cost more than they give on a busy machine

DATA=(--data "$WORK/train/questions.jsonl" --val-data "$WORK/val/questions.jsonl" --bf16)
GRPO=(--keep-high 0.25 --val-every 200 --val-questions 512 --val-keeps 0.125,0.06,0.03,0.015)
BUDGETS=(--scale-rewards budget --num-iterations 2)
# shellcheck source=runs/jobs.sh
. runs/jobs.sh

WARMUP=(--reward log_prob --warmup-steps) # judges the step that is kept, as when the scorers that ship were made

train() { # STAGE FOLDER ARGUMENTS...
  local stage=$1 folder=$2
  shift 2
  mkdir -p "$WORK/$folder"
  echo "$(date +%T) $folder"
  "$PYTHON" -m gripvlm train "$stage" "${DATA[@]}" --out "$WORK/$folder" "$@" >>"$WORK/$folder/log" 2>&1 ||
    { echo "$folder ended before its time: $WORK/$folder/log" >&2; exit 1; }
}

legs() { # FOLDER ARGUMENTS...: two runs of GRPO in a row
  local folder=$1
  shift
  train grpo "${folder}first" "${GRPO[@]}" --start "$WORK/${folder}warmup" --steps 800 --learning-rate 3e-4 "$@"
  train grpo "${folder}question" "${GRPO[@]}" --start "$WORK/${folder}first" --steps 800 --learning-rate 4e-4 --seed 1 "$@"
}

question() {
  train warmup warmup "${WARMUP[@]}" 500 --val-every 125
  legs ""
}

others() {
  train warmup warmup-blind --no-question "${WARMUP[@]}" 400
  train grpo blind "${GRPO[@]}" "${BUDGETS[@]}" --no-question --start "$WORK/warmup-blind" --steps 600
  local size=(--width 64 --blocks 2)
  train warmup small/warmup "${size[@]}" "${WARMUP[@]}" 800 --val-every 200
  legs small/ "${size[@]}"
}
one() { "$1"; }

mkdir -p "$WORK"
[ -d "$WORK/train" ] || "$PYTHON" -m gripvlm.lab.dataset "$WORK/train" --split train --pictures 4000
[ -d "$WORK/val" ] || "$PYTHON" -m gripvlm.lab.dataset "$WORK/val" --split val --pictures 150
each question others
"$PYTHON" runs/ship_grip.py "$WORK"
