#!/usr/bin/env bash
# The lab VLM from nothing: scenes, tower, reader, export. Interrupt it at any time; the same command goes on.
#
#   bash runs/train_lab.sh                 # about two hours on two cores (AVX512-BF16)
#   MINUTES_READER=30 bash runs/train_lab.sh
#
# Needs `pip install -e .[lab]` (icon fonts, typefaces, photographs) and about 3 GB in $WORK.
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=${WORK:-.lab}
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_WAIT_POLICY=PASSIVE # spinning OpenMP threads cost more than they give on a busy machine

"$PYTHON" -m gripvlm.lab.pool "$WORK/pool" --split val --scenes 1000
"$PYTHON" -m gripvlm.lab.pool "$WORK/pool" --split train --scenes "${SCENES:-60000}"
"$PYTHON" -m gripvlm.lab.train_tower "$WORK/pool" "$WORK/run" --minutes "${MINUTES_TOWER:-24}" --bf16
"$PYTHON" -m gripvlm.lab.train_reader "$WORK/pool" "$WORK/run" --minutes "${MINUTES_READER:-60}"
"$PYTHON" -m gripvlm.lab.export "$WORK/run"
