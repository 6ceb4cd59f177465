#!/usr/bin/env bash
# lab-dense from the first lab: boards, tower, its tokens, reader, export. Interrupt it at any time; the same command
# resumes.
#
#   bash examples/lab_dense/train.sh              into .lab/dense/out/{model,sample}: gripvlm ask --model .lab/dense/out/model ...
#   OUT=src/gripvlm/lab/data/dense bash examples/lab_dense/train.sh     in place of the lab-dense that ships
#
# Needs `pip install -r examples/lab_vlm/requirements.txt`, a C++ compiler and about 5 GB in $WORK. An accelerator is used
# where there is one (not tried yet); `--layers` of train_reader makes the model deeper.
#
# The weights in the package, 2026-11-28, two cores with AMX, other work beside it: boards 5 minutes, tower 19 (2,750 steps
# of 20 pictures), its tokens 2, reader 141 (5,771 steps, 1.52 million questions). The reader was trained while its recipe
# was written, not in one pass: `where` came in at step 1,121, `corner`, `most`, `single` and `holder` at 3,400, `present`,
# `nowhere` and `overall` at 4,168, and shares and lengths of the schedule changed there; it was stopped when the learning
# rate was down to 4 %.
set -euo pipefail
cd "$(dirname "$0")/../.."
WORK=${WORK:-.lab/dense}
OUT=${OUT:-$WORK/out}
PYTHON=${PYTHON:-.venv/bin/python}
PROCESSES=${PROCESSES:-2}
export PYTHONPATH="examples${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=1 # a process a core is faster than threads (lab_dense/parallel.py)
BOARDS=$WORK/boards SCENES=$WORK/scenes RUN=$WORK/run
parallel() { "$PYTHON" -m torch.distributed.run --nproc-per-node "$PROCESSES" -m "$@"; }

"$PYTHON" -m lab_dense.pool "$BOARDS" --split val --boards 1000 --workers "$PROCESSES"
"$PYTHON" -m lab_dense.pool "$BOARDS" --split train --boards "${BOARDS_TRAIN:-20000}" --workers "$PROCESSES"
"$PYTHON" -m lab_vlm.pool "$SCENES" --split val --scenes 1000 --workers "$PROCESSES"
"$PYTHON" -m lab_vlm.pool "$SCENES" --split train --scenes 6000 --workers "$PROCESSES"
parallel lab_dense.train_tower "$BOARDS" "$SCENES" "$RUN" --steps "${STEPS_TOWER:-2750}"
for split in val train; do
  "$PYTHON" -m lab_dense.features "$SCENES" "$RUN" --split $split
  "$PYTHON" -m lab_dense.features "$BOARDS" "$RUN" --split $split
done
parallel lab_dense.train_reader "$BOARDS" "$SCENES" "$RUN" --steps "${STEPS_READER:-5800}"
"$PYTHON" -m lab_dense.export "$RUN" "$OUT" --families colours,common,most,extreme,holder,missing,present,where,overall
