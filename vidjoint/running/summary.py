"""What a run is about to do, for a check at a glance before its first step; kept in the run's `about.json`, for its report."""

import datetime
import importlib.metadata
import math
import platform
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from vidjoint.data.mixture import Mixture
from vidjoint.data.tasks import Task
from vidjoint.data.workers import cores
from vidjoint.models.build import Model, count_parameters
from vidjoint.models.macs import macs
from vidjoint.step import TrainState

SCHEDULES = {  # in words, before what they take of each task
    "mixed": "in every step",
    "round_robin": "in turn",
    "alternating": "in turn",
    "task_by_task": "one after the other",
    "uniform": "one of these per step, drawn evenly",
    "weighted": "in a drawn order",
    "accumulated": "in every step, gradients summed",
}
CORE = 3e10  # FLOP/s of training that a core reaches (docs/performance.md: 40 to 57 G with clips of 224 pixels, less with smaller ones)
LONG = 1800.0  # seconds from which on a run on CPUs is announced as long
PACKAGES = ("vidjoint", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "av")


def describe(config: ConfigDict, tasks: dict[str, Task], mixture: Mixture, model: Model, state: TrainState, mesh: jax.sharding.Mesh) -> dict:
    """The content of `about.json`: data, batches, model, memory, devices and versions of a run. Sizes in bytes; nothing is computed on a device."""
    shares = task_shares(mixture)
    data = {
        name: {
            "train": len(task.train),
            "val": len(task.val) if task.val else 0,
            "classes": len(task.labels),
            "media": config.tasks[name].media,
            "clip": list(task.clip.shape[:3]),
            "share": shares[name],
            "loss_weight": config.tasks[name].loss_weight,
            "train_from": task.train.origin,
            "val_from": task.val.origin if task.val else "",
        }
        for name, task in tasks.items()
    }
    shape = max((task.clip.shape for task in tasks.values()), key=math.prod)
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "data": data,
        "batches": batches(config.schedule, mixture),
        "epoch": {"steps": mixture.steps_per_epoch, "examples": mixture.union},
        "model": {
            "name": f"{config.model.variant} width {model.spec.width}, {model.spec.depth} blocks, mixer {model.spec.mixer}",
            "trained": count_parameters(state.params),
            "frozen": count_parameters(state.frozen),
            "macs_per_view": macs(model.logits, state.eval_params, jax.ShapeDtypeStruct((1, *shape), np.uint8)),
            "view": list(shape[:3]),
        },
        "memory_per_device": {
            "parameters": device_bytes((state.params, state.frozen)),
            "optimiser": device_bytes(state.opt_state),
            "moving average": device_bytes(state.ema),
        },
        "devices": {"count": jax.device_count(), "kind": jax.devices()[0].device_kind, "mesh": dict(mesh.shape), "processes": jax.process_count()},
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)},
    }


def text(about: dict, start: int, total_steps: int, folder: Path, log_to: tuple[str, ...]) -> str:
    """`describe` for people, with what is to come."""
    lines = [f"{'task':<20} {'train':>9} {'val':>8} {'classes':>8}  {'clip':<12} {'share':>7} {'weight':>6}"]
    for name, task in about["data"].items():
        clip, share = "x".join(map(str, task["clip"])), f"{100 * task['share']:.1f} %"
        lines.append(f"{name:<20} {task['train']:>9,} {task['val']:>8,} {task['classes']:>8,}  {clip:<12} {share:>7} {task['loss_weight']:>6g}")
    model, memory, devices = about["model"], about["memory_per_device"], about["devices"]
    lines.append(f"batches    {about['batches']}")
    lines.append(f"model      {model['name']}: {model['trained']:,} parameters trained, {model['frozen']:,} frozen")
    lines.append(f"           {in_units(model['macs_per_view'])} multiply-accumulates per view of {'x'.join(map(str, model['view']))}")
    parts = ", ".join(f"{name} {in_units(size)}B" for name, size in memory.items() if size)
    lines.append(f"memory     {in_units(sum(memory.values()))}B per device ({parts}), and activations")
    mesh = " x ".join(f"{name} {size}" for name, size in devices["mesh"].items())
    processes = f", {devices['processes']} processes" if devices["processes"] > 1 else ""
    lines.append(f"devices    {devices['count']} {devices['kind']} ({mesh}){processes}")
    lines.append(f"steps      {start} -> {total_steps} ({about['epoch']['steps']:.1f} per epoch of {about['epoch']['examples']:.0f} examples)")
    if devices["kind"] == "cpu" and (seconds := cpu_seconds(about, total_steps - start)) > LONG:
        smaller = "--config.model.variant=Ti/16 --config.model.image_size=96 --config.total_steps=N"
        lines.append(f"time       about {in_time(seconds)} without a GPU or TPU, and evaluation besides; sooner: a smaller model ({smaller})")
    lines.append(f"results    {folder}" + (f"; events also to {', '.join(log_to)}" if log_to else ""))
    return "\n".join(lines)


def cpu_seconds(about: dict, steps: int) -> float:
    """Roughly what that many training steps take on the cores of this machine."""
    largest = math.prod(about["model"]["view"])
    share = sum(task["share"] * math.prod(task["clip"]) / largest for task in about["data"].values())
    examples = about["epoch"]["examples"] / about["epoch"]["steps"]
    return 6 * about["model"]["macs_per_view"] * share * examples * steps / (CORE * cores())


def in_time(seconds: float) -> str:
    """A long time, for people."""
    for size, unit in ((86400, "days"), (3600, "hours")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds / 60:.0f} minutes"


def batches(schedule: str, mixture: Mixture) -> str:
    """What the steps of a run read, in words."""
    shares = [f"{stream.batch_size} of {stream.name}" for stream in mixture.streams]
    if schedule in ("task_by_task", "weighted"):
        shares = [f"{steps} {'step' if steps == 1 else 'steps'} with {share}" for steps, share in zip(mixture.steps_of, shares, strict=True)]
    return f"{schedule}, {SCHEDULES[schedule]}: {', '.join(shares)}"


def task_shares(mixture: Mixture) -> dict[str, float]:
    """Share of each task in all examples of a run."""
    steps = getattr(mixture, "steps_of", [1] * len(mixture.streams))
    rows = {}
    for stream, count in zip(mixture.streams, steps, strict=True):
        for task, weight in zip(stream.tasks, stream.weights, strict=True):
            rows[task.name] = float(stream.batch_size * count * weight / sum(stream.weights))
    return {name: count / sum(rows.values()) for name, count in rows.items()}


def device_bytes(tree) -> int:
    """Bytes that the arrays of a tree take on this process's first device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))


def in_units(number: float) -> str:
    """12,345,678 as `12.3 M`; below a thousand as it is."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} "


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False
