"""Evaluates whole validation splits: every example once, several views, frames forward and reversed.

python -m vidjoint.evaluate --workdir=DIR [--views=TxS] [--reversed] [--task=NAME --data=CSV --root=FOLDER] [--json=FILE]
"""

import argparse
import json
import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from vidjoint import metrics, plots, sharding, validate
from vidjoint.classifier import Classifier
from vidjoint.data.mixture import Task, evaluation_batches, open_tasks
from vidjoint.errors import UserError, command
from vidjoint.models.build import Model
from vidjoint.run_folder import RunFolder
from vidjoint.step import make_eval_step

log = logging.getLogger(__name__)


@dataclass
class TaskResult:
    """Scores of one validation split."""

    labels: tuple[str, ...]
    label: np.ndarray  # int32[n]
    scores: np.ndarray  # float32[n, C]
    reversed_scores: np.ndarray | None  # the same with frames last to first; None for images or if not asked for
    bad: list[str]  # files that can't be decoded: not in n

    def summary(self) -> dict:
        """The task's entry in `results.json`; shares in 0..1."""
        n = len(self.label)
        top = {k: float(metrics.topk_correct(self.scores, self.label, k).mean()) if n else None for k in (1, 5)}
        result = {"n": n, "classes": len(self.labels), "top1": top[1], "top5": top[5]}
        if self.reversed_scores is not None:
            result["top1_reversed"] = float(metrics.topk_correct(self.reversed_scores, self.label, 1).mean()) if n else None
        return result | ({"undecodable": len(self.bad)} if self.bad else {})


class Evaluator:
    """Runs the validation splits of a set of tasks through one model; compiled once per clip shape."""

    def __init__(self, config: ConfigDict, model: Model, tasks: dict[str, Task], mesh):
        self.config, self.mesh = config, mesh
        self.tasks = {name: task for name, task in tasks.items() if task.val is not None}
        self._step = jax.jit(make_eval_step(model, config.eval.average), static_argnums=(2, 3))
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch_size = math.ceil((config.eval.batch_size or config.batch_size) / devices) * devices

    def run(self, params: dict, views: tuple[int, int], reverse: bool) -> dict[str, TaskResult]:
        """Evaluates every task with temporal x spatial `views`; with `reverse` also with the frames of videos in reverse order."""
        return {name: self._run_task(task, params, views, reverse and task.is_video) for name, task in self.tasks.items()}

    def _run_task(self, task: Task, params: dict, views: tuple[int, int], reverse: bool) -> TaskResult:
        temporal, spatial = views if task.is_video else (1, views[1])
        batches = evaluation_batches(
            task, self.config, self.batch_size, temporal, spatial, process=jax.process_index(), processes=jax.process_count()
        )
        label, scores, reversed_scores, bad = [], [], [], []
        total = math.ceil(len(task.val) / self.batch_size)
        for batch in tqdm(batches, f"evaluate {task.name}", total=total, disable=None, delay=2, leave=False, unit="batch"):
            bad += [f"{task.val.name(index)}: {reason}" for _, index, reason in batch["bad"]]
            arrays = sharding.put_batch({key: batch[key] for key in ("pixels", "label", "mask")}, self.mesh)
            keep = _to_host(arrays["mask"])
            label.append(_to_host(arrays["label"])[keep])
            scores.append(_to_host(self._step(params, arrays["pixels"], task.name))[keep])
            if reverse:
                reversed_scores.append(_to_host(self._step(params, arrays["pixels"], task.name, True))[keep])
        for line in bad:
            log.warning("%s: not evaluated: %s", task.name, line)
        return TaskResult(
            task.labels, np.concatenate(label), np.concatenate(scores), np.concatenate(reversed_scores) if reverse else None, bad
        )


def as_json(results: dict[str, TaskResult], step: int) -> dict:
    """The content of `results.json`."""
    return {"step": step, "tasks": {name: result.summary() for name, result in results.items()}}


def as_events(results: dict[str, TaskResult]) -> dict[str, float]:
    """The same as keys of a log event: val/NAME/top1 and so on."""
    return {f"val/{name}/{key}": value for name, result in results.items() for key, value in result.summary().items() if key.startswith("top")}


