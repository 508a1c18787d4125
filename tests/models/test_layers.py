import jax
import jax.numpy as jnp
import numpy as np
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
    for gelu in ("exact", "tanh"):
        mlp = layers.Mlp(4, 8, gelu=gelu, dtype="float32", rngs=nnx.Rngs(0))
        mlp.fc1.kernel[...] *= 40  # so that the two GELUs differ visibly
        outputs.append(mlp(x))
        np.testing.assert_allclose(outputs[-1], oracles.mlp(x, oracles.params_of(mlp), tanh=gelu == "tanh"), atol=1e-5)
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-5


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    x = np.ones((2000, 2, 3), np.float32)
    y = np.asarray(layers.drop_path(x, 0.25, jax.random.key(0)))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (y.reshape(2000, -1).min(1) == y.reshape(2000, -1).max(1)).all()
    assert abs(y.mean() - 1) < 0.05
    assert layers.drop_path(x, 0.25, None) is x
