"""Every mixer, on images and clips, in both compute types, one of them with rematerialisation: real training steps learn one batch by heart."""

import jax
import numpy as np
import pytest

from vidjoint import optim
from vidjoint.config import base_config, task_config
from vidjoint.models.build import build
from vidjoint.models.mixers import MIXERS
from vidjoint.step import init_state, make_train_step

STEPS = 150


def config_of(mixer: str, frames: int, dtype: str, remat: str):
    config = base_config()
    config.total_steps = STEPS
    config.model.update(variant="Ti/8", width=16, depth=1, heads=2, mlp_dim=32, frames=8, image_size=16)
    config.model.update(mixer=mixer, dtype=dtype, remat=remat, temporal_init="random")
    config.model.am_flow.update(bottleneck=8, tpu_width=8, tpu_mlp=16, tpu_heads=2)
    config.model.token_shift.tokens = "all"
    config.optim.update(name="adamw", lr=1e-2, schedule="constant")
    config.tasks.a = task_config(train="x", classes=4, media="image" if frames == 1 else "video")
    return config


@pytest.mark.parametrize(("dtype", "remat"), [("float32", "none"), ("bfloat16", "block")])
@pytest.mark.parametrize("frames", [1, 8])
@pytest.mark.parametrize("mixer", MIXERS)
def test_loss_falls_below_a_hundredth(mixer, frames, dtype, remat):
    config = config_of(mixer, frames, dtype, remat)
    model = build(config.model, {"a": 4})
    optimizer = optim.make_optimizer(config.optim, optim.make_schedule(config.optim, STEPS, 1))
    state = jax.jit(lambda key: init_state(config, model.init(key), optimizer))(jax.random.key(0))
    pixels = np.random.default_rng(0).integers(0, 256, (4, frames, 16, 16, 3), np.uint8)
    label = np.arange(4, dtype=np.int32)
    batch = {"pixels": pixels, "label": label, "task": np.zeros(4, np.int32), "mask": np.ones(4, bool)}
    step = make_train_step(config, model, optimizer)
    state, metrics = jax.jit(lambda state: jax.lax.scan(lambda state, _: step(state, (batch,)), state, length=STEPS))(state)
    losses = metrics["loss"]
    assert losses[-1] < 0.01 * losses[0], losses[:: STEPS // 5]
    assert all(np.isfinite(x).all() and x.dtype == np.float32 for x in jax.tree.leaves(state.params))
