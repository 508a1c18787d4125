"""What is counted and where it is written: top-k, average precision, confusion matrices, calibration, means of the training log, metrics.jsonl."""

import contextlib
import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from vidjoint.output_files import write_whole
from vidjoint.running import trackers

BINS = 15  # of confidence, in the calibration error

# Counting


def topk_correct(scores, label, k: int) -> np.ndarray:
    """Returns whether the label is among the k classes of highest score. Equal scores rank by class number, so a constant output names class 0.

    Args:
      scores: logits or probabilities, float[B, C]; a row with a NaN counts as wrong.
      label: int[B], 0..C-1.
      k: 1 or more; from k = C on every row without NaN is right.

    Returns:
      bool[B].

    Raises:
      ValueError: a label out of range.
    """
    scores, label = np.asarray(scores, np.float32), np.asarray(label)
    classes = scores.shape[1]
    _check_range("label", label, classes)
    own = scores[np.arange(len(label)), label][:, None]  # [B, 1]
    ahead = (scores > own) | ((scores == own) & (np.arange(classes) < label[:, None]))  # [B, C]
    return (ahead.sum(axis=1) < k) & ~np.isnan(scores).any(axis=1)


def positives(label, classes: int) -> np.ndarray:
    """Labels int[B, K], filled up by -1, as bool[B, C]: which classes are among an example's labels.

    Raises:
      ValueError: a label out of range.
    """
    label = np.asarray(label)
    rows, columns = np.nonzero(label >= 0)
    _check_range("label", label[rows, columns], classes)
    result = np.zeros((len(label), classes), bool)
    result[rows, label[rows, columns]] = True
    return result


def best_label(scores, positive: np.ndarray) -> np.ndarray:
    """The one of each example's labels that has the highest score, int[B]; so `topk_correct` of it is whether any of them is among the k best.

    Args:
      scores: float[B, C].
      positive: bool[B, C], see `positives`. A row without any gives class 0, which means nothing.
    """
    return np.where(positive, np.asarray(scores, np.float32), -np.inf).argmax(axis=1)


def average_precision(scores, positive: np.ndarray) -> np.ndarray:
    """Returns the average precision of each class, float64[C]; NaN for a class without positive examples.

    Examples are ranked by score. At each positive example, precision is the share of positives among all examples with at least its score, so that
    the order of equal scores doesn't matter; the mean of these, without interpolation, is the average precision (scikit-learn's convention). An
    example whose score is NaN counts as not found.

    Args:
      scores: float[B, C], logits or probabilities.
      positive: bool[B, C], see `positives`.
    """
    scores = np.asarray(scores, np.float32)
    result = np.full(scores.shape[1], np.nan)
    for number in np.flatnonzero(positive.any(axis=0)):
        ranked = np.sort(-scores[:, number])  # NaN last
        ranked_hits = np.sort(-scores[positive[:, number], number])
        found = ranked_hits[~np.isnan(ranked_hits)]
        precision = np.searchsorted(found, found, "right") / np.searchsorted(ranked, found, "right")
        result[number] = precision.sum() / len(ranked_hits)
    return result


def count_confusion(matrix: np.ndarray, label, prediction) -> None:
    """Adds examples to a confusion matrix, in place.

    Args:
      matrix: int64[C, C], one row per true class and one column per predicted class; starts as zeros.
      label, prediction: int[B], 0..C-1.

    Raises:
      ValueError: a label or prediction out of range.
    """
    label, prediction = np.asarray(label), np.asarray(prediction)
    _check_range("label", label, len(matrix))
    _check_range("prediction", prediction, len(matrix))
    np.add.at(matrix, (label, prediction), 1)


def per_class(matrix: np.ndarray, labels) -> list[dict]:
    """Returns the accuracy of each class and what it is most often taken for.

    Args:
      matrix: int[C, C], rows are true classes.
      labels: C class names.

    Returns:
      C dicts {"class": number, "label": name, "examples", "correct", "top1": share in 0..1 or None without examples,
      "taken_for": the most frequent wrong class or "", "taken_for_examples": how often}.
    """
    rows = []
    for number, (label, counts) in enumerate(zip(labels, matrix, strict=True)):
        examples, correct = int(counts.sum()), int(counts[number])
        wrong = np.where(np.arange(len(counts)) == number, 0, counts)
        worst = int(wrong.argmax())
        row = {"class": number, "label": label, "examples": examples, "correct": correct, "top1": correct / examples if examples else None}
        rows.append(row | {"taken_for": labels[worst] if wrong[worst] else "", "taken_for_examples": int(wrong[worst])})
    return rows


def mean_per_class(rows: list[dict]) -> float | None:
    """Mean of the classes' own accuracies, those without examples aside (mean class accuracy); None without any."""
    shares = [row["top1"] for row in rows if row["top1"] is not None]
    return sum(shares) / len(shares) if shares else None


