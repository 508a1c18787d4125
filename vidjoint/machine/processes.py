"""Several processes as one run (`jax.distributed`): how they find each other, end together, and say why in one line.

One process that ends takes the others with it. If it can, it leaves its exit status and its lines in the coordinator's key-value store, where the
others look (`Watch`); if it was killed, the others notice by a collective that fails, or by its missing heartbeats.
"""

import argparse
import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback

import jax
from jax.experimental import multihost_utils

from vidjoint.errors import UserError, printable

LOST = 76  # exit status after another process of the run was lost (EX_PROTOCOL)
START = 180  # seconds that the processes wait for each other at the start
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as lost
PARTING = 10  # seconds that a process which ends on its own account leaves the others to learn of it
POLL = 1.0  # seconds between two looks for processes that have ended

# What XLA says when a collective or the coordinator fails since a process is gone
GONE = re.compile(
    r"Gloo.*(closed by peer|reset by peer|Broken pipe|Read error|Write error|[Tt]imed? ?out)|coordination service"
    r"|waiting for .*barrier|^(UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED)"
)
# What its C++ parts say on the way, on standard error: true, but no news for the user, who gets one line
NOISE = re.compile(rb"[EFW]\d{4} .*(coordination_service|client\.h|preemption_sync|shutdown)|RPC: /xla|Additional GRPC|\*\*\* Check failure|    @ ")
_decided: list[int] = []  # exit status, as soon as this process is about to end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what a command needs to know to be one of several processes."""
    group = parser.add_argument_group("several processes", "start the same command in each; on TPU pods and under Slurm or Open MPI without these:")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="a free port of the machine on which process 0 runs")
    group.add_argument("--num_processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process_id", type=int, metavar="I", help="which one this is, from 0")


@contextlib.contextmanager
def joined(args: argparse.Namespace):
    """Makes this process one of several for the time of the block, if `args` or the cluster's environment say so; enter it before JAX is used.

    With several processes, an exception that leaves the block ends this process and all others with its exit status: the attribute `exit_status`,
    2 for a UserError, LOST where another process was lost, and else 1. A line that all have to say comes from process 0 alone.

    Raises:
      UserError: the arguments don't fit each other, or the processes don't find each other.
    """
    if not _initialize(args):
        yield
        return
    if jax.process_index():
        logging.getLogger().setLevel(logging.WARNING)
    with _one_line_when_aborted():
        with Watch() as watch:
            try:
                yield
                watch.wait_for_all()
            except BaseException as error:
                watch.leave(error)
        jax.distributed.shutdown()


def _initialize(args: argparse.Namespace) -> bool:
    """Connects the processes, if there are several."""
    given = {"coordinator": args.coordinator, "num_processes": args.num_processes, "process_id": args.process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(f"{' and '.join(missing)} missing: several processes need --coordinator=HOST:PORT, --num_processes=N and --process_id=I")
    if not missing:
        if not re.fullmatch(r".+:\d+", args.coordinator):
            raise UserError(f"--coordinator={args.coordinator}: write HOST:PORT")
        if not 0 <= args.process_id < args.num_processes:
            raise UserError(f"--process_id={args.process_id}: from 0 to {args.num_processes - 1}, for --num_processes={args.num_processes}")
    elif (size := _cluster_size()) == 1:
        return False
    settings = {"jax_cpu_collectives_implementation": "gloo"}
    settings["jax_enable_preemption_service"] = False  # it would take SIGTERM, which train.StopSignal handles
    for name, value in settings.items():
        with contextlib.suppress(AttributeError):  # a JAX that has no such setting
            jax.config.update(name, value)
    times = dict(initialization_timeout=START, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=2 * PARTING)
    try:
        with _one_line_when_aborted("the processes did not find each other: see whether all run, with the same --coordinator and --num_processes"):
            jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id, **times)
    except Exception as error:
        if missing and size is None and isinstance(error, ValueError):
            return False  # JAX found no cluster
        where = args.coordinator or "the cluster's"
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"coordinator {where}: {reason}: see whether all processes run, can reach it, and have the same --coordinator and --num_processes"
        ) from error
    return True


def _cluster_size() -> int | None:
    """Number of processes that JAX would detect (Cloud TPU, Slurm, Open MPI, Kubernetes); 1 where it detects nothing, None where it can't be asked.

    One process under a scheduler is none of several: `jax.distributed` would only hide all its GPUs but the first.
    """
    try:
        from jax._src.clusters import ClusterEnv  # there is no public way to ask

        found = next((kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method and kind.is_env_present()), None)
        return found.get_process_count() if found else 1
    except Exception:
        return None


def _key_value_store():
    """The coordinator's, with its barriers; None where this JAX has none under the name known here (there is no public one)."""
    try:
        from jax._src.distributed import global_state

        client = global_state.client
        return client if hasattr(client, "key_value_set") and hasattr(client, "wait_at_barrier") else None
    except Exception:
        return None


