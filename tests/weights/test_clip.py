"""CLIP's image tower against Hugging Face's library: every block's tokens and the features."""

import numpy as np
import pytest

from tests.weights.parity import arrays_of, block_outputs, compare, library, normalised, ours, pixels_of, randomise, read, refused_if_damaged, saved
from vidjoint.errors import UserError
from vidjoint.weights.pretrained import from_arrays

VISION = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8, projection_dim=24)
TEXT = VISION | dict(hidden_size=16, vocab_size=9, max_position_embeddings=8)


def model_of(kind: str, act: str = "quick_gelu"):
    transformers = library("transformers")
    config = transformers.CLIPVisionConfig(**VISION, hidden_act=act)
    if "Vision" not in kind:
        text = {key: value for key, value in TEXT.items() if key not in ("image_size", "patch_size")}
        config = transformers.CLIPConfig(text_config=text, vision_config=config.to_dict(), projection_dim=24)
    model = getattr(transformers, kind)(config).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("kind, act", [("CLIPVisionModel", "quick_gelu"), ("CLIPVisionModelWithProjection", "gelu"), ("CLIPModel", "quick_gelu")])
def test_parity(tmp_path, kind, act):
    reference = model_of(kind, act)
    pretrained = read(saved(reference, tmp_path), reference.config.to_dict())
    in_memory = read(arrays_of(reference), reference.config.to_dict())
    assert all(np.array_equal(value, in_memory.params[name]) for name, value in pretrained.params.items())
    assert ("visual_projection.weight" in pretrained.ignored) == (kind != "CLIPVisionModel") and not pretrained.labels
    assert any("text" in name for name in pretrained.ignored) == (kind == "CLIPModel")
    tower = getattr(reference, "vision_model", reference)
    for side in (32, 48, 24):
        pixels = pixels_of(2, 1, side, side)
        expected, blocks = block_outputs(tower.encoder.layers, tower, normalised(pixels, pretrained)[:, 0], interpolate_pos_encoding=True)
        compare(ours(pretrained, pixels), blocks, features=expected.pooler_output)


def test_names_of_older_files(tmp_path):
    """Before transformers 5 a `CLIPVisionModel` had a prefix and wrote down the numbers of its positions."""
    plain = saved(model_of("CLIPVisionModel"), tmp_path)
    older = {f"vision_model.{name}": array for name, array in plain.items()} | {"vision_model.embeddings.position_ids": np.arange(17)[None]}
    config = {"num_attention_heads": 2}
    wanted, found = read(plain, config), read(older, config)
    assert all(np.array_equal(array, found.params[name]) for name, array in wanted.params.items())


def test_damaged_files(tmp_path):
    reference = model_of("CLIPVisionModel")
    refused_if_damaged(saved(reference, tmp_path), reference.config.to_dict())


@pytest.mark.parametrize(
    "change", [{"layer_norm_eps": None}, {"layer_norm_eps": "x"}, {"hidden_act": "relu"}, {"num_attention_heads": 3}, {"vision_config": [1]}]
)
def test_settings_that_make_no_sense(tmp_path, change):
    reference = model_of("CLIPVisionModel")
    with pytest.raises(UserError, match="memory") as caught:
        from_arrays(saved(reference, tmp_path), {"config": reference.config.to_dict() | change}, "memory")
    assert len(caught.value.lines) == 1


def test_a_classifier_of_unnormed_patches_is_refused(tmp_path):
    reference = model_of("CLIPForImageClassification")
    with pytest.raises(UserError, match=r"memory.*classifier.*averages"):
        from_arrays(saved(reference, tmp_path), {"config": reference.config.to_dict()}, "memory")
