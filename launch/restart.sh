#!/usr/bin/env bash
# Runs a command again and again until it is finished, or until a restart would not help:
#     launch/restart.sh python train.py --config configs/llama_1b.py --workdir /shared/runs/one
# Exit statuses: docs/training.md. 0: finished; 2: a mistake of the user's; 3: diverged. Anything else comes from outside
# (a lost or hung process, a signal, the disk), and the run goes on from its last checkpoint.
# SIGTERM and SIGINT are passed on, and end it: the run saves and leaves.
set -uo pipefail

max_restarts=${MAX_RESTARTS:-100}
pause=${RESTART_PAUSE_SECONDS:-10}
child=
stopped=

pass_on() {
  stopped=$1
  [[ -z $child ]] || kill -s "$1" "$child" 2>/dev/null
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

for ((restarts = 0; ; restarts++)); do
  "$@" &
  child=$!
  # A signal ends `wait` before the command has ended.
  while wait "$child"; status=$?; kill -0 "$child" 2>/dev/null; do :; done
  child=
  case $status in
    0 | 2 | 3) exit "$status" ;;
  esac
  [[ -z $stopped ]] || exit "$status"
  if ((restarts >= max_restarts)); then
    echo "restart.sh: status $status after $restarts restarts; no more" >&2
    exit "$status"
  fi
  echo "restart.sh: status $status; restart $((restarts + 1)) of $max_restarts in $pause s" >&2
  sleep "$pause" &
  wait $!
  [[ -z $stopped ]] || exit "$status"
done
