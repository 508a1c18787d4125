"""From the tokens of all frames to one feature vector: every pool against its definition."""

import functools

import jax
import numpy as np
import pytest

from tests.models import oracles, oracles_motion
from tests.models.test_vit import clip, random_params, tiny
from vidjoint.models.pooling import NEED_CLASS_TOKEN, POOLS
from vidjoint.models.spec import ClassAttentionSpec, TemporalEncoderSpec


@functools.partial(jax.jit, static_argnums=0)
def run_pool(model, params, x, key=None):
    model = model.bind(params)
    return model.pool(x, model.norm, key)


def tokens(frames: int, count: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(4).normal(size=(batch, frames, count, 24)).astype(np.float32)


def pooled(model, frames: int, count: int = 7):
    """The pool's output, its parameters, the tokens and those of the last norm as NumPy."""
    params, x = random_params(model), tokens(frames, count)
    tree = oracles.numpy_tree(params)
    return run_pool(model, params, x), tree.get("pool"), x.astype(np.float64), tree["norm"]


def test_means_and_single_tokens_equal_their_definitions():
    def normed(x):
        return oracles.layer_norm(x, norm)

    result, _, x, norm = pooled(tiny(depth=1, pool="class_token"), 3)
    np.testing.assert_allclose(result, sum(normed(x[:, t, 0]) for t in range(3)) / 3, atol=1e-5)
    result, _, x, norm = pooled(tiny(depth=1, pool="average"), 3)
    np.testing.assert_allclose(result, sum(normed(x[:, t, i]) for t in range(3) for i in range(1, 7)) / 18, atol=1e-5)
    result, _, x, norm = pooled(tiny(depth=1, pool="frame_mean"), 3)
    np.testing.assert_allclose(result, normed(sum(x[:, t, 0] for t in range(3)) / 3), atol=1e-5)
    result, _, x, norm = pooled(tiny(depth=1, pool="last_frame"), 3)
    np.testing.assert_allclose(result, normed(x[:, 2, 0]), atol=1e-5)
    for class_token in (True, False):
        result, _, x, norm = pooled(tiny(depth=1, pool="first_token", class_token=class_token), 3)
        np.testing.assert_allclose(result, normed(x[:, 0, 0]), atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "blocks", "frames", "class_token", "layer_scale"),
    [("patches", 1, 3, False, 0.1), ("patches", 2, 1, True, 0.0), ("all", 1, 1, False, 0.0), ("all", 2, 3, True, 0.0)],
)
def test_class_attention_equals_its_definition(keys, blocks, frames, class_token, layer_scale):
    """With two blocks the second one sees the patches as they were: the stage updates the class token only."""
    stage = ClassAttentionSpec(blocks, keys)
    model = tiny(depth=1, pool="class_attention", class_attention=stage, class_token=class_token, layer_scale=layer_scale)
    result, p, x, norm = pooled(model, frames)
    expected = oracles_motion.class_attention(x, p, norm, 3, int(class_token), keys == "all")
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_class_attention_has_the_parameters_of_plain_blocks():
    """So the last block of a pretrained ViT fits, and one norm serves the token and the patches."""
    model = tiny(pool="class_attention", class_attention=ClassAttentionSpec(blocks=2), class_token=False)
    params = model.abstract()
    shapes = [jax.tree.map(lambda x: x.shape, blocks["0"]) for blocks in (params["blocks"], params["pool"]["blocks"])]
    assert shapes[0] == shapes[1] and sorted(params["pool"]["blocks"]) == ["0", "1"]


def test_class_attention_ignores_the_class_tokens_of_the_frames():
    model = tiny(depth=1, pool="class_attention")
    params, x = random_params(model), tokens(3, 7)
    other = x.copy()
    other[:, :, 0] += 1.0
    np.testing.assert_array_equal(run_pool(model, params, x), run_pool(model, params, other))


@pytest.mark.parametrize(("frames", "class_token"), [(4, True), (4, False), (1, True)])
def test_temporal_encoder_equals_its_definition(frames, class_token):
    model = tiny(depth=1, frames=frames, pool="temporal_encoder", temporal_encoder=TemporalEncoderSpec(depth=2), class_token=class_token)
    result, p, x, norm = pooled(model, frames)
    np.testing.assert_allclose(result, oracles_motion.temporal_encoder(x, p, norm, 3, int(class_token)), atol=1e-5)


def test_temporal_encoder_stretches_its_time_table():
    """A clip of twice the frames takes each row of the table twice, an image the first row."""
    model = tiny(depth=1, frames=2, pool="temporal_encoder", temporal_encoder=TemporalEncoderSpec(depth=1))
    params = random_params(model)
    for frames, rows in ((4, [0, 0, 1, 1]), (1, [0])):
        p, x = oracles.numpy_tree(params), tokens(frames, 7)
        p["pool"]["time"] = p["pool"]["time"][rows]
        expected = oracles_motion.temporal_encoder(x.astype(np.float64), p["pool"], p["norm"], 3, 1)
        np.testing.assert_allclose(run_pool(model, params, x), expected, atol=1e-5)


def test_temporal_encoder_drops_residuals_by_key():
    model = tiny(depth=1, drop_path=0.5, pool="temporal_encoder", temporal_encoder=TemporalEncoderSpec(depth=2))
    params, x = random_params(model), tokens(4, 7, batch=8)
    a, b = (run_pool(model, params, x, jax.random.key(i)) for i in (0, 1))
    assert np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize("pool", POOLS)
def test_every_pool_ends_a_model(pool):
    """On a lone image, in bfloat16, and without a class token where the pool can do so."""
    model = tiny(depth=1, pool=pool, dtype="bfloat16", class_token=pool in NEED_CLASS_TOKEN)
    result = jax.eval_shape(model.features, model.abstract(), clip(1))
    assert result.shape == (2, 48 if pool == "class_and_average" else 24) and result.dtype == np.float32
