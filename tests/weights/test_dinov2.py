"""DINOv2 against Hugging Face's library and, for the official files, timm: every block's tokens, features and logits."""

import numpy as np
import pytest

from tests.weights.parity import arrays_of, block_outputs, compare, library, normalised, ours, pixels_of, randomise, read, refused_if_damaged, saved
from vidjoint.errors import UserError
from vidjoint.weights.formats import FORMATS
from vidjoint.weights.pretrained import from_arrays
from vidjoint.weights.translate import Sizes, back

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8)


def model_of(kind: str, what: str = "ForImageClassification", **changes):
    transformers = library("transformers")
    registers = dict(num_register_tokens=3) if kind == "Dinov2WithRegisters" else {}
    config = getattr(transformers, f"{kind}Config")(**SIZES | registers | changes)
    model = getattr(transformers, f"{kind}{what}")(config).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
@pytest.mark.parametrize("what", ["ForImageClassification", "Model"])
def test_parity(tmp_path, kind, what):
    reference = model_of(kind, what, num_labels=5)
    pretrained = read(saved(reference, tmp_path), reference.config.to_dict())
    in_memory = read(arrays_of(reference), reference.config.to_dict())
    assert all(np.array_equal(value, in_memory.params[name]) for name, value in pretrained.params.items())
    assert list(pretrained.ignored.values()) == ["for masked pretraining alone"]
    backbone = reference if what == "Model" else getattr(reference, reference.base_model_prefix)
    for side in (32, 48, 24):
        pixels = pixels_of(2, 1, side, side)
        expected, blocks = block_outputs(backbone.encoder.layer, reference, normalised(pixels, pretrained)[:, 0])
        features = {"features": expected.pooler_output} if what == "Model" else {"logits": expected.logits}
        compare(ours(pretrained, pixels), blocks, **features)


def official(registers: int):
    """A backbone in the official code's names, and timm's model of it at another size, which timm's own reading of such files fills."""
    timm, torch = library("timm"), library("torch")
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, num_classes=0, init_values=0.1)
    sizes |= dict(reg_tokens=registers, no_embed_class=True) if registers else {}
    shapes = timm.models.vision_transformer.VisionTransformer(**sizes | dict(no_embed_class=False, reg_tokens=0))
    randomise(shapes)
    arrays = arrays_of(shapes) | {"mask_token": np.zeros((1, 32), np.float32)}
    if registers:
        arrays["register_tokens"] = np.random.default_rng(3).normal(size=(1, registers, 32)).astype(np.float32)

    def reference(side: int):
        model = timm.models.vision_transformer.VisionTransformer(**sizes | dict(img_size=side)).eval()
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        if side != 32 and not registers:  # here the official code stretches by another rule than timm
            table = tensors["pos_embed"][:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
            table = torch.nn.functional.interpolate(table, scale_factor=(side / 8 + 0.1) / 4, mode="bicubic")
            assert table.shape[-1] == side // 8
            tensors["pos_embed"] = torch.cat([tensors["pos_embed"][:, :1], table.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
        model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(tensors, model))
        return model

    return arrays, reference


@pytest.mark.parametrize("registers", [0, 3])
def test_official_files(registers):
    arrays, reference = official(registers)
    pretrained = read(arrays, heads=2)
    assert pretrained.format == "dinov2" and pretrained.config.model.image_size == 32
    for side in (32, 48, 24):
        pixels, model = pixels_of(2, 1, side, side), reference(side)
        expected, blocks = block_outputs(model.blocks, model, normalised(pixels, pretrained)[:, 0])
        compare(ours(pretrained, pixels), blocks, features=expected)


def test_checkpoints_of_an_official_training_run():
    arrays, _ = official(3)
    chunked = {f"teacher.backbone.{name.replace('blocks.', 'blocks.0.')}": array for name, array in arrays.items()}
    heads = {"teacher.dino_head.mlp.0.weight": np.zeros((4, 4)), "student.backbone.cls_token": np.zeros((1, 1, 32))}
    wanted, found = read(arrays, heads=2), read(chunked | heads, heads=2)
    assert all(np.array_equal(array, found.params[name]) for name, array in wanted.params.items()) and len(found.ignored) == 3


def test_damaged_files(tmp_path):
    reference = model_of("Dinov2WithRegisters", num_labels=5)
    optional = r".*(mask_token|register_tokens|projection\.bias)|classifier\..*"
    arrays = {name: array for name, array in saved(reference, tmp_path).items() if "mask_token" not in name}
    refused_if_damaged(arrays, reference.config.to_dict(), optional)


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_the_table_reads_both_ways(tmp_path, kind):
    reference = model_of(kind, num_labels=5)
    arrays = saved(reference, tmp_path)
    pretrained = read(arrays, reference.config.to_dict())
    format = next(format for format in FORMATS if format.name == pretrained.format)
    written = back(format, pretrained.params, Sizes(heads=2, patch=8))
    expected = {format.strip(name): array for name, array in arrays.items() if "mask_token" not in name}
    assert written.keys() == expected.keys() and all(np.array_equal(written[name], array) for name, array in expected.items())


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_giant_models_are_refused(tmp_path, kind):
    reference = model_of(kind, "Model", use_swiglu_ffn=True)
    for arrays in (saved(reference, tmp_path), arrays_of(reference)):
        with pytest.raises(UserError, match=r"memory.*mlp.*SwiGLU"):
            from_arrays(arrays, {"config": reference.config.to_dict()}, "memory")
    arrays = {name.replace("fc1", "w12").replace("fc2", "w3"): array for name, array in official(0)[0].items()}
    with pytest.raises(UserError, match=r"memory.*w12.*SwiGLU"):
        from_arrays(arrays, {}, "memory")
