"""Sources and a schedule become the tuple of batches of each step.

Everything is random-access: the tuple of step i is a function of (config, seed, i) alone, whatever the number of threads, worker processes,
hosts or devices. So the data position of a run is its step number, and a checkpoint holds no iterator state.

A stream is a sequence of batches of one clip shape. The schedule says which streams a step reads: `mixed` has one stream per clip shape, with the
tasks of that shape drawn in proportion to their sizes, and reads all of them (CoVeR 4.1). The others have one stream per task: `accumulated` reads
all of them in every step, the rest one in each, in an order that is fixed beforehand (IV-ViT 5.3; PolyViT, arXiv:2111.12993, section 3.3).
"""

import contextlib
import logging
import math
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import grain
import numpy as np
from ml_collections import ConfigDict

from vidjoint.data.examples import ClipSpec, training_clip, views
from vidjoint.data.sources import Source, open_source
from vidjoint.data.video import DecodeError
from vidjoint.data.workers import Decoder, cores, decode_ahead
from vidjoint.errors import UserError

MAX_SUBSTITUTES = 100  # files that are tried in place of an undecodable one before its row is masked

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


def steps_per_epoch(config: ConfigDict, tasks: dict[str, Task]) -> float:
    """Steps that show as many examples as one epoch has (`union_size`), whichever they are: only `mixed` shows each set in proportion to its size.

    Where batches of tasks differ in size, a step counts as the mean over the schedule's steps (for `uniform`, over the tasks).
    """
    if config.schedule == "mixed":
        return union_size(config, tasks) / config.batch_size
    sizes = _batch_sizes(config, tasks)
    if config.schedule == "accumulated":
        return union_size(config, tasks) / sum(sizes)
    weights = _step_weights(config, tasks) if config.schedule in ("task_by_task", "weighted") else [1] * len(tasks)
    return union_size(config, tasks) * sum(weights) / sum(weight * size for weight, size in zip(weights, sizes, strict=True))


@dataclass(frozen=True)
class Stream:
    """Batches of one clip shape, cut from one endless sequence in which the tasks alternate."""

    tasks: tuple[Task, ...]
    batch_size: int  # examples per batch, over all processes
    weights: tuple[int, ...]  # of sum(weights) consecutive examples, so many are of each task
    examples: tuple[grain.MapDataset, ...]  # the endless sequence of each task, as rows of batches

    @property
    def name(self) -> str:
        return "+".join(task.name for task in self.tasks)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.tasks[0].clip.shape

    @property
    def label_shape(self) -> tuple[int, ...]:
        """() or, where a task is multilabel, (K,) with room for the most labels of any example."""
        return max(task.train.label_shape for task in self.tasks)

    def __getitem__(self, i: int) -> dict:
        """Example i of the endless sequence, decoded."""
        before, after = _counts(i, self.weights), _counts(i + 1, self.weights)
        task = next(t for t in range(len(before)) if before[t] < after[t])
        row = self.examples[task][before[task]]
        return row | {"label": _filled_up(row["label"], self.label_shape)}


