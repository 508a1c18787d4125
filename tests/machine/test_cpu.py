"""How a CPU is used."""

import os
import subprocess
import sys

import pytest

from vidjoint.config import base_config
from vidjoint.machine import cpu, host_memory

GIB = 2**30


@pytest.mark.parametrize(
    ("changes", "cores", "memory", "expected"),
    [
        ({"batch_size": 64}, 4, 16, 4),
        ({"batch_size": 64}, 6, 16, 4),  # 64 rows don't divide over 6
        ({"batch_size": 7}, 4, 16, 1),
        ({"batch_size": 2}, 4, 16, 2),
        ({"batch_size": 64, "mesh.cpu_devices": 3}, 4, 16, 3),
        ({"mesh.cpu_devices": 10**6}, 4, 16, 1024),
        ({"mesh.data": 10**6}, 4, 16, 1024),
        ({"batch_size": 64, "mesh.data": 2, "mesh.tensor": 4}, 4, 16, 8),  # a mesh to be tried out
        ({"batch_size": 64, "mesh.tensor": 2}, 4, 16, 4),
        ({"batch_size": 64, "model.variant": "B/16"}, 8, 16, 2),  # 2 GB each for parameters, gradients and moments
        ({"batch_size": 64, "model.variant": "L/16"}, 8, 8, 1),
        ({"batch_size": 64, "model.image_size": 32, "model.patch": 8}, 4, 16, 1),  # so little work is done sooner by one
        ({"batch_size": 64, "model.variant": "unheard of"}, 4, 16, 1),  # `validate` tells
        ({"batch_size": 64, "model.variant": "B/0"}, 4, 16, 1),
    ],
)
def test_number_of_devices(changes, cores, memory, expected):
    config = base_config()
    config.model.update(variant="Ti/16", image_size=224)
    config.update_from_flattened_dict(changes)
    assert cpu.devices(config, cores, memory * GIB) == expected


def run(code: str, **environment: str) -> list[str]:
    """The words that a new process prints."""
    found = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")} | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run([sys.executable, "-c", code], env=found, capture_output=True, text=True, check=True).stdout.split()


def test_devices_are_there_and_compute():
    code = (
        "import jax; from vidjoint.machine import cpu; from vidjoint.config import base_config; c = base_config(); c.mesh.cpu_devices = 3;"
        "cpu.set_up(c); print(jax.device_count()); c.mesh.cpu_devices = 2; cpu.set_up(c)"  # JAX has started: nothing happens
    )
    assert run(code) == ["3"]
    assert run(code, XLA_FLAGS="--xla_force_host_platform_device_count=2") == ["2"]


@pytest.mark.skipif(not host_memory.can_be_kept(), reason="only with glibc 2.35 or newer")
def test_commands_keep_their_memory():
    code = (
        "import os, sys, resource, jax, jax.numpy as jnp; from vidjoint.machine import host_memory; {}; f = jax.jit(lambda x: x + 1);"
        "x = jnp.ones(1 << 24); [f(x).block_until_ready() for _ in range(3)]; before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt;"
        "[f(x).block_until_ready() for _ in range(3)]; print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before);"
        "print(os.environ['GLIBC_TUNABLES'])"
    )
    others = "glibc.rtld.optional_static_tls=512"
    kept, tunables = run(code.format("host_memory.keep()"), GLIBC_TUNABLES=others)
    assert tunables == others  # what this process starts is not concerned
    plain, _ = run(code.format("0"), GLIBC_TUNABLES=others)
    assert int(kept) < 500 < 20_000 < int(plain)
    _, tunables = run(code.format("host_memory.keep()"), GLIBC_TUNABLES="glibc.malloc.arena_max=2")
    assert tunables == "glibc.malloc.arena_max=2"  # somebody has chosen


@pytest.mark.skipif(not host_memory.can_be_kept(), reason="only with glibc 2.35 or newer")
def test_settled_memory_is_kept_and_grows_no_more():
    code = (
        "import os, resource, numpy as np; from vidjoint.machine import host_memory; host_memory.keep();"
        "held = lambda: int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE') >> 20;"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt;"
        "np.ones(1 << 27, np.uint8); {}; before = held(), faults();"
        "[np.ones(1 << 26, np.uint8).sum() for _ in range(9)]; print(held() - before[0], faults() - before[1]);"  # there is room for one at a time
        "np.ones(1 << 28, np.uint8); print(held() - before[0])"
    )
    grown, faults, more = map(int, run(code.format("host_memory.settle()")))
    assert abs(grown) < 8 and faults < 200 and abs(more) < 8
    grown, faults, more = map(int, run(code.format("0")))
    assert abs(grown) < 8 and faults < 200 and more > 100
