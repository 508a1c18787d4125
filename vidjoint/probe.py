"""Asks how good a frozen model's features are for a task: linear, nearest-neighbour and attentive classifiers on top of them.

python -m vidjoint.probe --workdir=DIR [--task=NAME] [--kind=linear,knn,attentive] [--config=FILE | --train=... --val=...] [--json=FILE]
"""

import argparse
import logging
import math
import sys

import jax
from ml_collections import ConfigDict

from vidjoint import config as config_module
from vidjoint import validate
from vidjoint.classifier import Classifier, parse_step
from vidjoint.config import task_config
from vidjoint.data.tasks import Task, open_tasks
from vidjoint.errors import UserError, command
from vidjoint.output_files import check_writable, write_json
from vidjoint.probes import attentive, knn
from vidjoint.probes.features import Backbone, check_file
from vidjoint.probes.study import Study
from vidjoint.reporting.results import percent

KINDS = ("linear", "knn", "attentive")
OWN = ("train", "val", "fold", "root", "labels", "source", "media", "multilabel")  # keys of a task that have a flag here

log = logging.getLogger(__name__)


def choose_data(args: argparse.Namespace, rest: list[str], classifier: Classifier) -> tuple[ConfigDict, str]:
    """The run's config with one task alone, the one to probe, and its name. Raises UserError if no data was named, or in several ways."""
    config, given = classifier.config, {key: getattr(args, key) for key in OWN if getattr(args, key) is not None}
    if args.config is not None:
        if given:
            raise UserError(f"--config and --{next(iter(given))} exclude each other: name the data in one way")
        theirs, _ = config_module.parse([f"--config={args.config}", *rest])
        known, config.data, config.data_root = dict(theirs.tasks), theirs.data, theirs.data_root
    elif given:
        name = args.task or "probe"
        known, config.data_root = {name: task_config(**given)}, ""
    else:
        known = dict(config.tasks)
    config.data_root = config.data_root if args.data_root is None else args.data_root
    videos = [name for name, task in known.items() if task.media == "video"]
    name = args.task or next((only[0] for only in (list(known), videos) if len(only) == 1), None)
    if name not in known:
        where = args.config or args.workdir
        fault = "several tasks could be meant" if name is None else f"{where} has no task {name!r}"
        choices = f"--task must be one of {', '.join(known)}" if known else "name data by --train and --val, or by --config"
        raise UserError(f"{fault}: {choices}")
    config.task_order = ()
    for other in list(config.tasks):
        del config.tasks[other]
    config.tasks[name] = known[name]
    return config, name


def open_task(config: ConfigDict, name: str) -> Task:
    """Opens both splits. Raises UserError if there is not both, or the config is wrong."""
    if problems := validate.check(config, trains=False):
        raise UserError(*problems)
    task = open_tasks(config)[name]
    if task.val is None:
        raise UserError(f"{name} has no validation split: give --val, or --fold=1/5 to hold out a fifth of its training split")
    if task.val.labels != task.labels:
        raise UserError(f"{name}: {task.val.origin} and {task.train.origin} have different classes: name them in one file, --labels")
    for source in (task.train, task.val):
        for line in source.warnings:
            log.warning("%s: %s", name, line)
    return task


