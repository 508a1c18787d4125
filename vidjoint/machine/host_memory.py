"""Host memory of commands that compute on CPUs: in huge pages, and kept from step to step, but no more of it than a step needs.

Imports nothing that takes time: a command calls this before it imports the rest.
"""

import ctypes
import importlib.util
import os
import platform
import sys

PLUGINS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")
# glibc: huge pages where the system gives them to whoever asks; freed memory stays with the process; one arena, as only that one keeps large pieces
KEPT = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.arena_max=1"

M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4  # malloc.h
LARGE = 16 << 20  # bytes of a piece that is given back at once, from `settle` on, if no room was left for it

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


def settle() -> None:
    """To be called when a process that keeps its memory has as much as it needs: it grows no more for large pieces.

    A step's temporary memory is one such piece. Now and then XLA asks for the next step's a moment before it has freed that, or something small lies
    where it was; each time one more would stay with the process. From here on, a large piece that finds no room is mapped and unmapped.
    """
    if kept:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(M_MMAP_MAX, 65536)  # as it is without KEPT