def calibration(confidence, correct, bins: int = BINS) -> dict:
    """Whether predictions are right as often as their probabilities say: expected calibration error and the reliability diagram's bars.

    Examples are put in `bins` equal bins by confidence, bin b holding ((b - 1) / bins, b / bins]; then
    ECE = sum over b of n_b / n x |accuracy_b - confidence_b|, with the means of each bin (Guo et al. 2017, eq. 3).

    Args:
      confidence: float[n] in 0..1, the probability of each example's prediction; an example whose confidence is NaN is left out.
      correct: bool[n].

    Returns:
      {"ece": share in 0..1 or None without examples, "bins": [{"from", "to", "examples", "confidence": mean, "accuracy"} of each bin that has some]}.
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, bool)
    known = ~np.isnan(confidence)
    confidence, correct = confidence[known], correct[known]
    number = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count, ahead, right = (np.bincount(number, weights, bins) for weights in (None, confidence, correct))
    ece = float(np.abs(right - ahead).sum() / len(confidence)) if len(confidence) else None
    bars = [
        {"from": b / bins, "to": (b + 1) / bins, "examples": int(count[b]), "confidence": ahead[b] / count[b], "accuracy": right[b] / count[b]}
        for b in map(int, np.flatnonzero(count))
    ]
    return {"ece": ece, "bins": bars}


def write_confusion_csv(path, matrix: np.ndarray, labels) -> None:
    """Writes a confusion matrix as CSV (UTF-8): a header of predicted classes, then per true class its name and its counts."""
    write_csv(path, [["true / predicted", *labels], *([label, *map(int, row)] for label, row in zip(labels, matrix, strict=True))])


def write_per_class_csv(path, matrix: np.ndarray, labels) -> None:
    """Writes the table of `per_class` as CSV (UTF-8) with a header; the share of a class without examples is empty."""
    rows = per_class(matrix, labels)
    write_csv(path, [list(rows[0]), *([rounded(value) for value in row.values()] for row in rows)])


def write_average_precision_csv(path, precision: np.ndarray, positive: np.ndarray, labels) -> None:
    """Writes a multilabel task's `per_class.csv` (UTF-8): class, label, examples that have it, and average precision, empty without examples."""
    counts = positive.sum(axis=0)
    rows = zip(range(len(labels)), labels, map(int, counts), map(rounded, precision), strict=True)
    write_csv(path, [["class", "label", "examples", "average_precision"], *rows])


# The training log


class Summary:
    """Running means of the training log: `add` after every step, `take` when it is time to log.

    `add` keeps device arrays as they are, so that no step waits for the one before; `take` fetches them all at once.
    """

    def __init__(self):
        self._steps = []

    def __len__(self) -> int:
        """Steps since the last `take`."""
        return len(self._steps)

    def add(self, values: dict) -> None:
        """Adds one step: name -> scalar, for a mean over steps, or pair (sum, count), for a mean over examples (sum of sums / sum of counts)."""
        self._steps.append(dict(values))

    def take(self, counts: Callable[[dict], bool] | None = None) -> dict[str, float]:
        """Returns name -> mean since the last `take`, sorted by name, and starts anew. A name whose counts add up to zero is left out.

        `counts` gets the values of each step, on the host, and says whether they count.
        """
        steps, self._steps = jax.device_get(self._steps), []
        totals = {}
        for step in filter(counts, steps) if counts else steps:
            for name, value in step.items():
                amount, count = value if isinstance(value, tuple) else (value, 1)
                total = totals.setdefault(name, [0.0, 0.0])
                total[0] += float(amount)
                total[1] += float(count)
        return {name: amount / count for name, (amount, count) in sorted(totals.items()) if count}


class MetricsWriter:
    """Writes the events of a run to `workdir/metrics.jsonl` (one JSON object per line) and to the trackers of `config.log_to`.

    One process of a run has one. Every event is handed to the system before `write` returns, so a killed process loses none. Write the events of
    a step before its checkpoint is saved; then a resumed run repeats exactly those that `resume_step` drops.
    """

    def __init__(self, workdir, resume_step: int | None = None, log_to: tuple[str, ...] = ("tensorboard",), settings: dict | None = None):
        """Opens the log.

        Args:
          workdir: folder, made if missing.
          resume_step: step the run goes on from (0: the start). What an interrupted run wrote about later steps is dropped. None drops nothing but
            a last line cut short.
          log_to: names of trackers, see `trackers.TRACKERS`.
          settings: the run's config as one flat dict, for trackers that show it.
        """
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        _drop_later_events(path, math.inf if resume_step is None else resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._trackers = trackers.open_all(log_to, workdir, resume_step, settings or {})

    def write(self, step: int, values: dict) -> None:
        """Writes one event.

        Args:
          step: number of updates made.
          values: name ("train/loss", "val/NAME/top1") -> number, text or None. Floats keep 6 significant digits; one that is not finite becomes null.
        """
        values = {name: rounded(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": int(step), **values}, allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.write(int(step), numbers)

    def close(self, ended: bool = True) -> None:
        """`ended` tells a run that is done from one that was stopped."""
        with contextlib.ExitStack() as closing:  # all of them, whether or not one fails
            closing.callback(self._file.close)
            for tracker in self._trackers:
                closing.callback(tracker.close, ended)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.close(ended=kind is None)


def read_events(path) -> list[dict]:
    """Returns the events of a metrics.jsonl in their order; lines that are no event (one cut short by a crash) are passed over."""
    with open(path, "rb") as file:
        return [event for event in map(_parse, file) if event is not None]


def rounded(value):
    """Returns a value as JSON and CSV hold it: whole numbers and text as they are, others as float of 6 significant digits, None if not finite."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, np.integer):
        return int(value)
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None


def _check_range(what: str, numbers: np.ndarray, classes: int) -> None:
    if numbers.size and not (0 <= numbers.min() and numbers.max() < classes):
        raise ValueError(f"{what} outside 0..{classes - 1}: {numbers.min()}..{numbers.max()}")


def write_csv(path, rows) -> None:
    """Writes rows as CSV in UTF-8; bytes of file names that are none stay as they are."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_whole(path, text.getvalue().encode(errors="surrogateescape"))


def _parse(line: bytes) -> dict | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if line.endswith(b"\n") and isinstance(event, dict) and isinstance(event.get("step"), int) else None


def _drop_later_events(path: Path, last: float) -> None:
    if not path.exists():
        return
    old = path.read_bytes()
    events = ((line, _parse(line)) for line in old.splitlines(keepends=True))
    new = b"".join(line for line, event in events if event is not None and event["step"] <= last)
    if new != old:
        write_whole(path, new)
