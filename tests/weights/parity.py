"""What the parity tests share: a reference model's parameters as arrays, ours built from them, and both compared block by block."""

import warnings

import jax
import numpy as np
import pytest
from flax import traverse_util

from vidjoint.models.build import build
from vidjoint.weights.pretrained import Pretrained, from_arrays

ATOL = 1e-5


def library(name: str):
    """Imports an optional library, or skips the test and says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip(name, reason=f"{name} is not installed: pip install 'vidjoint[parity]'")
        pytest.importorskip("torch", reason="torch is not installed: pip install 'vidjoint[parity]'").set_num_threads(1)
    return module


def randomise(module, seed: int = 0, scale: float = 0.3) -> None:
    """Gives every parameter of a torch module, also those that start as zeros or ones, a random value of its own."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (scale if parameter.ndim < 2 else parameter.shape[-1] ** -0.5))


def saved(module, folder) -> dict[str, np.ndarray]:
    """The arrays of the file that a Hugging Face model writes, whose names are not always those in memory."""
    from safetensors.numpy import load_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def arrays_of(module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in module.state_dict().items()}


def pixels_of(*shape: int, seed: int = 1) -> np.ndarray:
    """uint8[B, T, H, W, 3]"""
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def normalised(pixels: np.ndarray, pretrained: Pretrained):
    """What the reference model is fed: torch float32[B, T, 3, H, W]."""
    import torch

    model = build(pretrained.config.model, {}).spec
    x = (pixels.astype(np.float32) / 255 - np.array(model.mean, np.float32)) / np.array(model.std, np.float32)
    return torch.from_numpy(np.moveaxis(x, -1, 2).copy())


def ours(pretrained: Pretrained, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Our model's outputs: "logits" (where it has a head) and "features", and "block/i", tokens float[B, T, N, D] after each block."""
    model = build(pretrained.config.model, {task: len(names) for task, names in pretrained.labels.items()})
    params = traverse_util.unflatten_dict(pretrained.params, sep="/")

    @jax.jit
    def run(params, pixels):
        vit = model.bind(params)
        x = vit.embed(pixels)
        outputs = {}
        for i, block in enumerate(vit.blocks):
            x, _ = block(x, None, (pixels.shape[2] // model.spec.patch, pixels.shape[3] // model.spec.patch))
            outputs[f"block/{i}"] = x
        return outputs | {"features": vit.features(pixels)} | dict(zip(("logits",), vit(pixels).values(), strict=False))

    return jax.tree.map(np.asarray, run(params, pixels))


def read(arrays: dict, config: dict | None = None, **changes) -> Pretrained:
    """Our reading of a file's arrays, which must leave nothing unexplained and give the model exactly its parameters."""
    pretrained = from_arrays(arrays, {"config": config or {}}, "memory", changes=changes)
    assert not pretrained.unexplained
    model = build(pretrained.config.model, {task: len(names) for task, names in pretrained.labels.items()})
    wanted = {name: x.shape for name, x in traverse_util.flatten_dict(model.abstract(), sep="/").items()}
    assert {name: x.shape for name, x in pretrained.params.items()} == wanted
    return pretrained
