"""MACs are counted as on paper, and the command's figures have the names and the order of size that they should."""

import json
import os
import sys
from types import SimpleNamespace

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vidjoint import benchmark
from vidjoint.benchmark import as_text, with_weights
from vidjoint.config import base_config, parse, task_config
from vidjoint.errors import UserError
from vidjoint.models.build import build
from vidjoint.models.macs import macs
from vidjoint.speed import decoding, training
from vidjoint.speed.training import host_bytes, measure_model, training_macs

A, B = jax.ShapeDtypeStruct((3, 5), np.float32), jax.ShapeDtypeStruct((5, 7), np.float32)
SQUARE = jax.ShapeDtypeStruct((4, 4), np.float32)


def test_products():
    assert macs(jnp.matmul, A, B) == 3 * 5 * 7
    batched = [jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in (A, B)]
    assert macs(jnp.matmul, *batched) == 2 * 3 * 5 * 7
    assert macs(lambda a, b: jnp.einsum("ij,jk->", a, b), A, B) <= 3 * 5 * 7
    assert macs(lambda a, b: a + b[:3, :5].sum(), A, B) == 0


def test_convolutions():
    image, kernel = jax.ShapeDtypeStruct((2, 6, 8, 8), np.float32), jax.ShapeDtypeStruct((9, 6, 3, 3), np.float32)
    assert macs(lambda x, k: jax.lax.conv(x, k, (1, 1), "VALID"), image, kernel) == 2 * 9 * 6 * 6 * (6 * 3 * 3)
    grouped = jax.ShapeDtypeStruct((9, 2, 3, 3), np.float32)
    grouped_conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID", feature_group_count=3)  # noqa: E731
    assert macs(grouped_conv, image, grouped) == 2 * 9 * 6 * 6 * (2 * 3 * 3)


def test_control_flow():
    def scanned(x):
        return jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=10)[0]

    def branching(x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x)

    def looping(x):
        return jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ x, x)

    assert macs(scanned, SQUARE) == 10 * 64
    assert macs(branching, SQUARE) == 2 * 64  # the costlier of the two
    assert macs(looping, SQUARE) == 64
    assert macs(lambda x: jax.lax.map(branching, x), jax.ShapeDtypeStruct((5, 4, 4), np.float32)) == 5 * 2 * 64
    assert macs(jax.jit(lambda x: jax.jit(jnp.matmul)(x, x)), SQUARE) == 64
    custom = jax.custom_vjp(lambda x: x @ x)
    custom.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x,))
    assert macs(custom, SQUARE) == 64


def test_rematerialisation_counts_once_forward_and_again_backward():
    def layer(x):
        return jnp.sin(x @ x)

    assert macs(jax.checkpoint(layer), SQUARE) == macs(layer, SQUARE) == 64
    plain = macs(jax.grad(lambda x: layer(x).sum()), SQUARE)
    assert macs(jax.grad(lambda x: jax.checkpoint(layer)(x).sum()), SQUARE) == plain + 64


def gmacs(variant, frames, size, mixer, classes, remat="none", pool="class_token", depth=0):
    config = base_config()
    config.model.update(variant=variant, frames=frames, image_size=size, mixer=mixer, remat=remat, depth=depth, pool=pool)
    config.tasks.task = task_config(classes=classes)
    return measure_model(config)["macs_per_view"] / 1e9


@pytest.mark.parametrize(
    "published, depth, arguments, one_product",
    [
        (17.56, 12, ("B/16", 1, 224, "none", 1000), 0),
        (195.8, 12, ("B/16", 8, 224, "divided", 400), 12 * (8 * 196 - 768) * 768**2),  # TimeSformer
        (179.6, 12, ("B/16", 8, 224, "joint", 400), 0),
        (140.5, 12, ("B/16", 8, 224, "none", 400), 0),  # TimeSformer, space-only
        (5872.7, 24, ("L/16", 16, 448, "divided", 400, "block"), 24 * (16 * 784 - 1024) * 1024**2),  # CoVeR
    ],
)
def test_models_cost_what_is_published(published, depth, arguments, one_product):
    """In G, within 2 %. All blocks cost the same, so two depths tell the whole.

    Where a pool reads all patches: with class tokens alone the last block costs less. `one_product`: what is saved by making one product of the last
    two of a temporal branch.
    """
    one, two = (gmacs(*arguments, pool="average", depth=depth) for depth in (1, 2))
    assert one + (depth - 1) * (two - one) + one_product / 1e9 == pytest.approx(published, rel=0.02)


