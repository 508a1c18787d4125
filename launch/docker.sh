#!/usr/bin/env bash
# Builds an image of this clone (what is committed) and runs its commands in a container.
#
#   launch/docker.sh [--dry_run] build [cpu|gpu|tpu]
#   launch/docker.sh [--dry_run] [--data=FOLDER] [--runs=FOLDER] run cpu|gpu|tpu COMMAND [ARGUMENTS ...]
#
#   launch/docker.sh build gpu
#   launch/docker.sh --data=MY_VIDEOS run gpu main --config=configs/finetune_folder.py --config.data_root=/data --workdir=/runs/mine
#   launch/docker.sh --data=MY_VIDEOS run gpu predict --workdir=/runs/mine /data/CLIP.mp4
#
# COMMAND is one of python -m vidjoint.COMMAND. --data is seen as /data, read only; --runs (default: runs) as /runs, written as the user that you are,
# with compiled programs in /runs/.cache. docker stop and Ctrl-C let a training save. gpu needs the NVIDIA container toolkit.
set -euo pipefail

dry_run=false data='' runs=runs
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run) dry_run=true ;;
    --data=*) data=${1#--data=} ;;
    --runs=*) runs=${1#--runs=} ;;
    *) break ;;
  esac
  shift
done
verb=${1:-} kind=${2:-cpu}
case $verb-$kind in
  build-cpu | run-cpu) extra='' flags=() ;;
  build-gpu | run-gpu) extra=cuda12 flags=(--gpus=all) ;;
  build-tpu | run-tpu) extra=tpu flags=(--privileged --net=host) ;;
  *) verb='' ;;
esac
if [ -z "$verb" ] || { [ "$verb" = run ] && [ $# -lt 3 ]; }; then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
here=$(cd "$(dirname "$0")/.." && pwd)

if [ "$verb" = build ]; then
  command=(docker build --build-arg="EXTRA=$extra" --tag="vidjoint:$kind" --file=launch/Dockerfile -)
  if $dry_run; then
    printf 'git -C %q archive HEAD | ' "$here"
    printf '%q ' "${command[@]}"
    echo
  else
    git -C "$here" archive HEAD | "${command[@]}"
  fi
  exit
fi

name=$3
shift 3
$dry_run || mkdir -p "$runs"
flags+=(--rm --init --stop-timeout=120 --shm-size=8g --user="$(id -u):$(id -g)" --volume="$(realpath -m "$runs"):/runs")
[ -z "$data" ] || flags+=(--volume="$(realpath -m "$data"):/data:ro")
[ ! -t 0 ] || flags+=(--interactive --tty)
command=(docker run "${flags[@]}" "vidjoint:$kind" "vidjoint.$name" "$@")
if $dry_run; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
