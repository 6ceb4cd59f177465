#!/usr/bin/env bash
# The three scorers that ship for the lab VLM, from nothing: questions, warm-up, GRPO, export. Interrupt it at any time;
# the same command goes on.
#
#   bash runs/train_grip.sh
#
# Needs `pip install -e .[lab,train]`. The shipped scorers, 2026-11-22, one thread each: questions 8 minutes, warm-up 10,
# GRPO 12 and 12; without the question 11 and 11; the small one, on a busy machine, 15, 17 and 12. Results:
# docs/grip-results.md. They were made by these commands one by
# one; the script as a whole has not been run.
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=${WORK:-.lab/grip}
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_WAIT_POLICY=PASSIVE # spinning OpenMP threads cost more than they give on a busy machine

mkdir -p "$WORK"
[ -d "$WORK/train" ] || "$PYTHON" -m gripvlm.lab.dataset "$WORK/train" --split train --pictures 4000
[ -d "$WORK/val" ] || "$PYTHON" -m gripvlm.lab.dataset "$WORK/val" --split val --pictures 150
DATA=(--data "$WORK/train/questions.jsonl" --val-data "$WORK/val/questions.jsonl" --bf16)

GRPO=(--reward probability --scale-rewards batch --keep-high 0.25 --val-questions 512 --val-keeps 0.125,0.06,0.03,0.015)

"$PYTHON" -m gripvlm train warmup "${DATA[@]}" --teacher gradient --warmup-steps 500 --val-every 125 \
  --out "$WORK/warmup"
"$PYTHON" -m gripvlm train grpo "${DATA[@]}" "${GRPO[@]}" --start "$WORK/warmup" --steps 800 --learning-rate 3e-4 \
  --out "$WORK/first"
"$PYTHON" -m gripvlm train grpo "${DATA[@]}" "${GRPO[@]}" --start "$WORK/first" --steps 800 --learning-rate 4e-4 \
  --seed 1 --out "$WORK/question"

"$PYTHON" -m gripvlm train warmup "${DATA[@]}" --no-question --teacher gradient --warmup-steps 400 \
  --out "$WORK/warmup-blind"
"$PYTHON" -m gripvlm train grpo "${DATA[@]}" "${GRPO[@]}" --no-question --start "$WORK/warmup-blind" --steps 600 \
  --learning-rate 3e-4 --out "$WORK/blind"

SMALL=(--width 64 --blocks 2)
"$PYTHON" -m gripvlm train warmup "${DATA[@]}" "${SMALL[@]}" --teacher gradient --warmup-steps 800 --val-every 200 \
  --out "$WORK/small/warmup"
"$PYTHON" -m gripvlm train grpo "${DATA[@]}" "${GRPO[@]}" "${SMALL[@]}" --start "$WORK/small/warmup" --steps 800 \
  --learning-rate 3e-4 --out "$WORK/small/first"
"$PYTHON" -m gripvlm train grpo "${DATA[@]}" "${GRPO[@]}" "${SMALL[@]}" --start "$WORK/small/first" --steps 800 \
  --learning-rate 4e-4 --seed 1 --out "$WORK/small/question"

"$PYTHON" runs/ship_grip.py "$WORK"
