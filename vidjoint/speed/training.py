"""What `vidjoint.benchmark` measures of an experiment's model, its training step and its input pipeline."""

import contextlib
import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from vidjoint import sharding
from vidjoint.data.tasks import clip_spec
from vidjoint.models.build import Model, build, count_parameters
from vidjoint.models.macs import macs
from vidjoint.optim import join, split_frozen
from vidjoint.running.in_flight import InFlight, Step
from vidjoint.speed.topology import batch_shapes
from vidjoint.train import Setup, initial_state

ROUNDS = 5  # of which the median counts
ROUND = 0.3  # seconds that a round takes at least
SIDES = {"cpu": (1024, 2048)}  # of the square matrices whose product is the yardstick,
LARGE = (4096, 8192)  # and elsewhere


def seconds_per_call(call: Callable) -> float:
    """Median over ROUNDS of the time that `call()` takes, after two calls that warm up. In a round the device is waited for once, at its end."""
    jax.block_until_ready(call())
    began = time.perf_counter()
    jax.block_until_ready(call())
    calls = math.ceil(ROUND / (time.perf_counter() - began))
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - began) / calls)
    return statistics.median(times)


def matmul_peak(dtype: str) -> float:
    """FLOP/s that all devices together reach in products of large square matrices of this type, at the best of SIDES: the yardstick of MFU."""
    product, rates = jax.jit(jnp.matmul), []
    for side in SIDES.get(jax.default_backend(), LARGE):
        a, b = (jax.random.normal(jax.random.key(i), (side, side)).astype(dtype) for i in (0, 1))
        rates.append(2 * side**3 / seconds_per_call(lambda a=a, b=b: product(a, b)))
    return max(rates) * (1 if jax.default_backend() == "cpu" else jax.device_count())  # CPU devices share the cores, of which each takes all


def largest_view(config: ConfigDict) -> tuple[Model, jax.ShapeDtypeStruct]:
    """The model, and one view [1, T, height, width, 3] of the largest clip. Needs no data: a task without `classes` counts as 1000."""
    model = build(config.model, {name: task.classes or 1000 for name, task in config.tasks.items()})
    shape = max((clip_spec(config, name).shape for name in config.tasks), key=math.prod)
    return model, jax.ShapeDtypeStruct((1, *shape), np.uint8)


def measure_model(config: ConfigDict) -> dict:
    """Parameters, and multiply-accumulates of one view of the largest clip."""
    model, pixels = largest_view(config)
    params = model.abstract()
    trained, _ = split_frozen(params, config.optim.freeze)
    return {
        "params": count_parameters(params),
        "trainable_params": count_parameters(trained),
        "macs_per_view": macs(on_paper(model).logits, params, pixels),
        "view": "x".join(map(str, pixels.shape[1:4])),
    }


def on_paper(model: Model) -> Model:
    """The model without loops, with nothing computed twice, and with attention made of products, which can be counted."""
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, remat="none", scan=False, attention="xla"))


def measure_memory(config: ConfigDict) -> dict:
    """What the forward and backward pass of one view of the largest clip needs beside parameters and results: compiled, not run."""
    model, pixels = largest_view(config)
    trained, frozen = split_frozen(model.abstract(), config.optim.freeze)
    memory = jax.jit(jax.grad(_loss_of(model))).lower(trained, frozen, pixels).compile().memory_analysis()
    return {"gradient_temp_bytes": memory.temp_size_in_bytes if memory else None}


def _loss_of(model: Model) -> Callable:
    def loss(trained: dict, frozen: dict, pixels: jax.Array) -> jax.Array:
        logits = model.logits(join(trained, frozen), pixels)
        return sum(jax.nn.logsumexp(values) for values in logits.values())

    return loss


