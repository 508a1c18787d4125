"""Every mixer with every schedule, on images and clips together: the training step takes each tuple of batches that the mixture gives."""

import functools
import itertools

import jax
import numpy as np
import pytest

from tests import tiny
from vidjoint import optim, step, validate
from vidjoint.data.mixture import Mixture
from vidjoint.data.schedules import SCHEDULES
from vidjoint.data.tasks import open_tasks
from vidjoint.models.build import build
from vidjoint.models.mixers import MIXERS

STEPS = 20
COUNTS = {"clips": len(tiny.CLIPS), "stills": len(tiny.STILLS)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny.write_data(folder)
    return folder


def config_of(data, mixer: str, schedule: str):
    config = tiny.config_of(data)
    config.update(total_steps=STEPS, batch_size=4, schedule=schedule)
    config.model.mixer = mixer
    config.model.am_flow.update(bottleneck=8, tpu_width=8, tpu_mlp=16, tpu_heads=2)
    config.optim.update(clip_norm=1.0, weight_decay=0.1, ema=0.9)
    config.loss.mixup = 0.2
    return config


@functools.cache
def batches_of(data, schedule: str) -> tuple[list[tuple], set[int]]:
    """A tuple of batches of each shape that occurs in a run, and the numbers of the tasks that occur in it."""
    config = config_of(data, "none", schedule)
    mixture = Mixture(config, open_tasks(config), STEPS)
    run = [mixture.step(i) for i in range(STEPS)]
    tasks = {int(task) for batches in run for batch in batches for task in batch["task"][batch["mask"]]}
    return list({tuple(batch["pixels"].shape for batch in batches): batches for batches in run}.values()), tasks


@functools.cache
def step_of(data, mixer: str):
    """The shapes of a state and the jitted step, which do not hang on the schedule: batches of the same shapes are traced once."""
    config = config_of(data, mixer, "mixed")
    model = build(config.model, COUNTS)
    optimizer = optim.make_optimizer(config.optim, optim.make_schedule(config.optim, STEPS, 1.0), len(COUNTS))
    state = jax.eval_shape(lambda key: step.init_state(config, model.init(key), optimizer), jax.random.key(0))
    return state, jax.jit(step.make_train_step(config, model, optimizer))


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize(("mixer", "schedule"), list(itertools.product(MIXERS, SCHEDULES)))
def test_training_step(data, mixer, schedule):
    assert not validate.check(config_of(data, mixer, schedule))
    tuples, occurring = batches_of(data, schedule)
    assert occurring == {0, 1}
    assert len(tuples) == (1 if schedule in ("mixed", "accumulated") else 2)

    state, train_step = step_of(data, mixer)
    for batches in tuples:
        new, metrics = train_step.eval_shape(state, batches)
        assert shapes(new) == shapes(state)
        assert shapes(metrics["loss"]) == ((), np.float32)
        assert metrics.keys() == {"loss", "grad_norm", "skipped", *(f"{name}/loss" for name in COUNTS)}
