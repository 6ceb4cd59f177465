# To be sourced. `each NAME...` runs `one NAME` for every name, JOBS at a time, and waits for all of them, whether or not
# one fails (then it fails too). Ctrl-C reaches every job, which may save what it has, and is over when all of them are.
set -m # each job a process group of its own

_stop_jobs() {
  trap '' INT TERM
  for job in $(jobs -pr); do kill -INT -- "-$job" 2>/dev/null || true; done
  wait
  echo "stopped; the same command goes on" >&2
  exit 130
}

each() {
  local failed=0 running=0 name
  trap _stop_jobs INT TERM
  for name in "$@"; do
    if [ "$running" -ge "$JOBS" ]; then
      wait -n || failed=1
      running=$((running - 1))
    fi
    one "$name" &
    running=$((running + 1))
  done
  while [ "$running" -gt 0 ]; do
    wait -n || failed=1
    running=$((running - 1))
  done
  trap - INT TERM
  return "$failed"
}
