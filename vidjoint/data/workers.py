"""Threads and processes that decode batches ahead of their use, in order, in bounded memory."""

import contextlib
import logging
import math
import multiprocessing
import os
import shutil
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from vidjoint.errors import UserError

SHARED_MEMORY = "/dev/shm"  # through which worker processes pass batches
DEATH = "terminated unexpectedly with exit code"  # as grain says it
MOST_DEATHS = 3  # of worker processes, one after another without a batch between them

log = logging.getLogger(__name__)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode_threads(data: ConfigDict) -> int:
    """`data.threads`, or what keeps this process's cores busy. Threads that wait for a process which decodes for them are half as many again."""
    return data.threads or (cores() if data.isolate == "none" else math.ceil(1.5 * cores()))


class Decoder(grain.transforms.Map):
    """Number of an element -> its batches (`map`, which subclasses write), whose rows `threads` threads decode. Close it when done."""

    def __init__(self, threads: int):
        self.threads = threads
        self._open()

    def _open(self) -> None:
        self._pool = ThreadPoolExecutor(self.threads, "decode")
        self._end = weakref.finalize(self, self._pool.shutdown, cancel_futures=True)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_pool", "_end")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()  # a worker process has threads of its own

    def close(self) -> None:
        """Ends the threads, each after the row that it is at."""
        self._end()

    def start_batch(
        self, load: Callable[[int], dict], examples: Sequence[int], rows: int, shape: tuple[int, ...], fields: dict
    ) -> Callable[[], dict]:
        """Starts to decode a batch; the function that is returned waits for it.

        Args:
          load: example -> row: its `fields`, "pixels" (uint8[shape]; None where "mask" is False) and "bad", a list of what went wrong.
          examples: what goes into the first rows; the others stay zero.
          rows: size of the batch, B.
          fields: name -> dtype of the numbers that each row has; "mask" is one of them.

        Returns:
          function -> {"pixels": uint8[B, *shape], each field: dtype[B], "bad": list over all rows}.
        """
        pixels = np.zeros((rows, *shape), np.uint8)
        columns = {name: np.zeros(rows, dtype) for name, dtype in fields.items()}

        def work(i: int, example: int) -> list:
            row = load(example)
            if row["mask"]:
                pixels[i] = row["pixels"]
            for name, column in columns.items():
                column[i] = row[name]
            return row["bad"]

        pending = [self._pool.submit(work, i, example) for i, example in enumerate(examples)]
        return lambda: {"pixels": pixels, **columns, "bad": [failure for future in pending for failure in future.result()]}


def decode_ahead(decoder: Decoder, numbers: range, rows: int, prefetch: int, workers: int = 0, most_bytes: int = 0) -> Iterator:
    """Yields the elements `numbers` of a decoder, and closes it. An element has at least so many `rows`, and at most so many bytes.

    At any time `prefetch` elements are decoded or being decoded, besides those handed out; more only where they have fewer rows than there are
    threads. With worker processes, each of them makes whole elements, and at least four are held for each. Should one be killed, new ones go on with
    the element that is next.

    Raises:
      UserError: the elements that the workers hold don't fit into shared memory, or the workers are killed again and again.
    """
    busy = math.ceil(decoder.threads / rows) + 1  # elements in work; the threads are at the first, and begin the next before it is whole
    buffer = max(1, prefetch // (2 * workers) - 1) if workers else 0  # grain has two per worker, and one element waiting before each of them
    if workers:
        _check_shared_memory(workers, (workers * (2 * buffer + 2) + 1) * most_bytes)
        if not flags.FLAGS.is_parsed():  # grain reads its settings from flags
            flags.FLAGS.mark_as_parsed()

    def elements_from(number: int) -> Iterator:
        elements = grain.MapDataset.range(number, numbers.stop).map(decoder)
        if workers:
            return iter(elements.to_iter_dataset(grain.ReadOptions(0, 0)).mp_prefetch(grain.MultiprocessingOptions(workers, buffer), _begin))
        ahead = max(prefetch, busy - 1)
        return iter(elements.to_iter_dataset(grain.ReadOptions(min(busy, ahead), ahead)))

    number, deaths = numbers.start, 0
    with contextlib.closing(decoder):
        while True:
            with contextlib.closing(elements_from(number)) as elements:
                try:
                    for element in elements:
                        yield element
                        number, deaths = number + 1, 0
                    return
                except RuntimeError as error:  # what grain makes of a process that is no more
                    if not (workers and DEATH in str(error)):
                        raise
                    reason, deaths = str(error).partition(DEATH)[2].split(".")[0].strip(), deaths + 1
            if deaths == MOST_DEATHS:
                raise UserError(
                    f"a process of data.workers={workers} ended {deaths} times before it gave a batch, the last time with exit code {reason}: "
                    "it may lack memory (set data.workers=0: threads need less), or somebody ends it"
                )
            log.warning("a process of data.workers=%d ended (exit code %s): all are started anew, from the batch that is next", workers, reason)


def _check_shared_memory(workers: int, needed: int) -> None:
    """A process that finds shared memory full is killed without a word, so this is found out before."""
    free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else math.inf
    if needed > free:
        raise UserError(
            f"data.workers={workers} may need {needed / 2**20:.0f} MiB of shared memory, and {SHARED_MEMORY} has {free / 2**20:.0f}: "
            "set data.workers=0 (threads decode as fast), or enlarge it (docker run --shm-size)"
        )


def _begin(number: int, workers: int) -> None:
    """Makes a worker process end with its parent, whatever ends that, and by no signal that a whole job gets (Ctrl-C, SIGTERM of a scheduler).

    The parent itself decides what to do then, and may need more batches for it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
