"""MEViT's motion self-attention, its two limits (divided and joint attention), and the whole model's size."""

import functools

import jax
import numpy as np
import pytest

from tests.models import oracles, oracles_motion
from tests.models.test_vit import clip, features, init, random_params, tiny
from vidjoint.config import base_config
from vidjoint.models.build import build, count_parameters
from vidjoint.models.layers import dot_product_attention
from vidjoint.models.macs import macs
from vidjoint.models.mixers.motion import from_blocks, to_blocks
from vidjoint.models.spec import MotionSpec


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def run_block(model, params, x, index, grid):
    return model.bind(params).blocks[index](x, None, grid)[0]


def tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("side", "grid", "frames", "order", "fc", "class_token", "layer_scale"),
    [
        (1, (4, 5), 3, "time_space", True, True, 0.0),
        (1, (4, 5), 1, "space_time", True, False, 0.0),
        (2, (4, 6), 3, "time_space", True, False, 0.1),  # divides the grid
        (2, (4, 5), 3, "space_time", True, True, 0.1),  # reaches over one edge
        (2, (4, 5), 1, "time_space", False, True, 0.0),
        (3, (4, 5), 3, "time_space", False, False, 0.0),  # over both
        (3, (7, 7), 2, "space_time", False, True, 0.0),
        (3, (7, 7), 1, "time_space", True, True, 0.0),
        (5, (4, 5), 3, "time_space", True, True, 0.0),  # one block, of more rows than there are
    ],
)
def test_motion_attention_equals_its_definition(side, grid, frames, order, fc, class_token, layer_scale):
    pool = "class_token" if class_token else "average"
    model = tiny(depth=1, mixer="motion", motion=MotionSpec(side, order, fc), class_token=class_token, pool=pool, layer_scale=layer_scale)
    params, x = random_params(model), tokens(2, frames, class_token + grid[0] * grid[1], 24)
    block = oracles.numpy_tree(params)["blocks"]["0"]
    assert ("temporal_fc" in block["mixer"]) == fc
    expected = oracles_motion.motion_block(x.astype(np.float64), block, 3, grid, side, int(class_token), order)
    np.testing.assert_allclose(run_block(model, params, x, 0, grid), expected, atol=1e-5)


def test_with_blocks_of_one_patch_it_is_divided_attention():
    divided, motion = tiny(depth=1, mixer="divided"), tiny(depth=1, mixer="motion", motion=MotionSpec(block=1))
    params, pixels = random_params(divided), clip(3, 24, 32)
    assert jax.tree.structure(params) == jax.tree.structure(motion.abstract())  # weights of one fit the other
    np.testing.assert_allclose(features(motion, params, pixels), features(divided, params, pixels), atol=1e-5)


def test_with_one_block_it_is_joint_attention():
    """Of a motion model whose spatial attention gives nothing, what is left is joint attention with the weights of the branch."""
    settings = dict(class_token=False, pool="average")
    joint, motion = tiny(mixer="joint", **settings), tiny(mixer="motion", motion=MotionSpec(block=4), **settings)
    identity = {"kernel": np.eye(24, dtype=np.float32), "bias": np.zeros(24, np.float32)}
    params = random_params(joint)
    moved = random_params(motion) | {name: params[name] for name in ("embed", "norm", "heads")}
    for i, block in moved["blocks"].items():
        block |= {name: params["blocks"][i][name] for name in ("norm2", "mlp")}
        block["attn"]["proj"] = jax.tree.map(np.zeros_like, block["attn"]["proj"])
        block["mixer"] = {"temporal_norm": params["blocks"][i]["norm1"], "temporal_attn": params["blocks"][i]["attn"], "temporal_fc": identity}
    pixels = clip(3, 24, 32)
    np.testing.assert_allclose(features(motion, moved, pixels), features(joint, params, pixels), atol=1e-5)


