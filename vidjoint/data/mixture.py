"""Tasks and a schedule (schedules.py) become the tuple of batches of each step.

Everything is random-access: the tuple of step i is a function of (config, seed, i) alone, whatever the number of threads, worker processes,
hosts or devices. So the data position of a run is its step number, and a checkpoint holds no iterator state.
"""

import contextlib
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from os.path import exists

import numpy as np
from ml_collections import ConfigDict

from vidjoint.data.decode import DecodeError
from vidjoint.data.examples import views
from vidjoint.data.records import FileRecords
from vidjoint.data.schedules import SCHEDULES, Stream, steps_per_epoch
from vidjoint.data.tasks import Task, union_size
from vidjoint.data.workers import Decoder, decode_ahead, decode_threads
from vidjoint.errors import UserError, printable

SHOWN = 20  # bad files that an error names; the log has named them all
RowsOf = Callable[[int], Sequence[int]]

log = logging.getLogger(__name__)


class Mixture:
    """The training data of a run: `mixture.step(i)`, or `mixture.iterate(i)` for the same with decoding ahead.

    A batch is `{"pixels": uint8[B, T, H, W, 3], "label": int32[B], "task": int32[B], "mask": bool[B]}`, B rows, of this process. Where a task of its
    stream is multilabel, labels are int32[B, K], filled up by -1, with the same K in all batches of the stream. Rows whose mask is False only fill
    up the global batch to a multiple of `row_multiple` (the devices that share a batch) x `config.accumulate`, or stand for a file that can't be
    decoded and has no substitute either.
    """

    def __init__(self, config: ConfigDict, tasks: dict[str, Task], total_steps: int, rows_of: RowsOf = range, row_multiple: int = 1):
        """Opens the streams of a run of `total_steps`, of which `task_by_task` and `weighted` take shares.

        Args:
          rows_of: size of a global batch -> the numbers of the rows that this process reads, ascending (`sharding.local_rows`); all of them at first.

        Raises:
          UserError: a batch or the run is too small for all tasks.
        """
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
        row_multiple *= config.accumulate
        self.rows = [rows_of(math.ceil(stream.batch_size / row_multiple) * row_multiple) for stream in self.streams]

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

    def files(self, step: int) -> list[list[dict]]:
        """What the rows of the batches of a step are, over all processes: {"row", "task", "file", "label"} each, as drawn; nothing is decoded."""
        return [[self._file(self.streams[s], position, row) for row in range(self.streams[s].batch_size)] for s, position in self.plan(step)]

    @staticmethod
    def _file(stream: Stream, position: int, row: int) -> dict:
        task, number = stream.drawn(position * stream.batch_size + row)
        records = task.train.records
        label = np.atleast_1d(records.targets[number] if hasattr(records, "targets") else records[number][1])
        return {"row": row, "task": task.name, "file": task.train.name(number), "label": [task.labels[c] for c in label if c >= 0]}

    def kinds(self) -> dict[int, float]:
        """The first step of each kind, that is with the same streams, and the share of all steps that are of its kind."""
        if self._order is None:
            return {0: 1.0}
        _, first, counts = np.unique(self._order, return_index=True, return_counts=True)
        return dict(zip(first.tolist(), (counts / len(self._order)).tolist(), strict=True))

    def step(self, step: int) -> tuple[dict, ...]:
        """The tuple of batches of one step, decoded here and now."""
        with contextlib.closing(_Steps(self, decode_threads(self._data))) as steps:
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
        steps = _Steps(self, max(1, (decode_threads(self._data)) // max(workers, 1)))
        with contextlib.closing(decode_ahead(steps, range(start, sys.maxsize), fewest_rows, self._data.prefetch, workers, most_bytes)) as tuples:
            for batches in map(self._checked, tuples):
                if workers:  # copies shared memory, which grain frees only while the interpreter is whole
                    batches = tuple({name: np.array(column) for name, column in batch.items()} for batch in batches)
                yield batches

    def _checked(self, batches: tuple[dict, ...]) -> tuple[dict, ...]:
        """Takes the failures out of batches, logs files not met before, and stops when there are too many."""
        for name, index, reason in [failure for batch in batches for failure in batch.pop("bad")]:
            seen, source, share = self.bad[name], self.tasks[name].train, self._data.max_bad_share
            if index >= 0 and index not in seen:
                seen[index] = f"{source.name(index)}: {reason}"
                log.warning("%s: skipped %s", name, printable(seen[index]))
            if len(seen) > share * len(source) or (index < 0 and share < 1):
                count = f"{len(seen)} of {len(source)} training files" if index >= 0 else reason
                first = [f"  {line}" for line in list(seen.values())[:SHOWN]]
                more = [f"  and {len(seen) - SHOWN} more"] if len(seen) > SHOWN else []
                files = [source.name(i) for i in list(seen)[:SHOWN]] if isinstance(source.records, FileRecords) else []
                gone = [f"{name}: none of these is there any more: is the disk still mounted?"] if files and not any(map(exists, files)) else []
                limit = f"above data.max_bad_share={share}" if index >= 0 else "so there is nothing to put in their place"
                advice = "mend them or take them out (python -m vidjoint.check_data finds all), then go on with the same command"
                raise UserError(f"{name}: {count} can't be decoded, {limit}: {advice}:", *first, *more, *gone)
        return batches


def evaluation_batches(task: Task, config: ConfigDict, batch_size: int, temporal: int, spatial: int, rows_of: RowsOf = range) -> Iterator[dict]:
    """Yields the validation split once, in order, decoded ahead in threads; the more views, the fewer batches ahead.

    A batch is `{"pixels": uint8[B, V, T, H, W, 3], "label": int32[B], "index": int32[B], "mask": bool[B], "bad": [...]}`: the B rows of this process,
    `rows_of(batch_size)`, with V = temporal x spatial views; the labels of a multilabel task are int32[B, K], filled up by -1.
    Every process yields the same number of batches. A row whose mask is False is filling, or a file that can't be decoded (named in `bad` as
    (task, index, reason)).
    """
    rows = rows_of(batch_size)
    decoder = _ViewBatches(task, batch_size, rows, (temporal, spatial), decode_threads(config.data))
    numbers = range(math.ceil(len(task.val) / batch_size))
    prefetch = max(1, config.data.prefetch // (temporal * spatial))
    return decode_ahead(decoder, numbers, len(rows), prefetch)


# Decoding: see `Decoder.start_batch` for what a row is


class _Steps(Decoder):
    """Step -> its tuple of batches, the rows of one process."""

    def __init__(self, mixture: Mixture, threads: int):
        super().__init__(threads)
        self._mixture = mixture

    def map(self, step: int) -> tuple[dict, ...]:
        started = [self._start(self._mixture.streams[s], position, self._mixture.rows[s]) for s, position in self._mixture.plan(int(step))]
        return tuple(wait() for wait in started)

    def _start(self, stream: Stream, position: int, rows: Sequence[int]) -> Callable[[], dict]:
        examples = [position * stream.batch_size + int(row) for row in rows if row < stream.batch_size]  # the others are filling, at the end
        fields = {"label": np.dtype((np.int32, stream.label_shape)), "task": np.int32, "mask": bool}
        return self.start_batch(stream.__getitem__, examples, len(rows), stream.shape, fields)


class _ViewBatches(Decoder):
    """Number of an evaluation batch -> the batch, the rows of one process."""

    def __init__(self, task: Task, batch_size: int, rows: Sequence[int], view_counts: tuple[int, int], threads: int):
        super().__init__(threads)
        self._task, self._batch_size, self._rows, self._view_counts = task, batch_size, rows, view_counts

    def map(self, number: int) -> dict:
        first = int(number) * self._batch_size
        examples = [first + int(row) for row in self._rows if first + row < len(self._task.val)]
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
