#!/usr/bin/env bash
# The two scorers that ship for the lab VLM, from nothing: questions, warm-up, GRPO, export. Interrupt it at any time;
# the same command goes on.
#
#   bash runs/train_grip.sh
#
# Needs `pip install -e .[lab,train]`. Times and results of the shipped scorers: docs/grip.md.
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=${WORK:-.lab/grip}
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_WAIT_POLICY=PASSIVE # spinning OpenMP threads cost more than they give on a busy machine

mkdir -p "$WORK"
[ -d "$WORK/train" ] || "$PYTHON" -m gripvlm.lab.dataset "$WORK/train" --split train --pictures 4000
[ -d "$WORK/val" ] || "$PYTHON" -m gripvlm.lab.dataset "$WORK/val" --split val --pictures 150
DATA=(--data "$WORK/train/questions.jsonl" --val-data "$WORK/val/questions.jsonl" --bf16)

"$PYTHON" -m gripvlm train "${DATA[@]}" --config runs/grip-question.toml --out "$WORK/question"
"$PYTHON" -m gripvlm train "${DATA[@]}" --config runs/grip-blind.toml --out "$WORK/blind"
"$PYTHON" runs/ship_grip.py "$WORK"