class Watch:
    """Tells the other processes when this one ends, and ends this one when another has.

    Without the key-value store, processes end without a word to each other: the others learn of it by a collective that fails, or by heartbeats.
    """

    def __init__(self):
        self.client, self._me = _key_value_store(), jax.process_index()
        self._lock, self._end = threading.Lock(), threading.Event()

    def __enter__(self) -> "Watch":
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()

    def wait_for_all(self) -> None:
        """Returns when all processes have come here."""
        if self.client is None:
            multihost_utils.sync_global_devices("vidjoint: done")
        else:
            self.client.wait_at_barrier("vidjoint/done", 1000 * 3600)

    def leave(self, error: BaseException) -> None:
        """Ends this process for `error`, and with it all others. Does not return."""
        status, lines = _told(error)
        gone = _another_is_gone(error)
        if gone:
            for _ in range(3):  # it may have left a word
                time.sleep(POLL)
                self._follow()
            say([lost(gone)])
            time.sleep(POLL if self._me else 3 * POLL)  # with process 0 goes the coordinator, and whoever still asks it
            os._exit(LOST)
        with self._lock:
            self._end.set()
            try:
                self.client.key_value_set(f"vidjoint/ended/{self._me}", json.dumps([status, lines]))
                first = json.dumps([status, lines])
                if self._me:  # what process 0 says too is said
                    with contextlib.suppress(Exception):
                        first = self.client.blocking_key_value_get("vidjoint/ended/0", 3000)
                        lines = [] if json.loads(first) == [status, lines] else lines
            except Exception:
                pass  # the coordinator is gone, or has no store
            if status == 1 and lines:
                traceback.print_exception(error)
            self._exit(status, lines)

    def _look(self) -> None:
        while not self._end.wait(POLL):
            self._follow()

    def _follow(self) -> None:
        """Ends this process as another has ended, if one has."""
        try:
            ended = {key.rpartition("/")[2]: json.loads(value) for key, value in self.client.key_value_dir_get("vidjoint/ended/")}
        except Exception:
            return  # nobody can be asked: a failing collective or the heartbeats will tell
        ended.pop(str(self._me), None)
        if not ended or self._end.wait(3 * POLL):  # time to come to the same end by itself
            return
        with self._lock:
            self._end.set()
            number = min(ended, key=int)
            status, lines = ended[number]
            with contextlib.suppress(Exception):
                self.client.key_value_set(f"vidjoint/ended/{self._me}", json.dumps([status, lines]))
            self._exit(status, [f"process {number} ended: {lines[0].removeprefix('error: ')}"] if lines and self._me == 0 else [])

    def _exit(self, status: int, lines: list[str]) -> None:
        """Prints and ends, but not before the others could learn why."""
        say(lines)
        _decided.append(status)
        with contextlib.suppress(Exception):
            self.client.wait_at_barrier("vidjoint/ended", 1000 * PARTING)
        time.sleep(0 if self._me else POLL)  # with process 0 goes the coordinator
        os._exit(status)  # threads that wait for a process that has gone would hold up an orderly end


def _told(error: BaseException) -> tuple[int, list[str]]:
    """Exit status, and what is printed."""
    if isinstance(error, UserError):
        return 2, [line if line.startswith(" ") else f"error: {line}" for line in error.lines]
    if isinstance(error, KeyboardInterrupt):
        return 130, ["interrupted"]
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1, []
    if hasattr(error, "exit_status"):
        return error.exit_status, [str(error)]
    return 1, [f"error: {type(error).__name__}: {error}".splitlines()[0]]


def _another_is_gone(error: BaseException | None) -> str:
    """What XLA says of a process that has gone, if that is at the root of an error; else ""."""
    while error is not None:
        text = str(error)
        if not isinstance(error, UserError) and GONE.search(text):
            return text.splitlines()[0].rpartition("] ")[2] if "Gloo" not in text else re.sub(r".*\.cc:\d+\] ", "", text.splitlines()[0])
        error = error.__cause__ or error.__context__  # the first may have come while another was dealt with
    return ""


def lost(reason: str) -> str:
    """The line about a lost process."""
    return f"error: another process of the run was lost ({reason[:120]}): start all of them again, the run goes on from its last checkpoint"


def say(lines: list[str]) -> None:
    """Prints lines on standard error at once."""
    sys.stdout.flush()
    for line in lines:
        print(printable(line), file=sys.stderr)
    sys.stderr.flush()


@contextlib.contextmanager
def _one_line_when_aborted(line: str = ""):
    """Where XLA ends the process by abort(), as it does when the coordinator or its word is missing: one line and status LOST in place of its trace.

    What C++ writes to standard error goes through a pipe meanwhile, so that messages that say the same at length can be taken out.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    source, sink = os.pipe()
    os.dup2(sink, 2)
    os.close(sink)
    python_stderr, said = sys.stderr, []
    sys.stderr = open(os.dup(stderr), "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=True)
    handlers = [handler for handler in logging.getLogger().handlers if getattr(handler, "stream", None) is python_stderr]
    for handler in handlers:
        handler.setStream(sys.stderr)

    def pass_on() -> None:
        with open(source, "rb") as pipe:
            for text in pipe:
                if NOISE.match(text) or said:  # what follows belongs to it
                    said.append(text)
                    if not NOISE.match(text) and re.match(rb"[A-Z]\d{4} ", text):
                        said.clear()
                if not said:
                    os.write(stderr, text)

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()

    def abort(number: int) -> None:
        if _decided:
            os._exit(_decided[0])
        reader.join(0.5)
        text = b"".join(said).decode(errors="replace")
        silent = re.search(r"stopped sending heartbeats\):\s*([\d,\s]*\d)", text)
        reason = f"process {silent[1].split()[0]} is silent" if silent else "the coordinator, process 0, is gone"
        os.write(stderr, f"{f'error: {line}' if line else lost(reason)}\n".encode())
        os._exit(LOST)

    callback = ctypes.CFUNCTYPE(None, ctypes.c_int)(abort)
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    before = libc.signal(signal.SIGABRT, ctypes.cast(callback, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, before)
        os.dup2(stderr, 2)  # closes the pipe's end, and so the reader
        reader.join(1)
        for handler in handlers:
            handler.setStream(python_stderr)
        sys.stderr.close()
        sys.stderr = python_stderr
        os.close(stderr)
