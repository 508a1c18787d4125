"""MACs are counted as on paper, and the command's figures have the names and the order of size that they should."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vidjoint import benchmark
from vidjoint.benchmark import as_text, macs, measure_model
from vidjoint.config import base_config, task_config

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
    "published, depth, arguments",
    [
        (17.56, 12, ("B/16", 1, 224, "none", 1000)),
        (195.8, 12, ("B/16", 8, 224, "divided", 400)),  # TimeSformer
        (179.6, 12, ("B/16", 8, 224, "joint", 400)),
        (140.5, 12, ("B/16", 8, 224, "none", 400, "none", "frame_mean")),  # TimeSformer, space-only
        (5872.7, 24, ("L/16", 16, 448, "divided", 400, "block")),  # CoVeR
    ],
)
def test_models_cost_what_is_published(published, depth, arguments):
    """In G, within 2 %. All blocks cost the same, so two depths tell the whole."""
    one, two = gmacs(*arguments, depth=1), gmacs(*arguments, depth=2)
    assert one + (depth - 1) * (two - one) == pytest.approx(published, rel=0.02)


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


def test_command(experiment, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert benchmark.main([f"--config={experiment}", f"--json={file}"]) == 0
    shown = capsys.readouterr().out.splitlines()
    figures = json.loads(file.read_text())
    assert list(figures) == ["device", "jax", "model", "step", "data"]
    model, step, data = figures["model"], figures["step"], figures["data"]
    assert {"params", "trainable_params", "macs_per_view"} <= set(model)
    assert {"train_clips_per_s", "forward_clips_per_s", "mfu", "peak_bytes"} <= set(step)
    assert {"pipeline_clips_per_s", "wait_share", "decode_8_of_300_clips_per_s_per_core"} <= set(data)
    assert model["view"] == "1x16x16" and 0 < model["trainable_params"] == model["params"] and model["macs_per_view"] > 0
    assert step["forward_clips_per_s"] > step["train_clips_per_s"] > 0 and 0 < step["mfu"] < 1 and step["peak_bytes"] > 4 * model["params"]
    assert step["train_clips_per_s"] * step["ms_per_step"] == pytest.approx(16 * 1000)
    assert 0 <= data["wait_share"] <= 1 and data["pipeline_clips_per_s"] > 0 and data["decode_8_of_300_clips_per_s_per_core"] > 0.1
    assert [line for line in shown if not line.startswith("  ")][1:] == ["model:", "step:", "data:"]
    assert len(shown) == 4 + sum(len(figures[part]) for part in ("model", "step", "data"))


def test_the_model_needs_no_data(experiment, tmp_path, capsys):
    arguments = ["--what=model,memory", "--config.data_root=/absent", f"--json={tmp_path / 'x.json'}"]
    figures = []
    for freeze in ("()", "('blocks/.*','embed/.*')"):
        assert benchmark.main([f"--config={experiment}", f"--config.optim.freeze={freeze}", *arguments]) == 0
        figures.append(json.loads((tmp_path / "x.json").read_text()))
    trained, frozen = figures
    assert list(frozen) == ["device", "jax", "model", "memory"]
    assert 0 < frozen["model"]["trainable_params"] < frozen["model"]["params"]
    assert 0 < frozen["memory"]["gradient_temp_bytes"] < trained["memory"]["gradient_temp_bytes"]


def test_mistakes_are_lines(experiment, tmp_path, capsys):
    for arguments, line in {
        ("--what=speed,model",): "--what=speed: choose from model, memory, step, data",
        ("--what=",): "--what=",
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
