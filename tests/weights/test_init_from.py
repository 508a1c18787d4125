"""A new model takes over what fits of an earlier run, and says what it did."""

import jax
import numpy as np
import pytest

from vidjoint.checkpoints import Checkpoints
from vidjoint.config import base_config, task_config
from vidjoint.errors import UserError
from vidjoint.models.build import build
from vidjoint.models.layers import resize_position, resize_time
from vidjoint.run_folder import RunFolder
from vidjoint.weights.init_from import init_from

LABELS = {"actions": ("jump", "run", "sit"), "pictures": ("cat", "dog")}


def model_config(**changes):
    config = base_config()
    config.model.update(variant="Ti/8", width=8, depth=2, heads=2, mlp_dim=12, frames=4, image_size=16)
    config.model.update(**changes)
    for task in LABELS:
        config.tasks[task] = task_config()
    return config


def draw(config, labels, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    model = build(config.model, {task: len(names) for task, names in labels.items()})
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), model.abstract())


def write_run(folder, config, seed=0, labels=LABELS, ema=False) -> dict:
    """A run's folder as training leaves it; returns the parameters that count."""
    run = RunFolder(folder)
    run.write(config, labels)
    params, average = (draw(config, labels, seed + i) for i in range(2))
    frozen = {"embed": params.pop("embed")}
    average.pop("embed")
    state = {"step": np.int32(7), "params": params, "frozen": frozen, "ema": average if ema else {}}
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(7, jax.tree.map(jax.numpy.asarray, state))
    return flat((average if ema else params) | frozen)


def flat(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def load(folder, config, labels=LABELS) -> tuple[dict, dict, list[str]]:
    """What a new model starts from, what it was before, and the report."""
    fresh, lines = draw(config, labels, 99), []
    spec = build(config.model, {}).spec
    result = init_from(str(folder), fresh, spec, labels, lines.append)
    assert jax.tree.structure(result) == jax.tree.structure(fresh)
    assert jax.tree.map(np.shape, result) == jax.tree.map(np.shape, fresh)
    return flat(result), flat(fresh), lines


def assert_same(found: dict, expected: dict, names):
    for name in names:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.parametrize("ema", [False, True])
def test_everything_is_taken_over_and_the_average_where_there_is_one(tmp_path, ema):
    config = model_config(mixer="divided")
    old = write_run(tmp_path, config, ema=ema)
    found, fresh, lines = load(tmp_path, config)
    assert found.keys() == fresh.keys() == old.keys()
    assert_same(found, old, old)
    assert lines == [f"init_from={tmp_path} (step 7): {len(old)} parameters loaded"]


def test_the_tables_are_stretched(tmp_path):
    old = write_run(tmp_path, model_config(mixer="joint"))
    found, fresh, lines = load(tmp_path, model_config(mixer="joint", image_size=40, frames=6))
    np.testing.assert_allclose(found["embed/position"], resize_position(old["embed/position"], 1, (2, 2), (5, 5)), atol=1e-6)
    np.testing.assert_array_equal(found["embed/position"][0], old["embed/position"][0])
    np.testing.assert_array_equal(found["embed/time"], resize_time(old["embed/time"], 6))
    assert_same(found, old, fresh.keys() - {"embed/position", "embed/time"})
    assert lines[1] == f"init_from={tmp_path} (step 7): 2 parameters resized: embed/position, embed/time"


@pytest.mark.parametrize("labels", [("run", "jump", "sit"), ("jump", "run", "stand"), ("jump", "run")])
def test_a_head_is_taken_over_only_with_its_class_names(tmp_path, labels):
    config = model_config()
    old = write_run(tmp_path, config)
    found, fresh, lines = load(tmp_path, config, {**LABELS, "actions": labels})
    new = {"heads/actions/kernel", "heads/actions/bias"}
    assert_same(found, fresh, new)
    assert_same(found, old, fresh.keys() - new)
    assert lines[1:] == [f"init_from={tmp_path} (step 7): 2 parameters new: heads/actions/bias, heads/actions/kernel"]


def test_tasks_that_come_and_go(tmp_path):
    config = model_config()
    old = write_run(tmp_path, config)
    found, fresh, lines = load(tmp_path, config, {"actions": LABELS["actions"], "gestures": ("wave", "point")})
    assert_same(found, old, [name for name in fresh if "gestures" not in name])
    assert_same(found, fresh, ["heads/gestures/kernel", "heads/gestures/bias"])
    assert lines[1:] == [
        f"init_from={tmp_path} (step 7): 2 parameters new: heads/gestures/bias, heads/gestures/kernel",
        f"init_from={tmp_path} (step 7): 2 parameters unused: heads/pictures/bias, heads/pictures/kernel",
    ]


def test_from_images_to_videos_the_temporal_parameters_are_new(tmp_path):
    """CoVeR's second stage: a frame-wise model hands over to one with divided attention."""
    old = write_run(tmp_path, model_config())
    config = model_config(mixer="divided")
    found, fresh, lines = load(tmp_path, config)
    temporal = {name for name in fresh if "/mixer/temporal_" in name or name == "embed/time"}
    assert temporal == fresh.keys() - old.keys() and len(temporal) == 2 * 8 + 1
    assert_same(found, fresh, temporal)
    assert_same(found, old, old)
    kinds = "blocks/*/mixer/temporal_attn/proj/bias, blocks/*/mixer/temporal_attn/proj/kernel, "
    assert lines[1].startswith(f"init_from={tmp_path} (step 7): 17 parameters new: {kinds}")


def test_shapes_that_do_not_fit_are_all_listed(tmp_path):
    write_run(tmp_path, model_config())
    with pytest.raises(UserError) as caught:
        load(tmp_path, model_config(mlp_dim=16, variant="Ti/4"))
    lines = caught.value.lines
    expected = {f"blocks/{i}/mlp/{name}" for i in range(2) for name in ("fc1/kernel", "fc1/bias", "fc2/kernel")} | {"embed/proj/kernel"}
    assert {line.split()[1] for line in lines} == expected
    assert f"init_from={tmp_path}: embed/proj/kernel is [192, 8] there and [48, 8] here: use the model settings of that run" in lines


def test_a_position_table_without_class_token_does_not_become_one_with(tmp_path):
    write_run(tmp_path, model_config(class_token=False, pool="average"))
    with pytest.raises(UserError) as caught:
        load(tmp_path, model_config())
    assert caught.value.lines == (f"init_from={tmp_path}: embed/position is [4, 8] there and [5, 8] here: use the model settings of that run",)


def test_settings_that_pretrained_parameters_rely_on_are_compared(tmp_path):
    write_run(tmp_path, model_config(gelu="tanh"))
    _, _, lines = load(tmp_path, model_config(mean=(0.4, 0.4, 0.4)))
    assert lines[1:] == [
        f"init_from={tmp_path}: model.gelu was tanh there and is exact here: is that meant?",
        f"init_from={tmp_path}: model.mean was (0.5, 0.5, 0.5) there and is (0.4, 0.4, 0.4) here: is that meant?",
    ]


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no folder of a run"):
        load(tmp_path, model_config())
    RunFolder(tmp_path).write(model_config(), LABELS)
    with pytest.raises(UserError, match="no checkpoints there"):
        load(tmp_path, model_config())
