#!/usr/bin/env bash
# The lab VLM from nothing: scenes, tower, reader, export. Interrupt it at any time; the same command goes on.
#
#   bash runs/train_lab.sh
#
# Needs `pip install -e .[lab]` (icon fonts, typefaces, photographs) and about 4 GB in $WORK. On two cores with
# AVX512-BF16: pool 10 minutes, tower 28, reader 68 and 26.
#
# The shipped weights, 2026-11-22: 91,000 pictures for the tower in 27.5 minutes, then 3,700 reader steps (1.55 million
# questions) in 68 minutes and 1,400 more (0.66 million) in 26; results in docs/results.md. They were trained while this
# recipe was being written: the first 2,300 tower steps saw an earlier pool, and the reader's tower was frozen and its
# stepping stones absent for the first 1,400 steps (docs/log.md). A single pass of this script has not been run.
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=${WORK:-.lab}
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_WAIT_POLICY=PASSIVE # spinning OpenMP threads cost more than they give on a busy machine

"$PYTHON" -m gripvlm.lab.pool "$WORK/pool" --split val --scenes 1000
"$PYTHON" -m gripvlm.lab.pool "$WORK/pool" --split train --scenes "${SCENES:-60000}"
"$PYTHON" -m gripvlm.lab.train_tower "$WORK/pool" "$WORK/run" --minutes "${MINUTES_TOWER:-28}" --bf16
"$PYTHON" -m gripvlm.lab.train_reader "$WORK/pool" "$WORK/run" --steps "${STEPS_READER:-3700}"
"$PYTHON" -m gripvlm.lab.train_reader "$WORK/pool" "$WORK/run" --start reader --name longer --steps 1400 --rate 1e-3 \
  --hint 0
"$PYTHON" -m gripvlm.lab.export "$WORK/run" --reader longer
