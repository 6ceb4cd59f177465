#!/usr/bin/env bash
# What pruning adds to a call, before a change and after it: results/overhead_before.json and overhead_after.json.
#
#   bash experiments/speed/overhead.sh OLD       OLD: a worktree of the older version (git worktree add OLD COMMIT)
# Five turns of each, in alternation, one thread; two minutes on an idle machine. Remove the old files first.
set -euo pipefail
cd "$(dirname "$0")/../.."
OLD=${1:?type the folder of a worktree of the older version}
export OMP_NUM_THREADS=1
for _ in 1 2 3 4 5; do
  PYTHONPATH="$OLD/src" .venv/bin/python experiments/speed/overhead.py before
  PYTHONPATH="$PWD/src" .venv/bin/python experiments/speed/overhead.py after
done
