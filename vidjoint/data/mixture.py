"""Sources and a schedule become the tuple of batches of each step.

Everything is random-access: the tuple of step i is a function of (config, seed, i) alone, whatever the number of threads, worker processes,
hosts or devices. So the data position of a run is its step number, and a checkpoint holds no iterator state.

A stream is a sequence of batches of one clip shape. The schedule says which streams a step reads: `mixed` has one stream per clip shape, with the
tasks of that shape drawn in proportion to their sizes, and reads all of them (CoVeR 4.1); `round_robin` has one per task and reads them in turn (IV-ViT 5.3).
"""

import logging
import math
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from vidjoint.data.examples import ClipSpec, training_clip, views
from vidjoint.data.sources import Source, open_source
from vidjoint.data.video import DecodeError
from vidjoint.errors import UserError

MAX_SUBSTITUTES = 100  # undecodable files in a row before an example is given up

log = logging.getLogger(__name__)


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
    return ClipSpec(settings, frames, size, config.data.max_pixels)


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
        if source is not None:
            tasks[name] = Task(name, index, clip_spec(config, name), source.labels, **opened)
    if problems:
        raise UserError(*problems)
    return tasks


def union_size(config: ConfigDict, tasks: dict[str, Task]) -> float:
    """Examples in one epoch: the sum of size x sample_weight over the training sets."""
    return sum(len(task.train) * config.tasks[name].sample_weight for name, task in tasks.items())


@dataclass
class Stream:
    """Batches of one clip shape."""

    tasks: list[Task]
    batch_size: int
    dataset: grain.MapDataset = field(repr=False, default=None)  # element r is row r of the endless sequence of this process's examples

    @property
    def name(self) -> str:
        return "+".join(task.name for task in self.tasks)


