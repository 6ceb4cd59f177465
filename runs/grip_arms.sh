#!/usr/bin/env bash
# The arms of the study of training methods, for three seeds: the scorers that runs/grip_arms_table.sh compares. What is
# committed has more seeds of some arms and one of others: docs/grip-study.md says how many.
#
#   bash runs/grip_arms.sh               all, two at a time (JOBS=2), one thread each
#   bash runs/grip_arms.sh grpo soft     some arms only
#   LIST=1 bash runs/grip_arms.sh        what would run, and how
#
# Needs `pip install -e .[lab,train]` and 2 to 15 minutes of one core an arm and seed, a few more (docs/grip-study.md).
# Interrupt it at any time; the same command goes on. Most arms start from their seed's warm-up and take as many steps;
# GRPO without warm-up takes two and a half times as many.
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=${WORK:-.lab/grip}
PYTHON=${PYTHON:-.venv/bin/python}
JOBS=${JOBS:-2}
SEEDS=${SEEDS:-0 1 2}
STEPS=${STEPS:-240}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
DATA="--data $WORK/train/questions.jsonl --val-data $WORK/val/questions.jsonl --bf16"
VAL="--val-every 150 --val-questions 256 --val-keeps 0.125,0.06,0.03,0.015"
RUN="$DATA $VAL --keep-high 0.25"
WARMUP="warmup $RUN --reward log_prob --warmup-steps" # which judges the step that is kept; docs/log.md, 2026-11-23
CHOICES="$DATA $VAL --budgets choices --keep-choices"

arm() { # NAME SEED: the arguments of `gripvlm train`
  local start="--start $WORK/arms/warmup-$2"
  case $1 in
    warmup) echo "$WARMUP 400" ;;
    warmup_by_reward) echo "warmup $RUN --warmup-steps 400" ;;
    warmup_longer) echo "$WARMUP 500 $start --warmup-learning-rate 5e-4" ;;
    warmup_no_budget) echo "$WARMUP 400 --no-budget" ;;
    grpo) echo "grpo $RUN $start --steps $STEPS" ;;
    conditional) echo "grpo $RUN $start --steps $STEPS --policy conditional_bernoulli" ;;
    no_warmup) echo "grpo $RUN --steps $((5 * STEPS / 2))" ;;
    label_free) echo "grpo $RUN $start --steps $STEPS --reward agreement --own-answers" ;;
    soft) echo "relaxed $RUN $start --steps $STEPS --reward log_prob --relaxation soft_topk" ;;
    soft_probability) echo "relaxed $RUN $start --steps $STEPS --relaxation soft_topk" ;;
    straight) echo "relaxed $RUN $start --steps $STEPS --reward log_prob --relaxation straight_through" ;;
    perturbed) echo "relaxed $RUN $start --steps $STEPS --reward log_prob --relaxation perturbed" ;;
    dynamicvit) echo "relaxed $RUN $start --steps $STEPS --reward log_prob --relaxation dynamicvit" ;;
    diffprune) echo "relaxed $RUN $start --steps $STEPS --reward log_prob --relaxation diffprune" ;;
    soft_slower) echo "relaxed $RUN $start --steps $STEPS --reward log_prob --learning-rate 1e-4" ;;
    soft_faster) echo "relaxed $RUN $start --steps $STEPS --reward log_prob --learning-rate 1e-3" ;;
    soft_sharper) echo "relaxed $RUN $start --steps $STEPS --reward log_prob --tau-start 0.2" ;;
    straight_slower) echo "relaxed $RUN $start --steps $STEPS --reward log_prob --relaxation straight_through --learning-rate 1e-4" ;;
    diffprune_slower) echo "relaxed $RUN $start --steps $STEPS --reward log_prob --relaxation diffprune --learning-rate 1e-4" ;;
    diffprune_faster) echo "relaxed $RUN $start --steps $STEPS --reward log_prob --relaxation diffprune --learning-rate 1e-3" ;;
    diffprune_probability) echo "relaxed $RUN $start --steps $STEPS --relaxation diffprune" ;;
    three_budgets) echo "grpo $CHOICES 0.25,0.06,0.015 $start --steps $STEPS" ;;
    only_12) echo "grpo $CHOICES 0.125 $start --steps $STEPS" ;;
    only_3) echo "grpo $CHOICES 0.03 $start --steps $STEPS" ;;
    antithetic) echo "grpo $RUN $start --steps $STEPS --antithetic" ;;
    averaged) echo "grpo $RUN $start --steps $STEPS --ema-decay 0.98" ;;
    band) echo "grpo $RUN $start --steps $STEPS --band 8" ;;
    self_critical) echo "grpo $RUN $start --steps $STEPS --baseline self_critical --num-generations 15" ;;
    by_budget) echo "grpo $RUN $start --steps $STEPS --scale-rewards budget" ;;
    sums) echo "grpo $RUN $start --steps $STEPS --loss-type dr_grpo" ;;
    sums_by_budget) echo "grpo $RUN $start --steps $STEPS --loss-type dr_grpo --scale-rewards budget" ;;
    twice) echo "grpo $RUN $start --steps $STEPS --num-iterations 2" ;;
    twice_by_budget) echo "grpo $RUN $start --steps $STEPS --num-iterations 2 --scale-rewards budget" ;;
    four_times) echo "grpo $RUN $start --steps $STEPS --num-iterations 4" ;;
    faster) echo "grpo $RUN $start --steps $STEPS --learning-rate 6e-4" ;;
    fours) echo "grpo $RUN $start --steps $STEPS --num-generations 4 --images 16" ;;
    value_apart) echo "grpo $RUN $start --steps $STEPS --policy conditional_bernoulli --credit value" ;;
    no_budget) echo "grpo $RUN --start $WORK/arms/warmup_no_budget-$2 --steps $STEPS --no-budget" ;;
    warmup_blind) echo "$WARMUP 400 --no-question" ;;
    blind_plain) echo "grpo $RUN --no-question --start $WORK/arms/warmup_blind-$2 --steps 600" ;;
    blind_budget) echo "grpo $RUN --no-question --start $WORK/arms/warmup_blind-$2 --steps 600 --scale-rewards budget" ;;
    blind_by_budget)
      echo "grpo $RUN --no-question --start $WORK/arms/warmup_blind-$2 --steps 600 --num-iterations 2 --scale-rewards budget"
      ;;
    *) echo "unknown arm $1: type one of $FIRST $THEN" >&2; return 1 ;;
  esac
}

