"""Compiles an experiment's training step for TPUs that are not there: does it fit, what does it cost? `benchmark --topology=v5e:16x16`.

libtpu is compiler and run time in one, and its compiler needs no TPU. Datasets are not needed either: shapes follow from the config.
"""

import collections
import importlib.metadata
import importlib.util
import math
import os
import re
import time
from dataclasses import dataclass

import jax
import numpy as np
from ml_collections import ConfigDict

from vidjoint import optim, sharding
from vidjoint.data.mixture import Mixture
from vidjoint.data.schedules import steps_per_epoch
from vidjoint.data.tasks import Task, clip_spec
from vidjoint.errors import UserError
from vidjoint.models.build import build
from vidjoint.models.macs import macs
from vidjoint.train import sharded_step

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A TPU's published figures (cloud.google.com/tpu/docs)."""

    hbm: int  # GiB
    peak: float  # FLOP/s in bfloat16
    clock: float  # cycles per second: peak / (2 x side^2 of its matrix units x their number)


CHIPS = {
    "v4": Chip(32, 275e12, 1.05e9),
    "v5e": Chip(16, 197e12, 1.5e9),
    "v5p": Chip(95, 459e12, 1.75e9),
    "v6e": Chip(32, 918e12, 1.75e9),
}

SIZES = {  # training examples as published, by the first folder (or TFDS name) of `tasks.NAME.train`; other sets count as the mean of the known
    "kinetics400": 240_436,
    "kinetics600": 392_622,
    "kinetics700": 545_317,
    "something-v2": 168_913,
    "moments": 791_297,
    "imagenet": 1_281_167,
    "imagenet2012": 1_281_167,
    "imagenet21k": 14_197_122,
    "cifar100": 50_000,
    "tiny-imagenet-200": 100_000,
    "ucf101": 9_537,
    "mini-kinetics": 80_000,
}

TEXTS = {  # the figures for people
    "batches": "batches: rows x frames x height x width (of them filling)",
    "bytes_needed": "a device needs, GiB",
    "bytes_available": "a device has for programs, GiB",
    "bytes_free": "that leaves, GiB",
    "arguments": "  arguments (state and batches), GiB",
    "outputs": "  outputs, GiB",
    "aliased": "  of them in the arguments' place (donated), GiB",
    "temporaries": "  temporaries, GiB",
    "generated_code": "  program, GiB",
    "flops": "FLOPs of a device and step (matrix products, with what is computed again), T",
    "floor_seconds": "their time at the chip's peak, s",
    "optimal_seconds": "the compiler's estimate of a step, s",
    "cycles_seconds": "sum of its cycle estimates of operations, without collectives, s",
    "compile_seconds": "compiling here, s",
}

_ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+)[a-z0-9]*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(-start)?\(")
_COMPUTATION = re.compile(r"(?:ENTRY )?%([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|\w+_computations?)=\{?((?:%[\w.-]+(?:, )?)+)")
_ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_EXCEEDED = re.compile(r"Used ([\d.]+)([KMG]?) of ([\d.]+)([KMG]?) hbm")


class Unopened:
    """Stands for the training split of a dataset that is not opened: its size and the shape of its labels."""

    warnings = ()

    def __init__(self, size: int, label_shape: tuple[int, ...]):
        self._size, self.label_shape = size, label_shape

    def __len__(self) -> int:
        return self._size


def describe(name: str):
    """The devices of a topology such as v5e:16x16 or v4:2x2x4, for a process that has no TPU (it sets JAX to the CPU, so call it first).

    Raises:
      UserError: no such chip or arrangement, or libtpu is not installed.
    """
    chip, _, arrangement = name.partition(":")
    if chip not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", arrangement):
        raise UserError(f"--topology={name}: write CHIP:SIZE, with one of {', '.join(CHIPS)} and a size such as 16x16 (v4, v5p: 2x2x4)")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology needs TPUs' compiler, not a TPU: pip install 'vidjoint[tpu]'")
    # Without these libtpu asks the network which TPU machine this is
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-1", TPU_WORKER_HOSTNAMES="localhost")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its lock is for machines with a TPU; here several may compile at a time
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        # as jax.devices() has them: v4 has two cores in a chip, which run as one
        settings = {"chip_config_name": "megacore"} if chip == "v4" else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **settings).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise UserError(f"--topology={name}: libtpu knows no such arrangement ({str(error).splitlines()[0]})") from error


