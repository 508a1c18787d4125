"""A run's datasets, opened."""

from dataclasses import dataclass

from ml_collections import ConfigDict

from vidjoint.data.examples import ClipSpec
from vidjoint.data.files import some
from vidjoint.data.isolated import Limits
from vidjoint.data.labels import mirrored_classes
from vidjoint.data.records import Source
from vidjoint.data.sources import open_source, overlap
from vidjoint.errors import UserError


@dataclass(frozen=True)
class Task:
    """One dataset, opened."""

    name: str
    index: int  # its number in batches: the position of its name in alphabetical order
    clip: ClipSpec
    labels: tuple[str, ...]
    train: Source | None
    val: Source | None

    @property
    def is_video(self) -> bool:
        return self.clip.settings.media == "video"


def clip_spec(config: ConfigDict, name: str) -> ClipSpec:
    """The clip shape of a task: its own `frames` and `image_size`, or the model's."""
    settings = config.tasks[name]
    frames = 1 if settings.media == "image" else settings.frames or config.model.frames
    size = tuple(settings.image_size) if any(settings.image_size) else (config.model.image_size,) * 2
    data = config.data
    limits = Limits(data.decode_seconds, data.decode_memory * 2**20) if data.isolate in ("all", settings.media) else None
    return ClipSpec(settings, frames, size, data.max_pixels, config.model.interpolation or "bilinear", data.max_frames, limits)


def open_tasks(config: ConfigDict, splits: tuple[str, ...] = ("train", "val")) -> dict[str, Task]:
    """Opens the sources of all tasks, in alphabetical order.

    Raises:
      UserError: files are missing or labels wrong; holds every problem of every task.
    """
    tasks, problems = {}, []
    for index, name in enumerate(sorted(config.tasks)):
        settings, opened = config.tasks[name], {"train": None, "val": None}
        for split in splits:
            try:
                opened[split] = open_source(name, settings, split, config.data_root)
            except UserError as error:
                problems += [line for line in error.lines if line not in problems]
        source = opened["train"] or opened["val"]
        if opened["train"] and opened["val"]:
            opened["val"].warnings += overlap(opened["train"], opened["val"])
        if opened["train"] and settings.flip and (pairs := mirrored_classes(source.labels)):
            both = some(f"{one!r} and {other!r}" for one, other in pairs)
            opened["train"].warnings.append(f"flip=True mirrors pictures, and {both} become each other: set tasks.{name}.flip=False")
        if source is not None:
            tasks[name] = Task(name, index, clip_spec(config, name), source.labels, **opened)
    if problems:
        raise UserError(*problems)
    return tasks


def union_size(config: ConfigDict, tasks: dict[str, Task]) -> float:
    """Examples in one epoch: the sum of size x sample_weight over the training sets."""
    return sum(len(task.train) * config.tasks[name].sample_weight for name, task in tasks.items())