def test_in_other_blocks_frames_do_not_talk():
    """MEViT's top-heavy model: the first blocks see space only, and have no parameters for time."""
    model = tiny(mixer="motion", mixer_blocks=(1,), class_token=False, pool="average")
    params = random_params(model)
    assert [sorted(params["blocks"][i].get("mixer", {})) for i in "01"] == [[], ["temporal_attn", "temporal_fc", "temporal_norm"]]
    x = tokens(1, 3, 20, 24)
    other = x.copy()
    other[:, 1] *= -1.0
    moved = [np.abs(run_block(model, params, x, i, (4, 5)) - run_block(model, params, other, i, (4, 5))).max(axis=(0, 2, 3)) for i in (0, 1)]
    assert moved[0][0] == moved[0][2] == 0 and moved[0][1] > 1e-3
    assert min(moved[1]) > 1e-3


@pytest.mark.parametrize(("order", "fc"), [("time_space", True), ("space_time", False)])
def test_fresh_model_is_the_frame_wise_one(order, fc):
    settings = dict(depth=1, class_token=False, pool="average")
    model, frame_wise = tiny(mixer="motion", motion=MotionSpec(2, order, fc), **settings), tiny(mixer="none", **settings)
    params = init(model)
    fresh = features(model, params, clip(3))
    del params["embed"]["time"]
    for block in params["blocks"].values():
        del block["mixer"]
    np.testing.assert_allclose(fresh, features(frame_wise, params, clip(3)), atol=1e-6)


@pytest.mark.parametrize(("grid", "side", "masked"), [((4, 6), 2, False), ((4, 5), 9, False), ((4, 5), 1, False), ((4, 5), 2, True)])
def test_nothing_is_padded_where_the_blocks_divide_the_grid(grid, side, masked):
    x = tokens(2, 3, grid[0] * grid[1], 8)
    blocks, mask = to_blocks(x, grid, side)
    np.testing.assert_array_equal(from_blocks(blocks, grid, side), x)
    if masked:
        assert blocks.shape == (2, 6, 12, 8) and mask.shape == (6, 12) and mask.sum() == 3 * 20
    else:
        assert blocks.size == x.size and mask is None


def test_masked_keys_are_as_if_they_were_not_there():
    q, k, v = tokens(3, 2, 6, 2, 4)
    mask = np.array([True, True, False, True, False, False])

    @jax.jit
    def gradients(q, k, v, mask):
        return jax.value_and_grad(lambda *x: (dot_product_attention(*x, mask) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)

    value, (dq, dk, dv) = gradients(q, k, v, np.tile(mask, (2, 1)))
    expected, (eq, ek, ev) = gradients(q, k[:, mask], v[:, mask], None)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, wanted in ((dq, eq), (dk[:, mask], ek), (dv[:, mask], ev), (dk[:, ~mask], 0), (dv[:, ~mask], 0)):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@functools.cache
def mevit(depth: int, mixer_blocks: tuple[int, ...]):
    """MEViT-B/16 on Kinetics-400, 16 frames, and its parameters' shapes."""
    config = base_config()
    config.model.update(variant="B/16", depth=depth, frames=16, mixer="motion", mixer_blocks=mixer_blocks)
    config.model.update(class_token=False, pool="class_attention")
    model = build(config.model, {"k400": 400})
    return model, model.abstract()


FINAL = (11, tuple(range(4, 11)))  # section 4.3: 4 space-only blocks, 7 with motion attention, one of class-attention


@pytest.mark.parametrize(("layers", "millions", "without_fc"), [(FINAL, 106.8, 102.7), ((12, ()), 128.7, 121.6)], ids=["4+7+1", "12+1"])
def test_parameter_counts(layers, millions, without_fc):
    """Worked out from the paper's text, which gives no figures; 12 + 1 is of table 2."""
    _, params = mevit(*layers)
    dense = [block["mixer"]["temporal_fc"] for block in params["blocks"].values() if "mixer" in block]
    assert count_parameters(params) / 1e6 == pytest.approx(millions, abs=0.06)
    assert (count_parameters(params) - count_parameters(dense)) / 1e6 == pytest.approx(without_fc, abs=0.06)


def test_multiply_accumulates_of_one_view():
    model, params = mevit(*FINAL)
    count = macs(model.logits, params, jax.ShapeDtypeStruct((1, 16, 224, 224, 3), np.uint8))
    one_product = 7 * (16 * 196 - 768) * 768**2  # in each block with motion attention: fewer than the paper's two products have
    assert (count + one_product) / 1e9 == pytest.approx(327, abs=0.6)
