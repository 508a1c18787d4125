#!/usr/bin/env bash
# Trains on one machine, with all its GPUs (JAX drives them from one process), and starts again what was killed. tpu_vm.sh runs it on each host.
#
#   launch/machine.sh [--dry_run] [--gpus=LIST] [--tries=N] run|start|status|logs|stop [ARGUMENTS OF vidjoint.main ...]
#
#   launch/machine.sh start --config=configs/finetune_folder.py --config.data_root=MY_VIDEOS      in the background; its output goes to run.log
#   launch/machine.sh status                                                                      running, absent, or the exit status
#   launch/machine.sh logs                                                                        follows run.log
#   launch/machine.sh stop                                                                        saves and ends
#   launch/machine.sh --gpus=0,1 run --config=...                                                 in the foreground, with two of the GPUs
#
# A run that ends by a crash, by the kernel's lack of memory or because another process of it was lost (statuses from 128 on, and 76) goes on from its
# last checkpoint, --tries=10 times in all. One that was asked to stop (75), that is done (0) or whose user has something to mend (2) does not.
# run.log, run.pid and run.status lie in the clone. Needs .venv (README), or PYTHON in the environment.
set -euo pipefail

dry_run=false gpus='' tries=10
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run) dry_run=true ;;
    --gpus=*) gpus=${1#--gpus=} ;;
    --tries=*) tries=${1#--tries=} ;;
    *) break ;;
  esac
  shift
done
if [ $# -lt 1 ] || ! [[ $tries =~ ^[1-9][0-9]*$ ]]; then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
verb=$1
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
[ -z "$gpus" ] || export CUDA_VISIBLE_DEVICES=$gpus

running() { [ -f run.pid ] && kill -0 "$(cat run.pid)" 2>/dev/null; }

status() {
  if running; then echo running; elif [ -f run.status ]; then cat run.status; else echo absent; fi
}

run() { # one try after another; ends with the status of the last
  local child='' status=0 again asked=false signalled early=false
  # a signal goes on to the run, which saves and ends; one that comes before the run's number is known, as soon as it is
  trap 'asked=true signalled=true; if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null || true; else early=true; fi' TERM INT
  for ((try = 1; ; try++)); do
    child=''
    "$python" -m vidjoint.main "$@" &
    child=$!
    ! $early || kill -TERM "$child"
    while true; do # a signal ends the waiting, not the run
      again=0 signalled=false
      wait "$child" || again=$?
      [ "$again" -eq 127 ] || status=$again
      $signalled || break
    done
    if $asked || [ "$try" -ge "$tries" ] || { [ "$status" -ne 76 ] && [ "$status" -lt 128 ]; }; then
      return "$status"
    fi
    echo "status $status: try $((try + 1)) of $tries" >&2
    sleep "${PAUSE:-10}"
    ! $asked || return "$status"
    status=0
  done
}

if $dry_run; then
  case $verb in
    run | start)
      [ -z "$gpus" ] || printf 'CUDA_VISIBLE_DEVICES=%q ' "$gpus"
      printf '%q ' "$python" -m vidjoint.main "$@"
      if [ "$verb" = start ]; then echo '>>run.log 2>&1 &'; else echo; fi
      ;;
    logs) echo tail -n 50 -F run.log ;;
    stop) echo "kill -TERM \$(cat run.pid)" ;;
    *) echo "$verb" ;;
  esac
  exit
fi

case $verb in
  run) run "$@" ;;
  start)
    for ((i = 0; i < ${WAIT:-60}; i++)); do # for a run that is about to end
      running || break
      sleep 1
    done
    if running; then
      echo "there is a run already: launch/machine.sh stop" >&2
      exit 2
    fi
    rm -f run.status
    nohup "$0" --tries="$tries" supervise "$@" >>run.log 2>&1 </dev/null &
    echo $! >run.pid
    echo "started: launch/machine.sh logs"
    ;;
  supervise) # what start puts into the background
    status=0
    run "$@" || status=$?
    echo "$status" >run.status
    ;;
  status) status ;;
  logs) exec tail -n 50 -F run.log ;;
  stop)
    if running; then
      kill -TERM "$(cat run.pid)"
      while running; do sleep 0.2; done
    fi
    status
    ;;
  *)
    echo "unknown verb $verb: run, start, status, logs or stop" >&2
    exit 2
    ;;
esac
