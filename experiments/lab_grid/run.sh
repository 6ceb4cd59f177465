#!/usr/bin/env bash
# Every pruner at six budgets (those inside the language model and the vision tower at two), three seeds of random.
#
#   bash experiments/lab_grid/run.sh               100 questions a family; Ctrl-C and repeat: it resumes. Hours on two cores
#   LIMIT=2 OUT=.lab/try bash experiments/lab_grid/run.sh      a try
#
# The lab's model has 3 vision blocks and 5 language layers, so methods that name a block of CLIP's 24 or a layer of 32
# get another one here. Paired differences, frontiers and pictures: gripvlm report "$OUT"/*.json --out page/
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-.lab/grid} && mkdir -p "$OUT"
export OMP_WAIT_POLICY=PASSIVE # spinning OpenMP threads cost more than they give on a busy machine

INPUT="full,oracle,random,grid,norm,pool,divprune,svd_prune,cdpruner,dart_input,fastervlm,fopru,visionzip,vispruner,prumerge,prumerge_plus,hired,hiprune:middle=1,mustdrop,vscan_vision:shallow=0,ptp_vision,otprune,scope,holov,prunesid,apet_input,mmr(norm),spread(norm),restore(holov),ensemble(norm,divprune),grip,grip:scorer=lab-blind"
LLM="full,random,grid,grip,fastv:layer=1,dart:layer=1,sparsevlm,pyramiddrop,pumer,ptp:layer=1,mustdrop_llm,vscan:shallow=0,apet,clse,v2drop,priortr,vlm_pruner:layer=1,tome"

grid() { # NAME BUDGETS PRUNERS
  .venv/bin/python -m gripvlm eval --model lab --tasks lab --seeds 0,1,2 --batch 16 --limit "${LIMIT:-100}" --keep "$2" \
    --pruners "$3" --out "$OUT/$1.json"
  [ "$OUT" != .lab/grid ] || .venv/bin/python -m experiments.results "$OUT/$1.json" "lab_grid/results/$1"
}
grid input 0.5,0.25,0.125,0.06,0.03,0.015 "$INPUT"
grid llm 0.5,0.3 "$LLM"
