"""Evaluates whole validation splits: every example once, several views, frames forward and reversed.

python -m vidjoint.evaluate --workdir=DIR [--views=TxS] [--reversed] [--task=NAME --data=CSV --root=FOLDER] [--json=FILE]
"""

import argparse
import functools
import json
import logging
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from vidjoint import metrics, plots, processes, sharding, validate
from vidjoint.classifier import Classifier, parse_step
from vidjoint.data.mixture import evaluation_batches
from vidjoint.data.packed import is_packed, is_url
from vidjoint.data.tasks import Task, open_tasks
from vidjoint.errors import UserError, command
from vidjoint.models.build import Model
from vidjoint.step import make_eval_step, multilabel_tasks

SHARES = ("map", "top1", "top5")  # what begins the names of results that are shares

log = logging.getLogger(__name__)


@dataclass
class TaskResult:
    """Scores of one validation split; n examples, those that can be decoded."""

    labels: tuple[str, ...]
    label: np.ndarray  # int32[n], or int32[n, K] filled up by -1 where examples have any number of labels
    scores: np.ndarray  # float32[n, C], mean over the views
    reversed_scores: np.ndarray | None  # the same with frames last to first; None for images or if not asked for
    undecodable: int = 0  # files that are left out

    @property
    def multilabel(self) -> bool:
        return self.label.ndim == 2

    @functools.cached_property
    def positive(self) -> np.ndarray:
        """Of a multilabel task: bool[n, C]."""
        return metrics.positives(self.label, len(self.labels))

    @functools.cached_property
    def average_precision(self) -> np.ndarray:
        """Of a multilabel task: float64[C], NaN for a class without examples."""
        return metrics.average_precision(self.scores, self.positive)

    def summary(self) -> dict:
        """The task's entry in `results.json`; shares in 0..1.

        Of a multilabel task, `map` is the mean of the average precisions of the classes that have examples. Its `top1` and `top5` tell how often one
        of an example's labels is among the model's best; an example without labels takes no part in them, though it counts in n and in `map`.
        """
        result = {"n": len(self.label), "classes": len(self.labels)}
        if self.multilabel:
            result["map"] = _mean(self.average_precision[self.positive.any(axis=0)])
        result |= {"top1": self._top(self.scores, 1), "top5": self._top(self.scores, 5)}
        if self.reversed_scores is not None:
            if self.multilabel:
                precision = metrics.average_precision(self.reversed_scores, self.positive)
                result["map_reversed"] = _mean(precision[self.positive.any(axis=0)])
            result["top1_reversed"] = self._top(self.reversed_scores, 1)
        return result | ({"undecodable": self.undecodable} if self.undecodable else {})

    def _top(self, scores: np.ndarray, k: int) -> float | None:
        if not self.multilabel:
            return _mean(metrics.topk_correct(scores, self.label, k))
        some = self.positive.any(axis=1)
        return _mean(metrics.topk_correct(scores[some], metrics.best_label(scores[some], self.positive[some]), k))


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


class Evaluator:
    """Runs the validation splits of a set of tasks through one model; compiled once per clip shape."""

    def __init__(self, config: ConfigDict, model: Model, tasks: dict[str, Task], mesh):
        self.config, self.mesh = config, mesh
        self.tasks = {name: task for name, task in tasks.items() if task.val is not None}
        self._step = jax.jit(make_eval_step(model, config.eval.average, multilabel_tasks(config)), static_argnums=(2, 3))
        self._named = set()  # files that have been reported
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch_size = math.ceil((config.eval.batch_size or config.batch_size) / devices) * devices

    def run(self, params: dict, views: tuple[int, int], reverse: bool) -> dict[str, TaskResult]:
        """Evaluates every task with temporal x spatial `views`; with `reverse` also with the frames of videos in reverse order."""
        return {name: self._run_task(task, params, views, reverse and task.is_video) for name, task in self.tasks.items()}

    def _run_task(self, task: Task, params: dict, views: tuple[int, int], reverse: bool) -> TaskResult:
        temporal, spatial = views if task.is_video else (1, views[1])
        rows_of = functools.partial(sharding.local_rows, mesh=self.mesh)
        batches = evaluation_batches(task, self.config, self.batch_size, temporal, spatial, rows_of)
        label, scores, reversed_scores = [], [], []
        total = math.ceil(len(task.val) / self.batch_size)
        hidden = None if jax.process_index() == 0 else True  # None: where there is no terminal
        for batch in tqdm(batches, f"evaluate {task.name}", total=total, disable=hidden, delay=2, leave=False, unit=" batches"):
            for bad in set(batch["bad"]) - self._named:
                log.warning("%s: not evaluated: %s: %s", task.name, task.val.name(bad[1]), bad[2])
            self._named.update(batch["bad"])
            arrays = sharding.put_batch({key: batch[key] for key in ("pixels", "label", "mask")}, self.mesh)
            keep = _to_host(arrays["mask"])
            label.append(_to_host(arrays["label"])[keep])
            scores.append(_to_host(self._step(params, arrays["pixels"], task.name))[keep])
            if reverse:
                reversed_scores.append(_to_host(self._step(params, arrays["pixels"], task.name, True))[keep])
        label = np.concatenate(label)
        reversed_scores = np.concatenate(reversed_scores) if reverse else None
        return TaskResult(task.labels, label, np.concatenate(scores), reversed_scores, len(task.val) - len(label))


