"""Google's .npz files: made by hand in the names of each project, and compared with timm, which reads them with a loader of its own."""

import numpy as np
import pytest
from scipy import ndimage

from tests.weights.parity import block_outputs, compare, library, normalised, ours, pixels_of, read, refused_if_damaged
from vidjoint.errors import UserError
from vidjoint.weights.pretrained import from_arrays

WIDTH, DEPTH, HEADS, HIDDEN, PATCH, CLASSES = 32, 2, 2, 48, 8, 5
TABLE = "Transformer/posembed_input/pos_embedding"


def augreg(class_token=True) -> dict[str, np.ndarray]:
    """Arrays of google-research/vision_transformer, for pictures of 32 pixels."""
    random = np.random.default_rng(0)

    def array(*shape):
        return (random.normal(size=shape) * 0.3).astype(np.float32)

    def dense(name, *shape, bias=None):
        bias = array(*shape[1:] if bias is None else bias)
        kernel = array(*shape) / np.float32(0.3 * (np.prod(shape) / bias.size) ** 0.5)
        return {f"{name}/kernel": kernel, f"{name}/bias": bias}

    def norm(name):
        return {f"{name}/scale": 1 + array(WIDTH), f"{name}/bias": array(WIDTH)}

    arrays = dense("embedding", PATCH, PATCH, 3, WIDTH, bias=(WIDTH,)) | {TABLE: array(1, 16 + class_token, WIDTH)}
    arrays |= {"cls": array(1, 1, WIDTH)} if class_token else {}
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}/"
        arrays |= norm(f"{block}LayerNorm_0") | norm(f"{block}LayerNorm_2")
        for name in ("query", "key", "value"):
            arrays |= dense(f"{block}MultiHeadDotProductAttention_1/{name}", WIDTH, HEADS, WIDTH // HEADS)
        arrays |= dense(f"{block}MultiHeadDotProductAttention_1/out", HEADS, WIDTH // HEADS, WIDTH, bias=(WIDTH,))
        arrays |= dense(f"{block}MlpBlock_3/Dense_0", WIDTH, HIDDEN) | dense(f"{block}MlpBlock_3/Dense_1", HIDDEN, WIDTH)
    return arrays | norm("Transformer/encoder_norm") | dense("head", WIDTH, CLASSES)


def renamed(arrays: dict, prefix: str, **changes: str) -> dict:
    """The same arrays under big_vision's or scenic's names."""
    for old, new in {"LayerNorm_2": "LayerNorm_1", "Attention_1": "Attention_0", "MlpBlock_3": "MlpBlock_0", **changes}.items():
        arrays = {name.replace(old, new): array for name, array in arrays.items()}
    return {prefix + name: array for name, array in arrays.items()}


def scanned(arrays: dict) -> dict:
    """Blocks in one array each, along its first axis."""
    blocks = sorted(name for name in arrays if "encoderblock_0/" in name)
    made = {name: array for name, array in arrays.items() if "encoderblock_" not in name}
    return made | {name.replace("_0/", "/", 1): np.stack([arrays[name.replace("k_0/", f"k_{i}/", 1)] for i in range(DEPTH)]) for name in blocks}


def timms(arrays: dict, path, side=32, **changes):
    timm = library("timm")
    np.savez(path, **arrays)
    sizes = dict(img_size=side, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=HIDDEN / WIDTH, num_classes=CLASSES)
    model = timm.models.vision_transformer.VisionTransformer(**sizes, act_layer="gelu_tanh", **changes).eval()
    with library("torch").no_grad():
        timm.models.vision_transformer._load_weights(model, str(path))
    return model


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("side", [32, 48, 24])
def test_parity(tmp_path, class_token, side):
    arrays = augreg(class_token)
    pretrained = read(arrays)
    assert pretrained.format == "flax_vit" and pretrained.config.model.heads == HEADS
    lead, grid = int(class_token), side // PATCH
    table = ndimage.zoom(arrays[TABLE][0, lead:].reshape(4, 4, -1), (grid / 4, grid / 4, 1), order=1)
    table = np.concatenate([arrays[TABLE][:, :lead], table.reshape(1, grid * grid, WIDTH)], axis=1)
    changes = {} if class_token else dict(class_token=False, global_pool="avg", fc_norm=False)
    reference = timms(arrays | {TABLE: table}, tmp_path / "a.npz", side, **changes)
    pixels = pixels_of(2, 1, side, side)
    expected, blocks = block_outputs(reference.blocks, reference, normalised(pixels, pretrained)[:, 0])
    compare(ours(pretrained, pixels), blocks, logits=expected)


def test_timms_way_of_stretching(tmp_path):
    arrays = augreg()
    pretrained, pixels = read(arrays, position_resize="bilinear"), pixels_of(2, 1, 48, 48)
    reference = timms(arrays, tmp_path / "a.npz", 48)
    expected, blocks = block_outputs(reference.blocks, reference, normalised(pixels, pretrained)[:, 0])
    compare(ours(pretrained, pixels), blocks, logits=expected)


LAYOUTS = {
    "big_vision": lambda arrays: renamed(arrays, "params/", **{TABLE: "pos_embedding"}),
    "image tower": lambda arrays: renamed(arrays, "params/img/", **{TABLE: "pos_embedding"}),
    "scanned": lambda arrays: renamed(scanned(arrays), "params/", **{TABLE: "pos_embedding"}),
    "scenic": lambda arrays: renamed(arrays, "opt/target/", head="output_projection"),
    "scenic's first": lambda arrays: renamed(arrays, "optimizer/target/", head="output_projection"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_names(layout):
    arrays = LAYOUTS[layout](augreg())
    wanted, found = read(augreg()), read(arrays)
    assert wanted.params.keys() == found.params.keys() and set().union(*found.made_from.values()) == set(arrays)
    assert all(np.array_equal(array, found.params[name]) for name, array in wanted.params.items())


def test_a_class_token_without_position(tmp_path):
    """big_vision adds positions to the patches alone; timm calls that no_embed_class."""
    arrays = augreg()
    arrays = renamed(arrays | {TABLE: arrays[TABLE][:, 1:]}, "params/", **{TABLE: "pos_embedding"})
    pretrained, pixels = read(arrays), pixels_of(2, 1, 32, 32)
    reference = timms(arrays, tmp_path / "a.npz", no_embed_class=True)
    expected, blocks = block_outputs(reference.blocks, reference, normalised(pixels, pretrained)[:, 0])
    compare(ours(pretrained, pixels), blocks, logits=expected)


def test_what_is_left_out_has_a_reason():
    layer = {"pre_logits/kernel": np.zeros((WIDTH, WIDTH), np.float32), "pre_logits/bias": np.zeros(WIDTH, np.float32)}
    pretrained = read(augreg() | layer)
    assert not pretrained.labels and set(pretrained.ignored) == {"pre_logits/kernel", "pre_logits/bias", "head/kernel", "head/bias"}
    two = renamed(augreg(), "params/img/") | {"params/txt/Embed_0/embedding": np.zeros((4, 4)), "params/t": np.zeros(1), "params/b": np.zeros(1)}
    assert set(read(two).ignored) == {"params/img/head/kernel", "params/img/head/bias", "params/txt/Embed_0/embedding", "params/t", "params/b"}


def test_damaged_files():
    refused_if_damaged(augreg(), {}, optional=r"cls|embedding/bias|head/.*")


@pytest.mark.parametrize("name, words", [("MAPHead_0/probe", "attention pooling"), ("conv_root/kernel", "ResNet")])
def test_models_that_do_not_fit_are_refused(name, words):
    with pytest.raises(UserError, match=f"memory.*{name}.*{words}"):
        from_arrays(augreg() | {name: np.zeros((1, 1, WIDTH), np.float32)}, {}, "memory")
