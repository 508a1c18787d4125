"""Files without labels to batches of views, for prediction: bad files become errors, long videos may be cut into windows."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import grain
import numpy as np

from vidjoint.data.examples import ClipSpec, views
from vidjoint.data.sources import EXTENSIONS
from vidjoint.data.video import DecodeError


@dataclass(frozen=True)
class Window:
    """A file, or the part of a video from `start` to `end` seconds."""

    path: str
    start: float = 0.0
    end: float | None = None

    def times(self) -> dict:
        return {} if self.end is None else {"start": self.start, "end": self.end}


def prediction_batches(windows: list[Window], clip: ClipSpec, temporal: int, spatial: int, batch_size: int, threads: int) -> Iterator[dict]:
    """Yields `{"pixels": uint8[B, V, T, H, W, 3], "mask": bool[B], "window": [Window], "error": [reason or ""]}` over all windows, in order.

    Files are images or videos by their extension; an image gives a clip of one frame whatever the task. Batches of one clip shape stay together: an image
    among videos ends the batch. Every batch of a shape is filled up to `batch_size` rows of zeros, so that the device sees few shapes.
    """
    threads = threads or os.cpu_count()
    rows = grain.MapDataset.source(windows).map(_Load(clip, temporal, spatial))
    waiting: list[dict] = []
    for row in rows.to_iter_dataset(grain.ReadOptions(threads, max(threads, 2 * batch_size))):
        shapes = {r["pixels"].shape for r in waiting if r["pixels"] is not None}
        if len(waiting) == batch_size or (row["pixels"] is not None and shapes and row["pixels"].shape not in shapes):
            yield _batch(waiting, batch_size, clip, temporal * spatial)
            waiting = []
        waiting.append(row)
    if waiting:
        yield _batch(waiting, batch_size, clip, temporal * spatial)


class _Load(grain.transforms.Map):
    def __init__(self, clip: ClipSpec, temporal: int, spatial: int):
        self.clip, self.temporal, self.spatial = clip, temporal, spatial

    def map(self, window: Window) -> dict:
        extension = Path(window.path).suffix.lower()
        image = extension in EXTENSIONS["image"] - EXTENSIONS["video"] or (self.clip.settings.media == "image" and extension not in EXTENSIONS["video"])
        example = {"image" if image else "video": window.path}
        try:
            part = None if window.end is None else (window.start, window.end)
            pixels = views(example, replace(self.clip, frames=1) if image else self.clip, self.temporal, self.spatial, part)
            return {"window": window, "pixels": pixels, "error": ""}
        except (DecodeError, OSError) as error:
            return {"window": window, "pixels": None, "error": " ".join(str(error).split())}


def _batch(rows: list[dict], batch_size: int, clip: ClipSpec, view_count: int) -> dict:
    shape = next((row["pixels"].shape for row in rows if row["pixels"] is not None), (view_count, *clip.shape))
    pixels = np.zeros((batch_size, *shape), np.uint8)
    mask = np.zeros(batch_size, bool)
    for i, row in enumerate(rows):
        if row["pixels"] is not None:
            pixels[i], mask[i] = row["pixels"], True
    return {"pixels": pixels, "mask": mask, "window": [row["window"] for row in rows], "error": [row["error"] for row in rows]}