class Steps:
    """The training step, compiled for each kind of step, that is for each set of tasks in one. Figures are means over all steps of the run."""

    def __init__(self, setup: Setup):
        self._setup, self._kinds = setup, setup.mixture.kinds()
        shapes = [batch_shapes(setup.mixture, i, setup.mesh) for i in self._kinds]
        jax.config.update("jax_enable_compilation_cache", False)
        began = time.perf_counter()
        traced = [setup.train_step.lower(setup.abstract_state, batches) for batches in shapes]
        self._tracing = time.perf_counter() - began
        self.compiled = [step.compile() for step in traced]
        self._compiling = time.perf_counter() - began
        self._memory = [step.memory_analysis() for step in self.compiled]
        self._by_streams = dict(zip(map(self._streams, self._kinds), self.compiled, strict=True))

    def of(self, i: int) -> Callable:
        """What step i of the run is compiled to: (state, batches) -> (state, metrics)."""
        return self._by_streams[self._streams(i)]

    def _streams(self, i: int) -> tuple[int, ...]:
        return tuple(stream for stream, _ in self._setup.mixture.plan(i))

    def _mean(self, values) -> float:
        return sum(share * value for share, value in zip(self._kinds.values(), values, strict=True))

    def _most(self, bytes_of: Callable) -> int | None:
        return max(map(bytes_of, self._memory)) if all(self._memory) else None

    def measure_compile(self) -> dict:
        """How long the step takes to trace and to compile, and what memory it then plans with, on each device."""
        return {
            "compile_s": self._compiling,
            "trace_s": self._tracing,
            "step_argument_bytes": self._most(lambda memory: memory.argument_size_in_bytes),
            "step_temp_bytes": self._most(lambda memory: memory.temp_size_in_bytes),
        }

    def measure_step(self) -> dict:
        """Training steps on decoded batches that are on the devices already, and forward passes likewise."""
        setup, model, state = self._setup, self._setup.model, initial_state(self._setup)
        tuples = [tuple(sharding.put_batch(batch, setup.mesh) for batch in setup.mixture.step(i)) for i in self._kinds]
        forward = jax.jit(lambda state, batches: [model.logits(state.eval_params, batch["pixels"]) for batch in batches])
        forward_seconds = self._mean(seconds_per_call(lambda batches=batches: forward(state, batches)) for batches in tuples)
        flops = 2 * self._mean(training_macs(setup.config, model, batches) for batches in tuples)

        def update(step, batches):
            nonlocal state
            state, values = step(state, batches)
            return values

        seconds = self._mean(seconds_per_call(lambda step=step, b=b: update(step, b)) for step, b in zip(self.compiled, tuples, strict=True))
        stats = jax.local_devices()[0].memory_stats() or {}
        planned = self._most(lambda m: m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes)
        examples, peak = self._mean(setup.mixture.examples(i) for i in self._kinds), matmul_peak(model.spec.dtype)
        return {
            "train_clips_per_s": examples / seconds,
            "forward_clips_per_s": examples / forward_seconds,
            "ms_per_step": 1000 * seconds,
            "train_flops_per_s": flops / seconds,
            "matmul_peak_flops_per_s": peak,
            "mfu": flops / seconds / peak,
            "peak_bytes": stats.get("peak_bytes_in_use", planned),
            "peak_bytes_from": "the device" if "peak_bytes_in_use" in stats else "the compiler",
            "compile_s": self._compiling,
        }


def training_macs(config: ConfigDict, model: Model, batches: tuple[dict, ...]) -> int:
    """MACs of forward and backward passes on paper: three times those of the forward passes.

    Or what the gradient takes, if that is less, as where parameters are frozen: they have none, and those before the first trained ones pass none on.
    """
    model, pixels = on_paper(model), [batch["pixels"] for batch in batches]
    params = model.abstract()
    forward = sum(macs(model.logits, params, part) for part in pixels)
    if not config.optim.freeze:
        return 3 * forward
    gradient, (trained, frozen) = jax.grad(_loss_of(model)), split_frozen(params, config.optim.freeze)
    return min(3 * forward, sum(macs(gradient, trained, frozen, part) for part in pixels))


def measure_data(setup: Setup, steps: Steps, count: int) -> dict:
    """Examples per second that the pipeline delivers by itself, and how much of a run of `count` steps waits for it; memory of the host meanwhile."""
    mixture = setup.mixture
    with contextlib.closing(mixture.iterate(0)) as tuples:
        first = setup.config.data.prefetch + 1  # all that is decoded ahead
        for _ in range(first):
            next(tuples)
        rates = []
        for start in range(first, first + 4 * ROUNDS, 4):
            began = time.perf_counter()
            for _ in range(4):
                next(tuples)
            rates.append(sum(mixture.examples(start + i) for i in range(4)) / (time.perf_counter() - began))

    state, memory, warm = initial_state(setup), [], 5
    progress = tqdm(total=warm + count, desc="training", unit="step", delay=2, disable=None, leave=False)
    with contextlib.closing(InFlight()) as in_flight, contextlib.closing(mixture.iterate(0)) as tuples, progress:
        for i in range(warm + count):
            if i == warm:
                jax.block_until_ready(state)
                started, waited = time.perf_counter(), 0.0
            began = time.perf_counter()
            batches = next(tuples)
            arrays = tuple(sharding.put_batch(batch, setup.mesh) for batch in batches)
            if i >= warm:
                waited += min(in_flight.idle_for(), time.perf_counter() - began)
            in_flight.make_room()
            state, values = steps.of(i)(state, arrays)
            in_flight.add(Step(i + 1, values, batches))
            if i >= warm and (i - warm) % max(1, count // 100) == 0:
                memory.append(host_bytes())
            progress.update()
        jax.block_until_ready(state)
        seconds = time.perf_counter() - started
    tenth = max(1, len(memory) // 10)
    return {
        "pipeline_clips_per_s": statistics.median(rates),
        "run_clips_per_s": sum(mixture.examples(i) for i in range(warm, warm + count)) / seconds,
        "wait_share": waited / seconds,
        "training_steps": count,
        "host_bytes_begin": statistics.median(memory[tenth : 2 * tenth] or memory),
        "host_bytes_end": statistics.median(memory[-tenth:]),
    }


def host_bytes() -> int:
    """Memory of this process and of those that it started, shared pages counted once; 0 where the system doesn't tell (Linux does)."""
    total = 0
    for process in _family(os.getpid()):
        with contextlib.suppress(OSError):  # it has just ended
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def _family(process: int) -> list[int]:
    found = [process]
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += (member for child in task.read_text().split() for member in _family(int(child)))
    return found
