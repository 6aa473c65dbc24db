#!/usr/bin/env bash
# A run on GPUs under Slurm, a process a GPU. Arguments are those of train.py:
#     sbatch --nodes 4 launch/slurm.sh --config configs/llama_1b.py --workdir /shared/runs/one
# For a process a machine: sbatch --ntasks-per-node 1 ...; both work, and options of sbatch win over those below.
#SBATCH --job-name=transformer
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
# SIGTERM to every process, five minutes before the time is over: the run saves, and starts again below.
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail

max_restarts=${MAX_RESTARTS:-100}
python=${PYTHON:-python}
cd "${SLURM_SUBMIT_DIR:?submit this file with sbatch}" || exit 2

# Processes end by themselves when another has: no task is killed for the end of another, but after minutes. Without
# --gpus-per-task each sees all GPUs of its machine, as NCCL wants it, and JAX gives it the one of its number.
srun --kill-on-bad-exit=0 --wait=300 --label "$python" train.py "$@"
status=$?

# Exit statuses: docs/training.md. After 2, a mistake, and 3, divergence, a restart would end alike.
case $status in
  0 | 2 | 3) exit "$status" ;;
esac
restarts=${SLURM_RESTART_COUNT:-0}
if ((restarts >= max_restarts)); then
  echo "slurm.sh: status $status after $restarts restarts; no more" >&2
  exit "$status"
fi
echo "slurm.sh: status $status; job $SLURM_JOB_ID goes back to the queue (restart $((restarts + 1)) of $max_restarts)" >&2
scontrol requeue "$SLURM_JOB_ID"
