#!/usr/bin/env bash
# What pruning buys on one GPU: LLaVA-1.5-7B and Qwen2.5-VL-7B shapes with random weights, bf16, batch 1, 8 and 32,
# keeping 50, 22, 11 and 5 % (100 % is the unpruned model, always measured); results/bench-gpu-*.json. Then the largest
# batch that the memory holds, unpruned and at one budget with one pruner; results/bench-gpu-*-fit.json.
#
#   bash runs/bench_gpu.sh                                  one GPU of 80 GB; meant to take ten minutes at most
#   MODELS="random:tiny random:tiny-qwen" DEVICE=cpu BATCH=1,2 FIT=0 OUT=.lab/try bash runs/bench_gpu.sh     a try
#
# Tested on the two tiny shapes on a CPU only, where FIT=0 leaves the search out: it has not run on a GPU, and the ten
# minutes are an estimate. Each model's times are cut off after SECONDS_EACH, its search after SECONDS_FIT; what was
# measured by then is in its file, which says "finished": false. A setting that the memory does not hold is written
# down, and the rest goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
MODELS=${MODELS:-random:llava-1.5-7b random:qwen2.5-vl-7b}
DEVICE=${DEVICE:-cuda}
OUT=${OUT:-results}
SECONDS_EACH=${SECONDS_EACH:-195}
SECONDS_FIT=${SECONDS_FIT:-95}
FIT=${FIT:-1024}
PRUNERS=${PRUNERS:-norm,divprune,grip}

# measure SECONDS NAME OPTIONS: one run of bench on $model. timeout sends what Ctrl-C sends; bench then writes what it has, and
# timeout says 124
measure() {
  local seconds=$1 name=$2 code=0
  shift 2
  timeout --signal=INT --kill-after=60 "$seconds" "$PYTHON" -m gripvlm bench --model "$model" --device "$DEVICE" \
    --dtype bfloat16 --prompt "${PROMPT:-64}" --new "${NEW:-16}" --out "$OUT/$name.json" ${OVERWRITE:+--overwrite} "$@" ||
    code=$?
  [ "$code" = 0 ] || [ "$code" = 124 ] || exit "$code"
  [ "$code" = 0 ] || echo "$name: cut off after $seconds s; what was measured by then, if anything, is in $OUT" >&2
}

for model in $MODELS; do
  name=bench-gpu-${model#random:}
  measure "$SECONDS_EACH" "$name" --batch "${BATCH:-1,8,32}" --repeats "${REPEATS:-5}" \
    --pruners "$PRUNERS" --keep "${KEEP:-50%,22%,11%,5%}"
  [ "$FIT" = 0 ] || measure "$SECONDS_FIT" "$name-fit" --batch 1 --repeats 1 --pruners norm --keep "${FIT_KEEP:-11%}" --fit "$FIT"
done