FIRST="warmup warmup_no_budget warmup_blind" # others start from them
THEN="grpo soft soft_probability conditional label_free straight no_warmup perturbed dynamicvit diffprune
  soft_slower soft_faster soft_sharper straight_slower diffprune_slower diffprune_faster diffprune_probability
  warmup_by_reward warmup_longer three_budgets only_3 only_12 averaged antithetic value_apart band no_budget self_critical
  twice by_budget twice_by_budget faster four_times fours sums sums_by_budget blind_plain
  blind_budget blind_by_budget"

one() { # NAME-SEED
  local name=${1%-*} seed=${1##*-} settings
  [ -f "$WORK/arms/$1/scorer.json" ] && return 0
  settings=$(arm "$name" "$seed")
  mkdir -p "$WORK/arms"
  echo "$(date +%T) $1"
  # shellcheck disable=SC2086
  "$PYTHON" -m gripvlm train $settings --seed "$seed" --out "$WORK/arms/$1" >>"$WORK/arms/$1.log" 2>&1 ||
    { echo "$1 ended before its time: $WORK/arms/$1.log" >&2; return 1; }
}

pairs() { for name in "$@"; do for seed in $SEEDS; do echo "$name-$seed"; done; done; }
asked=${*:-$FIRST $THEN}
for name in $asked; do arm "$name" 0 >/dev/null; done
if [ -n "${LIST:-}" ]; then
  # shellcheck disable=SC2086
  for pair in $(pairs $asked); do echo "$pair: gripvlm train $(arm "${pair%-*}" "${pair##*-}") --seed ${pair##*-}"; done
  exit
fi
# shellcheck source=runs/jobs.sh
. runs/jobs.sh
FIRST=$(for name in $FIRST; do # those that are asked for, or that one that is asked for starts from
  for other in $asked; do
    case "$(arm "$other" 0) $other" in *"/$name-0 "* | *" $name") echo "$name" && break ;; esac
  done
done)
[ -d "$WORK/train" ] || PYTHONPATH=examples "$PYTHON" -m lab_vlm.dataset "$WORK/train" --split train --pictures 4000
[ -d "$WORK/val" ] || PYTHONPATH=examples "$PYTHON" -m lab_vlm.dataset "$WORK/val" --split val --pictures 150
# shellcheck disable=SC2046,SC2086
each $(pairs $FIRST)
# shellcheck disable=SC2046,SC2086
each $(pairs $asked)
