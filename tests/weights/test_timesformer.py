"""TimeSformer, with its three kinds of attention, against Hugging Face's library: every block's tokens and the logits; and the official names."""

import copy

import numpy as np
import pytest

from tests.weights.parity import ATOL, arrays_of, library, normalised, ours, pixels_of, randomise, read, saved
from vidjoint.weights.formats import TIMESFORMER
from vidjoint.weights.formats.timesformer import BLOCK, HF_BLOCK, HF_TIMESFORMER
from vidjoint.weights.pretrained import from_arrays, swap_colours
from vidjoint.weights.translate import Sizes, back

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8, num_frames=4)
KINDS = {"divided_space_time": "divided", "joint_space_time": "joint", "space_only": "none"}
OFFICIAL = {  # Hugging Face's name -> the official one
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.time_embeddings": "time_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "classifier": "head",
}


def tiny(kind="divided_space_time", **changes):
    transformers = library("transformers")
    reference = transformers.TimesformerForVideoClassification(
        transformers.TimesformerConfig(**SIZES | changes, attention_type=kind, num_labels=5)
    ).eval()
    randomise(reference)
    return reference


def at_size(reference, frames: int, side: int):
    """A second model of that size, whose tables are stretched as the library would: it can run divided attention at the size of its config alone."""
    torch, transformers = library("torch"), library("transformers")
    config = copy.deepcopy(reference.config)
    config.num_frames, config.image_size = frames, side
    other = transformers.TimesformerForVideoClassification(config).eval()
    state = dict(reference.state_dict())
    for name, table in state.items():
        if name.endswith("time_embeddings"):
            state[name] = torch.nn.functional.interpolate(table.transpose(1, 2), size=frames, mode="nearest").transpose(1, 2)
        if name.endswith("position_embeddings"):
            patches = table[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
            patches = torch.nn.functional.interpolate(patches, size=(side // 8, side // 8), mode="nearest")
            state[name] = torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)
    other.load_state_dict(state)
    return other


def tokens_of(hidden: np.ndarray, frames: int, patches: int) -> np.ndarray:
    """Theirs, [B, 1 + N T, D] with time the fastest axis or, of space-only attention, [B T, 1 + N, D] -> ours, [B, T, 1 + N, D]."""
    if hidden.shape[1] == 1 + patches:
        return hidden.reshape(-1, frames, *hidden.shape[1:])
    rest = hidden[:, 1:].reshape(len(hidden), patches, frames, -1).swapaxes(1, 2)
    return np.concatenate([np.repeat(hidden[:, None, :1], frames, axis=1), rest], axis=2)


def assert_equal(reference, pretrained, frames, side):
    torch = library("torch")
    pixels = pixels_of(2, frames, side, side)
    with torch.no_grad():
        expected = reference(normalised(pixels, pretrained), output_hidden_states=True)
        logits = expected.logits
        if reference.config.attention_type == "space_only":  # theirs are of single frames; the official code averages these before the last norm
            tokens = expected.hidden_states[-1].unflatten(0, (2, frames)).mean(dim=1)
            logits = reference.classifier(reference.timesformer.layernorm(tokens)[:, 0])
    found = ours(pretrained, pixels)
    for i, hidden in enumerate(expected.hidden_states[1:]):
        np.testing.assert_allclose(found[f"block/{i}"], tokens_of(hidden.numpy(), frames, (side // 8) ** 2), atol=ATOL)
    np.testing.assert_allclose(found["logits"], logits.numpy(), atol=ATOL)


@pytest.mark.parametrize("kind", KINDS)
def test_parity(tmp_path, kind):
    reference = tiny(kind)
    pretrained = read(saved(reference, tmp_path), reference.config.to_dict())
    model = pretrained.config.model
    assert (pretrained.format, model.mixer, model.frames) == ("hf_timesformer", KINDS[kind], 4)
    assert model.mean == (0.45,) * 3 and model.std == (0.225,) * 3 and pretrained.config.tasks.pretrained.media == "video"
    assert_equal(reference, pretrained, 4, 32)


@pytest.mark.parametrize(("frames", "side"), [(6, 48), (3, 24), (1, 32)])
@pytest.mark.parametrize("kind", KINDS)
def test_parity_at_another_size(kind, frames, side):
    reference = tiny(kind)
    pretrained = read(arrays_of(reference), reference.config.to_dict())
    if kind == "divided_space_time":  # the library's other kinds stretch their tables themselves
        reference = at_size(reference, frames, side)
    assert_equal(reference, pretrained, frames, side)


def test_without_biases_and_with_another_gelu():
    reference = tiny(qkv_bias=False, hidden_act="gelu_new", layer_norm_eps=1e-3)
    pretrained = read(arrays_of(reference), reference.config.to_dict())
    assert not pretrained.params["blocks/1/mixer/temporal_attn/qkv/bias"].any() and pretrained.config.model.gelu == "tanh"
    assert_equal(reference, pretrained, 4, 32)


def test_the_model_without_a_classifier():
    reference = tiny()
    whole, headless = (read(arrays_of(module), reference.config.to_dict()) for module in (reference, reference.timesformer))
    assert not headless.labels and {f"heads/pretrained/{name}" for name in ("kernel", "bias")} == whole.params.keys() - headless.params.keys()
    assert all(np.array_equal(value, whole.params[name]) for name, value in headless.params.items())


def official(arrays: dict) -> dict:
    """The same arrays under the names of the official code's files."""
    blocks = {theirs: BLOCK[name] for name, theirs in HF_BLOCK.items()}
    renamed = {}
    for name, array in arrays.items():
        module, _, last = name.removeprefix("timesformer.").rpartition(".")
        if module.startswith("encoder.layer."):
            _, _, number, module = module.split(".", 3)
            renamed[f"model.blocks.{number}.{blocks[module]}.{last}"] = array
        elif module in OFFICIAL:
            renamed[f"model.{OFFICIAL[module]}.{last}"] = array
        else:
            renamed[f"model.{OFFICIAL[f'{module}.{last}']}"] = array
    return renamed


@pytest.mark.parametrize("kind", KINDS)
def test_official_names_give_the_same_model(kind):
    reference = tiny(kind)
    arrays = arrays_of(reference)
    expected = read(arrays, reference.config.to_dict())
    space_only = kind == "space_only"  # whose names are those of an image model
    assert TIMESFORMER.recognises(official(arrays)) == (not space_only)
    changes = {"heads": 2} | ({"frames": 4} if space_only else {})
    found = from_arrays(official(arrays), {}, "memory", TIMESFORMER if space_only else None, changes)
    assert found.format == "timesformer" and not found.unexplained and found.params.keys() == expected.params.keys()
    assert all(np.array_equal(value, found.params[name]) for name, value in expected.params.items())
    assert found.config.model == expected.config.model


def test_official_names_as_the_published_files_have_them():
    names = official(arrays_of(tiny()))
    for name in (
        "temporal_norm1.weight",
        "temporal_attn.qkv.bias",
        "temporal_attn.proj.weight",
        "temporal_fc.weight",
        "norm1.bias",
        "attn.qkv.weight",
    ):
        assert f"model.blocks.1.{name}" in names
    assert {
        "model.cls_token",
        "model.pos_embed",
        "model.time_embed",
        "model.patch_embed.proj.weight",
        "model.norm.weight",
        "model.head.bias",
    } <= names.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_back_gives_the_file(kind):
    reference = tiny(kind)
    arrays = arrays_of(reference)
    written = back(
        HF_TIMESFORMER, read(arrays).params, Sizes(heads=2, patch=8), lambda name: name if name.startswith("classifier") else f"timesformer.{name}"
    )
    assert written.keys() == arrays.keys() and all(np.array_equal(array, arrays[name]) for name, array in written.items())


def test_weights_for_blue_green_red():
    """A model that was trained on pixels in that order sees in red, green, blue, once its colours are swapped, what it saw."""
    torch, reference = library("torch"), tiny()
    preprocessor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    weights = from_arrays(arrays_of(reference), {"config": reference.config.to_dict(), "preprocessor": preprocessor}, "memory")
    before = {name: value.copy() for name, value in weights.params.items()}
    pixels = pixels_of(2, 4, 32, 32)
    with torch.no_grad():
        expected = reference(normalised(pixels[..., ::-1], weights)).logits
    swapped = swap_colours(weights)
    np.testing.assert_allclose(ours(swapped, pixels)["logits"], expected.numpy(), atol=ATOL)
    assert swapped.config.model.mean == (0.3, 0.2, 0.1) and weights.config.model.mean == (0.1, 0.2, 0.3)
    assert all(np.array_equal(value, before[name]) for name, value in weights.params.items())
    twice = swap_colours(swapped)
    assert twice.config == weights.config and all(np.array_equal(value, before[name]) for name, value in twice.params.items())
