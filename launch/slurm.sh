#!/usr/bin/env bash
# Trains under Slurm: submits itself as a job that saves before its time is up and queues itself again until the run is done.
#
#   launch/slurm.sh [--dry_run] [OPTIONS OF sbatch ...] -- ARGUMENTS OF vidjoint.main ...
#
#   launch/slurm.sh --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --time=12:00:00 -- --config=configs/cover_jft.py --workdir=/shared/runs/cover
#   launch/slurm.sh --nodes=1 --gpus-per-node=4 --ntasks-per-node=1 -- --config=configs/finetune_folder.py --config.data_root=MY_VIDEOS
#
# Several tasks: one for each GPU, and all GPUs of a node visible to each task (no --gpus-per-task). One task in all: it drives every GPU of its node.
# Two minutes before the time limit Slurm sends SIGTERM to the tasks (--signal=TERM@120; another number: give --signal), which save and end with
# status 75. After that, and after a lost process (76), the job queues itself again, MOST_RESTARTS=100 times at most; scancel ends it for good. A job that
# Slurm itself preempts is queued again by Slurm (--requeue). The clone, its .venv (or PYTHON in the environment) and the workdir must be on a disk
# that all nodes see. Output: slurm-JOB.out.
set -euo pipefail

if [ "${1:-}" = --in_job ]; then # what the job runs, from here on under sbatch
  shift
  cancelled=false
  trap 'cancelled=true' TERM # this shell gets one by scancel or preemption, not at the time limit
  python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
  status=0
  srun --kill-on-bad-exit=0 --gpu-bind=none "$python" -m vidjoint.main "$@" || status=$?
  restarts=${SLURM_RESTART_COUNT:-0}
  if { [ "$status" -eq 75 ] || [ "$status" -eq 76 ]; } && ! $cancelled; then
    if [ "$restarts" -lt "${MOST_RESTARTS:-100}" ]; then
      echo "status $status: queued again ($((restarts + 1)))"
      scontrol requeue "$SLURM_JOB_ID"
    else
      echo "status $status after $restarts restarts: start it again by hand"
    fi
  fi
  exit "$status"
fi

dry_run=false
if [ "${1:-}" = --dry_run ]; then
  dry_run=true
  shift
fi
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  options+=("$1")
  shift
done
if [ $# -lt 2 ]; then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
shift
here=$(cd "$(dirname "$0")/.." && pwd)
options=(--job-name=vidjoint --chdir="$here" --requeue --open-mode=append --signal=TERM@120 "${options[@]}")
command=(sbatch "${options[@]}" "$here/launch/slurm.sh" --in_job "$@")
if $dry_run; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
