import math

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


def plain_attention(q, k, v, mask):
    """The definition in float64, without any of our tricks."""
    q, k, v = (np.moveaxis(np.asarray(x, np.float64), 2, 1) for x in (q, k, v))
    logits = q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1])
    return np.moveaxis(oracles.softmax(np.where(mask[:, None, None], logits, -np.inf)) @ v, 1, 2)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_has_the_gradient_of_its_definition(masked):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 3, 4)).astype(np.float32) for n in (5, 7, 7))
    mask = rng.random((2, 7)) < 0.6 if masked else np.ones((2, 7), bool)
    mask[:, 0] = True
    weight = rng.normal(size=q.shape)

    def loss(*x):
        return (layers.dot_product_attention(*x, mask if masked else None) * weight).sum()

    np.testing.assert_allclose(layers.dot_product_attention(q, k, v, mask), plain_attention(q, k, v, mask), atol=1e-5)
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    for i, gradient in enumerate(gradients):
        for index in [tuple(rng.integers(0, size) for size in gradient.shape) for _ in range(12)]:
            sides = []
            for step in (1e-6, -1e-6):
                moved = [x.astype(np.float64) for x in (q, k, v)]
                moved[i][index] += step
                sides.append((plain_attention(*moved, mask) * weight).sum())
            assert abs(gradient[index] - (sides[0] - sides[1]) / 2e-6) < 1e-5


def test_attention_in_bfloat16_stays_near_float32():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 50, 2, 16)) for i in range(3))

    def run(*x):
        return jax.value_and_grad(lambda *x: (layers.dot_product_attention(*x).astype(jnp.float32) ** 2).mean(), (0, 1, 2))(*x)

    exact, rounded = (jax.jit(run)(*(x.astype(dtype) for x in (q, k, v))) for dtype in (jnp.float32, jnp.bfloat16))
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
        assert b.dtype in (jnp.float32, jnp.bfloat16)
        assert np.abs(np.asarray(a) - np.asarray(b, np.float32)).max() < 0.03 * np.abs(a).max()


def test_product_and_its_gradients():
    rng = np.random.default_rng(0)
    x, kernel, grad = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 4), (4, 5), (2, 3, 5)))
    out, gradients = jax.vjp(layers.product, x, kernel)
    np.testing.assert_allclose(out, x @ kernel, atol=1e-5)
    to_x, to_kernel = gradients(grad)
    np.testing.assert_allclose(to_x, grad @ kernel.T, atol=1e-5)
    np.testing.assert_allclose(to_kernel, sum(np.outer(a, b) for a, b in zip(x.reshape(-1, 4), grad.reshape(-1, 5), strict=True)), atol=1e-5)
    rounded = layers.product(jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16


@pytest.mark.parametrize("columns", [1, 5, 48, 1024])
@pytest.mark.parametrize("rows", [(1,), (2, 3), (300,)])
def test_product_where_no_gradient_is_asked_for(rows, columns):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(*rows, 40)).astype(np.float32), rng.normal(size=(40, columns)).astype(np.float32)
    for run in (layers.product, jax.jit(layers.product)):
        out = run(x, kernel)
        assert out.shape == (*rows, columns)
        np.testing.assert_allclose(out, np.asarray(x, np.float64) @ kernel, atol=1e-5)


@pytest.mark.parametrize(("columns", "dtype", "written"), [(48, "float32", True), (1024, "float32", False), (48, "bfloat16", False)])
def test_products_are_convolutions_for_cpus_where_these_are_faster(columns, dtype, written):
    x, kernel = jnp.ones((6, 40), dtype), jnp.ones((40, columns), dtype)
    lowered = {name: jax.jit(layers.product).trace(x, kernel).lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda", "tpu")}
    assert {name: "convolution" in text for name, text in lowered.items()} == {"cpu": written, "cuda": False, "tpu": False}
    gradient = jax.jit(jax.grad(lambda x: layers.product(x, kernel).sum().astype(jnp.float32))).lower(x).as_text()
    assert "convolution" not in gradient


@pytest.mark.parametrize("split", [(None, "tensor"), ("tensor", None)])
def test_product_of_a_kernel_that_devices_share(split):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(6, 7, 40)).astype(np.float32), rng.normal(size=(40, 48)).astype(np.float32)
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data")), jax.sharding.NamedSharding(mesh, jax.P(*split))
    np.testing.assert_allclose(jax.jit(layers.product, in_shardings=sharding)(x, kernel), x @ kernel, atol=1e-5)


def test_products_make_no_gradient_that_nobody_asks_for_and_none_in_another_order():
    x, kernel = jnp.ones((2, 3, 4)), jnp.ones((4, 5))

    def loss(x, kernel):
        return layers.product(x, kernel).sum()

    programs = [str(jax.make_jaxpr(jax.grad(loss, which))(x, kernel)) for which in (0, 1, (0, 1))]
    assert [program.count("= dot_general[") for program in programs] == [2, 2, 3]  # one is forward
    assert not any("transpose" in program for program in programs)
    unused = jax.grad(lambda x, kernel: 0 * loss(x, kernel) + (x**2).sum(), 1)(x, kernel)
    np.testing.assert_array_equal(unused, 0)


def test_exact_gelu_and_its_gradient():
    x = np.linspace(-9, 9, 1001)
    probability = np.array([0.5 * math.erfc(-value / 2**0.5) for value in x])
    slope = probability + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    y, gradient = jax.jit(jax.vmap(jax.value_and_grad(layers.exact_gelu)))(x.astype(np.float32))
    np.testing.assert_allclose(y, x * probability, atol=1e-6)
    np.testing.assert_allclose(gradient, slope, atol=1e-6)
    rounded = layers.exact_gelu(jnp.asarray(x, jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(rounded, np.float32), x * probability, atol=0.04)


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


@pytest.mark.parametrize("masked", [False, True])
def test_heads_as_an_axis_of_their_own_change_nothing(masked):
    """The form for devices that are no CPUs, run on one: values and gradients."""
    q, k, v = (jax.random.normal(key, (3, 7, 2, 8)) for key in jax.random.split(jax.random.key(0), 3))
    mask = jnp.arange(7) < jnp.array([[3], [7], [1]]) if masked else None

    def results(function):
        return jax.jit(jax.value_and_grad(lambda *arrays: (function(*arrays, mask) ** 2).sum(), argnums=(0, 1, 2)))(q, k, v)

    merged, by_heads = results(layers._merged), results(layers._by_heads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), merged, by_heads)
