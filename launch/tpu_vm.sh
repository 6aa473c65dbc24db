#!/usr/bin/env bash
# A run on the workers of a Cloud TPU VM slice, which exists already:
#     launch/tpu_vm.sh setup  NAME ZONE                   copies this checkout to every worker and installs it
#     launch/tpu_vm.sh start  NAME ZONE ARGUMENTS...      starts train.py with the arguments on every worker
#     launch/tpu_vm.sh status NAME ZONE                   the last lines of every worker's log
#     launch/tpu_vm.sh stop   NAME ZONE                   has the run save and leave
# --workdir and the data have to lie where every worker finds them under the same path. Several slices are queued with
# `gcloud compute tpus queued-resources create --node-count`; then do this for each of their nodes.
# Commands in single quotes are for the workers to expand.
# shellcheck disable=SC2016
set -euo pipefail

usage() {
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
(($# >= 3)) || usage
verb=$1 name=$2 zone=$3
shift 3

everywhere() {
  gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "$1"
}

case $verb in
  setup)
    archive=$(mktemp -d)/transformer.tar.gz
    git -C "$(dirname "$0")/.." archive --format tar.gz --prefix transformer/ --output "$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$name:transformer.tar.gz" --zone "$zone" --worker all
    everywhere 'set -e
      tar --extract --gzip --file transformer.tar.gz && cd transformer
      python3 -c "import sys; sys.exit(sys.version_info < (3, 12))" && pins=constraints/jax-0.12.txt || pins=constraints/jax-0.10.txt
      [ -e .venv ] || python3 -m venv .venv
      .venv/bin/pip install --quiet --constraint $pins --editable ".[tpu,hf,tracking]"'
    ;;
  start)
    (($# > 0)) || usage
    arguments=$(printf ' %q' "$@")
    # A session of its own, so that it outlives the connection; the number of its first process, for `stop`.
    everywhere "cd transformer
      if [ -e run.pid ] && kill -0 \$(cat run.pid) 2>/dev/null; then echo 'a run is under way here' >&2; exit 1; fi
      nohup setsid launch/restart.sh .venv/bin/python train.py$arguments >> run.log 2>&1 < /dev/null &
      echo \$! > run.pid"
    ;;
  status)
    everywhere 'hostname; tail --lines 5 transformer/run.log'
    ;;
  stop)
    everywhere 'kill -TERM $(cat transformer/run.pid)'
    ;;
  *) usage ;;
esac
