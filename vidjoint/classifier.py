"""A trained model ready for use: `vidjoint.load(folder)`."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from vidjoint import sharding
from vidjoint.data.prediction import Row, Window, decoded, group
from vidjoint.data.tasks import clip_spec
from vidjoint.data.workers import cores
from vidjoint.errors import UserError
from vidjoint.models.build import build
from vidjoint.step import make_eval_step, multilabel_tasks, probabilities
from vidjoint.weights.pretrained import open_weights

MAX_BATCH_BYTES = 2**28  # uint8 pixels that go to the device at a time: bounds its memory and ours where clips are large


class Classifier:
    """A trained model with the class names and the preprocessing of its tasks.

    Attributes:
      labels: task -> class names, in the order of the head's outputs.
      config: the config of the run.
      step: number of updates the parameters have seen; None for weights that are not a run's.
      params: all parameters, float32 (the moving average where the run kept one).
    """

    def __init__(self, folder: str | Path, step: int | str | None = None, batch_size: int | None = None):
        """Opens the folder of a training run or of weights, or another project's weights (docs/weights.md).

        Args:
          step: which checkpoint, a number or "best" (by mean validation top-1, or mAP for multilabel tasks); None is the newest.
          batch_size: examples that go to the device at a time; None is the run's `eval.batch_size`.

        Raises:
          UserError: the folder holds no run, or not that checkpoint.
        """
        weights = open_weights(folder, step)
        if weights.unexplained:
            raise UserError(f"{folder}: nothing is known of {weights.unexplained[0]}: turn it into a folder with python -m vidjoint.weights import")
        self.config, self.labels, self.step = weights.config, weights.labels, weights.step
        if batch_size is not None and batch_size < 1:
            raise UserError(f"--batch_size={batch_size}: at least 1")
        self.config.eval.batch_size = batch_size or self.config.eval.batch_size or self.config.batch_size
        self.model = build(self.config.model, {task: len(names) for task, names in self.labels.items()})
        self.params = jax.device_put(traverse_util.unflatten_dict(weights.params, sep="/"))
        average, multilabel = self.config.eval.average, multilabel_tasks(self.config)
        eval_step = make_eval_step(self.model, average, multilabel)

        def averaged(params: dict, pixels: jax.Array, task: str) -> jax.Array:
            scores = eval_step(params, pixels, task)
            return probabilities(scores, task in multilabel) if average == "logits" else scores

        self._probabilities = jax.jit(averaged, static_argnums=2)
        self._logits = jax.jit(lambda params, pixels, task: self.model.logits(params, pixels)[task], static_argnums=2)
        self._features = jax.jit(self.model.features)

    def logits(self, pixels: np.ndarray, task: str | None = None) -> np.ndarray:
        """uint8[B, T, H, W, 3] in RGB, already cropped; any T, and any H, W that the patch divides -> float32[B, C]."""
        return np.asarray(self._logits(self.params, _checked(pixels), self.choose_task(task)))

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """The same pixels -> features before the heads, float32[B, D]."""
        return np.asarray(self._features(self.params, _checked(pixels)))

    def predict(self, paths: Iterable[str | Path] | str | Path, task: str | None = None, topk: int = 5) -> list[dict]:
        """Labels for image and video files, as `python -m vidjoint.predict` gives them.

        Returns:
          One dict per file: {"path", "task", "labels": [..], "scores": [..]}, best label first and scores in 0..1, or {"path", "error"}.
          The scores of all classes add up to 1; those of a multilabel task do not, for each is the probability that its own label holds.
        """
        paths = [paths] if isinstance(paths, str | Path) else paths
        return list(self.iter_predict((Window(str(path)) for path in paths), task, topk))

    def iter_predict(self, windows: Iterable[Window], task: str | None = None, topk: int = 5) -> Iterator[dict]:
        """Like `predict`, one answer at a time, for files or parts of them (their answers tell "start" and "end" in seconds).

        Answers come in the order of `windows`; decodes ahead, batches what goes to the device, and holds no more the more windows there are.
        """
        name = self.choose_task(task)
        clip = clip_spec(self.config, name)
        temporal, spatial = (int(n) for n in self.config.eval.views.split("x"))
        size = max(1, min(self.config.eval.batch_size, MAX_BATCH_BYTES // (temporal * spatial * math.prod(clip.shape))))
        threads = self.config.data.threads or cores()
        answers, due = {}, 0
        for rows in group(decoded(windows, clip, temporal, spatial, threads, threads + size), size):
            for row, outcome in zip(rows, self._outcomes(rows, name, topk, size), strict=True):
                answers[row.number] = {"path": row.window.path, **row.window.times(), **outcome}
            while due in answers:
                yield answers.pop(due)
                due += 1

    def _outcomes(self, rows: list[Row], task: str, topk: int, size: int) -> Iterator[dict]:
        """{"task", "labels", "scores"} or {"error"} for rows of one clip shape."""
        if rows[0].pixels is None:
            yield from ({"error": row.error} for row in rows)
            return
        count = min(size, 2 ** math.ceil(math.log2(len(rows))))  # few different sizes, for each is compiled
        pixels = np.zeros((count, *rows[0].pixels.shape), np.uint8)
        pixels[: len(rows)] = [row.pixels for row in rows]
        with sharding.memory_errors("lower --batch_size"):
            probabilities = np.asarray(self._probabilities(self.params, pixels, task))[: len(rows)]
        for scores in probabilities:
            if not np.isfinite(scores).all():
                yield {"error": "the model's output is not a number: its training has diverged, use an earlier checkpoint"}
                continue
            best = np.argsort(-scores, kind="stable")[:topk]
            yield {"task": task, "labels": [self.labels[task][c] for c in best], "scores": [round(float(scores[c]), 6) for c in best]}

    def choose_task(self, task: str | None = None) -> str:
        """The name of a task; None means the only one there is, or else the only one of videos.

        Raises:
          UserError: there is no such task, or several that could be meant.
        """
        if not self.labels:
            raise UserError("these weights have no classifier: train one with --config.init_from, or use embed() for features")
        videos = [name for name in self.labels if self.config.tasks[name].media == "video"]
        for only in (list(self.labels), videos):
            if task is None and len(only) == 1:
                return only[0]
        if task not in self.labels:
            fault = "several tasks could be meant" if task is None else f"there is no task {task!r}"
            raise UserError(f"{fault}: task must be one of {', '.join(self.labels)}")
        return task


def parse_step(text: str | None) -> int | str | None:
    """Reads a --step argument: a number, "best", or None for the newest checkpoint."""
    if text in (None, "best"):
        return text
    if not text.isdecimal():
        raise UserError(f"--step={text}: write the number of a checkpoint, or best")
    return int(text)


def _checked(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim != 5 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8[B, T, H, W, 3], not {pixels.dtype}{list(pixels.shape)}")
    return pixels
