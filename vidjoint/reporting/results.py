"""What an evaluation found, and its ways out: `results.json`, log events, tables for people, predictions, confusion matrices."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vidjoint import metrics
from vidjoint.data.records import Source
from vidjoint.errors import printable
from vidjoint.reporting import plots, predictions

SHARES = ("map", "top1", "top5")  # what begins the names of results that are shares


@dataclass
class TaskResult:
    """Scores of one validation split; n examples, those that can be decoded."""

    labels: tuple[str, ...]
    label: np.ndarray  # int32[n], or int32[n, K] filled up by -1 where examples have any number of labels
    scores: np.ndarray  # float32[n, C], mean over the views
    reversed_scores: np.ndarray | None  # the same with frames last to first; None for images or if not asked for
    undecodable: int = 0  # files that are left out
    source: Source | None = None  # where the examples come from
    index: np.ndarray | None = None  # int32[n], their numbers there
    logits: bool = False  # scores are logits, not probabilities

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

    @functools.cached_property
    def probabilities(self) -> np.ndarray:
        """Of each class: float[n, C]."""
        if not self.logits:
            return self.scores
        odds = np.exp(self.scores - (0 if self.multilabel else self.scores.max(axis=1, keepdims=True)))
        return odds / (1 + odds) if self.multilabel else odds / odds.sum(axis=1, keepdims=True)

    @functools.cached_property
    def confusion(self) -> np.ndarray:
        """Of a task with one label per example: int64[C, C], rows are true classes."""
        matrix = np.zeros((len(self.labels),) * 2, np.int64)
        metrics.count_confusion(matrix, self.label, self.scores.argmax(axis=1))
        return matrix

    def details(self) -> dict:
        """{"mean_class_top1", "per_class": rows of `metrics.per_class`, "calibration": `metrics.calibration`}; multilabel: average precisions."""
        if self.multilabel:
            counts, precision = map(int, self.positive.sum(axis=0)), map(metrics.rounded, self.average_precision)
            rows = zip(range(len(self.labels)), self.labels, counts, precision, strict=True)
            return {"per_class": [dict(zip(("class", "label", "examples", "average_precision"), row, strict=True)) for row in rows]}
        rows = metrics.per_class(self.confusion, self.labels)
        calibration = metrics.calibration(self.probabilities.max(axis=1, initial=0), metrics.topk_correct(self.scores, self.label, 1))
        return {"mean_class_top1": metrics.mean_per_class(rows), "per_class": rows, "calibration": calibration}

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
        cells = map(percent, shares)
        row = (f" {cell:>{max(8, len(title) + 1)}}" for title, cell in zip(titles, cells, strict=False))
        lines.append(f"{name:<20} {task['n']:>8} {task['classes']:>8}" + "".join(row))
    return "\n".join(lines)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def details_table(name: str, details: dict) -> str:
    """`TaskResult.details` for people."""
    lines = [f"{name}: {'class':<32} {'examples':>8} {'top-1' if 'calibration' in details else 'AP':>8}  most often taken for"]
    indent = " " * (len(name) + 2)
    for row in details["per_class"]:
        share, wrong = row.get("top1", row.get("average_precision")), row.get("taken_for")
        taken = f"  {printable(wrong)} ({row['taken_for_examples']})" if wrong else ""
        lines.append(f"{indent}{printable(row['label']):<32} {row['examples']:>8} {percent(share):>8}{taken}")
    if details.get("mean_class_top1") is not None:
        lines.append(f"{indent}mean over the classes: {100 * details['mean_class_top1']:.1f} %")
        lines.append(f"{indent}calibration error (ECE): {100 * details['calibration']['ece']:.1f} %")
        lines += [f"{indent}  {'confidence':<12} {'examples':>8} {'mean':>8} {'right':>8}"]
        for bar in details["calibration"]["bins"]:
            place = f"{100 * bar['from']:.0f} - {100 * bar['to']:.0f} %"
            lines.append(f"{indent}  {place:<12} {bar['examples']:>8} {100 * bar['confidence']:>6.1f} % {100 * bar['accuracy']:>6.1f} %")
    return "\n".join(lines)


def write_predictions(results: dict[str, TaskResult], folder: Path) -> None:
    """Writes `predictions_TASK.csv` of each task."""
    for name, result in results.items():
        if result.source is None:
            continue
        names = [result.source.name(i) for i in result.index]
        predictions.write(predictions.file_of(folder, name), names, result.label, result.probabilities, result.labels)


def write_reports(results: dict[str, TaskResult], folder: Path) -> None:
    """Writes `confusion_TASK.png` and `predictions_TASK.csv`, and in `eval/TASK/` the confusion matrix and per-class accuracy as CSV.

    Of multilabel tasks predictions and average precision per class alone.
    """
    write_predictions(results, folder)
    for name, result in results.items():
        target = folder / "eval" / name
        target.mkdir(parents=True, exist_ok=True)
        if result.multilabel:
            metrics.write_average_precision_csv(target / "per_class.csv", result.average_precision, result.positive, result.labels)
            continue
        metrics.write_confusion_csv(target / "confusion.csv", result.confusion, result.labels)
        metrics.write_per_class_csv(target / "per_class.csv", result.confusion, result.labels)
        title = f"{name}: top-1 {100 * (result.summary()['top1'] or 0):.1f} %"
        plots.confusion_png(folder / f"confusion_{name}.png", result.confusion, result.labels, title)
