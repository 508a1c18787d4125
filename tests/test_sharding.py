import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from vidjoint import sharding
from vidjoint.errors import UserError
from vidjoint.models.layers import Attention, Mlp


def sizes(data=-1, fsdp=1, tensor=1):
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


def test_one_size_may_be_what_is_left():
    mesh = sharding.make_mesh(sizes(-1, 2, 2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sharding.make_mesh(sizes(1, -1, 1), devices=jax.devices()[:3]).shape["fsdp"] == 3


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (sizes(-1, -1), "only one axis may be -1"),
        (sizes(0, 2), "sizes are 1 or more"),
        (sizes(-1, 3), "3 does not divide the number of devices, 8"),
        (sizes(2, 2), "that makes 4 devices, but there are 8"),
        (sizes(16), "that makes 16 devices, but there are 8"),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(wrong, says):
    with pytest.raises(UserError, match=says) as caught:
        sharding.make_mesh(wrong)
    assert f"mesh.fsdp={wrong['fsdp']}" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("params/blocks/3/attn/qkv/kernel", (64, 192), ("fsdp", "tensor")),
        ("params/blocks/3/mixer/temporal_attn/qkv/bias", (192,), ("tensor",)),
        ("opt_state/1/0/mu/blocks/3/attn/proj/kernel", (64, 64), ("tensor", "fsdp")),
        ("ema/blocks/11/mlp/fc1/kernel", (64, 256), ("fsdp", "tensor")),
        ("blocks/11/mlp/fc2/kernel", (256, 64), ("tensor", "fsdp")),
        ("blocks/11/mlp/fc1/kernel", (64, 255), ("fsdp", None)),  # 2 does not divide 255
        ("blocks/11/mlp/fc1/kernel", (63, 255), (None, None)),
        ("embed/position", (197, 64), (None, "fsdp")),
        ("norm/scale", (64,), ("fsdp",)),
        ("heads/kinetics/kernel", (64, 400), (None, None)),
        ("opt_state/1/0/nu/heads/kinetics/bias", (400,), (None,)),
        ("step", (), ()),
        ("opt_state/1/0/count", (), ()),
    ],
)
def test_partition(path, shape, expected):
    assert sharding.partition(path, shape, sharding.make_mesh(sizes(2, 2, 2))) == PartitionSpec(*expected)


def test_every_rule_names_a_parameter_of_the_backbone():
    modules = {
        "attn": lambda: Attention(8, 2, dtype=jnp.float32, rngs=nnx.Rngs(0)),
        "mlp": lambda: Mlp(8, 16, gelu="exact", dtype=jnp.float32, rngs=nnx.Rngs(0)),
    }
    paths = [f"{name}/{'/'.join(path)}" for name, make in modules.items() for path in nnx.to_flat_state(nnx.state(nnx.eval_shape(make))).paths]
    assert "attn/proj/bias" in paths
    for pattern, _ in sharding.RULES:
        assert any(re.fullmatch(pattern, path) for path in paths), pattern


def two_layers(params, x):
    for block in params["blocks"].values():
        x = x + jax.nn.relu(x @ block["mlp"]["fc1"]["kernel"] + block["mlp"]["fc1"]["bias"]) @ block["mlp"]["fc2"]["kernel"]
    return x


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(0), 4).reshape(2, 2)
    return {
        "blocks": {
            str(i): {
                "mlp": {
                    "fc1": {"kernel": jax.random.normal(a, (16, 64)) / 4, "bias": jnp.linspace(-1, 1, 64)},
                    "fc2": {"kernel": jax.random.normal(b, (64, 16)) / 8},
                }
            }
            for i, (a, b) in enumerate(keys)
        }
    }


@pytest.mark.parametrize("mesh_sizes", [sizes(8), sizes(1, 8), sizes(1, 1, 8), sizes(2, 2, 2)])
def test_loss_and_gradients_on_eight_devices_equal_those_on_one(params, mesh_sizes):
    x = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    step = jax.value_and_grad(lambda params, batch: (two_layers(params, batch["x"]) ** 2).mean())
    expected_loss, expected = jax.jit(step)(params, {"x": x})

    mesh = sharding.make_mesh(mesh_sizes)
    where = sharding.tree_sharding(params, mesh)
    loss, grads = jax.jit(step, out_shardings=(None, where))(jax.device_put(params, where), sharding.put_batch({"x": x}, mesh))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, expected)
    assert jax.tree.leaves(grads)[0].sharding.num_devices == 8


def bytes_on_each_device(tree) -> set[int]:
    total = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            total[shard.device] += shard.data.nbytes
    return set(total.values())


def test_fsdp_halves_the_memory_of_each_device(params):
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": optax.adam(1e-3).init(params)}
    whole, halves = (
        jax.device_put(state, sharding.tree_sharding(jax.eval_shape(lambda: state), sharding.make_mesh(sizes(-1, fsdp)))) for fsdp in (1, 2)
    )
    scalars = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim == 0)
    (full,), (half,) = bytes_on_each_device(whole), bytes_on_each_device(halves)
    assert half - scalars == (full - scalars) / 2


def test_put_batch_splits_the_examples_and_keeps_their_order():
    mesh = sharding.make_mesh(sizes(2, 2, 2))
    pixels = np.arange(8 * 2 * 3, dtype=np.uint8).reshape(8, 2, 3)
    batch = sharding.put_batch({"pixels": pixels, "label": np.arange(8, dtype=np.int32)}, mesh)
    np.testing.assert_array_equal(batch["pixels"], pixels)
    assert batch["label"].dtype == np.int32
    assert batch["pixels"].sharding == sharding.batch_sharding(mesh)
    assert {shard.data.shape for shard in batch["pixels"].addressable_shards} == {(2, 2, 3)}
    np.testing.assert_array_equal(sharding.local_rows(8, mesh), np.arange(8))


def test_an_uneven_batch_is_refused_in_one_line():
    mesh = sharding.make_mesh(sizes(2, 2, 2))
    for call in (lambda: sharding.put_batch({"label": np.zeros(6)}, mesh), lambda: sharding.local_rows(6, mesh)):
        with pytest.raises(UserError, match=r"^a batch of 6 examples does not divide over 4 devices \(data x fsdp\): choose a multiple of 4$"):
            call()
    with pytest.raises(UserError, match="a batch of 0"):
        sharding.put_batch({"label": np.zeros(0)}, mesh)
    with pytest.raises(ValueError, match="differ in length"):
        sharding.put_batch({"label": np.zeros(4), "mask": np.zeros(8)}, mesh)


def test_lack_of_memory_is_an_error_with_advice():
    with pytest.raises(UserError, match="too little memory: buy more"), sharding.memory_errors("buy more"):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
    with pytest.raises(jax.errors.JaxRuntimeError), sharding.memory_errors("buy more"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