def size(count: float) -> str:
    """A number of bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def run(args: argparse.Namespace, kinds: list[str], study: Study) -> dict:
    """Trains the probes of these kinds; tells on the way what is read and how large it is. Raises UserError."""
    backbone, task, limit = study.backbone, study.task, args.memory * 2**30
    examples = len(task.train) + len(task.val)
    content = {"classes": len(task.labels), "train": len(task.train), "val": len(task.val)}
    print(f"{task.name}: {len(task.train)} training and {len(task.val)} validation examples, {len(task.labels)} classes", flush=True)
    probes = {}
    if {"linear", "knn"} & set(kinds):
        (width,) = backbone.shape(task, "features")
        needed = 4 * width * examples
        if needed > limit:
            raise UserError(f"features of {width} numbers take {size(needed)}, above --memory={args.memory:g}: raise it, or take fewer examples")
        content["features"] = {"width": width, "bytes": needed}
        print(f"features: {width} numbers each, {size(needed)}", flush=True)
        features = study.features(args.features)
        for kind in [kind for kind in ("linear", "knn") if kind in kinds]:
            probes[kind] = getattr(study, kind)(*features).summary()
    if "attentive" in kinds:
        tokens, width = backbone.shape(task, "tokens")
        needed = 2 * tokens * width * examples
        kept = needed <= limit
        content["tokens"] = {"count": tokens, "width": width, "bytes": needed, "kept": kept}
        fate = "kept in memory" if kept else f"above --memory={args.memory:g} GiB, so the model runs in every epoch"
        print(f"tokens: {tokens} of {width} numbers each, {size(needed)}: {fate}", flush=True)
        probes["attentive"] = study.attentive(args.epochs, kept).summary()
    return content | {"probes": {kind: probes[kind] for kind in kinds}}


def table(probes: dict[str, dict]) -> str:
    """The probes' entries of the JSON file for people."""
    several = any("map" in probe for probe in probes.values())
    titles = ["chosen", "held out", "top-1", "95 % interval", "top-5"] + ["mAP"] * several
    widths = [12, 10, 9, 18, 9, 9]
    lines = [f"{'probe':<12}" + "".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=False))]
    for kind, probe in probes.items():
        interval = probe["top1_interval"] and "{:.1f} .. {:.1f} %".format(*(100 * share for share in probe["top1_interval"]))
        chosen = ", ".join(f"{name}={value:g}" for name, value in probe["chosen"].items())
        cells = [chosen, percent(probe["held_out"]), percent(probe["top1"]), interval or "-", percent(probe["top5"])]
        cells += [percent(probe.get("map"))] * several
        lines.append(f"{kind:<12}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False)))
    return "\n".join(lines)


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vidjoint.probe",
        usage="%(prog)s --workdir=DIR|WEIGHTS [--task=NAME] [--kind=linear,knn,attentive] [--config=FILE | --train=... --val=...] [--json=FILE]",
        description=__doc__.partition("\n")[0],
        epilog="linear: logistic regression with an L2 penalty; knn: nearest neighbours by cosine, votes weighted by "
        f"exp(cosine / {knn.TEMPERATURE}); attentive: a learned query that reads the patches of all frames. Each probe's settings are chosen by its "
        "top-1 (mAP for several labels) on a fifth of the training split, drawn by --seed; then it learns from all of the training split. The "
        "validation split, every example once, is only for the result. No augmentation. The same seed gives the same result. The JSON file holds "
        "what the table shows, shares in 0..1. More in docs/probe.md.",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of a training run, or any weights that --config.init_from takes")
    parser.add_argument("--task", metavar="NAME", help="task to probe, of the run or of --config (default: the only one, or the only one of videos)")
    parser.add_argument("--kind", default="linear,knn", metavar="KINDS", help=f"any of {', '.join(KINDS)}, comma-separated (default: linear,knn)")
    parser.add_argument("--step", metavar="N", help="checkpoint to probe, a number or best (default: the newest)")
    parser.add_argument("--untrained", action="store_true", help="fresh parameters in place of the trained ones: what the architecture alone gives")
    parser.add_argument("--views", default="1x1", metavar="TxS", help="temporal x spatial views: features are their mean, tokens those of all (1x1)")
    parser.add_argument("--epochs", type=float, default=20, metavar="E", help=f"of the attentive probe, at least {attentive.LEAST} updates (20)")
    parser.add_argument("--batch_size", type=int, metavar="B", help="examples at a time (default: the run's eval.batch_size)")
    parser.add_argument(
        "--memory", type=float, default=8, metavar="GIB", help="for features and tokens; tokens that don't fit are made in each epoch (8)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the held-out part and of the attentive probe (0)")
    parser.add_argument(
        "--features", metavar="FILE.npz", help="keep the features here, or read them from here if they are of the same weights and data"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    other = parser.add_argument_group("other data than the run's own", "keys of a task (vidjoint/config.py), paths relative to --data_root:")
    other.add_argument("--config", metavar="FILE[:ARG]", help="take --task from this experiment; --config.KEY=VALUE sets its keys")
    other.add_argument("--data_root", metavar="FOLDER", help="where relative paths start (default: as the config says; the current folder)")
    other.add_argument("--train", metavar="LIST|FOLDER", help="training split: a list of `path label`, a folder of classes, ...")
    other.add_argument("--val", metavar="LIST|FOLDER", help="validation split")
    other.add_argument("--fold", metavar="K/N", help="in place of --val: hold out the K-th of N parts of --train")
    other.add_argument("--root", metavar="FOLDER", help="where the paths of a list start (default: the list's own folder)")
    other.add_argument("--labels", metavar="FILE", help="one class name per line")
    other.add_argument("--source", metavar="KIND", help="csv (default), folder, smarthome, tfds, packed or demo")
    other.add_argument("--media", choices=("video", "image"), help="what the files are (default: video)")
    other.add_argument("--multilabel", action="store_true", default=None, help="an example has any number of labels")
    args, rest = parser.parse_known_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    kinds = args.kind.split(",")
    problems = [f"--kind={args.kind}: choose from {', '.join(KINDS)}, comma-separated"] * bool(set(kinds) - set(KINDS))
    problems += [f"unknown argument {word}: see --help" for word in rest if args.config is None]
    problems += [f"--views={args.views}: write temporal x spatial views, as in 1x3"] * (validate.views(args.views) is None)
    problems += [f"--{name}={getattr(args, name)}: above 0" for name in ("epochs", "memory") if not 0 < getattr(args, name) < math.inf]
    problems += [f"--seed={args.seed}: at least 0"] * (args.seed < 0)
    if problems:
        raise UserError(*problems)
    check_writable(args.json)
    check_file(args.features)
    classifier = Classifier(args.workdir, parse_step(args.step), args.batch_size)
    config, name = choose_data(args, rest, classifier)
    task = open_task(config, name)
    if args.untrained:
        classifier.params = jax.jit(classifier.model.init)(jax.random.key(args.seed))
    backbone = Backbone(config, classifier.model, classifier.params, validate.views(args.views), config.eval.batch_size)
    content = {"workdir": args.workdir, "step": classifier.step, "untrained": args.untrained, "task": name, "views": args.views, "seed": args.seed}
    content |= run(args, kinds, Study(backbone, task, args.seed))
    print(table(content["probes"]))
    write_json(args.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
