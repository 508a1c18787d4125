"""Signals that ask a run to stop: SIGTERM, which schedulers and preempted machines send, and Ctrl-C."""

import collections
import contextlib
import functools
import logging
import signal
import types

import jax
import numpy as np

CALLBACKS = ("_xla_gc_callback", "__del__")  # Python swallows what is raised in these, with a traceback
LATENCY = 2  # steps after which all processes have the answer to whether one of them was asked to stop

log = logging.getLogger(__name__)


class Stopped(Exception):
    """A signal ended the run; nothing is lost."""

    exit_status = 75  # of the command: start it again to go on (EX_TEMPFAIL)

    def __init__(self, step: int):
        where = f"after step {step} and saved; the same command goes on from there" if step else "before the first step; the same command starts anew"
        super().__init__(f"stopped {where}")
        self.step = step


class Waiting(Exception):
    """A signal came while the run only waited."""


class StopSignal:
    """Turns SIGTERM and the first Ctrl-C into a request to stop after the current step; a second Ctrl-C stops at once.

    As long as nothing would be lost (`when_saved`; at first, before there is anything to lose), a signal raises Stopped on the spot.
    """

    def __init__(self):
        self._asked, self._waits, self._saved, self._old = False, False, 0, {}
        self._answers = collections.deque()

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._old[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread, as in a notebook's executor: signals go to whoever owns it
                break
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def asked_anywhere(self) -> bool:
        """Whether to stop. In a run of several processes all of them get the same answer, for all make the same calls.

        There the answer is that of the call LATENCY before, so that none waits for the others.
        """
        if jax.process_count() == 1:
            return self._asked
        self._answers.append(_anyone(self._asked))
        return len(self._answers) > LATENCY and bool(self._answers.popleft())

    def when_saved(self, step: int | None) -> None:
        """From now on all is saved up to `step`: a signal, also one that came before, raises Stopped(step). None: there is something to lose."""
        self._saved = step
        if self._asked and step is not None:
            raise Stopped(step)

    @contextlib.contextmanager
    def while_waiting(self):
        """A signal that comes in this block, or came before, raises Waiting; in a run of several processes the block changes nothing."""
        self._waits = jax.process_count() == 1
        try:
            if self._waits and self._asked:
                raise Waiting
            yield
        finally:
            self._waits = False

    def _ask(self, number, frame):
        again, self._asked = self._asked, True
        if _in_callback(frame):  # whoever asks next hears of it
            return
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._saved is not None:
            raise Stopped(self._saved)
        if not again:
            log.warning("%s: saving after this step and stopping", signal.Signals(number).name)
        if self._waits:
            self._waits = False
            raise Waiting


def _in_callback(frame: types.FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name not in CALLBACKS:
        frame = frame.f_back
    return frame is not None


def _anyone(asked: bool) -> jax.Array:
    """bool[], whether any process says so; doesn't wait for the others."""
    sharding, reduce = _over_all_devices()
    local = np.full(jax.local_device_count(), asked)
    return reduce(jax.make_array_from_process_local_data(sharding, local, (jax.device_count(),)))


@functools.cache
def _over_all_devices():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("all",), ()))
    return split, jax.jit(lambda asked: asked.any(), out_shardings=whole)
