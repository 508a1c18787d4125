#!/usr/bin/env bash
# Trains on a TPU VM, of one host or of many (a slice such as v4-64): create it, copy this clone to its hosts, install, run, delete.
#
#   launch/tpu_vm.sh [--dry_run] create|install|run|logs|delete NAME ZONE [TYPE | ARGUMENTS OF vidjoint.main ...]
#
#   launch/tpu_vm.sh create  cover us-central2-b v4-8
#   launch/tpu_vm.sh install cover us-central2-b
#   launch/tpu_vm.sh run     cover us-central2-b --config=configs/cover_jft.py:standard --config.data_root=/mnt/data --workdir=/mnt/runs/cover
#   launch/tpu_vm.sh logs    cover us-central2-b
#   launch/tpu_vm.sh delete  cover us-central2-b
#
# The hosts of a slice find each other by themselves; they need the data at the same path, and one workdir that all of them see (a mounted bucket or
# NFS). Host 0 alone writes the log.
#
# After a preemption: create and install again, then the same `run` goes on from the last checkpoint if its workdir lies on a disk or bucket that stayed.
# Needs gcloud, logged in. --dry_run prints the commands instead of running them.
set -euo pipefail

dry_run=false
if [ "${1:-}" = --dry_run ]; then
  dry_run=true
  shift
fi
if [ $# -lt 3 ]; then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
verb=$1 name=$2 zone=$3
shift 3
here=$(cd "$(dirname "$0")/.." && pwd)

call() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
on_vm() { call gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="${2:-all}" --command="$1"; }

case $verb in
  create)
    case ${1:?"create needs the type of the TPU, as in v4-8"} in
      v5litepod-* | v5e-*) version=v2-alpha-tpuv5-lite ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v6e-*) version=v2-alpha-tpuv6e ;;
      *) version=tpu-ubuntu2204-base ;;
    esac
    call gcloud compute tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="$1" --version="$version"
    ;;
  install)
    archive=$(mktemp --suffix=.tar)
    trap 'rm -f "$archive"' EXIT
    call git -C "$here" archive --output="$archive" --prefix=vidjoint/ HEAD
    call gcloud compute tpus tpu-vm scp "$archive" "$name:vidjoint.tar" --zone="$zone" --worker=all
    on_vm "sudo apt-get update -q && sudo apt-get install -qy python3.11 python3.11-venv && tar xf vidjoint.tar && cd vidjoint && python3.11 -m venv .venv && .venv/bin/pip install -q -r requirements.lock && .venv/bin/pip install -q --no-deps -e . && .venv/bin/pip install -q 'jax[tpu]==0.10.2'"
    ;;
  run)
    arguments=$(printf '%q ' "$@")
    on_vm "cd vidjoint && nohup .venv/bin/python -m vidjoint.main $arguments>run.log 2>&1 </dev/null & sleep 5; tail -n 30 vidjoint/run.log"
    ;;
  logs) on_vm "tail -n 50 -F vidjoint/run.log" 0 ;;
  delete) call gcloud compute tpus tpu-vm delete "$name" --zone="$zone" --quiet ;;
  *)
    echo "unknown verb $verb: create, install, run, logs or delete" >&2
    exit 2
    ;;
esac
