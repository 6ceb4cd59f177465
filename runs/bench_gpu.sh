#!/usr/bin/env bash
# What pruning buys on one GPU: LLaVA-1.5-7B and Qwen2.5-VL-7B shapes with random weights, bf16, batch 1, 8 and 32,
# keeping 50, 22, 11 and 5 % (100 % is the unpruned model, always measured); results/bench-gpu-*.json.
#
#   bash runs/bench_gpu.sh                                  one GPU of 80 GB; meant to take ten minutes at most
#   MODELS="random:tiny random:tiny-qwen" DEVICE=cpu BATCH=1,2 OUT=.lab/try bash runs/bench_gpu.sh     a try
#
# Tested on the two tiny shapes on a CPU only: it has not run on a GPU, and the ten minutes are an estimate. Each model
# is cut off after SECONDS_EACH; what was measured by then is in its file, which says "finished": false. A setting that
# the memory does not hold is written down, and the rest goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
MODELS=${MODELS:-random:llava-1.5-7b random:qwen2.5-vl-7b}
DEVICE=${DEVICE:-cuda}
OUT=${OUT:-results}
SECONDS_EACH=${SECONDS_EACH:-290}
PRUNERS=${PRUNERS:-norm,divprune,grip}

for model in $MODELS; do
  # timeout sends what Ctrl-C sends; bench then writes what it has, and timeout says 124
  timeout --signal=INT --kill-after=60 "$SECONDS_EACH" "$PYTHON" -m gripvlm bench --model "$model" --device "$DEVICE" --dtype bfloat16 \
    --batch "${BATCH:-1,8,32}" --prompt "${PROMPT:-64}" --new "${NEW:-16}" --repeats "${REPEATS:-5}" \
    --pruners "$PRUNERS" --keep "${KEEP:-50%,22%,11%,5%}" \
    --out "$OUT/bench-gpu-${model#random:}.json" ${OVERWRITE:+--overwrite} || {
    code=$?
    [ "$code" = 124 ] || exit "$code"
    echo "$model: cut off after $SECONDS_EACH s; what was measured by then, if anything, is in $OUT" >&2
  }
done