def mean_top1(results: dict[str, TaskResult]) -> float | None:
    """Mean top-1 over the tasks, by which the best checkpoint is chosen; None without tasks."""
    top1 = [result.summary()["top1"] for result in results.values()]
    return float(np.mean(top1)) if top1 and None not in top1 else None


def table(content: dict) -> str:
    """`results.json` for people: one line per task, beside the accuracy of guessing."""
    lines = [f"{'task':<20} {'examples':>8} {'classes':>8} {'chance':>8} {'top-1':>8} {'top-5':>8} {'reversed':>9}"]
    for name, task in content["tasks"].items():
        shares = [1 / task["classes"], task["top1"], task["top5"], task.get("top1_reversed")]
        cells = [f"{100 * share:.1f} %" if share is not None else "-" for share in shares]
        lines.append(f"{name:<20} {task['n']:>8} {task['classes']:>8} {cells[0]:>8} {cells[1]:>8} {cells[2]:>8} {cells[3]:>9}")
    return "\n".join(lines)


def write_reports(results: dict[str, TaskResult], folder: Path) -> None:
    """Writes `eval/TASK/`: confusion matrix as CSV and PNG, per-class accuracy as CSV."""
    for name, result in results.items():
        target = folder / "eval" / name
        target.mkdir(parents=True, exist_ok=True)
        matrix = np.zeros((len(result.labels),) * 2, np.int64)
        metrics.count_confusion(matrix, result.label, result.scores.argmax(axis=1))
        metrics.write_confusion_csv(target / "confusion.csv", matrix, result.labels)
        metrics.write_per_class_csv(target / "per_class.csv", matrix, result.labels)
        plots.confusion_png(target / "confusion.png", matrix, result.labels, f"{name}: top-1 {100 * np.trace(matrix) / max(matrix.sum(), 1):.1f} %")


def _to_host(x: jax.Array) -> np.ndarray:
    return np.asarray(x) if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(x, tiled=True))


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m vidjoint.evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", required=True, help="folder of a training run")
    parser.add_argument("--views", help="temporal x spatial views whose predictions are averaged, as in 1x3 (default: the run's eval.views)")
    parser.add_argument("--reversed", action="store_true", help="also evaluate videos with their frames reversed")
    parser.add_argument("--task", help="evaluate this task only (default: all)")
    parser.add_argument("--data", help="list of files with labels to evaluate in place of the task's own validation split (needs --task)")
    parser.add_argument("--root", default="", help="folder that the paths in --data start from (default: the list's own folder)")
    parser.add_argument("--data_root", help="the config's data_root, if the data has moved")
    parser.add_argument("--step", help="checkpoint to evaluate: a number or best (default: the newest)")
    parser.add_argument("--json", help="write the results to this file, as in results.json")
    args = parser.parse_args(argv)
    if args.views and validate.views(args.views) is None:
        raise UserError(f"--views={args.views}: write temporal x spatial views, as in 1x3")
    if args.data and not args.task:
        raise UserError("--data needs --task: say which of the run's heads its labels are for")
    classifier = Classifier(args.workdir, int(args.step) if (args.step or "").isdigit() else args.step)
    config, folder = classifier.config, RunFolder(args.workdir)
    if args.data_root is not None:
        config.data_root = args.data_root
    if args.views:
        config.eval.views = args.views
    if args.task:
        classifier.check_task(args.task)
    if args.data:
        settings, path = config.tasks[args.task], Path(args.data).absolute()
        settings.source, settings.fold, settings.val = "csv", "", str(path)
        settings.root = str(Path(args.root or path.parent).absolute())
        settings.classes, settings.labels = 0, str(folder.label_file(args.task).absolute())
    for name in set(config.tasks) - {args.task or name for name in config.tasks}:
        del config.tasks[name]
    problems = validate.check(config)
    if problems:
        raise UserError(*problems)
    tasks = open_tasks(config, ("val",))
    changed = [f"{name}: its class names are not those of the run" for name, task in tasks.items() if task.labels != classifier.labels[name]]
    if changed or not tasks:
        raise UserError(*changed or ["there is no validation split: set tasks.NAME.val or fold in the run's config, or give --data"])
    evaluator = Evaluator(config, classifier.model, tasks, sharding.make_mesh(config.mesh))
    results = evaluator.run(classifier.params, validate.views(config.eval.views), args.reversed)
    content = as_json(results, classifier.step)
    print(table(content))
    if args.json:
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
