"""Measures an experiment on this machine: its model, its training step, its input pipeline.

python -m vidjoint.benchmark --config=configs/demo.py [--what=model,memory,step,data] [--json=FILE]
python -m vidjoint.benchmark --config=configs/cover_jft.py:high_res --topology=v5e:16x16     compiles the training step for TPUs, without one
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from vidjoint import config as config_module
from vidjoint import sharding, topology, validate
from vidjoint.config import task_config
from vidjoint.data import clips, transforms
from vidjoint.data.tasks import clip_spec
from vidjoint.data.video import Video
from vidjoint.errors import UserError, command
from vidjoint.evaluate import check_writable, write_json
from vidjoint.models.build import build, count_parameters
from vidjoint.optim import join, split_frozen
from vidjoint.train import Setup, initial_state, prepare

PARTS = ("model", "memory", "step", "data")
TEXTS = {  # the figures for people: what they are, and how they are written
    "params": ("parameters", "{:,}"),
    "trainable_params": ("of them trained", "{:,}"),
    "macs_per_view": ("multiply-accumulates of one view of its largest clip", "{}"),
    "view": ("frames x height x width of that view", "{}"),
    "gradient_temp_bytes": ("memory for the gradient of that view, bytes beside the parameters", "{}"),
    "train_clips_per_s": ("training, clips and images per second", "{:,.1f}"),
    "forward_clips_per_s": ("forward only", "{:,.1f}"),
    "ms_per_step": ("one training step, ms", "{:,.1f}"),
    "train_flops_per_s": ("FLOP/s of training", "{}"),
    "matmul_peak_flops_per_s": ("FLOP/s of a large matrix product", "{}"),
    "mfu": ("share of that reached (MFU)", "{:.1%}"),
    "peak_bytes": ("memory of one device, bytes", "{}"),
    "compile_s": ("compiling the step, s", "{:.1f}"),
    "pipeline_clips_per_s": ("decoding alone, clips and images per second", "{:,.1f}"),
    "wait_share": ("share of training that waits for data", "{:.1%}"),
    "decode_8_of_300_clips_per_s_per_core": ("8 of 300 frames of 340 x 256 H.264, clips per second and core", "{:.1f}"),
}
WHAT = "comma-separated: model and memory (compiles the gradient of one clip), which need no data; step; data (default: all but memory)"
TOPOLOGY = "v4, v5e, v5p or v6e, and a size as in v5e:16x16: compile the training step for these TPUs, without one and without data (extra tpu)"
FRAMES, HEIGHT, WIDTH, GOP = 300, 256, 340, 30  # the file that decoding is measured on: 10 s of a Kinetics clip as commonly stored


def macs(function: Callable, *args) -> int:
    """Multiply-accumulate operations of all matrix products and convolutions in `function(*args)`, counted from its jaxpr.

    Arguments may be abstract. Of a `cond` the costliest branch counts; a `while` loop's body counts once, for nobody knows its number of turns.
    """
    return _macs(jax.make_jaxpr(function)(*args).jaxpr)


def _macs(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        kind, params = equation.primitive.name, equation.params
        inner = [_macs(jaxpr) for jaxpr in _inner_jaxprs(params)]
        if kind == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        elif kind == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
        elif kind == "cond":
            total += max(inner)
        else:  # a scan, or a wrapper such as jit, remat or custom_vjp
            total += params.get("length", 1) * sum(inner) if kind == "scan" else sum(inner)
    return total


def _inner_jaxprs(params: dict) -> list:
    """The programs among an equation's parameters."""
    values = (item for value in params.values() for item in (value if isinstance(value, tuple | list) else [value]))
    jaxprs = (getattr(value, "jaxpr", value) for value in values)
    return [jaxpr for jaxpr in jaxprs if hasattr(jaxpr, "eqns")]


def median_seconds(function: Callable, *args, repeats: int = 5) -> float:
    """Median duration of `function(*args)` after one call that warms up; waits for the device each time."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def matmul_peak(dtype: str) -> float:
    """FLOP/s that one device reaches in a large matrix product of this type: the yardstick of MFU."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    a, b = (jax.random.normal(jax.random.key(i), (side, side)).astype(dtype) for i in (0, 1))
    product = jax.jit(jnp.matmul)
    return 2 * side**3 / median_seconds(lambda: product(a, b))