def unopened_tasks(config: ConfigDict) -> dict[str, Task]:
    """The tasks of a config without their data: published sizes (SIZES), `classes` of the config, 1000 where it has none."""
    known = {name: SIZES.get(re.split("[/:]", task.train)[0]) for name, task in config.tasks.items()}
    sizes = [size for size in known.values() if size]
    mean = round(sum(sizes) / len(sizes)) if sizes else 100_000
    tasks = {}
    for index, name in enumerate(sorted(config.tasks)):
        settings = config.tasks[name]
        classes = settings.classes or 1000
        source = Unopened(known[name] or mean, (classes,) if settings.multilabel else ())
        tasks[name] = Task(name, index, clip_spec(config, name), tuple(map(str, range(classes))), source, None)
    return tasks


def batch_shapes(mixture: Mixture, step: int, mesh) -> tuple[dict, ...]:
    """The tuple of batches of a step as shapes with their shardings, as `train_step` takes them; rows fill up to the devices that share a batch."""
    split = sharding.batch_sharding(mesh)

    def batch(stream, rows: int) -> dict:
        fields = {"pixels": (stream.shape, np.uint8), "label": (stream.label_shape, np.int32), "task": ((), np.int32), "mask": ((), bool)}
        return {name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=split) for name, (shape, dtype) in fields.items()}

    return tuple(batch(mixture.streams[s], len(mixture.rows[s])) for s, _ in mixture.plan(step))


def repeated_lines(hlo: str) -> list[tuple[int, str]]:
    """The lines of a compiled program's text, each with how often it runs: the rounds of the loops around it, one where these can't be told."""
    lines, name = collections.defaultdict(list), ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
        lines[name].append(line)
    times = collections.Counter({name: 1})  # the entry, which comes last: what is called stands before what calls it
    for caller in reversed(lines):
        for line in lines[caller]:
            rounds = _rounds(line, lines) if " while(" in line else 1
            for called in _CALLED.findall(line):
                for name in re.findall(r"%([\w.-]+)", called):
                    times[name] += rounds * times[caller]
    return [(times[name], line) for name, body in lines.items() for line in body]


def _rounds(loop: str, lines: dict[str, list[str]]) -> int:
    """The rounds of a `while` line: as it says, or the number that its condition compares a counter with."""
    if match := _ROUNDS.search(loop):
        return int(match[1])
    condition = "\n".join(lines[re.search(r"condition=%([\w.-]+)", loop)[1]])
    compared = re.search(r"compare\(%[\w.-]+, %([\w.-]+)\), direction=LT", condition)
    limit = compared and re.search(rf"%{re.escape(compared[1])} = \S+ constant\((\d+)\)", condition)
    return int(limit[1]) if limit else 1


