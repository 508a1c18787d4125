import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models import oracles
from vidjoint.models import layers


def test_attention_equals_its_definition():
    rng = np.random.default_rng(0)
    attention = layers.Attention(12, 3, dtype="float32", rngs=nnx.Rngs(0))
    x = rng.normal(size=(2, 4, 5, 12)).astype(np.float32)
    out, q, k = attention(x)
    weights = oracles.params_of(attention)
    np.testing.assert_allclose(out, oracles.attention(x, weights, heads=3), atol=1e-5)
    assert q.shape == k.shape == (2, 4, 5, 3, 4)
    np.testing.assert_allclose(q.reshape(2, 4, 5, 12), x @ weights["qkv"]["kernel"][:, :12] + weights["qkv"]["bias"][:12], atol=1e-5)


def test_attention_softmax_is_float32_in_bfloat16():
    """Logits that differ by less than bfloat16 resolves must still order the softmax."""
    q = jnp.full((1, 1, 1, 4), 4, jnp.bfloat16)
    k = jnp.stack([jnp.full((1, 1, 4), 16.0), jnp.full((1, 1, 4), 16.0).at[..., 0].set(16.125)], axis=1).astype(jnp.bfloat16)
    v = jnp.array([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1) * jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    out = layers.dot_product_attention(q, k, v)
    np.testing.assert_allclose(np.asarray(out, np.float32), 1 / (1 + np.exp(-0.25)), atol=4e-3)


def test_mlp_uses_the_gelu_it_was_told():
    x = np.linspace(-3, 3, 7, dtype=np.float32)[:, None] * np.ones((1, 4), np.float32)
    outputs = []
    for tanh in (False, True):
        mlp = layers.Mlp(4, 8, tanh_gelu=tanh, dtype="float32", rngs=nnx.Rngs(0))
        mlp.fc1.kernel[...] *= 40  # so that the two GELUs differ visibly
        outputs.append(mlp(x))
        np.testing.assert_allclose(outputs[-1], oracles.mlp(x, oracles.params_of(mlp), tanh=tanh), atol=1e-5)
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-5


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    x = np.ones((2000, 2, 3), np.float32)
    y = np.asarray(layers.drop_path(x, 0.25, jax.random.key(0)))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (y.reshape(2000, -1).min(1) == y.reshape(2000, -1).max(1)).all()
    assert abs(y.mean() - 1) < 0.05
    assert layers.drop_path(x, 0.25, None) is x


@pytest.mark.parametrize("size", [3, 7])
def test_bicubic_matrix_has_torch_s_kernel(size):
    np.testing.assert_allclose(layers.bicubic_matrix(4, size).sum(1), 1, atol=1e-6)
    a = -0.75
    values = np.arange(4.0) ** 2

    def cubic(t):
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    expected = []
    for i in range(size):
        centre = (i + 0.5) * 4 / size - 0.5
        first = int(np.floor(centre))
        expected.append(sum(cubic(centre - j) * values[min(max(j, 0), 3)] for j in range(first - 1, first + 3)))
    np.testing.assert_allclose(layers.bicubic_matrix(4, size) @ values, expected, atol=1e-5)


def test_resize_position_keeps_the_class_row_and_constant_tables():
    rng = np.random.default_rng(0)
    table = np.concatenate([rng.normal(size=(1, 8)), np.ones((12, 8))]).astype(np.float32)
    resized = layers.resize_position(table, 1, (3, 4), (5, 2))
    assert resized.shape == (11, 8)
    np.testing.assert_array_equal(resized[0], table[0])
    np.testing.assert_allclose(resized[1:], 1, atol=1e-6)
    assert layers.resize_position(table, 1, (3, 4), (3, 4)) is table


def test_resize_time_is_nearest_and_gives_an_image_the_first_row():
    table = np.arange(8.0)[:, None]
    np.testing.assert_array_equal(layers.resize_time(table, 1)[:, 0], [0])
    np.testing.assert_array_equal(layers.resize_time(table, 4)[:, 0], [0, 2, 4, 6])
    np.testing.assert_array_equal(layers.resize_time(table, 16)[:, 0], np.repeat(np.arange(8), 2))
