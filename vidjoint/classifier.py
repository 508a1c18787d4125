"""A trained model ready for use: `vidjoint.load(folder)`."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from vidjoint import sharding, validate
from vidjoint.data.examples import ClipSpec
from vidjoint.data.files import has_extension
from vidjoint.data.prediction import PIECE, Piece, Row, Window, decoded, group, whole_files
from vidjoint.data.tasks import clip_spec
from vidjoint.data.workers import decode_threads
from vidjoint.errors import UserError
from vidjoint.models.build import build
from vidjoint.step import multilabel_tasks, probabilities
from vidjoint.weights.pretrained import open_weights

MAX_BATCH_BYTES = 2**28  # uint8 pixels that go to the device at a time: bounds its memory and ours where clips are large
DIVERGED = "the model's output is not a number: its training has diverged, use an earlier checkpoint"
IN_FLIGHT = 2  # batches that the device has been given and has not answered

Tasks = str | Iterable[str] | None
Videos = np.ndarray | str | Path | Iterable[str | Path]


@dataclass(frozen=True)
class Answer:
    """What the model makes of a file or window in one task."""

    window: Window
    task: str  # "" if the file can't be read
    scores: np.ndarray | None  # float32[C] in 0..1; None if there are none
    error: str = ""  # then why, in one line


@dataclass
class Pace:
    """Where the time goes while answers are made: seconds spent waiting for clips, for the model, on compiling it, and on drawing the answers."""

    clips: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"clips": 0.0, "model": 0.0, "compiling": 0.0, "drawing": 0.0})
    seen: set = field(default_factory=set)  # what has been compiled

    def spent(self, on: str, began: float) -> None:
        self.seconds[on] += time.perf_counter() - began


@dataclass(frozen=True)
class _Kind:
    """Tasks whose clips are cut alike, so that a file is decoded, and the backbone run, once for all of them."""

    tasks: tuple[str, ...]
    clip: ClipSpec


class Classifier:
    """A trained model with the class names and the preprocessing of its tasks.

    Attributes:
      labels: task -> class names, in the order of the head's outputs.
      config: the config of the run.
      step: number of updates the parameters have seen; None for weights that are not a run's.
      model: a `vidjoint.models.build.Model`.
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
        self._kinds_of: dict[tuple[str, ...], tuple[_Kind, ...]] = {}
        self.params = jax.device_put(traverse_util.unflatten_dict(weights.params, sep="/"))
        multilabel, average = multilabel_tasks(self.config), self.config.eval.average

        def scores(params: dict, pixels: jax.Array, tasks: tuple[str, ...]) -> dict[str, jax.Array]:
            """uint8[B, V, T, H, W, 3] -> {task: float32[B, C]}, averaged over the views."""
            logits, result = self.model.logits(params, pixels.reshape(-1, *pixels.shape[2:])), {}
            for task in tasks:
                each = logits[task].reshape(*pixels.shape[:2], -1)
                if average == "softmax":
                    result[task] = probabilities(each, task in multilabel).mean(axis=1)
                else:
                    result[task] = probabilities(each.mean(axis=1), task in multilabel)
            return result

        def view_features(params: dict, pixels: jax.Array, _: tuple[str, ...]) -> jax.Array:
            features = self.model.features(params, pixels.reshape(-1, *pixels.shape[2:]))
            return features.reshape(*pixels.shape[:2], -1).mean(axis=1)

        self._scores = jax.jit(scores, static_argnums=2)
        self._view_features = jax.jit(view_features, static_argnums=2)
        self._logits = jax.jit(lambda params, pixels, task: self.model.logits(params, pixels)[task], static_argnums=2)
        self._features = jax.jit(self.model.features)

    def logits(self, pixels: np.ndarray, task: str | None = None) -> np.ndarray:
        """uint8[B, T, H, W, 3] in RGB, already cropped; any T, and any H, W that the patch divides -> float32[B, C]."""
        return np.asarray(self._logits(self.params, _checked(pixels), self.choose_task(task)))

    def embed(self, videos: Videos) -> np.ndarray:
        """Features before the heads, float32[B, D], of pixels (as for `logits`), a file or several (means over the views).

        Raises:
          UserError: files that can't be read.
        """
        if isinstance(videos, np.ndarray):
            return np.asarray(self._features(self.params, _checked(videos)))
        features, errors = [], []
        rows = self._run(whole_files(_listed(videos)), lambda path: self._kinds(self.tasks_for(path))[:1], self._view_features, Pace())
        for row, feature in rows:
            features.append(feature)
            errors += [f"{row.window.path}: {row.error}"] if row.pixels is None else []
        if errors:
            raise UserError(*errors)
        return np.stack(features) if features else np.zeros((0, 0), np.float32)

    def predict(self, videos: Videos, task: Tasks = None, topk: int = 5) -> list[dict]:
        """Labels for image and video files, as `python -m vidjoint.predict` gives them, or for pixels uint8[B, T, H, W, 3].

        Args:
          videos: a file or several, or pixels that have been cropped already.
          task: one task or several; None: see `tasks_for`.

        Returns:
          One dict for each file and task: {"path", "task", "labels": [..], "scores": [..]}, best label first and scores in 0..1, or {"path",
          "error"}; without "path" for pixels. The scores of all classes add up to 1; those of a multilabel task do not, for each is the probability
          that its own label holds.
        """
        if isinstance(videos, np.ndarray):
            tasks = self.tasks_for("" if _checked(videos).shape[1] > 1 else ".png", self.choose_tasks(task))
            size = self.config.eval.batch_size
            parts = [self._scores(self.params, videos[i : i + size, None], tasks) for i in range(0, len(videos), size)]
            return [
                self.top(Answer(Window(""), name, row), topk)
                for part in parts
                for rows in zip(*map(np.asarray, part.values()), strict=True)
                for name, row in zip(part, rows, strict=True)
            ]
        return list(self.iter_predict(whole_files(_listed(videos)), task, topk))

    def iter_predict(self, pieces: Iterable[Piece], task: Tasks = None, topk: int = 5) -> Iterator[dict]:
        """Like `predict`, one answer at a time, for files or parts of them (their answers tell "start" and "end" in seconds)."""
        return ({"path": answer.window.path, **answer.window.times(), **self.top(answer, topk)} for answer in self.answers(pieces, task))

    def answers(self, pieces: Iterable[Piece], task: Tasks = None, pace: Pace | None = None, threads: int = 0) -> Iterator[Answer]:
        """The scores of all classes, in the order of the files and, for each of them, of its tasks.

        Decodes ahead in `threads` threads (0: the run's data.threads), batches what goes to the device, and holds no more the more files there are.
        `pace` keeps account of the time. A file that can't be read has one answer.
        """
        asked, held = self.choose_tasks(task), []
        for row, outputs in self._run(pieces, lambda path: self._kinds(self.tasks_for(path, asked)), self._scores, pace or Pace(), threads):
            if row.pixels is None:
                held.append(Answer(row.window, "", None, row.error))
            else:
                held += [Answer(row.window, name, scores, "" if np.isfinite(scores).all() else DIVERGED) for name, scores in outputs.items()]
            if row.kind == row.kinds - 1:
                order = ("", *self.tasks_for(row.window.path, asked))
                said = set()
                for answer in sorted(held, key=lambda answer: order.index(answer.task)):
                    if answer.error not in said:
                        yield answer
                    said.update([answer.error] if answer.error else [])
                held = []

    def _run(
        self, pieces: Iterable[Piece], kinds_of: Callable[[str], tuple[_Kind, ...]], function: Callable, pace: Pace, threads: int = 0
    ) -> Iterator[tuple[Row, dict | np.ndarray]]:
        """Yields every row with what `function(params, pixels [B, V, T, H, W, 3], tasks)` makes of it, in order."""
        temporal, spatial = validate.views(self.config.eval.views)
        size, threads = self._batch_size(), threads or decode_threads(self.config.data)
        rows = decoded(pieces, lambda path: tuple(kind.clip for kind in kinds_of(path)), temporal, spatial, threads, 2 * threads + size)
        groups, in_flight, done, due = group(rows, size), deque(), {}, 0

        def collect() -> None:
            rows, output = in_flight.popleft()
            output = jax.tree.map(np.asarray, output)
            for i, row in enumerate(rows):
                done[row.number] = row, jax.tree.map(lambda array, i=i: array[i], output)

        while True:
            began = time.perf_counter()
            rows = next(groups, None)
            pace.spent("clips", began)
            began = time.perf_counter()
            with sharding.memory_errors("lower --batch_size"):
                if rows and rows[0].pixels is None:
                    done[rows[0].number] = rows[0], {}
                elif rows:
                    tasks = kinds_of(rows[0].window.path)[rows[0].kind].tasks
                    pixels = np.zeros(
                        (min(size, 2 ** math.ceil(math.log2(len(rows)))), *rows[0].pixels.shape), np.uint8
                    )  # few sizes: each is compiled
                    pixels[: len(rows)] = [row.pixels for row in rows]
                    in_flight.append((rows, function(self.params, pixels, tasks)))
                    pace.clips += len(rows)
                    if (pixels.shape, tasks) not in pace.seen:
                        pace.seen.add((pixels.shape, tasks))
                        pace.spent("compiling", began)
                        began = time.perf_counter()
                while len(in_flight) > (IN_FLIGHT - 1 if rows else 0):
                    collect()
            pace.spent("model", began)
            while due in done:
                yield done.pop(due)
                due += 1
            if rows is None:
                return

    def windows_at_a_time(self, threads: int = 0) -> int:
        """How many windows of a video one thread may decode in one go, so that what all of them hold stays bounded."""
        return max(1, min(PIECE, MAX_BATCH_BYTES // (self._bytes_of_clip() * (threads or decode_threads(self.config.data)))))

    def _batch_size(self) -> int:
        return max(1, min(self.config.eval.batch_size, MAX_BATCH_BYTES // self._bytes_of_clip()))

    def _bytes_of_clip(self) -> int:
        """All views of the largest clip that a task has."""
        temporal, spatial = validate.views(self.config.eval.views)
        return temporal * spatial * max(math.prod(clip_spec(self.config, task).shape) for task in self.config.tasks)

    def _kinds(self, tasks: tuple[str, ...]) -> tuple[_Kind, ...]:
        """The tasks, those together whose clips are cut alike."""
        if tasks not in self._kinds_of:
            kinds = {}
            for name in tasks:
                clip = clip_spec(self.config, name)
                settings = clip.settings
                window = settings.window_seconds if settings.sampler == "window" else None
                kinds.setdefault((clip.shape, settings.media, settings.sampler, window, settings.crop == "none"), []).append((name, clip))
            self._kinds_of[tasks] = tuple(_Kind(tuple(name for name, _ in kind), kind[0][1]) for kind in kinds.values())
        return self._kinds_of[tasks]

    def top(self, answer: Answer, topk: int) -> dict:
        """{"task", "labels", "scores"} of the best classes, or {"error"}."""
        if answer.error:
            return {"error": answer.error}
        best = np.argsort(-answer.scores, kind="stable")[:topk]
        names = self.labels[answer.task]
        return {"task": answer.task, "labels": [names[c] for c in best], "scores": [round(float(answer.scores[c]), 6) for c in best]}

    def choose_tasks(self, task: Tasks = None) -> tuple[str, ...] | None:
        """The tasks of these names, or all if "all" is one of them; None means that each file has those of its kind (`tasks_for`).

        Raises:
          UserError: there is no such task, or no task at all.
        """
        names = [task] if isinstance(task, str) else list(task or ())
        if "all" in names and "all" not in self.labels:
            return tuple(self.labels)
        return tuple(dict.fromkeys(map(self.choose_task, names))) if names or (not self.labels and self.choose_task()) else None

    def tasks_for(self, path: str, asked: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """The tasks that a file is answered in: those asked for, or else all tasks of videos for a video, all of images for an image.

        Where the run has none of that kind, all tasks. What is both or neither (a GIF) counts as a video.
        """
        if asked:
            return asked
        is_image = has_extension(path, "image") and not has_extension(path, "video")
        fitting = tuple(name for name in self.labels if (self.config.tasks[name].media == "image") == is_image)
        return fitting or tuple(self.labels)

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


def _listed(videos: str | Path | Iterable[str | Path]) -> list[str]:
    return [str(path) for path in ([videos] if isinstance(videos, str | Path) else videos)]


def _checked(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim != 5 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8[B, T, H, W, 3], not {pixels.dtype}{list(pixels.shape)}")
    return pixels