def as_json(results: dict[str, TaskResult], step: int) -> dict:
    """The content of `results.json`."""
    return {"step": step, "tasks": {name: result.summary() for name, result in results.items()}}


def as_events(results: dict[str, TaskResult]) -> dict[str, float]:
    """The same as keys of a log event: val/NAME/top1 and so on."""
    summaries = {name: result.summary() for name, result in results.items()}
    return {f"val/{name}/{key}": value for name, summary in summaries.items() for key, value in summary.items() if key.startswith(SHARES)}


def mean_score(results: dict[str, TaskResult]) -> float | None:
    """Mean over the tasks of top-1 (multilabel tasks: mAP), by which the best checkpoint is chosen; None without tasks."""
    summaries = [result.summary() for result in results.values()]
    scores = [summary.get("map", summary["top1"]) for summary in summaries]
    return float(np.mean(scores)) if scores and None not in scores else None


def table(content: dict) -> str:
    """`results.json` for people: one line per task, beside the accuracy of guessing; the mAP of multilabel tasks, if there are any, comes last."""
    tasks = content["tasks"]
    titles = ["chance", "top-1", "top-5", "reversed"] + ["mAP", "mAP rev."] * any("map" in task for task in tasks.values())
    lines = [f"{'task':<20} {'examples':>8} {'classes':>8}" + "".join(f" {title:>{max(8, len(title) + 1)}}" for title in titles)]
    for name, task in tasks.items():
        chance = None if "map" in task else 1 / task["classes"]
        shares = [chance, task["top1"], task["top5"], task.get("top1_reversed"), task.get("map"), task.get("map_reversed")]
        cells = [f"{100 * share:.1f} %" if share is not None else "-" for share in shares]
        row = (f" {cell:>{max(8, len(title) + 1)}}" for title, cell in zip(titles, cells, strict=False))
        lines.append(f"{name:<20} {task['n']:>8} {task['classes']:>8}" + "".join(row))
    return "\n".join(lines)


def write_reports(results: dict[str, TaskResult], folder: Path) -> None:
    """Writes `eval/TASK/`: confusion matrix as CSV and PNG, per-class accuracy as CSV; for multilabel tasks average precision per class alone."""
    for name, result in results.items():
        target = folder / "eval" / name
        target.mkdir(parents=True, exist_ok=True)
        if result.multilabel:
            metrics.write_average_precision_csv(target / "per_class.csv", result.average_precision, result.positive, result.labels)
            continue
        matrix = np.zeros((len(result.labels),) * 2, np.int64)
        metrics.count_confusion(matrix, result.label, result.scores.argmax(axis=1))
        metrics.write_confusion_csv(target / "confusion.csv", matrix, result.labels)
        metrics.write_per_class_csv(target / "per_class.csv", matrix, result.labels)
        title = f"{name}: top-1 {100 * (result.summary()['top1'] or 0):.1f} %"
        plots.confusion_png(target / "confusion.png", matrix, result.labels, title)


def _to_host(x: jax.Array) -> np.ndarray:
    return np.asarray(x) if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(x, tiled=True))


def use_data(config: ConfigDict, name: str, labels: tuple[str, ...], file: str, root: str, folder: str) -> None:
    """Puts the list `file` in place of a task's validation split; its labels are the run's numbers or class names. Writes these into `folder`."""
    task, path = config.tasks[name], Path(file).expanduser().absolute()
    if is_packed(file) or is_packed(str(path)):
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
        usage="%(prog)s --workdir=DIR [--views=TxS] [--reversed] [--task=NAME [--data=CSV --root=FOLDER]] [--json=FILE]",
        description=__doc__.partition("\n")[0],
        epilog='The JSON file holds {"step": updates made, "tasks": {NAME: {"n": examples, "classes", "top1", "top5", "top1_reversed"}}}, shares '
        "in 0..1; top1_reversed only with --reversed, for videos. Multilabel tasks also have map, mean average precision, and map_reversed. Files "
        "that can't be decoded are named, counted as undecodable, and left out of n.",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of a training run")
    parser.add_argument("--views", metavar="TxS", help="temporal x spatial views that are averaged, as in 1x3 (default: the run's eval.views)")
    parser.add_argument("--reversed", action="store_true", help="also evaluate videos with their frames in reverse order")
    parser.add_argument("--task", metavar="NAME", help="evaluate this task only (default: all that have a validation split)")
    parser.add_argument(
        "--data",
        metavar="CSV",
        help="list of files to evaluate in place of the task's own validation split (needs --task): lines `path,label` or `path label`, "
        "where a label is the name of a class of the run or its number from 0; for a multilabel task `path,label|label`; or a packed data set",
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
    with processes.joined(args):
        run(args)
    return 0


def run(args: argparse.Namespace) -> None:
    """Evaluates, prints the table and writes `args.json`. Raises UserError."""
    check_writable(args.json)
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
    write_json(args.json, content)


def check_writable(file: str | None) -> None:
    """Finds out before the work whether its results can be written to `file` (None: nowhere). Raises UserError if not."""
    if file and (os.path.isdir(file) or not os.access(file if os.path.exists(file) else os.path.dirname(os.path.abspath(file)), os.W_OK)):
        raise UserError(f"--json={file} can't be written: name a file in a folder that exists and is yours")


def write_json(file: str | None, content: dict) -> None:
    """Writes results to `file` (None: nowhere). Raises UserError if that fails."""
    try:
        if file:
            Path(file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json={file} can't be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
