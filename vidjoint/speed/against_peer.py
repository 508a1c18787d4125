"""A training step and a forward pass against those of a peer, Hugging Face's TimeSformer in PyTorch, on the CPUs of this machine."""

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from vidjoint import optim, sharding
from vidjoint.config import task_config
from vidjoint.errors import UserError
from vidjoint.models.build import build, count_parameters
from vidjoint.train import sharded_step

ROUNDS = 5  # after one that warms up; medians count
CLASSES = 400
KINDS = ("train", "forward")


def measure_peer(config: ConfigDict) -> dict:
    """Times `config.model` and a TimeSformer of the same sizes: random clips, one head of 400 classes, SGD with momentum, `config.batch_size`.

    Both sides are held ready, in processes of their own, and take steps in turn, so that both meet the same minutes of the machine.

    Raises:
      UserError: PyTorch is missing, the model is no TimeSformer, JAX does not run on CPUs, or the peer fails.
    """
    _check(config)
    steps, parameters = _ours(config)
    seconds = {(side, kind): [] for side in ("ours", "peer") for kind in KINDS}
    with _peer(config) as (about, peer):
        for i in tqdm(range(ROUNDS + 1), desc="against PyTorch", unit="round", delay=2, disable=None, leave=False):
            for kind in KINDS:
                sides = {"ours": steps[kind], "peer": lambda kind=kind: peer(kind)}
                for side in sorted(sides, reverse=bool(i % 2)):
                    seconds[side, kind].append(sides[side]())
    figures = {"peer": f"transformers {about['transformers']}, torch {about['torch']}", "peer_params": about["parameters"], "params": parameters}
    for kind in KINDS:
        ours, theirs = (seconds[side, kind][1:] for side in ("ours", "peer"))
        figures |= {f"{kind}_s": statistics.median(ours), f"peer_{kind}_s": statistics.median(theirs)}
        figures[f"{kind}_ratio"] = statistics.median(other / own for own, other in zip(ours, theirs, strict=True))
    return figures


def _check(config: ConfigDict) -> None:
    model, problems = config.model, []
    if absent := [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]:
        problems.append(f"--what=peer compares with PyTorch, and {' and '.join(absent)} can't be imported: pip install 'vidjoint[parity]'")
    if (model.mixer, model.pool, model.class_token, model.embed) != ("divided", "class_token", True, "shared"):
        problems.append("--what=peer compares TimeSformers: take configs/timesformer_k400.py, or set model.mixer=divided and model.pool=class_token")
    if jax.default_backend() != "cpu":
        problems.append(f"--what=peer compares on CPUs, and JAX runs on {jax.default_backend()}: set JAX_PLATFORMS=cpu")
    if problems:
        raise UserError(*problems)


def _ours(config: ConfigDict) -> tuple[dict[str, Callable[[], float]], int]:
    """The step that trains and the forward pass, compiled; each call makes one and returns its seconds."""
    config = ConfigDict(config.to_dict())
    config.tasks = {"clips": task_config(classes=CLASSES)}
    config.task_order, config.accumulate = (), 1
    config.optim.update(name="sgd", momentum=0.9, weight_decay=0.0, clip_norm=0.0, ema=0.0, freeze=(), per_task="shared")
    config.loss.update(mixup=0.0, cutmix=0.0)
    config.model.update(drop_path=0.0, dropout=0.0)
    model, mesh = build(config.model, {"clips": CLASSES}), sharding.make_mesh(config.mesh)
    optimizer = optim.make_optimizer(config.optim, lambda _: 5e-3)
    _, initial, update = sharded_step(config, model, optimizer, mesh)
    state = initial(jax.random.key(0))
    rng, rows, side = np.random.default_rng(0), config.batch_size, config.model.image_size
    batch = {
        "pixels": rng.integers(0, 256, (rows, config.model.frames, side, side, 3), np.uint8),
        "label": rng.integers(0, CLASSES, rows, np.int32),
        "task": np.zeros(rows, np.int32),
        "mask": np.ones(rows, bool),
    }
    arrays = sharding.put_batch(batch, mesh)
    answer = jax.jit(model.logits)

    def train():
        nonlocal state
        state, values = update(state, (arrays,))
        return values

    def timed(step: Callable) -> Callable[[], float]:
        def run() -> float:
            began = time.perf_counter()
            jax.block_until_ready(step())
            return time.perf_counter() - began

        return run

    steps = {"train": timed(train), "forward": timed(lambda: answer(state.params, arrays["pixels"]))}
    for step in steps.values():
        step()
    return steps, count_parameters(state.params)


@contextlib.contextmanager
def _peer(config: ConfigDict) -> Iterator[tuple[dict, Callable[[str], float]]]:
    """What the peer says of itself, and a function that makes it take a step and returns its seconds."""
    spec = build(config.model, {}).spec
    sizes = {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.mlp_dim,
        "patch_size": spec.patch,
        "num_frames": spec.frames,
        "image_size": spec.image_size,
        "num_labels": CLASSES,
        "batch_size": config.batch_size,
        "bfloat16": str(spec.dtype) == "bfloat16",
    }
    command = [sys.executable, "-m", "vidjoint.speed.peer", json.dumps(sizes)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)

        def answer() -> str:
            if line := process.stdout.readline():
                return line
            log.seek(0)
            raise UserError(f"--what=peer: PyTorch's side ended: {(log.read().strip().splitlines() or ['without a word'])[-1]}")

        def step(kind: str) -> float:
            print(kind, file=process.stdin, flush=True)
            return float(answer())

        try:
            yield json.loads(answer()), step
        finally:
            process.kill()
            process.communicate()
