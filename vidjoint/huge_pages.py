"""Huge pages for the memory of commands that compute on CPUs. Imports nothing that takes time: a command calls this before it imports the rest."""

import importlib.util
import os
import platform
import sys
from pathlib import Path

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PLUGINS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")


def only_cpus() -> bool:
    """Whether JAX will run on CPUs; doesn't start it."""
    chosen = os.environ.get("JAX_PLATFORMS", "")
    return chosen.startswith("cpu") if chosen else not any(importlib.util.find_spec(name) for name in PLUGINS)


def can_be_asked_for() -> bool:
    """Whether Linux gives huge pages to whoever asks, and glibc (2.35 or newer) can be told to."""
    name, version = platform.libc_ver()
    try:
        return "[madvise]" in SETTING.read_text() and name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
    except OSError:
        return False


def ask() -> None:
    """Starts this command again with huge pages, where they can be asked for and nobody has yet; process number and arguments stay.

    XLA asks for its buffers anew in every step, and to map them page by page took a quarter of it. glibc reads this setting when a process starts.
    """
    asked = os.environ.get("GLIBC_TUNABLES", "")
    if only_cpus() and can_be_asked_for() and "glibc.malloc.hugetlb" not in asked:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [asked, "glibc.malloc.hugetlb=1"]))
        os.execv(sys.executable, sys.orig_argv)
