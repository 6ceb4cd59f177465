#!/usr/bin/env bash
# What pruning buys on this CPU, float32: results/cpu_*.json. Let nothing else run meanwhile; a quarter of an hour.
#
#   bash experiments/speed/bench.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_WAIT_POLICY=PASSIVE # spinning OpenMP threads cost more than they give on a busy machine

run() { # NAME MODEL BATCH REPEATS PRUNERS KEEP
  "$PYTHON" -m gripvlm bench --model "$2" --device cpu --dtype float32 --batch "$3" --repeats "$4" --pruners "$5" \
    --keep "$6" --prompt 64 --new 8 --out "experiments/speed/results/cpu_$1.json" ${OVERWRITE:+--overwrite}
}

for model in ${MODELS:-lab llava-0.5b}; do
  case $model in
    lab) run lab lab 1,16 15 'norm,mmr(norm),divprune,grip,grip:scorer=lab-small' 25%,12.5%,6% ;;
    *)
      run "$model" "random:$model" 1 5 norm,divprune,grip 50%,12.5%,6%
      run "${model}_batch4" "random:$model" 1,4 3 grip 12.5%
      ;;
  esac
done
