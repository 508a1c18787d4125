"""Training steps that were started and have not been seen to end: so many at a time, and since when the device has had nothing to do."""

import collections
import contextlib
import math
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from vidjoint.machine import host_memory

MOST = 2  # steps that the device may have at a time; more would only hold their batches in its memory
MOST_ON_CPU = 1  # there each also holds all that it computes with
WARM = 100  # steps after which a process has as much memory as it needs


@dataclass(frozen=True)
class Step:
    """A training step."""

    number: int  # as logs count: the update that it makes
    values: dict  # its metrics
    batches: tuple[dict, ...]  # of this process, on the host


class InFlight:
    """The steps that the device has. Iterating tells them, oldest first. To be closed."""

    def __init__(self):
        self._steps: collections.deque[Step] = collections.deque()
        self._on_cpu = jax.default_backend() == "cpu"
        self._clock, self._started = DeviceClock(), 0

    def __iter__(self) -> Iterator[Step]:
        return iter(self._steps)

    def idle_for(self) -> float:
        """Seconds that the device has had nothing to do."""
        return self._clock.idle_for()

    def close(self) -> None:
        self._clock.close()

    def add(self, step: Step) -> None:
        """Takes a step that was just started."""
        step.values["skipped"].copy_to_host_async()
        self._steps.append(step)
        self._clock.add(step.values["skipped"])

    def make_room(self) -> list[Step]:
        """Waits until one more step may be started. Returns those that have ended."""
        ended = self.wait(MOST_ON_CPU - 1 if self._on_cpu else MOST - 1)
        self._started += 1
        if self._on_cpu and self._started == WARM:
            host_memory.settle()
        return ended

    def wait(self, left: int = 0) -> list[Step]:
        """Waits for all but `left` of the steps, and returns those."""
        ended = [self._steps.popleft() for _ in range(len(self._steps) - left)]
        jax.block_until_ready([step.values["skipped"] for step in ended])
        return ended


class DeviceClock:
    """Tells for how long the device has had nothing to do: a thread waits for each step and keeps the time at which it ended.

    The thread needs the interpreter for that, so the time may be late by a few ms, never early.
    """

    PATIENCE = 10  # seconds

    def __init__(self):
        self._started = self._ended = 0  # steps
        self._end = -math.inf  # of the newest of those
        self._steps: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait, name="device-clock", daemon=True)
        self._thread.start()

    def add(self, result: jax.Array) -> None:
        """Takes a result of a step that was just started."""
        self._started += 1
        self._steps.put(result)

    def idle_for(self) -> float:
        """Seconds since the newest step has ended: 0 while it runs, infinite before the first."""
        return time.perf_counter() - self._end if self._ended == self._started else 0.0

    def close(self) -> None:
        """Ends the thread, after the newest step: Python must not go while it waits for one. A step that hangs is not waited for."""
        self._steps.put(None)
        self._thread.join(self.PATIENCE)

    def _wait(self) -> None:
        while (result := self._steps.get()) is not None:
            with contextlib.suppress(Exception):  # whoever reads the result gets it
                result.block_until_ready()
            self._end = time.perf_counter()
            self._ended += 1