def collectives(lines: list[tuple[int, str]]) -> dict[str, dict]:
    """Count and bytes (of the results on one device) of the collectives among a program's `repeated_lines`, by kind."""
    found = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for times, line in lines:
        if match := _COLLECTIVE.search(line):
            result, kind, start = match.groups()
            arrays = _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", result))  # without layouts
            if start and kind != "all-reduce":  # its tuple holds the operands, then the results, then counters
                arrays = [array for array in arrays if array[0] != "u32" or array[2]]
                arrays = arrays[len(arrays) // 2 :]
            found[kind]["count"] += times
            found[kind]["bytes"] += times * sum(_array_bytes(bits, shape) for _, bits, shape in arrays)
    return dict(sorted(found.items()))


def _array_bytes(bits: str, shape: str) -> int:
    elements = math.prod(int(size) for size in shape.split(",") if size)
    return math.ceil(elements * (int(bits) if bits else 8) / 8)


def exceeded(message: str) -> tuple[float, float] | None:
    """(needed, available) bytes of a device's memory, from the compiler's message that a program doesn't fit; None if it says neither."""
    match = _EXCEEDED.search(message)
    if match is None:
        return None
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    return float(match[1]) * unit[match[2]], float(match[3]) * unit[match[4]]


def measure_topology(config: ConfigDict, name: str) -> dict:
    """Compiles the training step of a config for a topology; of steps that differ in their shapes each, in `steps`.

    Raises:
      UserError: no such topology, no libtpu, or the mesh doesn't fit the devices.
    """
    devices, chip = describe(name), CHIPS[name.partition(":")[0]]
    mesh = sharding.make_mesh(config.mesh, devices)
    tasks = unopened_tasks(config)
    per_epoch = steps_per_epoch(config, tasks)
    total_steps = config.total_steps or max(1, round(config.total_epochs * per_epoch))
    optimizer = optim.make_optimizer(config.optim, optim.make_schedule(config.optim, total_steps, per_epoch), len(tasks))
    model = build(config.model, {name: len(task.labels) for name, task in tasks.items()})
    state, _, train_step = sharded_step(config, model, optimizer, mesh)
    mixture = Mixture(config, tasks, total_steps, row_multiple=mesh.shape["data"] * mesh.shape["fsdp"])
    steps = {}
    for step in mixture.kinds():
        batches = batch_shapes(mixture, step, mesh)
        key = tuple(batch["pixels"].shape for batch in batches)
        if key not in steps:
            examples = [mixture.streams[s].batch_size for s, _ in mixture.plan(step)]
            shapes = [{"shape": list(shape), "filling": shape[0] - count} for shape, count in zip(key, examples, strict=True)]
            steps[key] = {"batches": shapes} | compile_step(train_step, state, batches, chip)
    return {
        "topology": name,
        "libtpu": importlib.metadata.version("libtpu"),
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "remat": config.model.remat,
        "hbm_gib": chip.hbm,
        "fits": all(figures["fits"] for figures in steps.values()),
        "steps": list(steps.values()),
    }


def compile_step(train_step, state, batches: tuple[dict, ...], chip: Chip) -> dict:
    """Compiles the jitted step for these shapes; see TEXTS for the figures. Where it doesn't fit, only what the compiler says of that."""
    lowered, began = train_step.lower(state, batches), time.perf_counter()
    devices = state.step.sharding.num_devices
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed, available = exceeded(str(error)) or (None, chip.hbm * GIB)
        seconds = time.perf_counter() - began
        free = None if needed is None else available - needed
        return {"fits": False, "bytes_needed": needed, "bytes_available": available, "bytes_free": free, "compile_seconds": seconds}
    seconds, memory, cost, hlo = time.perf_counter() - began, compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "generated_code": memory.generated_code_size_in_bytes,
    }
    needed = sum(parts.values()) - 2 * parts["aliased"]
    lines = repeated_lines(hlo)
    cycles = sum(times * int(count) for times, line in lines for count in re.findall(r'"estimated_cycles":"(\d+)"', line))
    flops = 2 * macs(train_step, state, batches) / devices  # the compiler's own count takes a loop's body once
    return {
        "fits": needed <= chip.hbm * GIB,
        "bytes_needed": needed,
        "bytes_available": chip.hbm * GIB,
        "bytes_free": chip.hbm * GIB - needed,
        "bytes": parts,
        "flops": flops,
        "floor_seconds": flops / chip.peak,
        # libtpu answers -1 or so where it has none, and counts the body of a loop once
        "optimal_seconds": cost["optimal_seconds"] if cost.get("optimal_seconds", -1) > 0 and max(lines)[0] == 1 else None,
        "cycles_seconds": cycles / chip.clock if cycles else None,
        "collectives": collectives(lines),
        "compile_seconds": seconds,
    }


def as_table(figures: dict) -> str:
    """What `measure_topology` found, as lines for people."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items())
    chips = f"{figures['topology']}: {figures['devices']} x {figures['device_kind']} of {figures['hbm_gib']} GiB"
    lines = [f"{chips}, libtpu {figures['libtpu']}", f"mesh: {mesh}; model.remat={figures['remat']}"]
    for step in figures["steps"]:
        shapes = ["x".join(map(str, batch["shape"][:-1])) + f" ({batch['filling']})" for batch in step["batches"]]
        lines.append("fits" if step["fits"] else "DOES NOT FIT")
        values = step | step.get("bytes", {}) | {"batches": ", ".join(shapes)}
        lines += [f"  {text:<72} {_text(key, values[key]):>12}" for key, text in TEXTS.items() if key in values]
        for kind, found in step.get("collectives", {}).items():
            lines.append(f"  {f'{kind}: number, GiB of their results':<72} {found['count']:>5}, {found['bytes'] / GIB:.3f}")
    return "\n".join(lines)


def _text(key: str, value) -> str:
    if value is None:
        return "not given"
    if isinstance(value, str):
        return value
    if key == "flops":
        return f"{value / 1e12:.3f}"
    return f"{value:.3f}" if key.endswith("_seconds") else f"{value / GIB:.3f}"
