"""Hugging Face's ViViT against its own library: every block's tokens and the logits."""

import copy

import numpy as np
import pytest

from tests.weights.parity import ATOL, arrays_of, library, normalised, ours, pixels_of, randomise, read, saved
from vidjoint.errors import UserError
from vidjoint.weights.pretrained import from_arrays

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, tubelet_size=[2, 8, 8], num_frames=8)


def tiny(**changes):
    transformers = library("transformers")
    reference = transformers.VivitForVideoClassification(transformers.VivitConfig(**SIZES | changes, num_labels=5)).eval()
    randomise(reference)
    return reference


def at_size(reference, frames: int, side: int):
    """A second model of that size with the table stretched: time by nearest neighbour, the grid of each time step by torch's bicubic kernel.

    The library's own `interpolate_pos_encoding` takes the tokens of all time steps for one square grid.
    """
    torch, transformers = library("torch"), library("transformers")
    config = copy.deepcopy(reference.config)
    config.num_frames, config.image_size = frames, side
    other = transformers.VivitForVideoClassification(config).eval()
    state, name = dict(reference.state_dict()), "vivit.embeddings.position_embeddings"
    patches = state[name][0, 1:].unflatten(0, (4, 4, 4)).movedim(-1, 1)  # [T, D, H, W]
    patches = patches[[t * 4 // (frames // 2) for t in range(frames // 2)]]
    patches = torch.nn.functional.interpolate(patches, size=(side // 8, side // 8), mode="bicubic", align_corners=False)
    state[name] = torch.cat([state[name][0, :1], patches.movedim(1, -1).flatten(0, 2)])[None]
    other.load_state_dict(state)
    return other


def assert_equal(reference, pretrained, pixels):
    torch = library("torch")
    with torch.no_grad():
        expected = reference(normalised(pixels, pretrained), output_hidden_states=True)
    found, times = ours(pretrained, pixels), pixels.shape[1] // 2
    for i, hidden in enumerate(expected.hidden_states[1:]):
        hidden = hidden.numpy()
        token = np.repeat(hidden[:, None, :1], times, axis=1)
        tokens = np.concatenate([token, hidden[:, 1:].reshape(len(hidden), times, -1, hidden.shape[-1])], axis=2)
        np.testing.assert_allclose(found[f"block/{i}"], tokens, atol=ATOL)
    np.testing.assert_allclose(found["logits"], expected.logits.numpy(), atol=ATOL)


@pytest.mark.parametrize("act", ["gelu_fast", "gelu"])
def test_parity(tmp_path, act):
    reference = tiny(hidden_act=act)
    pretrained = read(saved(reference, tmp_path), reference.config.to_dict())
    in_memory = read(arrays_of(reference), reference.config.to_dict())
    assert all(np.array_equal(value, in_memory.params[name]) for name, value in pretrained.params.items())
    model = pretrained.config.model
    assert (pretrained.format, model.frames, model.tubelet, model.image_size, model.video_position) == ("vivit", 8, 2, 32, "space_time")
    assert_equal(reference, pretrained, pixels_of(2, 8, 32, 32))


@pytest.mark.parametrize(("frames", "side"), [(8, 48), (8, 24), (12, 32), (4, 48), (2, 24)])
def test_parity_at_another_size(frames, side):
    reference = tiny()
    pretrained = read(arrays_of(reference), reference.config.to_dict())
    assert_equal(at_size(reference, frames, side), pretrained, pixels_of(2, frames, side, side))


def test_a_model_without_classifier_is_told_from_an_image_model(tmp_path):
    """Its names are those of Hugging Face's ViT; the convolution over time tells them apart."""
    transformers, reference = library("transformers"), tiny()
    base = transformers.VivitModel(reference.config).eval()
    base.load_state_dict(reference.vivit.state_dict(), strict=False)
    pretrained = read(saved(base, tmp_path), SIZES)
    whole = read(arrays_of(reference), reference.config.to_dict())
    assert pretrained.format == "vivit" and set(pretrained.ignored) == {"pooler.dense.weight", "pooler.dense.bias"} and not pretrained.labels
    assert all(np.array_equal(value, whole.params[name]) for name, value in pretrained.params.items())


def test_a_picture_is_a_clip_of_one_time_step_that_stands_still():
    reference = tiny()
    pretrained = read(arrays_of(reference), reference.config.to_dict())
    assert pretrained.made_from["embed/proj/kernel"] == (
        "embeddings.patch_embeddings.projection.weight summed over the tubelet's frames, for still images",
    )
    for side in (32, 48):
        pixels = pixels_of(2, 1, side, side)
        image, clip = (ours(pretrained, np.repeat(pixels, frames, axis=1)) for frames in (1, 2))
        for name in image:
            np.testing.assert_allclose(image[name], clip[name], atol=ATOL)
        assert_equal(at_size(reference, 2, side), pretrained, np.repeat(pixels, 2, axis=1))


def test_normalisation_that_starts_with_an_offset():
    """Hugging Face's processor may scale pixels to -1..1 and then normalise them once more: ours does in one step what it says."""
    reference, config = tiny(), SIZES
    arrays = arrays_of(reference)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 127.5, "offset": True}
    for preprocessor, mean, std in (
        ({}, 0.5, 0.5),
        (half, 0.75, 0.25),
        (half | {"do_normalize": False}, 0.5, 0.5),
        (half | {"rescale_factor": 1 / 255, "offset": False}, 0.5, 0.5),
        (half | {"offset": False, "do_rescale": False}, 0.5 / 255, 0.5 / 255),
    ):
        model = from_arrays(arrays, {"config": config, "preprocessor": preprocessor}, "memory").config.model
        np.testing.assert_allclose([*model.mean, *model.std], [mean] * 3 + [std] * 3, rtol=1e-6)


@pytest.mark.parametrize("changes", [{"num_frames": 6}, {"image_size": 48}, {"image_size": [32, 48]}])
def test_a_config_that_is_of_another_model_is_refused(changes):
    with pytest.raises(UserError, match="ViViT"):
        from_arrays(arrays_of(tiny()), {"config": SIZES | changes}, "memory")
