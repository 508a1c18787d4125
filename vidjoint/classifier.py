"""A trained model ready for use: `vidjoint.load(folder)`."""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np

from vidjoint import optim
from vidjoint.checkpoints import load_params
from vidjoint.data.mixture import clip_spec
from vidjoint.data.prediction import Window, prediction_batches
from vidjoint.errors import UserError
from vidjoint.models.build import build
from vidjoint.run_folder import RunFolder
from vidjoint.step import make_eval_step


class Classifier:
    """A trained model with the class names and the preprocessing of its tasks.

    Args:
      folder: folder of a training run.
      step: which checkpoint, a number or "best" (by mean validation top-1); None is the newest.

    Raises:
      UserError: the folder holds no run, or not that checkpoint.
    """

    def __init__(self, folder: str | Path, step: int | str | None = None):
        run = RunFolder(folder)
        self.config, self.labels = run.config, run.labels  # labels: task -> class names
        self.model = build(self.config.model, {task: len(names) for task, names in self.labels.items()})
        self.step, parts = load_params(folder, step)
        self.params = jax.device_put(optim.join(parts["ema"] or parts["params"], parts["frozen"]))
        self.scores = jax.jit(make_eval_step(self.model, self.config.eval.average), static_argnums=(2, 3))
        self._logits, self._features = jax.jit(self.model.logits), jax.jit(self.model.features)

    def logits(self, pixels: np.ndarray, task: str) -> np.ndarray:
        """uint8[B, T, H, W, 3], already cropped; any T, and any H, W that the patch divides -> float32[B, C]."""
        return np.asarray(self._logits(self.params, pixels)[self.check_task(task)])

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """uint8[B, T, H, W, 3] -> features before the heads, float32[B, D]."""
        return np.asarray(self._features(self.params, pixels))

    def predict(self, paths: Iterable[str | Path], task: str | None = None, topk: int = 5) -> list[dict]:
        """Labels for files: one `{"path", "task", "labels": [..], "scores": [..]}` or `{"path", "error"}` per file, best label first."""
        return list(self.iter_predict([Window(str(path)) for path in paths], task, topk))

    def iter_predict(self, windows: list[Window], task: str | None = None, topk: int = 5) -> Iterator[dict]:
        """Like `predict`, one answer at a time in order, for files or parts of files; decodes ahead and batches what goes to the device."""
        name = self.check_task(task)
        temporal, spatial = (int(n) for n in self.config.eval.views.split("x"))
        clip = clip_spec(self.config, name)
        size = self.config.eval.batch_size or self.config.batch_size
        for batch in prediction_batches(windows, clip, temporal, spatial, min(size, max(len(windows), 1)), self.config.data.threads):
            good = np.flatnonzero(batch["mask"])
            scores = np.asarray(self.scores(self.params, batch["pixels"], name)) if len(good) else None
            for row, (window, error) in enumerate(zip(batch["window"], batch["error"], strict=True)):
                answer = {"path": window.path} | window.times()
                if error:
                    yield answer | {"error": error}
                    continue
                order = np.argsort(-scores[row], kind="stable")[:topk]
                yield answer | {"task": name, "labels": [self.labels[name][c] for c in order], "scores": [round(float(scores[row, c]), 6) for c in order]}

    def check_task(self, task: str | None) -> str:
        """The name of a task; None is the only one there is. Raises UserError for an unknown one."""
        if task is None and len(self.labels) == 1:
            return next(iter(self.labels))
        if task not in self.labels:
            raise UserError(f"{'which task is meant' if task is None else f'there is no task {task}'}: choose one of {', '.join(self.labels)}")
        return task

    @functools.cached_property
    def video_tasks(self) -> list[str]:
        return [name for name in self.labels if self.config.tasks[name].media == "video"]