class Mixture:
    """The training data of a run: `mixture.step(i)`, or `mixture.iterate(i)` for the same with decoding ahead.

    A batch is `{"pixels": uint8[B, T, H, W, 3], "label": int32[B], "task": int32[B], "mask": bool[B]}`, B rows of this process. Rows whose mask is
    False only fill up the global batch to a multiple of `row_multiple` (the devices that share a batch).
    """

    def __init__(self, config: ConfigDict, tasks: dict[str, Task], *, process: int = 0, processes: int = 1, row_multiple: int = 1):
        self.tasks = {name: task for name, task in tasks.items() if task.train is not None}
        self.union = union_size(config, self.tasks)
        self.steps_per_epoch = self.union / config.batch_size
        self.max_bad_share = config.data.max_bad_share
        self.bad: dict[str, dict[int, str]] = {name: {} for name in self.tasks}  # task -> {file: reason}, as met so far
        self._data = config.data
        self._streams_per_step, self.streams = SCHEDULES[config.schedule](config, self.tasks)
        for stream in self.streams:
            examples = _endless(config, stream.tasks)
            rows = math.ceil(stream.batch_size / row_multiple) * row_multiple
            stream.dataset = _Rows(examples, stream.batch_size, rows, process, processes, stream.tasks[0].clip.shape)

    def plan(self, step: int) -> list[tuple[int, int]]:
        """Which batches step `step` takes: (stream, position in the stream)."""
        if self._streams_per_step == len(self.streams):
            return [(s, step) for s in range(len(self.streams))]
        return [(step % len(self.streams), step // len(self.streams))]

    def step(self, step: int) -> tuple[dict, ...]:
        """The tuple of batches of one step, decoded here and now."""
        return tuple(self._checked(self._batches(stream)[position]) for stream, position in self.plan(step))

    def iterate(self, start: int = 0) -> Iterator[tuple[dict, ...]]:
        """Yields the tuples of steps start, start + 1, ... without end; decodes ahead in threads or worker processes. Close it when done.

        Raises:
          UserError: more files of a task than `data.max_bad_share` of its training set can't be decoded.
        """
        first = [math.inf] * len(self.streams)
        for step in range(start, start + len(self.streams)):
            for stream, position in self.plan(step):
                first[stream] = min(first[stream], position)
        iterators = [self._prefetched(stream, position) for stream, position in enumerate(first)]
        try:
            while True:
                yield tuple(self._checked(next(iterators[stream])) for stream, _ in self.plan(start))
                start += 1
        finally:
            for iterator in iterators:
                iterator.close()

    def _batches(self, stream: int) -> grain.MapDataset:
        rows = self.streams[stream].dataset
        return rows.batch(rows.local, batch_fn=_collate)

    def _prefetched(self, stream: int, position: int):
        data, rows = self._data, self.streams[stream].dataset
        threads = data.threads or os.cpu_count()
        if data.workers:
            if not flags.FLAGS.is_parsed():  # grain reads its settings from flags
                flags.FLAGS.mark_as_parsed()
            options = grain.ReadOptions(max(1, threads // data.workers), data.prefetch)
            batches = self._batches(stream)[position:].to_iter_dataset(options)
            return iter(batches.mp_prefetch(grain.MultiprocessingOptions(data.workers, per_worker_buffer_size=data.prefetch)))
        options = grain.ReadOptions(threads, max(threads, data.prefetch * rows.local))
        batches = rows[position * rows.local :].to_iter_dataset(options).batch(rows.local, batch_fn=_collate)
        return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=1))

    def _checked(self, batch: dict) -> dict:
        """Takes the failures out of a batch, logs files not met before, and stops when there are too many."""
        for name, index, reason in batch.pop("bad"):
            seen, source = self.bad[name], self.tasks[name].train
            if index not in seen:
                seen[index] = f"{source.name(index)}: {reason}"
                log.warning("%s: skipped %s", name, seen[index])
            if len(seen) > self.max_bad_share * len(source):
                raise UserError(
                    f"{name}: {len(seen)} of {len(source)} training files can't be decoded, above data.max_bad_share={self.max_bad_share}; mend or remove:",
                    *(f"  {line}" for line in seen.values()),
                )
        return batch


def evaluation_batches(
    task: Task, config: ConfigDict, batch_size: int, temporal: int, spatial: int, *, process: int = 0, processes: int = 1
) -> Iterator[dict]:
    """Yields the validation split once, in order: `{"pixels": uint8[B, V, T, H, W, 3], "label": int32[B], "index": int32[B], "mask": bool[B], "bad": [...]}`.

    B = batch_size / processes rows of this process, V = temporal x spatial views. Every process yields the same number of batches; a row whose mask is
    False is filling or a file that can't be decoded (named in `bad` as (task, index, reason)).
    """
    local = batch_size // processes
    total = math.ceil(len(task.val) / batch_size) * batch_size
    shape = (temporal * spatial, *task.clip.shape)
    rows = grain.MapDataset.range(total).map(_LoadViews(task, temporal, spatial))
    rows = _Rows(rows, batch_size, batch_size, process, processes, shape)
    threads = config.data.threads or os.cpu_count()
    options = grain.ReadOptions(threads, max(threads, config.data.prefetch * local))
    return iter(rows.to_iter_dataset(options).batch(local, batch_fn=_collate))


def _mixed(config: ConfigDict, tasks: dict[str, Task]) -> tuple[int, list[Stream]]:
    """One stream per clip shape, read side by side; batch_size is shared out in proportion to the examples behind each (largest remainder)."""
    groups: dict[tuple, list[Task]] = {}
    for task in tasks.values():
        groups.setdefault(task.clip.shape, []).append(task)
    shares = np.array([union_size(config, {t.name: t for t in group}) for group in groups.values()])
    shares = shares / shares.sum() * config.batch_size
    sizes = np.maximum(np.floor(shares).astype(int), 1)  # no clip shape is left out
    for i in np.argsort(sizes - shares, kind="stable")[: config.batch_size - sizes.sum()]:
        sizes[i] += 1
    while sizes.sum() > config.batch_size:
        sizes[sizes.argmax()] -= 1
    return len(groups), [Stream(group, int(size)) for group, size in zip(groups.values(), sizes, strict=True)]


def _round_robin(config: ConfigDict, tasks: dict[str, Task]) -> tuple[int, list[Stream]]:
    """One stream per task, one read per step, in `task_order`."""
    return 1, [Stream([tasks[name]], config.batch_size) for name in config.task_order or tasks]


SCHEDULES = {"mixed": _mixed, "round_robin": _round_robin}


def _endless(config: ConfigDict, tasks: list[Task]) -> grain.MapDataset:
    """An endless random-access sequence of the tasks' examples; each set is shuffled anew in every pass, and sets alternate in proportion to size."""
    datasets, weights = [], []
    for task in tasks:
        seed = np.random.SeedSequence([config.seed, zlib.crc32(task.name.encode())]).generate_state(1)[0]
        dataset = grain.MapDataset.range(len(task.train)).seed(int(seed)).shuffle().repeat(None)
        datasets.append(dataset.random_map(_LoadClip(task)))
        weights.append(len(task.train) * config.tasks[task.name].sample_weight)
    return grain.MapDataset.mix(datasets, weights) if len(datasets) > 1 else datasets[0]


class _LoadClip(grain.transforms.RandomMap):
    """Index of a training example -> row of a batch. A file that can't be decoded is replaced by the one after it."""

    def __init__(self, task: Task):
        self.task = task

    def random_map(self, index: int, rng: np.random.Generator) -> dict:
        task, bad = self.task, []
        for substitute in range(min(MAX_SUBSTITUTES, len(task.train))):
            source_index = (int(index) + substitute) % len(task.train)
            try:
                example = task.train[source_index]
                pixels = training_clip(example, task.clip, rng)
            except DecodeError as error:
                bad.append((task.name, source_index, str(error)))
                continue
            return {"pixels": pixels, "label": np.int32(example["label"]), "task": np.int32(task.index), "mask": True, "bad": bad}
        return {**_blank(task.clip.shape), "task": np.int32(task.index), "bad": bad}


class _LoadViews(grain.transforms.Map):
    """Index of a validation example -> row of a batch, masked if it can't be decoded or lies beyond the end."""

    def __init__(self, task: Task, temporal: int, spatial: int):
        self.task, self.temporal, self.spatial = task, temporal, spatial

    def map(self, index: int) -> dict:
        task, index = self.task, int(index)
        row = {**_blank((self.temporal * self.spatial, *task.clip.shape)), "task": np.int32(task.index), "index": np.int32(index)}
        if index >= len(task.val):
            return row
        try:
            example = task.val[index]
            row["label"] = np.int32(example["label"])
            return {**row, "pixels": views(example, task.clip, self.temporal, self.spatial), "mask": True}
        except DecodeError as error:
            return {**row, "bad": [(task.name, index, str(error))]}


class _Rows(grain.MapDataset):
    """The rows that one process holds of consecutive global batches of `batch` examples, filled up to `rows` with blanks."""

    def __init__(self, parent: grain.MapDataset, batch: int, rows: int, process: int, processes: int, shape: tuple[int, ...]):
        super().__init__(parent)
        if rows % processes:
            raise ValueError(f"{rows} rows cannot be shared by {processes} processes")
        self.local, self._batch, self._offset, self._shape = rows // processes, batch, process * (rows // processes), shape

    def __len__(self) -> int:
        return min(len(self._parent) // self._batch * self.local, sys.maxsize)  # the parent may be endless already

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self.local)
        row += self._offset
        return self._parent[batch * self._batch + row] if row < self._batch else _blank(self._shape)


def _blank(shape: tuple[int, ...]) -> dict:
    return {"pixels": np.zeros(shape, np.uint8), "label": np.int32(0), "task": np.int32(0), "mask": False, "bad": []}


def _collate(rows: list[dict]) -> dict:
    batch = {key: np.stack([row[key] for row in rows]) for key in rows[0] if key != "bad"}
    return {**batch, "bad": [failure for row in rows for failure in row["bad"]]}
