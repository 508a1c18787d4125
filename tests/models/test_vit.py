import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import oracles
from vidjoint.config import base_config
from vidjoint.models.build import PRESETS, Model, build, count_parameters
from vidjoint.models.macs import macs
from vidjoint.models.mixers import MIXERS
from vidjoint.models.spec import AMFlowSpec, DividedSpec, TemporalEncoderSpec, TokenShiftSpec, ViTSpec
from vidjoint.optim import join, split_frozen

AM_FLOW = AMFlowSpec(bottleneck=12, encoder_width=12, encoder_mlp=16, encoder_heads=2, tpu="tcn", tpu_width=12)
TINY = ViTSpec(width=24, depth=2, heads=3, mlp_dim=48, patch=8, frames=4, image_size=24, am_flow=AM_FLOW)
CLASSES = (("actions", 5), ("digits", 3))


def tiny(**changes) -> Model:
    return Model(dataclasses.replace(TINY, **changes), CLASSES)


def random_params(model: Model, seed: int = 0) -> dict:
    """Every parameter random: zero-initialised branches would hide mistakes."""
    leaves, tree = jax.tree.flatten(model.abstract())
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [rng.normal(scale=0.3, size=x.shape).astype(np.float32) for x in leaves])


# Compiled whole: one by one, the operations take far longer to compile
init = jax.jit(lambda model: model.init(jax.random.key(0)), static_argnums=0)
features = jax.jit(Model.features, static_argnums=0)
logits = jax.jit(Model.logits, static_argnums=0)
tokens_of = jax.jit(lambda model, params, pixels: model.bind(params).tokens(pixels), static_argnums=0)


def clip(frames: int, height: int = 24, width: int = 24, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (batch, frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("frames", "layer_scale"), [(1, 0.0), (4, 0.1)])
def test_frame_wise_equals_its_definition(frames, layer_scale):
    model = tiny(mixer="none", layer_scale=layer_scale)
    params = random_params(model)
    expected = oracles.frame_wise(clip(frames), oracles.numpy_tree(params), 3, 8)
    np.testing.assert_allclose(features(model, params, clip(frames)), expected, atol=1e-5)


@pytest.mark.parametrize(("frames", "image_temporal", "layer_scale"), [(1, "affine", 0.1), (4, "affine", 0.0), (1, "skip", 0.0), (4, "skip", 0.1)])
def test_divided_attention_equals_its_definition(frames, image_temporal, layer_scale):
    """LayerScale is of the image model's own residuals: the temporal branch has none."""
    model = tiny(mixer="divided", frames=frames, divided=DividedSpec(image_temporal=image_temporal), layer_scale=layer_scale)
    params = random_params(model)
    expected = oracles.divided(clip(frames), oracles.numpy_tree(params), 3, 8, skip_images=image_temporal == "skip")
    np.testing.assert_allclose(features(model, params, clip(frames)), expected, atol=1e-5)


def test_divided_attention_on_an_image_is_an_affine_map():
    """CoVeR, appendix A: over one frame the softmax is 1, so queries and keys of the temporal attention don't matter."""
    model = tiny(mixer="divided")
    params = random_params(model)
    other = jax.tree.map(np.copy, params)
    for block in other["blocks"].values():
        block["mixer"]["temporal_attn"]["qkv"]["kernel"][:, :48] += 1.0
    np.testing.assert_allclose(features(model, params, clip(1)), features(model, other, clip(1)), atol=1e-6)
    assert np.abs(features(model, params, clip(4)) - features(model, other, clip(4))).max() > 1e-3


@pytest.mark.parametrize(("frames", "layer_scale"), [(1, 0.0), (4, 0.1)])
def test_joint_attention_equals_its_definition(frames, layer_scale):
    model = tiny(mixer="joint", frames=frames, layer_scale=layer_scale)
    params = random_params(model)
    np.testing.assert_allclose(features(model, params, clip(frames)), oracles.joint(clip(frames), oracles.numpy_tree(params), 3, 8), atol=1e-5)


@pytest.mark.parametrize("tokens", ["class", "all"])
@pytest.mark.parametrize("direction", ["next_first", "previous_first"])
@pytest.mark.parametrize(("fraction", "fold"), [(1 / 8, 3), (1 / 4, 6)])
def test_token_shift_equals_its_definition(tokens, direction, fraction, fold):
    model = tiny(mixer="token_shift", token_shift=TokenShiftSpec(tokens, fraction, direction))
    params = random_params(model)
    for frames in (1, 4):
        expected = oracles.token_shift(clip(frames), oracles.numpy_tree(params), 3, 8, fold, tokens, direction == "next_first")
        np.testing.assert_allclose(features(model, params, clip(frames)), expected, atol=1e-5)


def test_fresh_divided_model_is_the_image_vit_with_its_class_attention_averaged_over_frames():
    """With the temporal branch at zero only the average of the class token's residual ties the frames together (TimeSformer)."""
    model = tiny(mixer="divided")
    params = init(model)
    fresh = oracles.numpy_tree(params)
    assert not any(np.any(fresh["blocks"][i]["mixer"]["temporal_fc"][name]) for i in ("0", "1") for name in ("kernel", "bias"))
    assert not np.any(fresh["embed"]["time"])
    pixels = clip(4)
    patches, token = oracles.embed(pixels, fresh["embed"], 8)
    x = np.concatenate([np.broadcast_to(token, (2, 4, 1, 24)), patches], axis=2)
    for block in oracles.ordered(fresh["blocks"]):
        residual = oracles.attention(oracles.layer_norm(x, block["norm1"]), block["attn"], 3)  # each frame by itself, as the image ViT
        residual[:, :, 0] = residual[:, :, 0].mean(axis=1, keepdims=True)
        x = x + residual
        x = x + oracles.mlp(oracles.layer_norm(x, block["norm2"]), block["mlp"])
    tokens = tokens_of(model, params, pixels)
    np.testing.assert_allclose(tokens, oracles.layer_norm(x, fresh["norm"]), atol=1e-5)
    np.testing.assert_array_equal(tokens[:, 0, 0], tokens[:, 3, 0])  # one class token per video


@pytest.mark.parametrize("mixer", MIXERS)
def test_order_of_frames_matters_to_mixers_only(mixer):
    model = tiny(mixer=mixer, token_shift=TokenShiftSpec("all", 0.25))
    params = random_params(model)
    forward, backward = (features(model, params, pixels) for pixels in (clip(4), clip(4)[:, ::-1]))
    difference = np.abs(forward - backward).max()
    assert difference < 1e-5 if mixer == "none" else difference > 1e-3


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 24, 24), (7, 24, 24), (3, 16, 40)])
def test_any_number_of_frames_and_any_size(mixer, frames, height, width):
    model = tiny(mixer=mixer)
    result = logits(model, init(model), clip(frames, height, width))
    assert {task: x.shape for task, x in result.items()} == {"actions": (2, 5), "digits": (2, 3)}
    assert all(np.isfinite(x).all() for x in result.values())


