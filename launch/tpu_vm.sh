#!/usr/bin/env bash
# Trains on a TPU VM, of one host or of many (a slice such as v4-64): create it, copy this clone to its hosts, install, run, delete.
#
#   launch/tpu_vm.sh [--dry_run] create|install|run|keep|status|logs|stop|delete NAME ZONE [TYPE] [ARGUMENTS ...]
#
#   launch/tpu_vm.sh create  cover us-central2-b v4-8 [--spot ...]      further words go to gcloud
#   launch/tpu_vm.sh install cover us-central2-b
#   launch/tpu_vm.sh run     cover us-central2-b --config=configs/cover_jft.py:standard --config.data_root=/mnt/data --workdir=/mnt/runs/cover
#   launch/tpu_vm.sh status  cover us-central2-b                        running, absent, or the exit status (0: done), of each host
#   launch/tpu_vm.sh logs    cover us-central2-b
#   launch/tpu_vm.sh stop    cover us-central2-b                        saves and ends
#   launch/tpu_vm.sh delete  cover us-central2-b
#
# All of this, and again after each preemption, until the run is done or has something to be mended:
#
#   CREATE_OPTIONS=--spot launch/tpu_vm.sh keep cover us-central2-b v4-8 --config=configs/cover_jft.py:standard --workdir=/mnt/runs/cover ...
#
# The hosts of a slice find each other by themselves; they need the data at the same path, and one workdir that all of them see (a mounted bucket or
# NFS). Host 0 alone writes the log. SETUP in the environment is a command that runs on every host after the installation, to mount what they share.
# A run goes on from the last checkpoint in its workdir, if that lies on a disk or bucket that stayed: after a preemption create, install, run again.
#
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
archive=
trap 'rm -f "$archive"' EXIT

call() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
tpu() { # a verb of gcloud's and its further words
  call gcloud compute tpus tpu-vm "$1" "$name" --zone="$zone" "${@:2}"
}
on_vm() { tpu ssh --worker="${2:-all}" --command="$1"; }

create() {
  local version
  case ${1:?"create needs the type of the TPU, as in v4-8"} in
    v5litepod-* | v5e-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
  tpu create --accelerator-type="$1" --version="$version" "${@:2}"
}

install() {
  archive=$(mktemp --suffix=.tar)
  call git -C "$here" archive --output="$archive" --prefix=vidjoint/ HEAD
  call gcloud compute tpus tpu-vm scp "$archive" "$name:vidjoint.tar" --zone="$zone" --worker=all
  local python="sudo apt-get update -q && sudo apt-get install -qy python3.11 python3.11-venv" pip=".venv/bin/pip install -q"
  local packages="$pip -r requirements.lock && $pip --no-deps -e . && $pip 'jax[tpu]==0.10.2'"
  on_vm "$python && tar xf vidjoint.tar && cd vidjoint && python3.11 -m venv .venv && $packages"
  [ -z "${SETUP:-}" ] || on_vm "$SETUP"
}

run() {
  local arguments
  arguments=$(printf '%q ' "$@")
  on_vm "vidjoint/launch/machine.sh start $arguments"
}

keep() { # TYPE ARGUMENTS
  local type=${1:?"keep needs the type of the TPU, as in v4-8"} state status words
  shift
  read -ra words <<<"${CREATE_OPTIONS:-}"
  while true; do
    state=$(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)' 2>/dev/null || echo ABSENT)
    case $state in
      READY)
        status=$(on_vm "vidjoint/launch/machine.sh status 2>/dev/null || echo new" 0 | tail -n 1) || true
        case $status in
          0) echo "the run is done" && return ;;
          running) ;;
          new) { install && run "$@"; } || true ;; # preempted meanwhile: the next look tells
          absent | 75 | 76 | 1[2-9][0-9]) run "$@" || true ;;
          [0-9]*) echo "the run ended with status $status: launch/tpu_vm.sh logs $name $zone" >&2 && return "$status" ;;
        esac
        ;;
      ABSENT) create "$type" "${words[@]}" || true ;; # there may be none to be had: again later
      PREEMPTED | TERMINATED | STOPPED) tpu delete --quiet || true ;;
    esac
    sleep "${PAUSE:-60}"
  done
}

case $verb in
  create) create "$@" ;;
  install) install ;;
  run) run "$@" ;;
  keep)
    if $dry_run; then
      read -ra words <<<"${CREATE_OPTIONS:-}"
      create "${1:-}" "${words[@]}" && install && run "${@:2}" && tpu delete --quiet
      echo "# the same again after each preemption"
    else
      keep "$@"
    fi
    ;;
  status) on_vm "vidjoint/launch/machine.sh status" ;;
  logs) on_vm "vidjoint/launch/machine.sh logs" 0 ;;
  stop) on_vm "vidjoint/launch/machine.sh stop" ;;
  delete) tpu delete --quiet ;;
  *)
    echo "unknown verb $verb: create, install, run, keep, status, logs, stop or delete" >&2
    exit 2
    ;;
esac
