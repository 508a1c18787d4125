"""Hugging Face's ViT against its own library: every block's tokens and the logits."""

import numpy as np
import pytest

from tests.weights.parity import ATOL, arrays_of, library, normalised, ours, pixels_of, randomise, read, saved

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "quick_gelu"])
@pytest.mark.parametrize("side", [32, 48, 24])
def test_parity(tmp_path, act, side):
    transformers, torch = library("transformers"), library("torch")
    config = transformers.ViTConfig(**SIZES, hidden_act=act, num_labels=5)
    reference = transformers.ViTForImageClassification(config).eval()
    randomise(reference)
    pretrained = read(saved(reference, tmp_path), config.to_dict())
    in_memory = read(arrays_of(reference), config.to_dict())
    assert all(np.array_equal(value, in_memory.params[name]) for name, value in pretrained.params.items())
    pixels = pixels_of(2, 1, side, side)
    with torch.no_grad():
        expected = reference(normalised(pixels, pretrained)[:, 0], output_hidden_states=True, interpolate_pos_encoding=True)
    found = ours(pretrained, pixels)
    for i, tokens in enumerate(expected.hidden_states[1:]):
        np.testing.assert_allclose(found[f"block/{i}"][:, 0], tokens.numpy(), atol=ATOL)
    np.testing.assert_allclose(found["logits"], expected.logits.numpy(), atol=ATOL)