def measure_model(config) -> dict:
    """Parameters, and MACs of one view of the largest clip among the tasks; needs no data (a task without `classes` counts as 1000)."""
    model = build(config.model, {name: task.classes or 1000 for name, task in config.tasks.items()})
    params = model.abstract()
    shape = max((clip_spec(config, name).shape for name in config.tasks), key=math.prod)
    trained, _ = split_frozen(params, config.optim.freeze)
    pixels = jax.ShapeDtypeStruct((1, *shape), np.uint8)
    return {
        "params": count_parameters(params),
        "trainable_params": count_parameters(trained),
        "macs_per_view": macs(model.logits, params, pixels),
        "view": "x".join(map(str, shape[:3])),
    }


def measure_memory(config) -> dict:
    """What the forward and backward pass of one view of the largest clip needs beside parameters and results: compiled, not run. Needs no data."""
    model = build(config.model, {name: task.classes or 1000 for name, task in config.tasks.items()})
    shape = max((clip_spec(config, name).shape for name in config.tasks), key=math.prod)
    trained, frozen = split_frozen(model.abstract(), config.optim.freeze)

    def loss(trained: dict, frozen: dict, pixels: jax.Array) -> jax.Array:
        logits = model.logits(join(trained, frozen), pixels)
        return sum(jax.nn.logsumexp(values) for values in logits.values())

    compiled = jax.jit(jax.grad(loss)).lower(trained, frozen, jax.ShapeDtypeStruct((1, *shape), np.uint8)).compile()
    memory = compiled.memory_analysis()
    return {"gradient_temp_bytes": memory.temp_size_in_bytes if memory else None}


def measure_step(setup: Setup) -> dict:
    """The training step on decoded batches that are on the devices already, and forward passes likewise; of steps that differ in their tasks one of
    each kind, which counts by its share of the run.
    """
    kinds = setup.mixture.kinds()
    tuples = [tuple(sharding.put_batch(batch, setup.mesh) for batch in setup.mixture.step(i)) for i in kinds]
    state, model = initial_state(setup), setup.model
    params = state.eval_params

    def mean(values) -> float:
        return sum(share * value for share, value in zip(kinds.values(), values, strict=True))

    step_macs = mean(sum(macs(model.logits, params, batch["pixels"]) for batch in batches) for batches in tuples)
    forward = jax.jit(model.logits)
    forward_seconds = mean(median_seconds(lambda batches: [forward(params, batch["pixels"]) for batch in batches], batches) for batches in tuples)

    began = time.perf_counter()
    compiled = [setup.train_step.lower(state, batches).compile() for batches in tuples]
    compile_seconds = time.perf_counter() - began

    def update(step, batches):
        nonlocal state
        state, values = step(state, batches)
        return values

    train_seconds = mean(median_seconds(update, step, batches) for step, batches in zip(compiled, tuples, strict=True))
    examples, memory = mean(setup.mixture.examples(i) for i in kinds), [step.memory_analysis() for step in compiled]
    peak = matmul_peak(setup.model.spec.dtype) * jax.device_count()
    stats = jax.local_devices()[0].memory_stats() or {}
    needs = max(m.temp_size_in_bytes + m.argument_size_in_bytes for m in memory) if all(memory) else None
    return {
        "train_clips_per_s": examples / train_seconds,
        "forward_clips_per_s": examples / forward_seconds,
        "ms_per_step": 1000 * train_seconds,
        "train_flops_per_s": 6 * step_macs / train_seconds,
        "matmul_peak_flops_per_s": peak,
        "mfu": 6 * step_macs / train_seconds / peak,
        "peak_bytes": stats.get("peak_bytes_in_use") or needs,
        "compile_s": compile_seconds,
    }


