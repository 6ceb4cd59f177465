#!/usr/bin/env bash
# What pruning buys on this CPU: the lab's model and a 0.5B-class random one (CLIP-L/14-336 and Qwen2-0.5B, 576 visual
# tokens), float32; results/bench-cpu-*.json, which runs/write_speed.py puts into docs/speed.md.
#
#   bash runs/bench_cpu.sh                   let nothing else run on the machine meanwhile; a quarter of an hour
#   MODELS=tiny OUT=.lab/try bash runs/bench_cpu.sh     a try of every command on a tiny random model
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
MODELS=${MODELS:-lab llava-0.5b}
OUT=${OUT:-results}
export OMP_WAIT_POLICY=PASSIVE # spinning OpenMP threads cost more than they give on a busy machine

run() { # NAME MODEL BATCH REPEATS PRUNERS KEEP
  "$PYTHON" -m gripvlm bench --model "$2" --device cpu --dtype float32 --batch "$3" --repeats "$4" --pruners "$5" \
    --keep "$6" --prompt 64 --new 8 --out "$OUT/bench-cpu-$1.json" ${OVERWRITE:+--overwrite}
}

for model in $MODELS; do
  case $model in
    lab) run lab lab 1,16 15 'norm,mmr(norm),divprune,grip,grip:scorer=lab-small' 25%,12.5%,6% ;;
    tiny)
      run tiny random:tiny 1,2 3 norm,divprune,grip 50%,12.5%
      run tiny-batch random:tiny 1,2 2 grip 12.5%
      ;;
    *)
      run "$model" "random:$model" 1 5 norm,divprune,grip 50%,12.5%,6%
      run "$model-batch" "random:$model" 1,4 3 grip 12.5%
      ;;
  esac
done
