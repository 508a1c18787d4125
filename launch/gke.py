#!/usr/bin/env python3
"""Trains on TPU slices of Google Kubernetes Engine, one or several (multi-slice): makes a JobSet from launch/gke_jobset.yaml and gives it to kubectl.

launch/gke.py [--dry_run] start NAME --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=4x4 [--slices=N] -- ARGUMENTS OF vidjoint.main ...
launch/gke.py [--dry_run] status|logs|stop NAME
"""

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from string import Template

TEMPLATE = Path(__file__).with_name("gke_jobset.yaml")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="launch/gke.py",
        usage="%(prog)s [--dry_run] start|status|logs|stop NAME [OPTIONS -- ARGUMENTS OF vidjoint.main ...]",
        description=__doc__.partition("\n")[0],
        epilog="Needs kubectl with access to a cluster that has the JobSet controller (0.6 or newer) and a node pool of TPUs for each slice; and an "
        "image made by `launch/docker.sh build tpu` and pushed. Batches are split over slices, all else inside of them: mesh.data must be a multiple "
        "of their number. After a lost pod the run goes on from the last checkpoint in its workdir, which must be on the claim's volume.",
    )
    parser.add_argument("verb", choices=("start", "status", "logs", "stop"))
    parser.add_argument("name", metavar="NAME", help="of the JobSet: lower-case letters, digits and dashes")
    parser.add_argument("--dry_run", action="store_true", help="print the JobSet and the command, run nothing")
    group = parser.add_argument_group("start")
    group.add_argument("--image", help="where the cluster gets the image, as in REGION-docker.pkg.dev/PROJECT/REPOSITORY/vidjoint:tpu")
    group.add_argument(
        "--accelerator", default="tpu-v5-lite-podslice", help="label of the nodes, as in tpu-v5p-slice (default: tpu-v5-lite-podslice)"
    )
    group.add_argument("--topology", default="4x4", metavar="AxB[xC]", help="chips of a slice (default: 4x4)")
    group.add_argument("--slices", type=int, default=1, metavar="N", help="how many slices (default: 1)")
    group.add_argument("--chips_per_host", type=int, default=4, metavar="N", help="TPU chips of a node (default: 4)")
    group.add_argument("--claim", metavar="NAME:PATH", help="a persistent volume claim and where pods see it, as in data:/mnt/data")
    group.add_argument("--spot", action="store_true", help="on spot nodes")
    group.add_argument("--restarts", type=int, default=100, metavar="N", help="how often all pods may start again (default: 100)")
    words, arguments = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser.parse_args(words)
    if problems := check(args, arguments):
        print(*(f"error: {line}" for line in problems), sep="\n", file=sys.stderr)
        return 2
    label = f"jobset.sigs.k8s.io/jobset-name={args.name}"
    first = f"{label},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    commands = {
        "start": [["kubectl", "apply", "--filename=-"]],
        "status": [["kubectl", "get", "jobset", args.name], ["kubectl", "get", "pods", f"--selector={label}"]],
        "logs": [["kubectl", "logs", "--follow", "--tail=50", f"--selector={first}"]],
        "stop": [["kubectl", "delete", "jobset", args.name]],
    }[args.verb]
    text = fill(args, arguments) if args.verb == "start" else None
    if args.dry_run:
        print((text or "") + "\n".join(map(shlex.join, commands)))
        return 0
    return max(subprocess.run(command, input=text, text=True).returncode for command in commands)


def check(args: argparse.Namespace, arguments: list[str]) -> list[str]:
    """What is wrong with the arguments, one line each."""
    problems = []
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,30}[a-z0-9])?", args.name):
        problems.append(f"{args.name}: a name has lower-case letters, digits and dashes, at most 32")
    if args.verb != "start":
        return problems
    if not args.image:
        problems.append("--image is missing")
    if not any(word.startswith("--config") for word in arguments):
        problems.append(
            "arguments of vidjoint.main are missing: write them after --, as in -- --config=configs/cover_jft.py --workdir=/mnt/data/runs/cover"
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", args.topology):
        problems.append(f"--topology={args.topology}: write the chips along each side, as in 4x4 or 2x2x4")
    elif chips(args) > args.chips_per_host and chips(args) % args.chips_per_host:
        problems.append(f"--topology={args.topology}: its {chips(args)} chips are no multiple of --chips_per_host={args.chips_per_host}")
    if min(args.slices, args.chips_per_host) < 1:
        problems.append("--slices and --chips_per_host are 1 or more")
    if args.claim and not re.fullmatch(r"[-.a-z0-9]+:/.+", args.claim):
        problems.append(f"--claim={args.claim}: write NAME:PATH, as in data:/mnt/data")
    return problems


def chips(args: argparse.Namespace) -> int:
    """Chips of a slice."""
    return math.prod(map(int, args.topology.split("x")))


def fill(args: argparse.Namespace, arguments: list[str]) -> str:
    """The JobSet as YAML; values are JSON, which YAML contains."""
    nodes = {"cloud.google.com/gke-tpu-accelerator": args.accelerator, "cloud.google.com/gke-tpu-topology": args.topology}
    nodes |= {"cloud.google.com/gke-spot": "true"} if args.spot else {}
    claim, _, path = (args.claim or "").partition(":")
    values = {
        "name": args.name,
        "image": args.image,
        "slices": args.slices,
        "hosts": max(1, chips(args) // args.chips_per_host),
        "chips": min(chips(args), args.chips_per_host),
        "restarts": args.restarts,
        "nodes": nodes,
        "arguments": ["vidjoint.main", *arguments],
        "mounts": [{"name": "claim", "mountPath": path}] if claim else [],
        "volumes": [{"name": "claim", "persistentVolumeClaim": {"claimName": claim}}] if claim else [],
    }
    text = TEMPLATE.read_text().partition("\n")[2]  # without the line about this script
    return Template(text).substitute({key: json.dumps(value) for key, value in values.items()})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