def write_sample(path: Path) -> None:
    """A 10-second H.264 clip of 340 x 256 pixels with motion and texture, so that it decodes like camera footage of about 2 Mbit/s."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (HEIGHT // 4 + 80, WIDTH // 4 + 80, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"bit_rate": "2000000", "g": str(GOP), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = WIDTH, HEIGHT, "yuv420p", 2_000_000
        for t in range(FRAMES):
            x, y = int(150 + 140 * math.sin(t / 40)), int(150 + 140 * math.cos(t / 55))
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(texture[y : y + HEIGHT, x : x + WIDTH]))):
                container.mux(packet)
        container.mux(stream.encode())


def decode_rate(frames: int = 8, repeats: int = 5) -> float:
    """Clips per second on one core: `frames` of 300, spread over the file, resized and cropped to 224 x 224."""
    task = task_config(sampler="uniform", crop="short_side", short_side=(256, 256))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sample.mp4"
        write_sample(path)

        def clip(seed):
            rng = np.random.default_rng(seed)
            with Video(path) as video:
                geometry = transforms.train_geometry(video.info.height, video.info.width, task, (224, 224), rng)
                return video.read(clips.train_times(video.info, frames, task, rng), geometry)

        clip(0)
        times = []
        for seed in range(repeats):
            began = time.perf_counter()
            clip(seed)
            times.append(time.perf_counter() - began)
        return 1 / statistics.median(times)


def measure_data(setup: Setup, steps: int = 20) -> dict:
    """Examples per second that the pipeline delivers by itself, and the share of a training run that waits for it."""
    batches = setup.mixture.iterate(0)
    for _ in range(3):
        next(batches)
    began = time.perf_counter()
    for _ in range(steps):
        next(batches)
    alone = sum(setup.mixture.examples(3 + i) for i in range(steps)) / (time.perf_counter() - began)
    batches.close()

    state = initial_state(setup)
    for i in setup.mixture.kinds():  # compiles
        state, _ = setup.train_step(state, tuple(sharding.put_batch(batch, setup.mesh) for batch in setup.mixture.step(i)))
    batches, waited, previous = setup.mixture.iterate(0), 0.0, None
    for i in range(steps + 5):
        if i == 5:  # warm
            jax.block_until_ready(previous)
            began, waited = time.perf_counter(), 0.0
        start = time.perf_counter()
        arrays = tuple(sharding.put_batch(batch, setup.mesh) for batch in next(batches))
        if previous is None or previous.is_ready():
            waited += time.perf_counter() - start
        if previous is not None:
            previous.block_until_ready()
        state, values = setup.train_step(state, arrays)
        previous = values["loss"]
    jax.block_until_ready(previous)
    batches.close()
    return {
        "pipeline_clips_per_s": alone,
        "wait_share": waited / (time.perf_counter() - began),
        "decode_8_of_300_clips_per_s_per_core": decode_rate(),
    }


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vidjoint.benchmark",
        usage="%(prog)s --config=FILE[:ARGUMENT] [--what=model,memory,step,data | --topology=CHIP:SIZE] [--json=FILE] [--config.KEY=VALUE ...]",
        description=__doc__.partition("\n")[0],
        epilog="mfu = 6 x MACs of the forward pass x steps/s / the FLOP/s of a large matrix product measured here, in the model's dtype. "
        "Medians of 5 after a warm-up. Any key of the experiment can be set by --config.KEY=VALUE.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARGUMENT]", help="experiment, as in configs/demo.py; its data must be there")
    parser.add_argument("--what", default="model,step,data", metavar="PARTS", help=WHAT)
    parser.add_argument("--topology", metavar="CHIP:SIZE", help=TOPOLOGY)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    args, rest = parser.parse_known_args(argv)
    what = args.what.split(",")
    if unknown := [part for part in what if part not in PARTS]:
        raise UserError(f"--what={','.join(unknown)}: choose from {', '.join(PARTS)}")
    check_writable(args.json)
    config, _ = config_module.parse([f"--config={args.config}", *rest])
    problems = validate.check(config)
    if problems:
        raise UserError(*problems)
    if args.topology:
        figures = {"jax": jax.__version__} | topology.measure_topology(config, args.topology)
        print(topology.as_table(figures))
        write_json(args.json, figures)
        return 0
    figures = {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "jax": jax.__version__}
    print(f"{figures['device']}, jax {figures['jax']}", flush=True)
    setup = prepare(config) if {"step", "data"} & set(what) else None
    measures = {
        "model": lambda: measure_model(config),
        "memory": lambda: measure_memory(config),
        "step": lambda: measure_step(setup),
        "data": lambda: measure_data(setup),
    }
    with tqdm(total=len(what), disable=None, leave=False, bar_format="measuring {desc} ({n} of {total} done)") as bar:
        for part in [part for part in PARTS if part in what]:
            bar.set_description_str(part)
            figures[part] = measures[part]()
            bar.update()
            bar.write("\n".join([f"{part}:", *(f"  {TEXTS[key][0]:<62} {as_text(key, value):>12}" for key, value in figures[part].items())]))
    write_json(args.json, figures)
    return 0


def as_text(key: str, value: float | str | None) -> str:
    """A figure as the table shows it, large ones in M, G or T."""
    if value is None:
        return "unknown"
    text = TEXTS[key][1]
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if text == "{}" and not isinstance(value, str) and value >= size:
            return f"{value / size:,.2f} {unit}"
    return text.format(value)


if __name__ == "__main__":
    sys.exit(main())
