"""Hugging Face's VideoMAE against its own library: every block's tokens and the logits."""

import copy

import numpy as np
import pytest

from tests.weights.parity import ATOL, arrays_of, library, normalised, ours, pixels_of, randomise, read, saved
from vidjoint.models.position import sinusoid

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8, num_frames=8)
DECODER = dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=24)


def tiny(kind="ForVideoClassification", **changes):
    transformers = library("transformers")
    config = transformers.VideoMAEConfig(**SIZES | DECODER | changes, num_labels=5)
    reference = getattr(transformers, f"VideoMAE{kind}")(config).eval()
    randomise(reference)
    return reference


def at_size(reference, frames: int, side: int):
    """A second model of that size with the same parameters: the library makes its table when the model is built."""
    config = copy.deepcopy(reference.config)
    config.num_frames, config.image_size = frames, side
    other = type(reference)(config).eval()
    other.load_state_dict(reference.state_dict())
    return other


def assert_equal(reference, pretrained, pixels):
    torch = library("torch")
    with torch.no_grad():
        expected = reference(normalised(pixels, pretrained), output_hidden_states=True)
    found, times = ours(pretrained, pixels), max(pixels.shape[1] // reference.config.tubelet_size, 1)
    for i, hidden in enumerate(expected.hidden_states[1:]):
        tokens = hidden.numpy().reshape(len(pixels), times, -1, hidden.shape[-1])
        np.testing.assert_allclose(found[f"block/{i}"], tokens, atol=ATOL)
    if pretrained.labels:
        np.testing.assert_allclose(found["logits"], expected.logits.numpy(), atol=ATOL)
    return found, expected


@pytest.mark.parametrize("changes", [{}, {"use_mean_pooling": False}, {"qv_bias": False}, {"tubelet_size": 4}], ids=str)
def test_parity(tmp_path, changes):
    reference = tiny(**changes)
    arrays = saved(reference, tmp_path)
    pretrained = read(arrays, reference.config.to_dict())
    in_memory = read(arrays_of(reference), reference.config.to_dict())
    assert all(np.array_equal(value, in_memory.params[name]) for name, value in pretrained.params.items())
    model = pretrained.config.model
    assert (pretrained.format, model.frames, model.class_token) == ("video_mae", 8, False)
    assert model.pool == ("patch_mean" if reference.config.use_mean_pooling else "first_token")
    assert_equal(reference, pretrained, pixels_of(2, 8, 32, 32))


@pytest.mark.parametrize(("frames", "side"), [(8, 48), (8, 24), (12, 32), (2, 48)])
def test_parity_at_another_size(frames, side):
    reference = tiny()
    pretrained = read(arrays_of(reference), reference.config.to_dict())
    assert_equal(at_size(reference, frames, side), pretrained, pixels_of(2, frames, side, side))


def test_keys_have_no_bias(tmp_path):
    """The published files name the other two in a way of their own."""
    arrays = saved(tiny(), tmp_path)
    assert {name.rpartition(".")[2] for name in arrays if ".attention.attention." in name} == {"q_bias", "v_bias", "weight"}
    bias = read(arrays, SIZES).params["blocks/1/attn/qkv/bias"]
    assert bias[:32].all() and not bias[32:64].any() and bias[64:].all()


def test_the_last_norm_has_an_epsilon_of_its_own():
    """Where the mean of the patches hardly varies from channel to channel, it decides the logits."""
    torch, reference = library("torch"), tiny()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith(("output.dense.weight", "output.dense.bias", "projection.weight", "projection.bias")):
                parameter.mul_(0.0)
    pretrained = read(arrays_of(reference), reference.config.to_dict())
    assert (pretrained.config.model.norm_eps, pretrained.config.model.last_norm_eps) == (1e-12, 1e-5)
    reference.videomae.embeddings.position_embeddings *= 1e-3
    pretrained.params["embed/video_position"] = pretrained.params["embed/video_position"] * np.float32(1e-3)
    assert_equal(reference, pretrained, pixels_of(2, 8, 32, 32))


@pytest.mark.parametrize("pooled", [True, False])
def test_the_model_without_a_classifier(tmp_path, pooled):
    """With mean pooling it has no last norm either: ours is then one of ones and zeros, and the report says so."""
    reference = tiny("Model", use_mean_pooling=pooled)
    pretrained = read(saved(reference, tmp_path), reference.config.to_dict())
    found, expected = assert_equal(reference, pretrained, pixels_of(2, 8, 32, 32))
    assert ("ones" in pretrained.made_from["norm/scale"][0]) == pooled
    if not pooled:
        np.testing.assert_allclose(found["features"], expected.last_hidden_state.mean(dim=1).numpy(), atol=ATOL)


def test_the_encoder_of_a_pretraining_model(tmp_path):
    reference = tiny("ForPreTraining", use_mean_pooling=False)
    pretrained = read(saved(reference, tmp_path), reference.config.to_dict())
    assert pretrained.format == "video_mae" and not pretrained.labels and pretrained.config.model.depth == 2
    assert {name.split(".")[0] for name in pretrained.ignored} == {"decoder", "encoder_to_decoder", "mask_token"}
    assert_equal(reference.videomae, pretrained, pixels_of(2, 8, 32, 32))


def test_sizes_without_a_config():
    """The table is in no file: it is that of 16 frames of 224 pixels."""
    pretrained = read(arrays_of(tiny()), heads=2)
    model = pretrained.config.model
    assert (model.frames, model.image_size) == (16, 224) and pretrained.params["embed/video_position"].shape == (8 * 28 * 28, 32)
    assert pretrained.made_from["embed/video_position"] == ("a fixed sinusoid",)
    np.testing.assert_array_equal(pretrained.params["embed/position"], sinusoid(28 * 28, 32))


def test_a_picture_is_a_clip_of_one_time_step_that_stands_still():
    reference = tiny()
    pretrained = read(arrays_of(reference), reference.config.to_dict())
    for side in (32, 48):
        pixels = pixels_of(2, 1, side, side)
        image, clip = (ours(pretrained, np.repeat(pixels, frames, axis=1)) for frames in (1, 2))
        for name in image:
            np.testing.assert_allclose(image[name], clip[name], atol=ATOL)
        assert_equal(at_size(reference, 2, side), pretrained, np.repeat(pixels, 2, axis=1))