def test_a_whole_model_is_the_sum_of_its_blocks():
    one, two, four = (gmacs("Ti/16", 4, 96, "divided", 10, remat, depth=depth) for remat, depth in (("block", 1), ("none", 2), ("block", 4)))
    assert four == pytest.approx(one + 3 * (two - one), rel=1e-9)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A config file with one of the tiny run's tasks."""
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "data").mkdir()
    tiny.write_data(folder / "data")
    (folder / "experiment.py").write_text(f"""
from pathlib import Path
from tests import tiny

def get_config():
    config = tiny.config_of(Path({str(folder / "data")!r}))
    config.update(task_order=(), batch_size=16)
    config.model.mixer = "none"
    del config.tasks["clips"]
    return config
""")
    return folder / "experiment.py"


def test_command(experiment, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "ROUND", 0.01)
    monkeypatch.setattr(training, "SIDES", {"cpu": (128, 256)})
    file = tmp_path / "figures.json"
    arguments = ["--what=data,compile,step,model", "--steps=12", f"--json={file}"]
    assert benchmark.main([f"--config={experiment}", *arguments]) == 0
    shown = capsys.readouterr().out.splitlines()
    figures = json.loads(file.read_text())
    assert list(figures) == ["device", "jax", "dtype", "model", "compile", "step", "data"]
    model, compiled, step, data = (figures[part] for part in ("model", "compile", "step", "data"))
    assert {"params", "trainable_params", "macs_per_view"} <= set(model)
    assert {"train_clips_per_s", "forward_clips_per_s", "mfu", "peak_bytes"} <= set(step)
    assert {"pipeline_clips_per_s", "wait_share"} <= set(data)
    assert model["view"] == "1x16x16" and 0 < model["trainable_params"] == model["params"] and model["macs_per_view"] > 0
    assert step["forward_clips_per_s"] > step["train_clips_per_s"] > 0 and 0 < step["mfu"] < 1 and step["peak_bytes"] > 4 * model["params"]
    assert step["train_clips_per_s"] * step["ms_per_step"] == pytest.approx(16 * 1000)
    as_trained = build(parse([f"--config={experiment}"])[0].model, {"stills": 10})
    per_view = macs(as_trained.logits, as_trained.abstract(), jax.ShapeDtypeStruct((1, 1, 16, 16, 3), np.uint8))
    assert step["train_flops_per_s"] == pytest.approx(6 * per_view * step["train_clips_per_s"])
    assert 0 < compiled["trace_s"] < compiled["compile_s"] == step["compile_s"] and compiled["step_argument_bytes"] > 4 * 5000
    assert 0 <= data["wait_share"] <= 1 and data["pipeline_clips_per_s"] > 0 and data["training_steps"] == 12
    assert data["host_bytes_begin"] > 1e7 and data["host_bytes_end"] == pytest.approx(data["host_bytes_begin"], rel=0.5)
    rows = sum(len(figures[part]) for part in ("model", "compile", "step", "data"))
    assert len(shown) == 1 + rows and [line[:8].strip() for line in shown[1:] if line[0] != " "] == ["model", "compile", "step", "data"]
    assert len({len(line) for line in shown[1:]}) == 1  # one table


def test_the_model_needs_no_data(experiment, tmp_path, capsys):
    arguments = ["--what=model,memory", "--config.data_root=/absent", f"--json={tmp_path / 'x.json'}"]
    figures = []
    for freeze in ("()", "('blocks/.*','embed/.*')"):
        assert benchmark.main([f"--config={experiment}", f"--config.optim.freeze={freeze}", *arguments]) == 0
        figures.append(json.loads((tmp_path / "x.json").read_text()))
    trained, frozen = figures
    assert list(frozen) == ["device", "jax", "dtype", "model", "memory"]
    assert 0 < frozen["model"]["trainable_params"] < frozen["model"]["params"]
    assert 0 < frozen["memory"]["gradient_temp_bytes"] < trained["memory"]["gradient_temp_bytes"]


def test_frozen_parameters_cost_less():
    config = base_config()
    config.model.update(variant="Ti/8", width=16, depth=3, heads=2, mlp_dim=32, image_size=16, remat="block", temporal_init="random")
    model = build(config.model, {"task": 10})
    batches = ({"pixels": jax.ShapeDtypeStruct((2, 1, 16, 16, 3), np.uint8)},)

    def cost(*freeze):
        config.optim.freeze = freeze
        return training_macs(config, model, batches)

    everything = cost()
    assert everything == 3 * macs(model.logits, model.abstract(), batches[0]["pixels"])
    last, first = cost("embed/.*", "blocks/[01]/.*"), cost("blocks/[12]/.*")
    assert everything / 3 < last < first < everything


