"""`predictions_TASK.csv`: what a model said of each example of a validation split. Evaluations write it, `report` and `compare` read it."""

import csv
import functools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vidjoint.errors import UserError
from vidjoint.metrics import rounded, write_csv

TOP = 5  # classes kept per example
NAME = re.compile(r"predictions_(\w+)\.csv")


@dataclass(frozen=True)
class Predictions:
    """The table in memory, n rows in the order of the split; classes are given by name."""

    paths: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]  # true classes: one each, in multilabel tasks any number
    scores: np.ndarray  # float64[n], probability of the true class; in multilabel tasks of the least probable true one, NaN without any
    top: tuple[tuple[str, ...], ...]  # the most probable classes, best first
    top_scores: np.ndarray  # float64[n, K], their probabilities
    multilabel: bool

    @functools.cached_property
    def confidence(self) -> np.ndarray:
        """Probability of the best class, float64[n]; NaN where the model's output was not a number."""
        return self.top_scores[:, 0]

    @functools.cached_property
    def correct(self) -> np.ndarray:
        """bool[n]: the best class is the true one, or one of them."""
        right = [best[0] in labels for best, labels in zip(self.top, self.labels, strict=True)]
        return np.array(right, bool) & ~np.isnan(self.confidence)


def file_of(folder: str | Path, task: str) -> Path:
    return Path(folder) / f"predictions_{task}.csv"


def tasks_in(folder: str | Path) -> list[str]:
    """Names of the tasks that have predictions in a folder, sorted."""
    return sorted(match[1] for file in Path(folder).glob("predictions_*.csv") if (match := NAME.fullmatch(file.name)))


def write(path: str | Path, names: list[str], labels: np.ndarray, probabilities: np.ndarray, classes: tuple[str, ...]) -> None:
    """Writes the table: path, label (multilabel: labels, joined by |), its probability, then the best classes and theirs.

    Args:
      names: n paths, or other names of examples.
      labels: int[n], or in multilabel tasks int[n, K] filled up by -1.
      probabilities: float[n, C].
      classes: C names.
    """
    multilabel, count = labels.ndim == 2, min(TOP, len(classes))
    titles = ["path", "labels" if multilabel else "label", "score"]
    rows = [titles + [f"{what}{k}" for k in range(1, count + 1) for what in ("top", "score")]]
    ranked = np.argsort(-probabilities, axis=1, kind="stable")[:, :count]  # equal ones by number, as top-1 counts them
    for name, own, values, best in zip(names, labels if multilabel else labels[:, None], probabilities, ranked, strict=True):
        own = own[own >= 0]
        score = rounded(values[own].min()) if len(own) else None
        rows.append([name, "|".join(classes[c] for c in own), score, *(cell for c in best for cell in (classes[c], rounded(values[c])))])
    write_csv(path, rows)


def read(path: str | Path) -> Predictions:
    """Reads what `write` wrote. Raises UserError if it can't be read."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            header, *rows = csv.reader(file)
        multilabel, width = header[1] == "labels", len(header)
        if header[0] != "path" or width < 5 or any(len(row) != width for row in rows):
            raise ValueError("not a table of predictions")
        labels = tuple(tuple(filter(None, row[1].split("|"))) if multilabel else (row[1],) for row in rows)
        numbers = np.array([[float(cell or "nan") for cell in row[2::2]] for row in rows]).reshape(len(rows), (width - 1) // 2)
        return Predictions(tuple(row[0] for row in rows), labels, numbers[:, 0], tuple(tuple(row[3::2]) for row in rows), numbers[:, 1:], multilabel)
    except (OSError, ValueError, IndexError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise UserError(f"{path} can't be read ({reason}): make it anew with python -m vidjoint.evaluate --workdir=RUN --predictions=DIR") from None
