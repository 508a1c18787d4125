"""The official TokenShift: every block's tokens and the logits against a plain forward pass in PyTorch, which is written from reading its code."""

import functools
import math

import numpy as np
import pytest

from tests.weights.parity import ATOL, library, normalised, ours, pixels_of, read
from vidjoint.weights.pretrained import from_arrays

WIDTH, HIDDEN, HEADS, PATCH, CLASSES = 32, 48, 2, 8, 5


def official(side=32, depth=2, width=WIDTH, hidden=HIDDEN, patch=PATCH, classes=CLASSES) -> dict[str, np.ndarray]:
    """Random arrays with the names and shapes of a published file, the `state_dict` of its checkpoint."""
    random = np.random.default_rng(0)
    transformer = "module.base_model.transformer."
    layers = {"attn.query": (width, width), "attn.key": (width, width), "attn.value": (width, width), "attn.out": (width, width)}
    layers |= {"ffn.fc1": (hidden, width), "ffn.fc2": (width, hidden), "attention_norm": (width,), "ffn_norm": (width,)}
    modules = {f"encoder.layer.{i}.{name}": shape for i in range(depth) for name, shape in layers.items()}
    modules |= {"encoder.encoder_norm": (width,), "embeddings.patch_embeddings": (width, 3, patch, patch)}
    modules = {transformer + name: shape for name, shape in modules.items()} | {"module.base_model.head": (classes, width)}
    shapes = {f"{name}.weight": shape for name, shape in modules.items()} | {f"{name}.bias": shape[:1] for name, shape in modules.items()}
    shapes |= {
        f"{transformer}embeddings.position_embeddings": (1, 1 + (side // patch) ** 2, width),
        f"{transformer}embeddings.cls_token": (1, 1, width),
    }
    arrays = {}
    for name, shape in shapes.items():
        deviation = math.prod(shape[1:]) ** -0.5 if name.endswith("weight") and len(shape) > 1 else 0.3
        arrays[name] = ((name.endswith("norm.weight")) + deviation * random.standard_normal(shape)).astype(np.float32)
    return arrays


def forward(arrays, x, heads=HEADS, divisor=4):
    """x: torch float32[B, T, 3, H, W], normalised -> every block's tokens [B, T, N, D], and logits [B, C].

    Twice in each block, before what branches off, class tokens trade channels: the first D / divisor come from the next frame, as many from the one
    before, and zeros from beyond the ends. Frames meet nowhere else; their logits are averaged.
    """
    torch = library("torch")
    functional = torch.nn.functional
    state = {name.split("base_model.")[1].removeprefix("transformer."): torch.from_numpy(array) for name, array in arrays.items()}
    norm = functools.partial(functional.layer_norm, eps=1e-6)

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def shifted(x):
        fold, x = x.shape[-1] // divisor, x.clone()
        token = torch.nn.functional.pad(x[:, :, 0], (0, 0, 1, 1))  # a frame of zeros at either end
        x[:, :, 0, :fold], x[:, :, 0, fold : 2 * fold] = token[:, 2:, :fold], token[:, :-2, fold : 2 * fold]
        return x

    def attention(x, name):
        q, k, v = (linear(x, f"{name}.{part}").unflatten(-1, (heads, -1)).transpose(-2, -3) for part in ("query", "key", "value"))
        weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
        return linear((weights @ v).transpose(-2, -3).flatten(-2), f"{name}.out")

    kernel = state["embeddings.patch_embeddings.weight"]
    width, patch = len(kernel), kernel.shape[-1]
    patches = functional.conv2d(x.flatten(0, 1), kernel, state["embeddings.patch_embeddings.bias"], stride=patch).flatten(2).mT
    token = state["embeddings.cls_token"].expand(len(patches), 1, width)
    x = (torch.cat([token, patches], dim=1) + state["embeddings.position_embeddings"]).unflatten(0, x.shape[:2])
    blocks = []
    for i in range(len([name for name in state if name.endswith("attn.out.bias")])):
        layer = f"encoder.layer.{i}"
        norms = [(state[f"{layer}.{name}.weight"], state[f"{layer}.{name}.bias"]) for name in ("attention_norm", "ffn_norm")]
        x = shifted(x)
        x = x + attention(norm(x, (width,), *norms[0]), f"{layer}.attn")
        x = shifted(x)
        x = x + linear(functional.gelu(linear(norm(x, (width,), *norms[1]), f"{layer}.ffn.fc1")), f"{layer}.ffn.fc2")
        blocks.append(x)
    x = norm(x, (width,), state["encoder.encoder_norm.weight"], state["encoder.encoder_norm.bias"])
    return blocks, linear(x[:, :, 0], "head").mean(dim=1)


def assert_equal(arrays, pretrained, frames, side):
    torch = library("torch")
    pixels = pixels_of(2, frames, side, side)
    with torch.no_grad():
        blocks, logits = forward(arrays, normalised(pixels, pretrained))
    found = ours(pretrained, pixels)
    for i, tokens in enumerate(blocks):
        np.testing.assert_allclose(found[f"block/{i}"], tokens.numpy(), atol=ATOL)
    np.testing.assert_allclose(found["logits"], logits.numpy(), atol=ATOL)


@pytest.mark.parametrize("frames", [8, 3, 2])
def test_parity(frames):
    arrays = official()
    pretrained = read(arrays, heads=HEADS)
    model = pretrained.config.model
    assert (pretrained.format, model.mixer, model.image_size, model.frames) == ("token_shift", "token_shift", 32, 8)
    assert pretrained.config.tasks.pretrained.media == "video"
    assert_equal(arrays, pretrained, frames, 32)


@pytest.mark.parametrize("side", [48, 40])
def test_parity_at_another_size(side):
    """The official code stretches the table of an image model by scipy's zoom when it loads it, and never else."""
    ndimage = pytest.importorskip("scipy.ndimage")
    arrays = official()
    pretrained = read(arrays, heads=HEADS)
    name = next(name for name in arrays if name.endswith("position_embeddings"))
    grid = ndimage.zoom(arrays[name][0, 1:].reshape(4, 4, WIDTH), (side / 32, side / 32, 1), order=1)
    table = np.concatenate([arrays[name][:, :1], grid.reshape(1, -1, WIDTH)], axis=1)
    assert_equal(arrays | {name: table}, pretrained, 4, side)


def test_names_with_and_without_prefixes():
    arrays = official()
    expected = read(arrays, heads=HEADS).params
    for prefix in ("module.", "module.base_model."):
        bare = read({name.removeprefix(prefix): array for name, array in arrays.items()}, heads=HEADS).params
        assert bare.keys() == expected.keys() and all(np.array_equal(value, bare[name]) for name, value in expected.items())


def test_the_plain_model_of_the_same_repository_is_asked_for():
    """Its file has the same names; the shift makes a difference."""
    arrays = official()
    plain = from_arrays(arrays, {}, "memory", changes={"heads": HEADS, "mixer": "none"})
    pixels = pixels_of(2, 4, 32, 32)
    logits = [ours(weights, pixels)["logits"] for weights in (plain, read(arrays, heads=HEADS))]
    assert np.abs(logits[0] - logits[1]).max() > 1e-2
