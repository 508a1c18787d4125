"""Host memory of commands that compute on CPUs: in huge pages, and kept from step to step, but no more of it than steps need.

Imports nothing that takes time: a command calls this before it imports the rest.
"""

import collections
import ctypes
import importlib.util
import os
import platform
import sys
import time
from pathlib import Path

PLUGINS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")
# glibc: huge pages where the system gives them to whoever asks; freed memory stays with the process; one arena, as only that one keeps large pieces
KEPT = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.arena_max=1"

kept = False  # whether this process keeps what is freed


def only_cpus() -> bool:
    """Whether JAX will run on CPUs; doesn't start it."""
    chosen = os.environ.get("JAX_PLATFORMS", "")
    return chosen.startswith("cpu") if chosen else not any(importlib.util.find_spec(name) for name in PLUGINS)


def can_be_kept() -> bool:
    """Whether this is glibc 2.35 or newer, which knows these settings."""
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)


def keep() -> None:
    """Starts this command again, once, so that its memory is kept; process number and arguments stay, and processes that it starts are as ever.

    XLA asks for its buffers anew in every step. To have them mapped and cleared by the system each time took a tenth to a third of a step. glibc
    reads its settings when a process starts, from GLIBC_TUNABLES; whoever has set `glibc.malloc` there keeps what they chose.
    """
    global kept
    asked = os.environ.get("GLIBC_TUNABLES", "")
    if asked.endswith(KEPT):  # this is the second start
        os.environ["GLIBC_TUNABLES"] = asked.removesuffix(KEPT).rstrip(":")
        kept = True
        return
    if only_cpus() and can_be_kept() and "glibc.malloc" not in asked:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [asked, KEPT]))
        os.execv(sys.executable, sys.orig_argv)


class Excess:
    """Gives memory that is free back to the system where a process that keeps it holds more than it did.

    XLA may ask for a step's temporary memory a moment before it has freed that of the step before. Both pieces would stay with the process.
    """

    EVERY, LOOKS = 10, 6  # seconds from one look to the next; looks that are compared: where more is needed for good, that is settled in a minute
    MARGIN = 1.03

    def __init__(self):
        self._held: collections.deque[int] = collections.deque(maxlen=self.LOOKS)
        self._next = 0.0

    def give_back(self) -> None:
        """To be called between steps, when what they computed with is free. What the next one needs is mapped anew, once."""
        if not kept or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self.EVERY
        self._held.append(resident())
        if self._held[-1] > self.MARGIN * min(self._held):
            ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Bytes of memory that this process has in use (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
