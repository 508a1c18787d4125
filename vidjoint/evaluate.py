"""Evaluates whole validation splits: every example once, several views, frames forward and reversed.

python -m vidjoint.evaluate --workdir=DIR [--views=TxS] [--reversed] [--per_class] [--task=NAME --data=CSV --root=FOLDER] [--json=FILE]
"""

import argparse
import functools
import json
import logging
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from vidjoint.machine import host_memory

if __name__ == "__main__":
    host_memory.keep()  # as vidjoint.main does

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from vidjoint import metrics, sharding, validate
from vidjoint.classifier import Classifier, parse_step
from vidjoint.data.mixture import evaluation_batches
from vidjoint.data.packed import is_packed, is_url
from vidjoint.data.tasks import Task, open_tasks
from vidjoint.errors import UserError, command
from vidjoint.machine import processes
from vidjoint.models.build import Model
from vidjoint.output_files import check_writable, write_json
from vidjoint.reporting.results import TaskResult, as_events, as_json, details_table, mean_score, table, write_predictions, write_reports
from vidjoint.step import make_eval_step, multilabel_tasks

log = logging.getLogger(__name__)

__all__ = ["Abandoned", "Evaluator", "TaskResult", "as_events", "as_json", "main", "mean_score", "table", "write_reports"]


class Abandoned(Exception):
    """An evaluation was given up."""


class Evaluator:
    """Runs the validation splits of a set of tasks through one model; compiled once per clip shape."""

    def __init__(self, config: ConfigDict, model: Model, tasks: dict[str, Task], mesh):
        self.config, self.mesh = config, mesh
        self.tasks = {name: task for name, task in tasks.items() if task.val is not None}
        self._step = jax.jit(make_eval_step(model, config.eval.average, multilabel_tasks(config)), static_argnums=(2, 3))
        self._named = set()  # files that have been reported
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch_size = math.ceil((config.eval.batch_size or config.batch_size) / devices) * devices

    def run(self, params: dict, views: tuple[int, int], reverse: bool, give_up: Callable[[], bool] = lambda: False) -> dict[str, TaskResult]:
        """Evaluates every task with temporal x spatial `views`; with `reverse` also with the frames of videos in reverse order.

        Raises:
          Abandoned: `give_up`, which is called before each batch, said so.
        """
        return {name: self._run_task(task, params, views, reverse and task.is_video, give_up) for name, task in self.tasks.items()}

    def _run_task(self, task: Task, params: dict, views: tuple[int, int], reverse: bool, give_up: Callable[[], bool]) -> TaskResult:
        temporal, spatial = views if task.is_video else (1, views[1])
        rows_of = functools.partial(sharding.local_rows, mesh=self.mesh)
        batches = evaluation_batches(task, self.config, self.batch_size, temporal, spatial, rows_of)
        label, index, scores, reversed_scores = [], [], [], []
        total = math.ceil(len(task.val) / self.batch_size)
        hidden = None if jax.process_index() == 0 else True  # None: where there is no terminal
        for batch in tqdm(batches, f"evaluate {task.name}", total=total, disable=hidden, delay=2, leave=False, unit=" batches"):
            if give_up():
                raise Abandoned
            for bad in set(batch["bad"]) - self._named:
                log.warning("%s: not evaluated: %s: %s", task.name, task.val.name(bad[1]), bad[2])
            self._named.update(batch["bad"])
            arrays = sharding.put_batch({key: batch[key] for key in ("pixels", "label", "index", "mask")}, self.mesh)
            keep = _to_host(arrays["mask"])
            label.append(_to_host(arrays["label"])[keep])
            index.append(_to_host(arrays["index"])[keep])
            scores.append(_to_host(self._step(params, arrays["pixels"], task.name))[keep])
            if reverse:
                reversed_scores.append(_to_host(self._step(params, arrays["pixels"], task.name, True))[keep])
        label, index = np.concatenate(label), np.concatenate(index)
        reversed_scores = np.concatenate(reversed_scores) if reverse else None
        found = task.labels, label, np.concatenate(scores), reversed_scores, len(task.val) - len(label)
        return TaskResult(*found, task.val, index, self.config.eval.average == "logits")


def _to_host(x: jax.Array) -> np.ndarray:
    return np.asarray(x) if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(x, tiled=True))