def test_sizes_that_the_patch_does_not_divide_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="20 x 24"):
        logits(model, init(model), clip(1, 20, 24))


@pytest.mark.parametrize("mixer", MIXERS)
def test_without_a_class_token_patches_are_averaged(mixer):
    model = tiny(mixer=mixer, class_token=False, pool="average", token_shift=TokenShiftSpec("all"))
    params = random_params(model)
    tokens = tokens_of(model, params, clip(4))
    assert tokens.shape == (2, 4, 9, 24)
    np.testing.assert_allclose(features(model, params, clip(4))[:, :24], tokens.mean(axis=(1, 2)), atol=1e-5)


@pytest.mark.parametrize(("mixer", "remat"), [*((mixer, "block") for mixer in MIXERS), ("divided", "dots")])
def test_remat_changes_nothing_but_memory(mixer, remat):
    def loss(params, model):
        return sum((x**2).sum() for x in model.logits(params, clip(4), jax.random.key(0)).values())

    model = tiny(mixer=mixer, drop_path=0.3)
    params = random_params(model)
    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, again = gradient(params, model), gradient(params, tiny(mixer=mixer, drop_path=0.3, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, again)
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda p: loss(p, tiny(mixer=mixer, remat=remat))))(params))
    assert "checkpoint" in jaxpr or "remat" in jaxpr


@pytest.mark.parametrize("remat", ["block", "dots"])
@pytest.mark.parametrize(("mixer", "frozen"), [("am_flow", ("embed/.*", r"blocks/\d+/(norm1|attn|norm2|mlp)/.*")), ("divided", ("blocks/0/.*",))])
def test_remat_with_frozen_parts_gives_the_same_gradients(mixer, frozen, remat):
    """Blocks of which other parts are frozen, or whose inputs no gradient is asked for, are traced once for all."""
    trained, rest = split_frozen(random_params(tiny(mixer=mixer, depth=3)), frozen)

    def gradient(**settings):
        model = tiny(mixer=mixer, depth=3, **settings)
        return jax.jit(jax.grad(lambda p: sum((x**2).sum() for x in model.logits(join(p, rest), clip(4)).values())))(trained)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), gradient(), gradient(remat=remat))


def test_remat_dots_keeps_what_dense_layers_make():
    """The backward pass makes no dense product of the forward pass again, and attention maps it does."""
    params = random_params(tiny(mixer="divided"))

    def count(remat: str) -> int:
        model = tiny(mixer="divided", remat=remat)
        loss = jax.grad(lambda p: sum((x**2).sum() for x in model.logits(p, clip(4)).values()))
        return str(jax.make_jaxpr(loss)(params)).count("name=dense")

    assert count("none") == count("dots") < count("block")


