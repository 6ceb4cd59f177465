#!/usr/bin/env bash
# The whole lab grid: every pruner at six budgets, three seeds of those that have one, on the lab's test sample;
# results/lab-grid.json and results/lab-grid-llm.json, their answers, docs/zoo.md and their report in docs/lab-grid/.
#
#   bash runs/lab_grid.sh                    all of it; Ctrl-C and repeat: it goes on
#   SHARD=1/2 bash runs/lab_grid.sh          one machine's half (the other: 2/2); bring the files together in results/
#   MERGE=2 bash runs/lab_grid.sh            merge two shards and write the report
#   LIMIT=100 bash runs/lab_grid.sh          100 questions a family; what is committed was made so
#   LIMIT=2 OUT=.lab/try bash runs/lab_grid.sh     a try
#   AGAIN=1 LIMIT=100 bash runs/lab_grid.sh  only the methods that changed since, into results/lab-grid*-later.json, which
#                                            docs/zoo.md then shows in their place; remove these after a whole grid
#
# The lab's model has 3 vision blocks and 5 language layers, so methods that name a block of CLIP's 24 or a layer of 32
# are told another one here; inside 5 layers no average far below 30 % can be met. Hardware and time are in the files.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-results}
PAGE=${PAGE:-docs/lab-grid}
[ "$OUT" = results ] || PAGE=$OUT/report
export OMP_WAIT_POLICY=PASSIVE # spinning OpenMP threads cost more than they give on a busy machine

INPUT="full,oracle,random,grid,norm,pool,divprune,svd_prune,cdpruner,dart_input,fastervlm,fopru,visionzip,vispruner,prumerge,prumerge_plus,hired,hiprune:middle=1,mustdrop,vscan_vision:shallow=0,ptp_vision,mmr(norm),spread(norm),ensemble(norm,divprune),grip,grip:scorer=lab-blind"
INSIDE="full,random,grid,grip,fastv:layer=1,dart:layer=1,sparsevlm,pyramiddrop,pumer,ptp:layer=1,mustdrop_llm,vscan:shallow=0,tome"
LATER=
if [ -n "${AGAIN:-}" ]; then
  INPUT="full,vispruner,hiprune:middle=1,vscan_vision:shallow=0"
  INSIDE="full,dart:layer=1,sparsevlm,pumer,mustdrop_llm,vscan:shallow=0"
  LATER=-later
fi
COMMON=(--model lab --tasks lab --seeds 0,1,2 --batch 16 ${LIMIT:+--limit "$LIMIT"} ${OVERWRITE:+--overwrite})

grid() { # NAME KEEPS PRUNERS
  if [ -n "${MERGE:-}" ]; then
    local parts=()
    for i in $(seq "$MERGE"); do parts+=("$OUT/$1-$i-of-$MERGE.json"); done
    "$PYTHON" -m gripvlm merge "${parts[@]}" --out "$OUT/$1.json" --overwrite
  elif [ -n "${SHARD:-}" ]; then
    "$PYTHON" -m gripvlm eval "${COMMON[@]}" --keep "$2" --pruners "$3" --shard "$SHARD" --out "$OUT/$1-${SHARD/\//-of-}.json"
  else
    "$PYTHON" -m gripvlm eval "${COMMON[@]}" --keep "$2" --pruners "$3" --out "$OUT/$1.json"
  fi
}

grid "lab-grid$LATER" 0.5,0.25,0.125,0.06,0.03,0.015 "$INPUT"
grid "lab-grid-llm$LATER" 0.5,0.3 "$INSIDE"
[ -z "${SHARD:-}" ] || exit 0
[ -n "$LATER" ] || "$PYTHON" -m gripvlm report "$OUT/lab-grid.json" "$OUT/lab-grid-llm.json" --out "$PAGE" --title "Every pruner on the lab"
gzip -nkf9 "$OUT/lab-grid$LATER.samples.jsonl" "$OUT/lab-grid-llm$LATER.samples.jsonl"
[ "$OUT" != results ] || { "$PYTHON" runs/write_zoo.py && "$PYTHON" runs/methods_table.py; }
