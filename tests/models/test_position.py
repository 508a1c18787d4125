"""Position tables of another size: against loops, against torch and scipy, and against the models whose conventions they are."""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from vidjoint.models import position
from vidjoint.models.position import RESIZERS, resize_position, resize_space_time, resize_time, sinusoid

SIZES = [((4, 4), (7, 7)), ((7, 7), (4, 4)), ((4, 6), (7, 5)), ((3, 5), (8, 2)), ((5, 4), (5, 9)), ((2, 3), (1, 1)), ((16, 16), (37, 23))]
sized = functools.partial(pytest.mark.parametrize, ("grid", "new_grid"), ids=lambda grid: "x".join(map(str, grid)))
resize = jax.jit(resize_position, static_argnums=(1, 2, 3, 4))
resize_clip = jax.jit(resize_space_time, static_argnums=(1, 2, 3, 4))


def random_table(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def reference(name):
    """A library of the extra `parity`, or its module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own dependencies, on import
        module = pytest.importorskip(name, reason="needs the extra `parity`")
        pytest.importorskip("torch").set_num_threads(1)
    return module


# Oracles: one output row at a time, one neighbour at a time, along one axis


def cubic(t, a):
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def cubic_axis(x, new, offset=0.0):
    out = []
    for i in range(new):
        at = (i + 0.5) / ((new + offset) / len(x)) - 0.5
        rows = range(math.floor(at) - 1, math.floor(at) + 3)
        out.append(sum(cubic(at - j, -0.75) * x[min(max(j, 0), len(x) - 1)] for j in rows))
    return np.stack(out)


def antialias_axis(x, new):
    out, step = [], len(x) / new
    for i in range(new):
        weights = [cubic(((j + 0.5) - (i + 0.5) * step) / max(step, 1), -0.5) for j in range(len(x))]
        out.append(sum(w * row for w, row in zip(weights, x, strict=True)) / sum(weights))
    return np.stack(out)


def linear_axis(x, new, corners=False):
    out = []
    for i in range(new):
        at = (i * (len(x) - 1) / (new - 1) if new > 1 else 0) if corners else (i + 0.5) * len(x) / new - 0.5
        at = min(max(at, 0), len(x) - 1)
        below = min(int(at), len(x) - 2)
        out.append((below + 1 - at) * x[below] + (at - below) * x[below + 1])
    return np.stack(out)


def nearest_axis(x, new):
    return np.stack([x[i * len(x) // new] for i in range(new)])


AXES = {
    "bicubic": cubic_axis,
    "bicubic_antialias": antialias_axis,
    "bicubic_offset": functools.partial(cubic_axis, offset=0.1),
    "bilinear": linear_axis,
    "bilinear_corners": functools.partial(linear_axis, corners=True),
    "nearest": nearest_axis,
}


def oracle(patches, grid, new_grid, how):
    """[h * w, D] -> [h' * w', D], in float64."""
    if how == "nearest_1d":
        return nearest_axis(patches, math.prod(new_grid))
    if how == "sinusoid":
        count, width = math.prod(new_grid), patches.shape[1]
        return np.array([[(math.cos if j % 2 else math.sin)(p / 10000 ** (2 * (j // 2) / width)) for j in range(width)] for p in range(count)])
    axis, picture = AXES[how], patches.reshape(*grid, -1).astype(np.float64)
    picture = axis(picture, new_grid[0])
    return axis(picture.swapaxes(0, 1), new_grid[1]).swapaxes(0, 1).reshape(-1, patches.shape[1])


@sized(SIZES)
@pytest.mark.parametrize("how", RESIZERS)
def test_position_tables_are_resized_as_their_oracle_has_it(how, grid, new_grid):
    table = random_table(2 + math.prod(grid), 6)
    resized = resize(table, 2, grid, new_grid, how)
    assert resized.dtype == jnp.float32
    np.testing.assert_array_equal(resized[:2], table[:2])
    np.testing.assert_allclose(resized[2:], oracle(table[2:], grid, new_grid, how), atol=1e-5)
    np.testing.assert_allclose(resize_position(table[2:], 0, grid, new_grid, how), resized[2:], atol=1e-6)


@pytest.mark.parametrize("how", RESIZERS)
def test_a_table_of_the_right_size_is_left_alone(how):
    table = random_table(1 + 12, 4)
    assert resize_position(table, 1, (3, 4), (3, 4), how) is table
    assert resize_space_time(table, 1, (2, 2, 3), (2, 2, 3), how) is table


@pytest.mark.parametrize("how", sorted(RESIZERS.keys() - {"sinusoid"}))
def test_resizing_keeps_a_constant_table(how):
    np.testing.assert_allclose(resize(np.ones((12, 3), np.float32), 0, (3, 4), (5, 2), how), 1, atol=1e-6)


def test_every_interpolation_is_another():
    """Else a wrong name in a table of formats would go unnoticed."""
    table = random_table(16, 4)
    for new_grid in ((7, 7), (3, 3)):
        results = [np.asarray(resize(table, 0, (4, 4), new_grid, how)) for how in RESIZERS]
        assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize("size", [(4, 3, 3), (2, 5, 2), (8, 3, 4), (1, 3, 4), (1, 6, 6), (6, 2, 3)])
@pytest.mark.parametrize("how", RESIZERS)
def test_space_time_tables_are_resized_frame_by_frame(how, size):
    table, old = random_table(1 + 4 * 3 * 4, 6), (4, 3, 4)
    frames = table[1:].reshape(4, 12, 6)[[t * 4 // size[0] for t in range(size[0])]]
    if how == "sinusoid":  # of all tokens in one row
        expected = oracle(table[1:], None, size, how)
    elif size[1:] != old[1:]:
        expected = np.concatenate([oracle(frame, old[1:], size[1:], how) for frame in frames])
    else:
        expected = frames.reshape(-1, 6)
    resized = resize_clip(table, 1, old, size, how)
    np.testing.assert_array_equal(resized[0], table[0])
    np.testing.assert_allclose(resized[1:], expected, atol=1e-5)


def test_resize_time_is_nearest_and_gives_an_image_the_first_row():
    table = np.arange(8.0)[:, None]
    np.testing.assert_array_equal(resize_time(table, 1)[:, 0], [0])
    np.testing.assert_array_equal(resize_time(table, 4)[:, 0], [0, 2, 4, 6])
    np.testing.assert_array_equal(resize_time(table, 16)[:, 0], np.repeat(np.arange(8), 2))


# The libraries' own functions


def torch_resize(patches, grid, new_grid, how):
    torch = reference("torch")
    interpolate = torch.nn.functional.interpolate
    flat = torch.from_numpy(patches.T[None].copy())  # [1, D, h w]
    if how == "nearest_1d":
        return interpolate(flat, size=math.prod(new_grid), mode="nearest")[0].T.numpy()
    settings = {
        "bicubic": dict(size=new_grid, mode="bicubic"),
        "bicubic_antialias": dict(size=new_grid, mode="bicubic", antialias=True),
        "bicubic_offset": dict(scale_factor=tuple(float(new + 0.1) / old for old, new in zip(grid, new_grid, strict=True)), mode="bicubic"),
        "bilinear": dict(size=new_grid, mode="bilinear"),
        "nearest": dict(size=new_grid, mode="nearest"),
    }[how]
    return interpolate(flat.reshape(1, -1, *grid), **settings).flatten(2)[0].T.numpy()


@sized([*SIZES, ((37, 37), (64, 48)), ((64, 64), (14, 20))])
@pytest.mark.parametrize("how", ["bicubic", "bicubic_antialias", "bicubic_offset", "bilinear", "nearest", "nearest_1d"])
def test_resizing_equals_torch_s(how, grid, new_grid):
    patches = random_table(math.prod(grid), 6)
    np.testing.assert_allclose(resize(patches, 0, grid, new_grid, how), torch_resize(patches, grid, new_grid, how), atol=1e-5)


def test_nearest_neighbours_are_torch_s_for_every_size():
    """Also where its float32 falls short of a whole number: 14 to 46."""
    torch = reference("torch")
    for size in (*range(1, 33), 62, 196):
        rows = torch.arange(size, dtype=torch.float32)[None, None]
        for new_size in range(1, 70):
            expected = torch.nn.functional.interpolate(rows, size=new_size, mode="nearest")[0, 0].numpy().astype(int)
            np.testing.assert_array_equal(position.nearest_index(size, new_size), expected)


@sized(SIZES)
def test_bilinear_corners_equals_scipy_s_zoom(grid, new_grid):
    table = random_table(*grid, 6)
    expected = scipy.ndimage.zoom(table, (new_grid[0] / grid[0], new_grid[1] / grid[1], 1), order=1)
    resized = resize(table.reshape(-1, 6), 0, grid, new_grid, "bilinear_corners")
    np.testing.assert_allclose(np.reshape(resized, (*new_grid, 6)), expected, atol=1e-5)


def test_bilinear_corners_keeps_the_last_row_where_scipy_loses_it():
    table = random_table(28, 1)
    assert scipy.ndimage.zoom(table[:, 0], 0.5, order=1)[-1] == 0
    np.testing.assert_allclose(resize(table, 0, (28, 1), (14, 1), "bilinear_corners")[-1], table[-1], atol=1e-6)


@pytest.mark.parametrize(("count", "width"), [(20, 16), (1568, 48)])
def test_sinusoid_is_videomae_s(count, width):
    modeling = reference("transformers.models.videomae.modeling_videomae")
    np.testing.assert_array_equal(sinusoid(count, width), modeling.get_sinusoid_encoding_table(count, width)[0].numpy())


# The models: with black pixels, a projection without bias and no class token, what enters the first block is the table


MODELS = {  # class: (module, how)
    "ViTModel": ("vit", "bicubic"),
    "Dinov2Model": ("dinov2", "bicubic"),
    "Dinov2WithRegistersModel": ("dinov2_with_registers", "bicubic_antialias"),
    "CLIPVisionModel": ("clip", "bicubic"),
    "TimesformerModel": ("timesformer", "nearest"),
}
TINY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8)


def hugging_face(name, module, **changes):
    """A tiny model of theirs with random tables and nothing else in its embeddings."""
    torch = reference("torch")
    modeling = reference(f"transformers.models.{module}.modeling_{module}")
    config = reference(f"transformers.models.{module}.configuration_{module}")
    config = getattr(config, name.replace("Model", "Config"))(**TINY | changes)
    torch.manual_seed(0)
    with torch.no_grad():
        model = getattr(modeling, name)(config).eval()
        for key, value in model.named_parameters():
            if "class_embedding" in key or "cls_token" in key or key.endswith("projection.bias"):
                value.zero_()
            elif "position_embedding" in key or "time_embeddings" in key:
                value.normal_()
    return model


def entering(model, *shape, **options):
    """What the model's embeddings make of zeros of this shape: float[N, D] of the first example."""
    torch = reference("torch")
    with torch.no_grad():
        out = model.embeddings(torch.zeros(shape), **options)
    return (out[0] if isinstance(out, tuple) else out)[0].numpy()


@pytest.mark.parametrize("pixels", [(48, 48), (24, 56)])
@pytest.mark.parametrize("name", MODELS)
def test_tables_are_resized_as_hugging_face_s_models_do(name, pixels):
    module, how = MODELS[name]
    if module == "timesformer":
        model = hugging_face(name, module, num_frames=2, attention_type="space_only")
        found = entering(model, 1, 1, 3, *pixels)
    else:
        model = hugging_face(name, module, **({"num_register_tokens": 2} if "register" in module else {}))
        found = entering(model, 1, 3, *pixels, **({} if "dinov2" in module else {"interpolate_pos_encoding": True}))
        if "register" in module:
            found = np.delete(found, [1, 2], axis=0)
    table = next(value for key, value in model.named_parameters() if "position_embedding" in key).detach().numpy().reshape(17, 16)
    np.testing.assert_allclose(found, resize(table, 1, (4, 4), (pixels[0] // 8, pixels[1] // 8), how), atol=1e-5)


@pytest.mark.parametrize("frames", [1, 3, 8])
def test_time_tables_are_resized_as_hugging_face_s_timesformer_does(frames):
    model = hugging_face("TimesformerModel", "timesformer", num_frames=4)
    table, time = (getattr(model.embeddings, f"{name}_embeddings").detach().numpy()[0] for name in ("position", "time"))
    expected = np.asarray(resize(table, 1, (4, 4), (6, 3), "nearest"))[1:, None] + resize_time(time, frames)  # [N, T, D]: time runs fastest
    np.testing.assert_allclose(entering(model, 1, frames, 3, 48, 24)[1:], expected.reshape(-1, 16), atol=1e-5)


def test_space_time_tables_are_made_as_videomae_makes_them():
    model = hugging_face("VideoMAEModel", "videomae", image_size=48, num_frames=8, tubelet_size=2)
    found = entering(model, 1, 8, 3, 48, 48, bool_masked_pos=None)
    np.testing.assert_allclose(found, resize_clip(sinusoid(2 * 4 * 4, 16), 0, (2, 4, 4), (4, 6, 6), "sinusoid"), atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"class_token": False, "global_pool": "avg"}, {"no_embed_class": True}], ids=str)
@pytest.mark.parametrize("pixels", [(48, 48), (24, 56)])
def test_tables_are_resized_as_timm_does_while_running_and_loading(pixels, settings):
    torch, vision_transformer = reference("torch"), reference("timm.models.vision_transformer")
    tiny = dict(patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0) | settings
    model = vision_transformer.VisionTransformer(img_size=32, dynamic_img_size=True, **tiny).eval()
    with torch.no_grad():
        model.patch_embed.proj.bias.zero_()
        model.pos_embed.normal_()
        if model.cls_token is not None:
            model.cls_token.zero_()
        found = model._pos_embed(model.patch_embed(torch.zeros(1, 3, *pixels)))[0].numpy()
    table = model.pos_embed.detach().numpy()[0]
    prefix = len(table) - 16
    expected = np.asarray(resize(table, prefix, (4, 4), (pixels[0] // 8, pixels[1] // 8), "bicubic_antialias"))
    np.testing.assert_allclose(found[len(found) - len(expected) :], expected, atol=1e-5)
    other = vision_transformer.VisionTransformer(img_size=pixels, **tiny)
    loaded = vision_transformer.checkpoint_filter_fn({"pos_embed": model.pos_embed.detach()}, other)["pos_embed"][0].numpy()
    np.testing.assert_allclose(loaded, expected, atol=1e-5)
