import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from vidjoint import optim, sharding
from vidjoint.config import base_config, task_config
from vidjoint.errors import UserError
from vidjoint.models.build import build
from vidjoint.models.layers import Attention, Mlp
from vidjoint.models.mixers import MIXERS
from vidjoint.step import init_state, make_train_step
from vidjoint.train import sharded_step


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


# The training step of every mixer; with SGD, for AdamW moves keys' biases, whose gradient is zero, by rounding errors

MESHES = {"data": sizes(8), "fsdp": sizes(2, 4), "tensor": sizes(2, 1, 4), "all": sizes(2, 2, 2)}
HEADS, CLASSES = 4, {"actions": 5, "pictures": 3}  # all of them divide over the tensor axis


def make_config(mixer: str, scan: bool = False, accumulate: int = 1):
    config = base_config()
    config.accumulate = accumulate
    config.model.update(variant="Ti/8", width=16, depth=2, heads=HEADS, mlp_dim=32, frames=2, image_size=16, dtype="float32", mixer=mixer)
    config.model.update(temporal_init="random", drop_path=0.3, scan=scan)
    config.model.am_flow.update(bottleneck=8, tpu_width=8, tpu_mlp=16, tpu_heads=2, encoder_width=8, encoder_mlp=8, encoder_heads=2, flow="aligned")
    config.optim.update(name="sgd", lr=0.1, schedule="constant", clip_norm=1.0, ema=0.9)
    for name, classes in CLASSES.items():
        config.tasks[name] = task_config(classes=classes)
    return config


def make_batch(step: int) -> dict:
    rng = np.random.default_rng(step)
    task = np.arange(8, dtype=np.int32) % 2
    pixels = rng.integers(0, 256, (8, 2, 16, 16, 3), np.uint8)
    return {"pixels": pixels, "label": rng.integers(0, 3, 8).astype(np.int32), "task": task, "mask": np.arange(8) != 5}


def two_steps(train_step, state, put=lambda batch: batch):
    seen = []
    for step in range(2):
        state, metrics = train_step(state, (put(make_batch(step)),))
        seen.append(metrics)
    return jax.device_get((state, seen))


@functools.cache
def on_one_device(*settings):
    """The config, its model and optimiser, the state at step 0, and what two steps make of it."""
    config = make_config(*settings)
    model = build(config.model, CLASSES)
    optimizer = optim.make_optimizer(config.optim, lambda step: 0.1)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), model.abstract())
    state = init_state(config, params, optimizer)
    return config, model, optimizer, state, two_steps(jax.jit(make_train_step(config, model, optimizer)), state)


def check(mesh_sizes: dict, *settings):
    config, model, optimizer, state, expected = on_one_device(*settings)
    mesh = sharding.make_mesh(mesh_sizes)
    abstract, _, train_step = sharded_step(config, model, optimizer, mesh)
    many = jax.device_put(jax.tree.map(np.array, state), jax.tree.map(lambda x: x.sharding, abstract))
    own = max(bytes_on_each_device(many))
    assert own <= sum(x.nbytes for x in jax.tree.leaves(state)) * (0.6 if mesh.shape["fsdp"] > 1 else 0.8 if mesh.shape["tensor"] > 1 else 1)

    def put(batch):
        return sharding.put_batch(batch, mesh)

    compiled = train_step.lower(many, (put(make_batch(0)),)).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= 0.99 * own  # the state is donated
    assert not re.search(r"callback|outfeed|infeed|send\(|recv\(", compiled.as_text())  # and the host not asked
    actual = two_steps(compiled, many, put)
    assert all(x.is_deleted() for x in jax.tree.leaves(many))
    chex.assert_trees_all_close(actual, expected, atol=2e-6, rtol=2e-6)
    moved = [(a != b).any() for a, b in zip(jax.tree.leaves(actual[0].params), jax.tree.leaves(state.params), strict=True)]
    assert np.mean(moved) > 0.7


def test_two_steps_on_all_axes_are_those_of_one_device():
    check(MESHES["all"], "divided")


def test_two_steps_of_every_mixer_on_every_mesh(full):
    """And of one as a loop, by accumulated parts."""
    if not full:
        pytest.skip("repeats the test above for every mixer on every mesh: --full")
    for mixer in MIXERS:
        for mesh_sizes in MESHES.values():
            check(mesh_sizes, mixer)
    for mesh_sizes in ("tensor", "fsdp"):
        check(MESHES[mesh_sizes], "divided", True, 2)
