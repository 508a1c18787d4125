"""Embeddings of videos: shared with images or separate, of patches or of tubelets."""

import jax
import numpy as np
import pytest

from tests.models import oracles, oracles_embed, test_vit
from tests.models.test_vit import features, random_params
from vidjoint.config import base_config
from vidjoint.models.build import build, count_parameters
from vidjoint.models.embed import inflate
from vidjoint.models.mixers import MIXERS
from vidjoint.models.pooling import NEED_CLASS_TOKEN, POOLS

embedded = jax.jit(lambda model, params, pixels: model.bind(params).embed(pixels), static_argnums=0)
fresh = jax.jit(lambda model: {part: model.init(jax.random.key(0))[part] for part in ("embed", "heads")}, static_argnums=0)  # first and last drawn


def tiny(**changes):
    return test_vit.tiny(**{"depth": 1, "image_size": 16} | changes)


def separate(**changes):
    return tiny(embed="separate", **changes)


def clip(frames: int) -> np.ndarray:
    return test_vit.clip(frames, 16, 16)


@pytest.mark.parametrize(("tubelet", "time"), [(1, False), (2, True), (3, False)])
def test_it_equals_its_definition(tubelet, time):
    model = separate(mixer="joint" if time else "none", frames=2 * tubelet, tubelet=tubelet)
    params = random_params(model)
    for frames in (1, 2 * tubelet):
        patches, token = oracles_embed.tubelets(clip(frames), oracles.numpy_tree(params["embed"]), 8, tubelet, time)
        tokens = embedded(model, params, clip(frames))
        assert tokens.shape == (2, max(frames // tubelet, 1), 5, 24)
        np.testing.assert_allclose(tokens[:, :, 1:], patches, atol=1e-5)
        np.testing.assert_allclose(tokens[:, :, 0], np.broadcast_to(token, tokens[:, :, 0].shape), atol=1e-6)


def test_videos_and_images_have_parameters_of_their_own():
    model = separate()
    params = random_params(model)
    before = {frames: embedded(model, params, clip(frames)) for frames in (1, 4)}
    for name, touched in {"proj": [1], "position": [1], "video_proj": [4], "video_position": [4], "class_token": [1, 4]}.items():
        other = params | {"embed": params["embed"] | {name: jax.tree.map(lambda x: x + 0.5, params["embed"][name])}}
        for frames in (1, 4):
            same = np.array_equal(embedded(model, other, clip(frames)), before[frames])
            assert same == (frames not in touched), (name, frames)


def test_a_fresh_separate_model_is_the_shared_one():
    shared, own = (make(mixer="divided", temporal_init="random") for make in (tiny, separate))
    params, more = fresh(shared), fresh(own)
    rest = more | {"embed": {name: value for name, value in more["embed"].items() if not name.startswith("video_")}}
    jax.tree.map(np.testing.assert_array_equal, rest, params)  # what is drawn after the embedding is not drawn anew
    params, more = random_params(shared) | params, random_params(shared) | more
    for frames in (1, 4):
        np.testing.assert_array_equal(embedded(own, more, clip(frames)), embedded(shared, params, clip(frames)))


@pytest.mark.parametrize("tubelet", [2, 3])
def test_a_fresh_tubelet_model_sees_each_tubelet_s_central_frame(tubelet):
    """ViViT 3.4, central frame initialisation, against the embedding of those frames alone."""
    frames = 2 * tubelet
    model = separate(mixer="joint", frames=frames, tubelet=tubelet)
    params = random_params(model) | fresh(model)
    params["embed"]["class_token"] = np.full(24, 0.5, np.float32)
    assert params["embed"]["time"].shape == (2, 24)
    central = clip(frames)[:, tubelet // 2 :: tubelet]
    patches, token = oracles.embed(central, oracles.numpy_tree(params["embed"]), 8, time=True)
    tokens = embedded(model, params, clip(frames))
    assert tokens.shape == (2, 2, 5, 24)
    np.testing.assert_allclose(tokens[:, :, 1:], patches, atol=1e-5)
    np.testing.assert_allclose(tokens[:, :, 0], np.broadcast_to(token, (2, 2, 24)), atol=1e-6)


def test_the_initial_kernel_is_whole_in_one_frame_and_zero_in_the_others():
    """Not zero along another axis, such as the width of the patch: a bug that the reference code has."""
    model = separate(frames=8, tubelet=4)
    params = fresh(model)
    video = np.asarray(params["embed"]["video_proj"]["kernel"]).reshape(4, 8, 8, 3, 24)  # frame, row, column, colour, width
    image = np.asarray(params["embed"]["proj"]["kernel"]).reshape(8, 8, 3, 24)
    assert (image != 0).all()
    np.testing.assert_array_equal(video[2], image)
    assert not video[[0, 1, 3]].any()
    np.testing.assert_array_equal(params["embed"]["video_position"], params["embed"]["position"])
    np.testing.assert_array_equal(params["embed"]["video_proj"]["bias"], params["embed"]["proj"]["bias"])


def test_the_average_kernel_sees_a_still_video_as_an_image():
    model = separate(mixer="none", frames=6, tubelet=3, tubelet_init="average")
    params = random_params(model) | fresh(model)
    still = np.repeat(clip(1), 6, axis=1)
    tokens = embedded(model, params, still)
    np.testing.assert_allclose(tokens, np.broadcast_to(embedded(model, params, clip(1)), tokens.shape), atol=1e-5)
    kernel = np.arange(6.0).reshape(3, 2)
    np.testing.assert_allclose(inflate(kernel, 3, "average"), np.concatenate([kernel / 3] * 3), rtol=1e-6)
    np.testing.assert_array_equal(inflate(kernel, 2, "central_frame"), np.concatenate([0 * kernel, kernel]))


@pytest.mark.parametrize("frames", [1, 4, 8])
def test_joint_attention_over_tubelets_is_vivit_s_first_model(frames):
    model = separate(mixer="joint", frames=4, tubelet=2)
    params = random_params(model)
    expected = oracles_embed.vivit(clip(frames), oracles.numpy_tree(params), 3, 8, 2)
    np.testing.assert_allclose(features(model, params, clip(frames)), expected, atol=1e-5)  # of 8 frames: time steps 0, 0, 1, 1


@pytest.mark.parametrize("frames", [1, 4, 8, 16])
@pytest.mark.parametrize("mixer", ["none", "joint"])
def test_a_table_over_space_and_time_equals_its_definition(mixer, frames):
    """A row for each token of a clip of 8 frames, so 4 time steps: of 16 frames each takes a step's rows twice, of 4 frames steps 0 and 2 count."""
    model = separate(mixer=mixer, frames=8, tubelet=2, video_position="space_time")
    params = random_params(model)
    assert params["embed"]["video_position"].shape == (1 + 4 * 4, 24) and "time" not in params["embed"]
    patches, token = oracles_embed.tubelets(clip(frames), oracles.numpy_tree(params["embed"]), 8, 2)
    tokens = embedded(model, params, clip(frames))
    np.testing.assert_allclose(tokens[:, :, 1:], patches, atol=1e-5)
    np.testing.assert_allclose(tokens[:, :, 0], np.broadcast_to(token, tokens[:, :, 0].shape), atol=1e-6)
    if mixer == "joint":
        expected = oracles_embed.vivit(clip(frames), oracles.numpy_tree(params), 3, 8, 2, time=False)
        np.testing.assert_allclose(features(model, params, clip(frames)), expected, atol=1e-5)


@pytest.mark.parametrize("class_token", [True, False])
def test_a_fresh_table_over_space_and_time_is_the_image_s_at_every_time(class_token):
    changes = dict(mixer="joint", frames=6, tubelet=2, class_token=class_token, pool="class_token" if class_token else "average")
    over_time, grid = separate(video_position="space_time", **changes), separate(**changes)
    params = fresh(over_time)
    assert params["embed"]["video_position"].shape == (int(class_token) + 3 * 4, 24)
    without = fresh(grid)
    rest = {name: value for name, value in without["embed"].items() if name not in ("time", "video_position")}
    jax.tree.map(np.testing.assert_array_equal, {name: params["embed"][name] for name in rest}, rest)
    for frames in (1, 6, 4):
        tokens = [embedded(model, random_params(model) | part, clip(frames)) for model, part in ((over_time, params), (grid, without))]
        np.testing.assert_allclose(*tokens, atol=1e-6)  # the table over time starts as zeros


@pytest.mark.parametrize(("mixer", "pool"), [("divided", "class_token"), ("token_shift", "class_token"), ("none", "average")])
def test_tubelets_take_the_place_of_frames(mixer, pool):
    """Tubelets that see one frame each give what these frames alone give. Joint attention: above."""
    changes = dict(mixer=mixer, pool=pool, class_token=pool in NEED_CLASS_TOKEN)
    model, image = separate(frames=6, tubelet=2, **changes), tiny(frames=3, **changes)
    params = random_params(image)
    embed = params["embed"]
    own = {"video_proj": embed["proj"] | {"kernel": inflate(embed["proj"]["kernel"], 2, "central_frame")}, "video_position": embed["position"]}
    inflated = params | {"embed": embed | own}
    assert jax.tree.map(np.shape, inflated) == jax.tree.map(lambda x: x.shape, model.abstract())
    np.testing.assert_allclose(features(model, inflated, clip(6)), features(image, params, clip(6)[:, 1::2]), atol=1e-5)


@pytest.mark.parametrize(("mixer", "pool"), [*((mixer, "class_token") for mixer in MIXERS), *(("none", pool) for pool in POOLS)])
def test_no_mixer_and_no_pool_counts_frames(mixer, pool):
    """All parameters but the embedding's have the shapes of a model of so many frames as there are tubelets, and any length goes through."""
    changes = dict(mixer=mixer, pool=pool, class_token=pool in NEED_CLASS_TOKEN)
    model, image = separate(frames=6, tubelet=2, **changes), tiny(frames=3, **changes)
    params = model.abstract()
    rest = {name: x for name, x in params["embed"].items() if not name.startswith("video_")}
    assert params | {"embed": rest} == image.abstract()
    for frames in (1, 2, 8):
        pixels = jax.ShapeDtypeStruct((2, frames, 16, 16, 3), np.uint8)
        assert jax.eval_shape(model.features, params, pixels).shape[0] == 2


def test_frames_that_the_tubelet_does_not_divide_are_refused():
    model = separate(frames=4, tubelet=2)
    params = random_params(model)
    with pytest.raises(ValueError, match="a clip of 3 frames cannot be cut into tubelets of 2"):
        features(model, params, clip(3))
    assert features(model, params, clip(1)).shape == (2, 24)  # one frame is an image


def test_size_of_polyvit_s_second_embedding():
    """B/16 with tubelets of two frames: a projection from 2 x 16 x 16 x 3 values and 197 positions more than the shared model."""

    def size(**changes):
        settings = base_config().model
        settings.update(variant="B/16", frames=32, depth=1, **changes)
        return count_parameters(build(settings, {"k400": 400}).abstract())

    assert size(embed="separate", tubelet=2) - size() == (2 * 16 * 16 * 3 + 1 + 197) * 768
