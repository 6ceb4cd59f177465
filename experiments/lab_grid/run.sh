#!/usr/bin/env bash
# Every pruner at six budgets (those inside the language model and the vision tower at two), three seeds of random.
#
#   bash experiments/lab_grid/run.sh               100 questions a family; Ctrl-C and repeat: it resumes. Hours on two cores
#   LIMIT=2 OUT=.lab/try bash experiments/lab_grid/run.sh      a try
#   LAB=lab-dense bash experiments/lab_grid/run.sh             the second lab; results go to experiments/lab_dense/
#
# The labs' models have 3 vision blocks and 5 or 8 language layers, so methods that name a block of CLIP's 24 or a layer of
# 32 get another one here. Paired differences, frontiers and pictures: gripvlm report "$OUT"/*.json --out page/
set -euo pipefail
cd "$(dirname "$0")/../.."
LAB=${LAB:-lab} PROCESSES=${PROCESSES:-2}
KEPT=.lab/grid/$LAB
OUT=${OUT:-$KEPT} && mkdir -p "$OUT"
export OMP_NUM_THREADS=1 # processes share the questions: faster than threads

case $LAB in
  # Weights of heads belong to a model: REPORT.md says how they were measured. There are none of the second lab.
  lab) STUDY=lab_grid GRIP="grip,grip:scorer=lab-blind" HAWK="hawk:weights=(0.3129,0.2755,0.1070,0.2032,0.1015)," ;;
  lab-dense) STUDY=lab_dense GRIP="grip:scorer=lab-dense,grip:scorer=lab-dense-blind" HAWK="" ;;
  *) echo "LAB=$LAB: use lab or lab-dense" >&2 && exit 2 ;;
esac
INPUT="full,oracle,downsample,random,grid,norm,pool,divprune,svd_prune,cdpruner,dart_input,fastervlm,fopru,visionzip,vispruner,prumerge,prumerge_plus,hired,hiprune:middle=1,mustdrop,vscan_vision:shallow=0,ptp_vision,otprune,scope,holov,prunesid,apet_input,${HAWK}mmr(norm),spread(norm),restore(holov),ensemble(norm,divprune),$GRIP,mmr(${GRIP%%,*}),gumbel(${GRIP%%,*})"
LLM="full,downsample,random,grid,${GRIP%%,grip*},fastv:layer=1,dart:layer=1,sparsevlm,pyramiddrop,pumer,ptp:layer=1,mustdrop_llm,vscan:shallow=0,apet,clse,v2drop,priortr,vlm_pruner:layer=1,ivc_prune:layer=6,tome"

grid() { # NAME BUDGETS PRUNERS
  local ask=(.venv/bin/python -m gripvlm eval --model "$LAB" --tasks "$LAB" --seeds 0,1,2 --batch 16 --limit "${LIMIT:-100}"
    --keep "$2" --pruners "$3" --out "$OUT/$1.json")
  for shard in $(seq "$PROCESSES"); do "${ask[@]}" --shard "$shard/$PROCESSES" & done
  wait
  "${ask[@]}"
  [ "$OUT" != "$KEPT" ] || .venv/bin/python -m experiments.results "$OUT/$1.json" "$STUDY/results/$1"
}
grid input 0.5,0.25,0.125,0.06,0.03,0.015 "$INPUT"
[ "$LAB" != lab ] || grid llm 0.5,0.3 "$LLM"