def use_data(config: ConfigDict, name: str, labels: tuple[str, ...], file: str, root: str, folder: str) -> None:
    """Puts the list or packed data set `file` in place of a task's validation split.

    A list's labels are the run's numbers or class names, which are written into `folder`.
    """
    task, path = config.tasks[name], Path(file).expanduser().absolute()
    if is_packed(str(path)) or is_url(file):
        task.update(source="packed", val=file if is_url(file) else str(path), fold="", root="", classes=0, labels="")
        return
    names = Path(folder) / "labels.json"  # JSON, for a text file of names like "1 left" would be taken for numbered names
    names.write_text(json.dumps(labels))
    root = Path(root).expanduser().absolute() if root else path.parent
    task.update(source="csv", val=str(path), fold="", root=str(root), classes=0, labels=str(names))


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vidjoint.evaluate",
        usage="%(prog)s --workdir=DIR [--views=TxS] [--reversed] [--per_class] [--task=NAME [--data=CSV --root=FOLDER]] [--json=FILE]",
        description=__doc__.partition("\n")[0],
        epilog='The JSON file holds {"step": updates made, "tasks": {NAME: {"n": examples, "classes", "top1", "top5", "top1_reversed"}}}, shares '
        "in 0..1; top1_reversed only with --reversed, for videos. Multilabel tasks also have map, mean average precision, and map_reversed. Files "
        "that can't be decoded are named, counted as undecodable, and left out of n. With --per_class, a task also has mean_class_top1, per_class (a "
        f"list) and calibration (ece, the expected calibration error in {metrics.BINS} bins, and the bins).",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of a training run")
    parser.add_argument("--views", metavar="TxS", help="temporal x spatial views that are averaged, as in 1x3 (default: the run's eval.views)")
    parser.add_argument("--reversed", action="store_true", help="also evaluate videos with their frames in reverse order")
    parser.add_argument("--per_class", action="store_true", help="also show the accuracy of each class, and whether probabilities can be believed")
    parser.add_argument("--predictions", metavar="FOLDER", help="also write predictions_TASK.csv there, for vidjoint.compare and .report")
    parser.add_argument("--task", metavar="NAME", help="evaluate this task only (default: all that have a validation split)")
    parser.add_argument(
        "--data",
        metavar="CSV",
        help="list of files to evaluate in place of the task's own validation split (needs --task): lines `path,label` or `path label`, "
        "where a label is the name of a class of the run or its number from 0; for a multilabel task `path,label|label`; or a packed data set, "
        "PACK or PACK:SPLIT",
    )
    parser.add_argument("--root", default="", metavar="FOLDER", help="folder that the paths in --data start from (default: the list's own folder)")
    parser.add_argument("--data_root", metavar="FOLDER", help="where the run's own data is, if it has moved since")
    parser.add_argument("--step", metavar="N", help="checkpoint to evaluate, a number or best (default: the newest)")
    parser.add_argument("--batch_size", type=int, metavar="B", help="examples at a time (default: the run's eval.batch_size)")
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    processes.add_arguments(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    if args.views and validate.views(args.views) is None:
        raise UserError(f"--views={args.views}: write temporal x spatial views, as in 1x3")
    if args.data and not args.task:
        raise UserError("--data needs --task: say which of the run's heads its labels are for")
    if args.root and not args.data:
        raise UserError("--root is where the paths of --data start: give --data too (if the run's own data has moved, --data_root)")
    sharding.keep_compiled()
    with processes.joined(args):
        run(args)
    return 0


def run(args: argparse.Namespace) -> None:
    """Evaluates, prints the table and writes `args.json`. Raises UserError."""
    check_writable(args.json)
    if args.predictions and not Path(args.predictions).is_dir():
        raise UserError(f"--predictions={args.predictions} is not a folder: make it, or name another")
    classifier = Classifier(args.workdir, parse_step(args.step), args.batch_size)
    config, views = classifier.config, args.views or classifier.config.eval.views
    config.eval.views = views
    config.data_root = config.data_root if args.data_root is None else args.data_root
    config.mesh.update(data=-1, fsdp=1, tensor=1)  # whatever the run was trained on
    if args.task:
        config.task_order = ()
        for name in set(config.tasks) - {classifier.choose_task(args.task)}:
            del config.tasks[name]
    with tempfile.TemporaryDirectory() as folder:
        if args.data:
            use_data(config, args.task, classifier.labels[args.task], args.data, args.root, folder)
        problems = validate.check(config, trains=False)
        tasks = open_tasks(config, ("val",)) if not problems else {}
    problems += [
        f"{name}: the classes of {task.val.origin} are not those of the run: evaluate it by --task={name} --data=CSV"
        for name, task in tasks.items()
        if task.labels != classifier.labels[name]
    ]
    if not problems and not tasks:
        problems = [f"{', '.join(config.tasks)}: no validation split in its config: give one by --task=NAME --data=CSV"]
    if problems:
        raise UserError(*problems)
    for task in tasks.values():
        for line in task.val.warnings if jax.process_index() == 0 else ():
            log.warning("%s: %s", task.name, line)
    mesh = sharding.make_mesh(config.mesh)
    params = jax.device_put(jax.device_get(classifier.params), sharding.tree_sharding(classifier.params, mesh))
    with sharding.memory_errors("lower --batch_size"):
        results = Evaluator(config, classifier.model, tasks, mesh).run(params, validate.views(views), args.reversed)
    if jax.process_index():
        return
    content = as_json(results, classifier.step)
    print(f"{args.workdir if classifier.step is None else f'step {classifier.step}'}, {views} views")
    print(table(content))
    for name, result in results.items() if args.per_class else ():
        content["tasks"][name] |= (details := result.details())
        print(f"\n{details_table(name, details)}")
    write_json(args.json, content)
    if args.predictions:
        write_predictions(results, Path(args.predictions))


if __name__ == "__main__":
    sys.exit(main())