@pytest.mark.parametrize(("mixer", "pool"), [*((mixer, "class_token") for mixer in MIXERS), ("none", "frame_mean"), ("none", "temporal_encoder")])
def test_the_last_block_leaves_out_what_the_pool_does_not_read(mixer, pool):
    """Class tokens alone, but with AM flow, whose units read all tokens: the same features and gradients with fewer operations."""
    model = tiny(mixer=mixer, pool=pool, registers=2, temporal_encoder=TemporalEncoderSpec(depth=1))
    params = random_params(model)

    def of_all_tokens(params, pixels, key):
        vit = model.bind(params)
        x, branches = vit.encode(pixels)
        return jnp.concatenate([vit.pool(x, vit.norm, None), *branches], axis=-1)

    def gradient(function):
        return jax.jit(jax.value_and_grad(lambda params: (function(params, clip(4), None) ** 2).mean()))(params)

    def counted(function):
        return macs(function, params, clip(4), None)

    def features(params, pixels, key):
        return model.features(params, pixels)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient(features), gradient(of_all_tokens))
    tokens, frames, clips, width, hidden = 12, 4, 2, 24, 48
    left_out = (tokens - 1) * (width**2 + 2 * width * hidden)  # projection and MLP of a frame
    keys, askers = (tokens, tokens - 1) if mixer != "joint" else (3 + 9 * frames, 3 + 9 * frames - 1)
    left_out = clips * (frames * left_out + 2 * width * keys * askers * (frames if mixer != "joint" else 1))
    if mixer == "joint":  # its sequence has class token and registers once
        left_out = clips * (askers * width**2 + 2 * width * keys * askers + frames * (tokens - 1) * 2 * width * hidden)
    assert counted(of_all_tokens) - counted(features) == (0 if mixer == "am_flow" else left_out)


def test_projection_and_dense_layer_are_one_product_where_that_is_less():
    """36 patches of a clip against width 24: 36 D^2 + D^3 (and D^2 of the bias) in place of 72 D^2; 9 patches of an image stay with two."""

    def counted(mixer, frames):
        model = tiny(mixer=mixer, pool="average", depth=1)
        return macs(model.features, model.abstract(), clip(frames, batch=1))

    assert counted("divided", 1) - counted("none", 1) == 9 * (5 * 24**2 + 2 * 24)
    assert counted("divided", 4) - counted("none", 4) == 36 * (4 * 24**2 + 2 * 4 * 24) + 24**3 + 24**2


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    model, exact = tiny(mixer="divided", dtype="bfloat16"), tiny(mixer="divided")
    params = init(model)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert tokens_of(model, params, clip(4)).dtype == jnp.bfloat16
    result, expected = logits(model, params, clip(4)), logits(exact, params, clip(4))
    assert result["actions"].dtype == jnp.float32
    np.testing.assert_allclose(result["actions"], expected["actions"], atol=0.02)


def test_dropout_and_drop_path_need_a_key():
    model = tiny(drop_path=0.5, dropout=0.5)
    params = random_params(model)
    pixels = clip(2)
    np.testing.assert_array_equal(logits(model, params, pixels)["digits"], logits(model, params, pixels)["digits"])
    a, b = (logits(model, params, pixels, jax.random.key(i))["digits"] for i in (0, 1))
    assert np.abs(a - b).max() > 1e-3


def test_parameter_names_are_stable():
    leaves = jax.tree_util.tree_leaves_with_path(tiny(mixer="divided").abstract())
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}
    expected = {"embed/proj/kernel", "embed/position", "embed/class_token", "embed/time", "heads/actions/kernel", "heads/digits/bias", "norm/scale"}
    expected |= {"blocks/1/attn/qkv/kernel", "blocks/1/mlp/fc2/kernel", "blocks/0/norm1/scale", "blocks/0/mixer/temporal_fc/bias"}
    assert expected <= names


PUBLISHED = [  # millions of parameters (heads included where classes are given)
    ("Ti/16", "none", {"imagenet": 1000}, 8, 224, 5.72),
    ("S/16", "none", {"imagenet": 1000}, 8, 224, 22.05),
    ("B/16", "none", {"imagenet": 1000}, 8, 224, 86.57),
    ("L/16", "none", {"imagenet": 1000}, 8, 224, 304.33),
    ("H/14", "none", {"imagenet": 1000}, 8, 224, 632.05),
    ("B/16", "divided", {"k400": 400}, 8, 224, 121.57),  # TimeSformer-B
    ("L/16", "divided", {"k400": 400, "ssv2": 174, "mit": 339, "imagenet": 1000}, 16, 448, 431.88),  # CoVeR
]


@pytest.mark.parametrize(("variant", "mixer", "classes", "frames", "size", "millions"), PUBLISHED)
def test_parameter_counts(variant, mixer, classes, frames, size, millions):
    config = base_config()
    config.model.update(variant=variant, mixer=mixer, frames=frames, image_size=size)
    assert count_parameters(build(config.model, classes).abstract()) / 1e6 == pytest.approx(millions, abs=0.006)


def test_presets_can_be_overridden():
    config = base_config()
    config.model.update(variant="Ti/16", depth=3, patch=8)
    spec = build(config.model, {"a": 2}).spec
    assert (spec.width, spec.depth, spec.heads, spec.patch) == (PRESETS["Ti"][0], 3, 3, 8)
