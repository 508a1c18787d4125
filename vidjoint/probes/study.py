"""The protocol: settings of each classifier are chosen on a part of the training split, and the validation split is only for its result."""

import dataclasses
import logging
import math
import os
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from vidjoint import sharding
from vidjoint.data.tasks import Task
from vidjoint.errors import UserError
from vidjoint.probes import attentive, knn
from vidjoint.probes.attentive import Batches
from vidjoint.probes.features import Backbone, Features, hold_out, labels_of, load, pick, save
from vidjoint.reporting.results import TaskResult

SPLITS = ("train", "val")

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Probe:
    """What one kind of classifier came to."""

    chosen: dict  # its settings, chosen by the held-out part of the training split
    held_out: float  # top-1 (of a multilabel task: mAP) on that part
    tried: list[dict]  # settings, each with its `held_out`
    result: TaskResult  # on the validation split, trained on all of the training split

    def summary(self) -> dict:
        """Its entry in the JSON file."""
        summary = self.result.summary()
        interval = wilson(summary["top1"] * summary["n"], summary["n"]) if summary["top1"] is not None else None
        return summary | {"top1_interval": interval, "held_out": self.held_out, "chosen": self.chosen, "tried": self.tried}


def wilson(correct: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): which true shares make `correct` of n no surprise."""
    z = 1.959964
    share, extra = correct / n, z**2 / n
    middle, half = (share + extra / 2) / (1 + extra), z * math.sqrt(share * (1 - share) / n + extra / (4 * n)) / (1 + extra)
    return max(0.0, middle - half), min(1.0, middle + half)


class Study:
    """A task's two splits, and the classifiers that are tried on them."""

    def __init__(self, backbone: Backbone, task: Task, seed: int):
        self.backbone, self.task, self.seed = backbone, task, seed
        self.held = hold_out(labels_of(task.train), seed)  # bool[examples of the training split]
        if not self.held.any():
            raise UserError(f"{task.name}: no class has two training examples, one to learn from and one to choose a probe's settings by")

    def features(self, file: str | None = None) -> tuple[Features, Features]:
        """Of the training and of the validation split; read from `file` where that is there, or else written to it. Raises UserError."""
        source = self.backbone.fingerprint(self.task) if file else ""
        if file and os.path.exists(file):
            return load(file, source)
        found = tuple(self.backbone.read(self.task, getattr(self.task, split), "features", f"features of {split}") for split in SPLITS)
        if file:
            save(file, source, self.task.labels, *found)
        return found

    def linear(self, train: Features, val: Features) -> Probe:
        """Logistic regression on features."""
        from vidjoint.probes import linear  # scikit-learn takes a second

        held, classes = self.held[train.index], len(self.task.labels)
        models = linear.fit(train.x[~held], train.label[~held], classes)
        bar = tqdm(zip(linear.PENALTIES, models, strict=True), "linear probe", len(linear.PENALTIES), disable=None, delay=2, leave=False)
        tried = [{"l2": penalty, "held_out": self._quality(model.scores(train.x[held]), train.label[held])} for penalty, model in bar]
        best = max(tried, key=lambda row: row["held_out"])  # of equals the strongest penalty
        (model,) = linear.fit(train.x, train.label, classes, [best["l2"]])
        if not model.converged:
            log.warning("linear: not converged after %d iterations at l2=%g", linear.ITERATIONS, best["l2"])
        return self._probe("l2", best, tried, val.label, model.scores(val.x))

    def knn(self, train: Features, val: Features) -> Probe:
        """k nearest neighbours by the features' cosine."""
        held, classes = self.held[train.index], len(self.task.labels)
        counts = [k for k in knn.NEIGHBOURS if k <= (~held).sum()] or [int((~held).sum())]
        similarity, index = knn.nearest(train.x[held], train.x[~held], counts[-1])
        tried = []
        for k in counts:
            scores = knn.vote(similarity[:, :k], index[:, :k], train.label[~held], classes)
            tried.append({"k": k, "held_out": self._quality(scores, train.label[held])})
        best = max(tried, key=lambda row: row["held_out"])  # of equals the fewest neighbours
        scores = knn.vote(*knn.nearest(val.x, train.x, best["k"]), train.label, classes)
        return self._probe("k", best, tried, val.label, scores)

    def attentive(self, epochs: float, kept: bool) -> Probe:
        """One cross-attention block on the tokens of all patches: `kept` in memory, or made anew in each epoch."""
        train, val = (self._batches(split, kept) for split in SPLITS)
        width, heads = self.backbone.shape(self.task, "tokens")[-1], self.backbone.model.spec.heads
        sizes = dict(width=width, heads=heads, classes=len(self.task.labels), batch_size=self.backbone.batch_size)
        probes = attentive.train(train, self.backbone.mesh, self.held, **sizes, epochs=epochs, seed=self.seed)
        count = len(attentive.RATES)
        scores, label = probes.scores(train(np.flatnonzero(self.held)), slice(count))
        tried = [{"lr": rate, "held_out": self._quality(found, label)} for rate, found in zip(attentive.RATES, scores, strict=True)]
        best = max(tried, key=lambda row: row["held_out"])
        number = count + tried.index(best)
        scores, label = probes.scores(val(np.arange(len(self.task.val))), slice(number, number + 1))
        return self._probe("lr", best, tried, label, scores[0])

    def _batches(self, split: str, kept: bool) -> Batches:
        source = getattr(self.task, split)
        if not kept:
            return lambda order: self.backbone.batches(self.task, pick(source, order), "tokens")
        tokens, size, mesh = self.backbone.read(self.task, source, "tokens", f"tokens of {split}"), self.backbone.batch_size, self.backbone.mesh
        place = np.full(len(source), -1)  # of an example in `tokens`, -1 where it can't be decoded
        place[tokens.index] = np.arange(len(tokens))

        def batches(order: np.ndarray) -> Iterator:
            for start in range(0, len(order), size):
                index = np.arange(start, min(start + size, len(order)))
                rows = np.concatenate([place[order[index]], np.full(size - len(index), -1)])
                index = np.concatenate([index, np.zeros(size - len(index), index.dtype)])
                yield sharding.put_batch({"x": tokens.x[rows]}, mesh)["x"], tokens.label[rows], index, rows >= 0

        return batches

    def _quality(self, scores: np.ndarray, label: np.ndarray) -> float:
        summary = TaskResult(self.task.labels, label, scores, None).summary()
        return summary.get("map", summary["top1"])

    def _probe(self, name: str, best: dict, tried: list[dict], label: np.ndarray, scores: np.ndarray) -> Probe:
        result = TaskResult(self.task.labels, label, scores, None, len(self.task.val) - len(label))
        return Probe({name: best[name]}, best["held_out"], tried, result)