class Mixture:
    """The training data of a run: `mixture.step(i)`, or `mixture.iterate(i)` for the same with decoding ahead.

    A batch is `{"pixels": uint8[B, T, H, W, 3], "label": int32[B], "task": int32[B], "mask": bool[B]}`, B rows of this process. Where a task of its
    stream is multilabel, labels are int32[B, K], filled up by -1, with the same K in all batches of the stream. Rows whose mask is False only fill
    up the global batch to a multiple of `row_multiple` (the devices that share a batch), or stand for a file that can't be decoded and has no
    substitute either.
    """

    def __init__(self, config: ConfigDict, tasks: dict[str, Task], total_steps: int, *, process: int = 0, processes: int = 1, row_multiple: int = 1):
        """Raises UserError if a batch or the run (`total_steps`, of which `task_by_task` and `weighted` take shares) is too small for all tasks."""
        self.tasks = {name: task for name, task in tasks.items() if task.train is not None}
        self.union = union_size(config, self.tasks)
        self.steps_per_epoch = steps_per_epoch(config, self.tasks)
        self.bad: dict[str, dict[int, str]] = {name: {} for name in self.tasks}  # task -> {file: reason}, as met so far by this process
        self._data = config.data
        self.streams, order = SCHEDULES[config.schedule](config, self.tasks, total_steps)
        self._order = None if order is None else order.astype(np.int16)  # which stream each step reads, then from the start again; None: all of them
        if order is not None:
            self.steps_of = np.bincount(order, minlength=len(self.streams))  # how many steps read each stream, of one run through the order
            self._before = np.empty(len(order), np.int32)  # of them, those before each step
            for s, steps in enumerate(self.steps_of):
                self._before[order == s] = np.arange(steps)
        self.rows = [_rows_of(process, processes, math.ceil(stream.batch_size / row_multiple) * row_multiple) for stream in self.streams]

    def plan(self, step: int) -> list[tuple[int, int]]:
        """Which batches step `step` takes: (stream, position in the stream). From total_steps on the order starts again, and streams go on."""
        if self._order is None:
            return [(s, step) for s in range(len(self.streams))]
        turn, i = divmod(step, len(self._order))
        s = int(self._order[i])
        return [(s, turn * int(self.steps_of[s]) + int(self._before[i]))]

    def examples(self, step: int) -> int:
        """Number of examples in a step, over all processes."""
        return sum(self.streams[s].batch_size for s, _ in self.plan(step))

    def kinds(self) -> dict[int, float]:
        """The first step of each kind, that is with the same streams, and the share of all steps that are of its kind."""
        if self._order is None:
            return {0: 1.0}
        _, first, counts = np.unique(self._order, return_index=True, return_counts=True)
        return dict(zip(first.tolist(), (counts / len(self._order)).tolist(), strict=True))

    def step(self, step: int) -> tuple[dict, ...]:
        """The tuple of batches of one step, decoded here and now."""
        with contextlib.closing(_Steps(self, self._data.threads or cores())) as steps:
            return self._checked(steps.map(step))

    def iterate(self, start: int = 0) -> Iterator[tuple[dict, ...]]:
        """Yields the tuples of steps start, start + 1, ... without end; decodes `data.prefetch` of them ahead, in threads or worker processes.

        Close it when done.

        Raises:
          UserError: more files of a task than `data.max_bad_share` of its training set can't be decoded.
        """
        workers = self._data.workers
        rows = [len(rows) for rows in self.rows]
        batch_bytes = [count * math.prod(stream.shape) for stream, count in zip(self.streams, rows, strict=True)]
        fewest_rows, most_bytes = (sum(rows), sum(batch_bytes)) if self._order is None else (min(rows), max(batch_bytes))
        steps = _Steps(self, max(1, (self._data.threads or cores()) // max(workers, 1)))
        with contextlib.closing(decode_ahead(steps, range(start, sys.maxsize), fewest_rows, self._data.prefetch, workers, most_bytes)) as tuples:
            for batches in map(self._checked, tuples):
                if workers:  # copies shared memory, which grain frees only while the interpreter is whole
                    batches = tuple({name: np.array(column) for name, column in batch.items()} for batch in batches)
                yield batches

    def _checked(self, batches: tuple[dict, ...]) -> tuple[dict, ...]:
        """Takes the failures out of batches, logs files not met before, and stops when there are too many."""
        for name, index, reason in [failure for batch in batches for failure in batch.pop("bad")]:
            seen, source = self.bad[name], self.tasks[name].train
            if index not in seen:
                seen[index] = f"{source.name(index)}: {reason}"
                log.warning("%s: skipped %s", name, seen[index])
            if len(seen) > self._data.max_bad_share * len(source):
                limit = f"data.max_bad_share={self._data.max_bad_share}"
                raise UserError(
                    f"{name}: {len(seen)} of {len(source)} training files can't be decoded, above {limit}; mend them or take them out:",
                    *(f"  {line}" for line in seen.values()),
                )
        return batches


def evaluation_batches(
    task: Task, config: ConfigDict, batch_size: int, temporal: int, spatial: int, *, process: int = 0, processes: int = 1
) -> Iterator[dict]:
    """Yields the validation split once, in order, decoded ahead in threads; the more views, the fewer batches ahead.

    A batch is `{"pixels": uint8[B, V, T, H, W, 3], "label": int32[B], "index": int32[B], "mask": bool[B], "bad": [...]}`: the B rows of this process,
    batch_size / processes, with V = temporal x spatial views; the labels of a multilabel task are int32[B, K], filled up by -1.
    Every process yields the same number of batches. A row whose mask is False is filling, or a file that can't be decoded (named in `bad` as
    (task, index, reason)).
    """
    decoder = _ViewBatches(task, batch_size, _rows_of(process, processes, batch_size), (temporal, spatial), config.data.threads or cores())
    numbers = range(math.ceil(len(task.val) / batch_size))
    prefetch = max(1, config.data.prefetch // (temporal * spatial))
    return decode_ahead(decoder, numbers, batch_size // processes, prefetch)


# Schedules: (config, tasks, total_steps) -> streams, and which of them each step reads (int[n], then from the start again; None: all in every step)


def _mixed(config: ConfigDict, tasks: dict[str, Task], total_steps: int) -> tuple[list[Stream], None]:
    """One stream per clip shape, read side by side; batch_size is shared out in proportion to the examples behind each."""
    groups: dict[tuple, list[Task]] = {}
    for task in tasks.values():
        groups.setdefault(task.clip.shape, []).append(task)
    if config.batch_size < len(groups):
        raise UserError(f"batch_size={config.batch_size}, but the tasks have {len(groups)} clip shapes and each needs a row: enlarge it")
    sizes = _largest_remainder([union_size(config, {task.name: task for task in group}) for group in groups.values()], config.batch_size)
    return [_stream(config, group, size) for group, size in zip(groups.values(), sizes, strict=True)], None


def _round_robin(config: ConfigDict, tasks: dict[str, Task], total_steps: int) -> tuple[list[Stream], np.ndarray]:
    """One step of each task in `task_order`, again and again."""
    return _one_per_task(config, _ordered(config, tasks)), np.arange(len(tasks))


def _task_by_task(config: ConfigDict, tasks: dict[str, Task], total_steps: int) -> tuple[list[Stream], np.ndarray]:
    """All steps of the first task in `task_order`, then all of the next."""
    tasks = _ordered(config, tasks)
    return _one_per_task(config, tasks), np.repeat(np.arange(len(tasks)), _steps(config, tasks, total_steps))


def _uniform(config: ConfigDict, tasks: dict[str, Task], total_steps: int) -> tuple[list[Stream], np.ndarray]:
    """Each step's task is drawn with equal probabilities; a longer run begins like a shorter one."""
    return _one_per_task(config, tasks), _order_rng(config).integers(len(tasks), size=total_steps)


def _weighted(config: ConfigDict, tasks: dict[str, Task], total_steps: int) -> tuple[list[Stream], np.ndarray]:
    """The steps of `task_by_task`, shuffled: probabilities in proportion to the tasks' steps, and exact counts."""
    return _one_per_task(config, tasks), _order_rng(config).permutation(np.repeat(np.arange(len(tasks)), _steps(config, tasks, total_steps)))


def _accumulated(config: ConfigDict, tasks: dict[str, Task], total_steps: int) -> tuple[list[Stream], None]:
    """One batch of each task in every step; the loss `per_task` makes the sum of their gradients of it."""
    return _one_per_task(config, tasks), None


SCHEDULES = {
    "mixed": _mixed,
    "round_robin": _round_robin,
    "alternating": _round_robin,
    "task_by_task": _task_by_task,
    "uniform": _uniform,
    "weighted": _weighted,
    "accumulated": _accumulated,
}


def _ordered(config: ConfigDict, tasks: dict[str, Task]) -> dict[str, Task]:
    return {name: tasks[name] for name in config.task_order or tasks}


def _order_rng(config: ConfigDict) -> np.random.Generator:
    return np.random.default_rng([config.seed, zlib.crc32(b"order of tasks")])


def _one_per_task(config: ConfigDict, tasks: dict[str, Task]) -> list[Stream]:
    return [_stream(config, [task], size) for task, size in zip(tasks.values(), _batch_sizes(config, tasks), strict=True)]


def _batch_sizes(config: ConfigDict, tasks: dict[str, Task]) -> list[int]:
    """Examples per batch of each task, where batches are of one task."""
    share = [config.batch_size] * len(tasks)
    if config.schedule == "accumulated":  # evenly; the first ones have one more
        share = [(config.batch_size + len(tasks) - 1 - i) // len(tasks) for i in range(len(tasks))]
    sizes = [config.tasks[name].batch_size or size for name, size in zip(tasks, share, strict=True)]
    if 0 in sizes:
        raise UserError(f"batch_size={config.batch_size} is shared out over {len(tasks)} tasks, and each needs a row: enlarge it, or set their own")
    return sizes


def _step_weights(config: ConfigDict, tasks: dict[str, Task]) -> list[float]:
    """What the numbers of steps of the tasks are in proportion to."""
    return [config.tasks[name].steps or union_size(config, {name: task}) for name, task in tasks.items()]


def _steps(config: ConfigDict, tasks: dict[str, Task], total_steps: int) -> list[int]:
    """Each task's share of total_steps."""
    if total_steps < len(tasks):
        raise UserError(f"total_steps={total_steps}, but there are {len(tasks)} tasks and each needs a step: train longer")
    return _largest_remainder(_step_weights(config, tasks), total_steps)


def _largest_remainder(weights: list[float], total: int) -> list[int]:
    """Shares `total` out in proportion to `weights` by largest remainder; everyone gets 1 at least, at the expense of the largest."""
    exact = [weight / sum(weights) * total for weight in weights]
    shares = [math.floor(share) for share in exact]
    for i in sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])[: total - sum(shares)]:
        shares[i] += 1
    while 0 in shares:
        shares[shares.index(max(shares))] -= 1
        shares[shares.index(0)] += 1
    return shares


def _stream(config: ConfigDict, tasks: list[Task], batch_size: int) -> Stream:
    sizes = [len(task.train) * Fraction(str(config.tasks[task.name].sample_weight)) for task in tasks]
    unit = Fraction(math.gcd(*(size.numerator for size in sizes)), math.lcm(*(size.denominator for size in sizes)))
    return Stream(tuple(tasks), batch_size, tuple(int(size / unit) for size in sizes), tuple(_endless(config.seed, task) for task in tasks))


def _endless(seed: int, task: Task) -> grain.MapDataset:
    """The examples of a task as rows of batches, pass after pass. Depends on the seed and the task's name, not on other tasks."""
    seed = int(np.random.SeedSequence([seed, zlib.crc32(task.name.encode())]).generate_state(1)[0])
    return grain.MapDataset.source(_Passes(len(task.train), seed)).seed(seed).random_map(_LoadClip(task))


class _Passes:
    """Position -> number of an example, without end: every pass over `size` examples is a new permutation.

    Holds two passes, 4 bytes an example. (grain's own shuffle holds nothing, but takes milliseconds per example of a set of a hundred: it walks a
    permutation of 2^16 numbers until one is in the set.)
    """

    def __init__(self, size: int, seed: int):
        self._size, self._seed = size, seed
        self._orders: dict[int, np.ndarray] = {}  # pass -> int32[size]
        self._lock = threading.Lock()

    def __reduce__(self):
        return _Passes, (self._size, self._seed)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, i: int) -> int:
        number, position = divmod(int(i), self._size)
        return int(self._order(number)[position])

    def _order(self, number: int) -> np.ndarray:
        with self._lock:
            if number not in self._orders:
                order = np.arange(self._size, dtype=np.int32)
                np.random.default_rng([self._seed, number]).shuffle(order)
                self._orders = {**dict(list(self._orders.items())[-1:]), number: order}
            return self._orders[number]


def _counts(n: int, weights: tuple[int, ...]) -> list[int]:
    """How many of the first n members of an endless sequence are of each kind.

    Kind 1 gets its share of n, rounded up, kind 2 its share of the others, and so on: exact after every sum(weights), evenly spread between.
    """
    counts, total = [], sum(weights)
    for weight in weights:
        others = n * (total - weight) // total
        counts.append(n - others)
        n, total = others, total - weight
    return counts


def _filled_up(label: int | np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A label, or several, as int32[shape]; what is left is -1."""
    result = np.full(shape, -1, np.int32)
    result.reshape(-1)[: np.size(label)] = label
    return result


def _rows_of(process: int, processes: int, rows: int) -> range:
    """Which of a global batch's `rows` a process holds."""
    if rows % processes:
        raise ValueError(f"{rows} rows cannot be shared by {processes} processes")
    return range(process * (rows // processes), (process + 1) * (rows // processes))


# Decoding: see `Decoder.start_batch` for what a row is


class _LoadClip(grain.transforms.RandomMap):
    """Index of a training example -> row. A file that can't be decoded is replaced by the one after it."""

    def __init__(self, task: Task):
        self.task = task

    def random_map(self, index: int, rng: np.random.Generator) -> dict:
        task, bad = self.task, []
        for substitute in range(min(MAX_SUBSTITUTES + 1, len(task.train))):
            source_index = (int(index) + substitute) % len(task.train)
            try:
                example = task.train[source_index]
                pixels = training_clip(example, task.clip, rng)
            except DecodeError as error:
                bad.append((task.name, source_index, str(error)))
                continue
            return {"pixels": pixels, "label": example["label"], "task": task.index, "mask": True, "bad": bad}
        return {"pixels": None, "label": 0, "task": task.index, "mask": False, "bad": bad}


class _Steps(Decoder):
    """Step -> its tuple of batches, the rows of one process."""

    def __init__(self, mixture: Mixture, threads: int):
        super().__init__(threads)
        self._mixture = mixture

    def map(self, step: int) -> tuple[dict, ...]:
        started = [self._start(self._mixture.streams[s], position, self._mixture.rows[s]) for s, position in self._mixture.plan(int(step))]
        return tuple(wait() for wait in started)

    def _start(self, stream: Stream, position: int, rows: range) -> Callable[[], dict]:
        examples = range(position * stream.batch_size, (position + 1) * stream.batch_size)[rows.start : rows.stop]
        fields = {"label": np.dtype((np.int32, stream.label_shape)), "task": np.int32, "mask": bool}
        return self.start_batch(stream.__getitem__, examples, len(rows), stream.shape, fields)


class _ViewBatches(Decoder):
    """Number of an evaluation batch -> the batch, the rows of one process."""

    def __init__(self, task: Task, batch_size: int, rows: range, view_counts: tuple[int, int], threads: int):
        super().__init__(threads)
        self._task, self._batch_size, self._rows, self._view_counts = task, batch_size, rows, view_counts

    def map(self, number: int) -> dict:
        first = int(number) * self._batch_size
        examples = range(len(self._task.val))[first + self._rows.start : first + self._rows.stop]
        shape = (math.prod(self._view_counts), *self._task.clip.shape)
        fields = {"label": np.dtype((np.int32, self._task.val.label_shape)), "index": np.int32, "mask": bool}
        return self.start_batch(self._row, examples, len(self._rows), shape, fields)()

    def _row(self, index: int) -> dict:
        try:
            example = self._task.val[index]
            pixels = views(example, self._task.clip, *self._view_counts)
            return {"pixels": pixels, "label": example["label"], "index": index, "mask": True, "bad": []}
        except DecodeError as error:
            return {"pixels": None, "label": 0, "index": index, "mask": False, "bad": [(self._task.name, index, str(error))]}
