"""Attention maps and rollout against plain NumPy: dense matrices over all tokens of a clip, multiplied out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidjoint.config import base_config
from vidjoint.maps.attention import looks, maps_of, neighbours
from vidjoint.maps.flow import flow_of_heads
from vidjoint.maps.rollout import rollout
from vidjoint.models.build import build

FRAMES, GRID = 3, (2, 3)
MODELS = {
    "none": dict(mixer="none", registers=2, pool="class_and_average"),
    "divided": dict(mixer="divided", mixer_blocks=(1,), scan=True),
    "joint": dict(mixer="joint", pool="average"),
    "token_shift": dict(mixer="token_shift"),
    "motion": dict(mixer="motion", class_token=False, pool="class_attention"),
    "motion_space_time": dict(mixer="motion"),
    "vivit": dict(mixer="none", pool="temporal_encoder", embed="separate", tubelet=2, frames=6),
    "am_flow": dict(mixer="am_flow", pool="last_frame"),
}


def make(name):
    """A model whose parameters are large enough that attention is uneven, and a clip."""
    model = base_config().model
    model.update(variant="Ti/8", width=16, depth=2, heads=2, mlp_dim=32, frames=FRAMES, image_size=16, dtype="float32", temporal_init="random")
    model.update(**{key: value for key, value in MODELS[name].items() if key in model})
    model.am_flow.update(bottleneck=8, tpu="none")
    model.motion.order = "space_time" if name == "motion_space_time" else "time_space"
    model.token_shift.update(tokens="all", fraction=0.25)
    built = build(model, {"t": 2})
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), built.abstract())
    return built, params, rng.integers(0, 256, (model.frames, 8 * GRID[0], 8 * GRID[1], 3), np.uint8)


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    model, params, pixels = make(request.param)
    return request.param, model, maps_of(model, params, pixels, heads=True)


def dense(maps, stage):
    """The map of one stage over all T N tokens, frame by frame; and which tokens it leaves alone."""
    spec, (frames, tokens), prefix = maps.spec, maps.reader.shape, maps.spec.prefix
    size, columns = frames * tokens, maps.grid[1]
    result, alone = np.zeros((size, size)), np.ones(size, bool)

    def number(t, n):
        return t * tokens + n

    for t in range(frames):
        for n in range(tokens):
            row, i = result[number(t, n)], number(t, n)
            if stage.kind == "space":
                alone[i] = False
                sources = range(frames) if n < prefix and spec.mixer in ("divided", "joint", "motion") else [t]
                for s in sources:
                    row[number(s, 0) : number(s, tokens)] += stage.weights[s, n] / len(sources)
            elif stage.kind == "joint":
                alone[i] = False
                weights = stage.weights[n if n < prefix else prefix + t * (tokens - prefix) + n - prefix]
                for s in range(frames):
                    row[number(s, 0) : number(s, prefix)] += weights[:prefix] / frames
                    row[number(s, prefix) : number(s, tokens)] += weights[prefix + s * (tokens - prefix) : prefix + (s + 1) * (tokens - prefix)]
            elif stage.kind == "time" and n >= prefix:
                alone[i] = False
                for s in range(frames):
                    row[number(s, n)] = stage.weights[n - prefix, t, s]
            elif stage.kind == "motion" and n >= prefix:
                alone[i] = False
                r, c = divmod(n - prefix, columns)
                across, side = -(-columns // 2), 2
                block, place = r // side * across + c // side, (t * side + r % side) * side + c % side
                for s in range(frames):
                    for dr in range(side):
                        for dc in range(side):
                            rr, cc = r // side * side + dr, c // side * side + dc
                            weight = stage.weights[block, place, (s * side + dr) * side + dc]
                            if cc < columns:
                                row[number(s, prefix + rr * columns + cc)] += weight
                            else:
                                assert weight == 0  # beyond the grid's edge
            elif stage.kind == "shift" and n < stage.moving:
                alone[i] = False
                for s in range(frames):
                    row[number(s, n)] = stage.weights[t, s]
    return result, alone


def test_rollout_is_the_product_of_all_maps(made):
    name, _, maps = made
    row = maps.reader.ravel().astype(np.float64)
    for stage in reversed([stage for stage in maps.stages if stage.block >= 0]):
        matrix, alone = dense(maps, stage)
        np.testing.assert_allclose(matrix[~alone].sum(axis=1), 1, atol=1e-5)
        eye = np.eye(len(matrix))
        mixed = matrix if stage.kind == "shift" else 0.5 * matrix + 0.5 * eye
        row = row @ np.where(alone[:, None], eye, mixed)
    found = rollout(maps)
    np.testing.assert_allclose(found.ravel(), row, atol=1e-5)
    assert found.shape == maps.reader.shape and abs(found.sum() - 1) < 1e-5 and found.min() >= 0
    if name not in ("none", "am_flow"):
        assert (found.sum(axis=1) > 0.02).all()  # all frames stand behind it


def test_stages_in_the_order_of_the_model(made):
    name, _, maps = made
    kinds = [stage.kind for stage in maps.stages]
    block = {"joint": ["joint"], "token_shift": ["shift", "space", "shift"], "motion": ["motion", "space"]}
    block["motion_space_time"] = ["space", "motion"]
    expected = {"motion": block["motion"] * 2 + ["class attention"], "divided": ["space", "time", "space"]}
    assert kinds == expected.get(name, 2 * block.get(name, ["space"]))


def test_maps_are_those_of_the_queries_and_keys():
    """The first block's map by hand, from the embedded tokens on; and the mean over heads."""
    model, params, pixels = make("none")
    stage = maps_of(model, params, pixels, heads=True).stages[0]
    vit = model.bind(params)
    x = np.asarray(vit.blocks[0].norm1(vit.embed(pixels[None])))[0]
    qkv = x @ params["blocks"]["0"]["attn"]["qkv"]["kernel"] + params["blocks"]["0"]["attn"]["qkv"]["bias"]
    q, k = (qkv[..., i * 16 : (i + 1) * 16].reshape(FRAMES, 9, 2, 8) for i in (0, 1))
    for head in range(2):
        logits = np.einsum("tqd,tkd->tqk", q[:, :, head], k[:, :, head]) / np.sqrt(8)
        odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
        np.testing.assert_allclose(stage.heads[:, head], odds / odds.sum(axis=-1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(stage.weights, stage.heads.mean(axis=1), atol=1e-6)


def test_looks_and_neighbours_have_the_shape_of_the_clip(made):
    maps = made[2]
    frames = len(maps.reader)
    for stage in maps.stages:
        if stage.kind == "shift":
            continue
        for head in [None] if stage.heads is None else [None, 0, 1]:
            assert looks(maps, stage, head).shape == (frames, *GRID)
            if stage.kind != "class attention":
                seen = neighbours(maps, stage, 1, 1, 2, head)
                assert seen.shape == (frames, *GRID) and np.nansum(seen) <= 1 + 1e-5
                if stage.kind in ("time", "motion"):
                    assert abs(np.nansum(seen) - 1) < 1e-5
                    assert np.isfinite(seen).sum() == frames * {"time": 1, "motion": 2}[stage.kind]  # the block at the edge is one column wide


def test_flow_of_heads_is_the_change_of_their_maps():
    model, params, pixels = make("none")
    maps = maps_of(model, params, pixels, heads=True)
    assert maps.stages[0].heads is not None
    flows = np.asarray(jax.jit(flow_of_heads, static_argnums=(0, 3))(model, params, jnp.asarray(pixels), 1))
    assert flows.shape == (2, *GRID, 2)
    still = np.asarray(jax.jit(flow_of_heads, static_argnums=(0, 3))(model, params, jnp.asarray(pixels[[1, 1, 1]]), 1))
    np.testing.assert_allclose(still, 1, atol=1e-4)  # no change: a softmax over zeros
    assert np.ptp(flows) > 0.01
