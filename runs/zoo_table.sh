#!/usr/bin/env bash
# Every pruner on the lab: results/zoo.json and docs/zoo.md. Ctrl-C and repeat: it goes on.
#
# The lab's model has 3 vision blocks and 5 language layers, so methods that name a block of CLIP's 24 or a layer of 32
# are told another one here. Inside 5 layers a cut saves little: an average of 10 % of the tokens is out of reach for
# most, so those run at 50 and 30 %.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
LIMIT=${LIMIT:-100}

"$PYTHON" -m gripvlm eval --model lab --tasks lab --limit "$LIMIT" --batch 16 --keep 0.5,0.25,0.1,0.05 \
  --pruners "full,oracle,random,random:seed=1,random:seed=2,grid,norm,pool,divprune,svd_prune,cdpruner,dart_input,fastervlm,fopru,visionzip,vispruner,prumerge,prumerge_plus,hired,hiprune:middle=1,mustdrop,vscan_vision:shallow=0,ptp_vision,mmr(norm),spread(norm),ensemble(norm,divprune),grip,grip:scorer=lab-blind" \
  --out results/zoo.json "$@"
"$PYTHON" -m gripvlm eval --model lab --tasks lab --limit "$LIMIT" --batch 16 --keep 0.5,0.3 \
  --pruners "full,random,grip,fastv:layer=1,dart:layer=1,sparsevlm,pyramiddrop,pumer,ptp:layer=1" \
  --out results/zoo-llm.json "$@"
"$PYTHON" runs/write_zoo.py
