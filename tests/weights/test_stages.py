"""CoVeR from stage to stage: images alone, then images and videos, then another dataset with frozen features or in full; real runs, tiny."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

from tests import tiny
from vidjoint.checkpoints import load_params
from vidjoint.config import base_config, task_config
from vidjoint.models.spec import DividedSpec
from vidjoint.optim import join
from vidjoint.train import initial_state, prepare, train

STILLS = dict(source="folder", media="image", train="stills/train")
CLIPS = dict(train="clips/val.csv", labels="clips/labels.json", sampler="segments")


def config_of(data, tasks: dict, **changes):
    config = base_config()
    config.update(total_steps=2, batch_size=16, data_root=str(data), log_every=1, **changes)
    config.model.update(variant="Ti/8", width=16, depth=1, heads=2, mlp_dim=16, frames=2, image_size=16, dtype="float32")
    config.optim.update(lr=0.01, schedule="constant")
    config.data.threads = 1
    config.tasks.update({name: task_config(**settings) for name, settings in tasks.items()})
    return config


def parameters(folder) -> dict:
    stored = load_params(folder)[1]
    return join(stored["params"], stored["frozen"])


def flat(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    tiny.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def first(data):
    """Stage 1: images only, no temporal layers (eq. 1)."""
    train(config_of(data, {"stills": STILLS}), data / "first")
    return data / "first"


def second_config(data, first):
    config = config_of(data, {"clips": CLIPS, "stills": STILLS}, init_from=str(first))
    config.model.mixer = "divided"
    return config


@pytest.fixture(scope="module")
def second(data, first):
    """Stage 2: images and videos together, with attention over time."""
    train(second_config(data, first), data / "second")
    return data / "second"


def test_co_training_starts_with_the_image_model_s_answers(data, first, caplog):
    setup = prepare(second_config(data, first))
    with caplog.at_level(logging.INFO, "vidjoint.train"):
        params = jax.device_get(initial_state(setup).params)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 1, 16, 16, 3), np.uint8)
    old, spec = parameters(first), setup.model.spec
    image_model = dataclasses.replace(setup.model, spec=dataclasses.replace(spec, mixer="none"), classes=(("stills", 10),))
    expected = jax.jit(image_model.logits)(old, pixels)["stills"]
    for image_temporal in ("affine", "skip"):
        model = dataclasses.replace(setup.model, spec=dataclasses.replace(spec, divided=DividedSpec(image_temporal)))
        found = jax.jit(model.logits)(params, pixels)["stills"]  # the head is kept: same task, same labels
        np.testing.assert_allclose(found, expected, atol=1e-6)
    block = params["blocks"]["0"]
    jax.tree.map(np.testing.assert_array_equal, block["mixer"]["temporal_attn"], block["attn"])
    report = [message.partition(" (step 2): ")[2] for message in caplog.messages]
    assert report[1].startswith("6 parameters copied from the spatial attention: ")
    assert report[2:] == ["5 parameters new: blocks/*/mixer/temporal_fc/{bias,kernel}, embed/time, heads/clips/{bias,kernel}"]


def test_co_training_moves_the_branch(second):
    assert np.abs(parameters(second)["blocks"]["0"]["mixer"]["temporal_fc"]["kernel"]).max() > 0


@pytest.mark.parametrize("frozen", [True, False])
def test_transfer_to_a_new_dataset(data, second, frozen):
    """Figure 3, and 3.2: a new head on frozen features, or everything fine-tuned."""
    config = config_of(data, {"gestures": CLIPS}, init_from=str(second))
    config.model.mixer = "divided"
    config.optim.freeze = ("embed/.*", "blocks/.*", "norm/.*") if frozen else ()
    start = flat(jax.device_get((lambda state: join(state.params, state.frozen))(initial_state(prepare(config)))))
    before = flat(parameters(second))
    folder = data / ("frozen" if frozen else "full")
    train(config, folder)
    after = flat(parameters(folder))
    assert after.keys() == start.keys()
    for name, value in after.items():
        if name.startswith("heads/gestures/"):
            assert (value != start[name]).any(), name
            continue
        np.testing.assert_array_equal(start[name], before[name], err_msg=name)  # taken over
        assert value.tobytes() == before[name].tobytes() if frozen else (value != before[name]).any(), name
