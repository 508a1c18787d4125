"""Functions called in child processes, under limits: what hangs, crashes or eats memory over a hostile file ends there, and the caller goes on.

This bounds accidents, not attacks: the children may do whatever this process may.
"""

import atexit
import contextlib
import json
import logging
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vidjoint.data.decode import DecodeError, NoMemory
from vidjoint.errors import UserError

START_SECONDS = 300  # for a child to import its modules, on a machine that is busy
MOST_STARTS = 5  # attempts
READY = b"!"
SMALL = 1 << 16  # bytes
HEAD = struct.Struct("<QQ")  # bytes of a pickle, number of the buffers behind it
# What most calls need is imported before the clock runs
CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from vidjoint.data import examples, isolated; isolated.serve(int(sys.argv[1]))"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one call may take."""

    seconds: float  # of time, as a clock on the wall shows it
    memory: int  # bytes of address space, some 230 MiB for Python and its libraries included


class Died(Exception):
    """A child ended before it answered."""


def call(limits: Limits, name: str, function: Callable, *args) -> Any:
    """Returns `function(*args)` as a child process answers it. Any number of threads may call at once; each is served by a child of its own.

    A child that dies is replaced and the call made once more, for the machine may have killed it (a lack of memory); the second time it is the
    file's fault.

    Args:
      name: of the file, for the log.
      function: of a module, which the child imports; it and what it takes and returns can be pickled.

    Raises:
      DecodeError: it takes more than the limits, or kills the child; and whatever the function raises.
    """
    for attempt in range(2):
        child = _started() if attempt else _waiting()
        try:
            answer = child.ask(limits, function, args)
        except TimeoutError:
            child.end()
            raise DecodeError(f"not decoded within {limits.seconds:g} s (data.decode_seconds)") from None
        except Died:
            reason = child.end(patience=1)
            if attempt:
                raise DecodeError(f"it kills the process that decodes it ({reason})") from None
            log.warning("%s: the process that decoded it ended (%s); trying once more in a new one", name, reason)
            continue
        except BaseException:  # Ctrl-C: the answer is still to come
            child.end()
            raise
        if isinstance(answer, NoMemory):
            child.end()  # whose libraries may be in any state
            if child.calls > 1 and not attempt:  # what it held of earlier files may be to blame
                continue
            raise answer
        _idle.append(child)
        if isinstance(answer, BaseException):
            raise answer
        return answer[0]
    raise AssertionError("two attempts end in an answer or an error")


class _Child:
    """A process that waits for calls."""

    def __init__(self):
        self.calls = 0
        self._socket, theirs = socket.socketpair()
        path = json.dumps([entry or os.getcwd() for entry in sys.path])
        one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # which would only take address space
        with theirs:
            command = [sys.executable, "-c", CODE, str(theirs.fileno()), path]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=os.environ | one_thread)
        self._answers = self._socket.makefile("rb", 1 << 16)
        try:
            self._socket.settimeout(START_SECONDS)
            ready = self._receive(1) == READY
        except (Died, TimeoutError, ConnectionError):
            ready = False
        except BaseException:
            self.end()
            raise
        if not ready:
            raise Died(self.end(patience=1))

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, limits: Limits, function: Callable, args: tuple) -> tuple | BaseException:
        """Returns (result,), or what the function raised. Raises Died or TimeoutError."""
        self.calls += 1
        assert function.__module__ != "__main__", "the child could not import it"
        request = pickle.dumps((limits, function, args), 5)
        try:
            self._socket.settimeout(limits.seconds)
            self._socket.sendall(HEAD.pack(len(request), 0) + request)
            size, count = HEAD.unpack(self._receive(HEAD.size))
            sizes = struct.unpack(f"<{count}Q", self._receive(8 * count))
            answer = self._receive(size)
            return pickle.loads(answer, buffers=[self._receive(size) for size in sizes])
        except ConnectionError:
            raise Died from None

    def _receive(self, size: int) -> bytearray:
        content = bytearray(size)
        if self._answers.readinto(content) < size:
            raise Died
        return content

    def end(self, patience: float = 0.0) -> str:
        """Ends the process, if it has not ended by itself within `patience` seconds; returns how, in words."""
        self._close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self._process.kill()
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:  # it hangs in the kernel, on a file server that is gone: it ends when that answers
            _lost.append(self)
            return "no answer"
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"

    def _close(self) -> None:
        self._answers.close()  # else the socket stays open behind it
        self._socket.close()

    def disown(self) -> None:
        """In a forked process: the child is its parent's."""
        self._close()
        self._process.returncode = 0  # there is nothing to wait for


def _waiting() -> _Child:
    """A child that has nothing to do, or else a new one."""
    while True:
        try:
            child = _idle.pop()
        except IndexError:
            return _started()
        if child.is_alive():
            return child
        child.end()


def _started() -> _Child:
    """A new child. Should one be killed before it has started, that is tried a few times."""
    for _ in range(MOST_STARTS):
        try:
            return _Child()
        except Died as error:
            reason = str(error)
    raise UserError(f"a decoding process does not start ({reason}): mend that, or set data.isolate=none")


_idle: deque[_Child] = deque()
_lost: list[_Child] = []


@atexit.register
def close() -> None:
    """Ends the children that wait for calls."""
    while _idle:
        _idle.pop().end()


def _forget() -> None:
    for child in (*_idle, *_lost):
        child.disown()
    _idle.clear()
    _lost.clear()


os.register_at_fork(after_in_child=_forget)


# In the child


def serve(descriptor: int) -> None:
    """Answers calls until the other end is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a whole job gets these; what to do then, the parent decides
        signal.signal(number, signal.SIG_IGN)
    _limit(resource.RLIMIT_CORE, 0)
    connection = socket.socket(fileno=descriptor)
    with connection, connection.makefile("rb") as requests, contextlib.suppress(ConnectionError):  # the parent has gone
        connection.sendall(READY)
        while head := requests.read(HEAD.size):
            limits, function, args = pickle.loads(requests.read(HEAD.unpack(head)[0]))
            _limit(resource.RLIMIT_AS, limits.memory)
            # Ends a child that hangs when its parent is gone; a living parent does so before
            _limit(resource.RLIMIT_CPU, int(time.process_time() + limits.seconds) + 2)
            _answer(connection, function, args)


def _limit(kind: int, soft: int) -> None:
    """Lowers or raises a soft limit, as far as the hard one and the system let it."""
    hard = resource.getrlimit(kind)[1]
    try:
        resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
    except (ValueError, OSError):  # macOS bounds no address space
        pass


def _answer(connection: socket.socket, function: Callable, args: tuple) -> None:
    buffers = []
    try:
        try:
            answer = (function(*args),)
        except MemoryError as error:
            raise NoMemory from error
    except BaseException as error:
        if not isinstance(error, DecodeError | UserError):
            error.add_note("in a decoding process:\n" + traceback.format_exc())
        answer = error.with_traceback(None)
    try:
        content = pickle.dumps(answer, 5, buffer_callback=buffers.append)
    except Exception:
        content = pickle.dumps(RuntimeError(f"{type(answer).__name__}: {answer}"))
    views = [buffer.raw() for buffer in buffers]
    head = HEAD.pack(len(content), len(views)) + struct.pack(f"<{len(views)}Q", *(view.nbytes for view in views))
    if sum(view.nbytes for view in views) < SMALL:
        connection.sendall(b"".join([head, content, *views]))  # at once: a wake-up of the parent costs more than a copy
        return
    connection.sendall(head + content)
    for view in views:
        connection.sendall(view)
