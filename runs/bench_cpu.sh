#!/usr/bin/env bash
# What pruning buys on this CPU: the lab's model and a 0.5B-class random one (CLIP-L/14-336 and Qwen2-0.5B, 576 visual
# tokens), float32; results/bench-cpu-lab.json and results/bench-cpu-llava-0.5b.json.
#
#   bash runs/bench_cpu.sh                   let nothing else run on the machine meanwhile; half an hour on two cores
#   BATCH=1,16 bash runs/bench_cpu.sh        some two hours (both are estimates from FLOPs)
#   MODELS=random:tiny BATCH=1,2 OUT=.lab/try bash runs/bench_cpu.sh     a try
#
# Not run as it stands: the duration is an estimate from FLOPs.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
MODELS=${MODELS:-lab random:llava-0.5b}
OUT=${OUT:-results}
export OMP_WAIT_POLICY=PASSIVE # spinning OpenMP threads cost more than they give on a busy machine

for model in $MODELS; do
  "$PYTHON" -m gripvlm bench --model "$model" --device cpu --dtype float32 --batch "${BATCH:-1,4}" \
    --prompt "${PROMPT:-64}" --new "${NEW:-8}" --repeats "${REPEATS:-5}" --pruners "${PRUNERS:-norm,divprune,grip}" \
    --keep "${KEEP:-50%,10%}" --out "$OUT/bench-cpu-${model#random:}.json" ${OVERWRITE:+--overwrite}
done