def test_settings_of_weights_count(tmp_path, monkeypatch):
    config = tiny.config_of(tmp_path)
    assert with_weights(config) == (config, [])
    config.init_from = "absent"
    unchanged, notes = with_weights(config)
    assert notes[0].startswith("without the settings that come with init_from=absent: ") and unchanged == config
    stored = config.copy_and_resolve_references()
    stored.model.update(gelu="tanh", registers=4)
    monkeypatch.setattr(benchmark, "open_weights", lambda source: SimpleNamespace(config=stored))
    complete, notes = with_weights(config)
    assert (complete.model.gelu, complete.model.registers, notes) == ("tanh", 4, []) and config.model.gelu == ""
    assert measure_model(complete)["params"] == measure_model(config)["params"] + 4 * 16  # width 16
    config.model.mixer = "blender"
    with pytest.raises(UserError, match="blender"):
        with_weights(config)


def test_memory_of_the_family():
    before = host_bytes()
    held = np.ones(30_000_000, np.uint8)
    grown = host_bytes() - before
    assert 25e6 < grown < 60e6, held[0]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    (folder / "data").mkdir()
    tiny.write_data(folder / "data")
    (folder / "experiment.py").write_text(f"""
from pathlib import Path
from tests import tiny
get_config = lambda: tiny.config_of(Path({str(folder / "data")!r}))
""")
    return folder / "experiment.py"


def test_decoding(videos, experiment, tmp_path, capsys, monkeypatch):
    class Decord:
        """Stands for the package: the same frames by their numbers."""

        class VideoReader:
            def __init__(self, file, num_threads, **size):
                self.pictures = [frame.to_ndarray(format="rgb24") for frame in av.open(file).decode(video=0)]

            def get_batch(self, numbers):
                Decord.seen = np.stack([self.pictures[i] for i in numbers])
                return self

            def asnumpy(self):
                return Decord.seen

    monkeypatch.setitem(sys.modules, "decord", Decord)
    monkeypatch.setattr(decoding, "FRAMES", (2, 5))
    monkeypatch.setattr(decoding, "ROUNDS", 1)
    wanted, read = [], decoding._read
    monkeypatch.setattr(decoding, "_read", lambda clip, size: wanted.append(read(clip, size)))
    cores = len(os.sched_getaffinity(0))
    for gops in ("", "3,250"):
        assert benchmark.main([f"--config={videos}", "--what=decode", f"--gops={gops}", f"--json={tmp_path / 'x.json'}"]) == 0
        decode = json.loads((tmp_path / "x.json").read_text())["decode"]
        assert decode["task"] == "clips" and decode["files"] == 3 and len(decode["rows"]) == 4 * max(1, len(gops.split(",")))
        assert all(row[f"{reader}_clips_per_s"] > 0 for row in decode["rows"] for reader in ("vidjoint", "decord"))
        assert np.array_equal(wanted[-1], Decord.seen)  # the last cell's last file, as stored: the same frames
        assert "5 frames, as stored" in capsys.readouterr().out
    assert wanted[-1].shape == (5, 256, 340, 3) and len(os.sched_getaffinity(0)) == cores
    assert benchmark.main([f"--config={experiment}", "--what=decode"]) == 2
    assert "media='video'" in capsys.readouterr().err


def test_mistakes_are_lines(experiment, tmp_path, capsys):
    for arguments, line in {
        ("--what=speed,model",): "--what=speed: choose from model, memory, compile, step, attention, data, decode",
        ("--what=",): "--what=",
        ("--steps=0",): "--steps",
        ("--gops=12,x",): "--gops=12,x",
        ("--config.model.mixer=blender", "--what=model"): "model.mixer='blender'",
        ("--config.no_key=1",): "no_key",
        ("--config.data_root=/absent", "--what=step"): "/absent",
        (f"--json={tmp_path}",): f"--json={tmp_path} can't be written",
    }.items():
        assert benchmark.main([f"--config={experiment}", *arguments]) == 2
        captured = capsys.readouterr()
        errors = captured.err.splitlines()
        assert errors and all(error.startswith("error: ") for error in errors) and line in errors[0], errors


def test_figures_for_people():
    assert as_text("params", 121_600_000) == "121,600,000" and as_text("macs_per_view", 195_800_000_000) == "195.80 G"
    assert as_text("peak_bytes", None) == "unknown" and as_text("mfu", 0.4321) == "43.2%" and as_text("view", "8x224x224") == "8x224x224"
