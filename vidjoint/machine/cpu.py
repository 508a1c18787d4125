"""What makes JAX fast on a machine without accelerators. A command calls `set_up` before JAX looks for devices."""

import contextlib
import math
import os

import jax
from ml_collections import ConfigDict

from vidjoint.data.workers import cores
from vidjoint.machine.host_memory import only_cpus
from vidjoint.models.build import PRESETS
from vidjoint.validate import MOST_CPU_DEVICES

LARGE = 100  # patches of a frame
STATE_BYTES = 16  # float32 parameter, gradient and AdamW's two moments


def set_up(config: ConfigDict) -> None:
    """Gives JAX `devices(config)` CPU devices, if it runs on CPUs and has not started.

    An operation runs over several threads with much waiting; several devices, each with its rows of the batch, do not wait for each other.
    """
    if not only_cpus() or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    count = devices(config, cores(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(RuntimeError):  # JAX has started: it is in other hands
        jax.config.update("jax_num_cpu_devices", count)


def is_large(config: ConfigDict) -> bool:
    """Whether frames have so many patches that their tokens keep several devices busy."""
    patch = config.model.patch or config.model.variant.partition("/")[2]
    return str(patch).isdecimal() and int(patch) > 0 and (config.model.image_size // int(patch)) ** 2 >= LARGE


def devices(config: ConfigDict, cores: int, memory: int) -> int:
    """As how many devices a CPU shall count: `mesh.cpu_devices`; or as many as the mesh's sizes say; or for each core one, if they divide the batch.

    Small pictures stay on one device, which is faster there. Where parameters, gradients and AdamW's moments of so many devices would take more than
    a quarter of `memory` (bytes), they are fewer.
    """
    if config.mesh.cpu_devices > 0:
        return min(config.mesh.cpu_devices, MOST_CPU_DEVICES)
    sizes = [config.mesh[axis] for axis in ("data", "fsdp", "tensor")]
    known = math.prod(size for size in sizes if size > 0)
    if -1 not in sizes or known > MOST_CPU_DEVICES:
        return min(known, MOST_CPU_DEVICES)
    name = config.model.variant.partition("/")[0]
    if name not in PRESETS or not is_large(config):
        return known
    width, depth, *_ = PRESETS[name]
    parameters = 18 * (config.model.depth or depth) * (config.model.width or width) ** 2  # of a block of divided attention, the rest is less
    most = min(cores, int(memory / 4 / (STATE_BYTES * parameters))) // known
    return known * max((n for n in range(1, most + 1) if config.batch_size % n == 0), default=1)
