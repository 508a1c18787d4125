"""What the parity tests share: a reference model's parameters as arrays, ours built from them, and both compared block by block."""

import importlib
import importlib.util
import re
import sys
import warnings

import jax
import numpy as np
import pytest
from flax import traverse_util

from vidjoint.errors import UserError
from vidjoint.models.build import build
from vidjoint.weights.pretrained import Pretrained, from_arrays

ATOL = 1e-5
declared: list = []  # operators live as long as what declared them


def library(name: str):
    """Imports an optional library, or skips the test and says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch", reason="torch is not installed: pip install 'vidjoint[parity]'").set_num_threads(1)
        if importlib.util.find_spec("torchvision"):
            _import_torchvision()
        return pytest.importorskip(name, reason=f"{name} is not installed: pip install 'vidjoint[parity]'")


def _import_torchvision() -> None:
    """timm needs the Python half of torchvision alone. That imports beside a torch for CPUs too, if its compiled operators are declared."""
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for module in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        declared.append(torch.library.Library("torchvision", "DEF"))
        for operator in ("nms", "qnms"):
            declared[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


def randomise(module, seed: int = 0, scale: float = 0.3) -> None:
    """Gives every parameter of a torch module, also those that start as zeros or ones, a random value of its own."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 3 else max((1, *parameter.shape[-1:]))  # convolutions, or other kernels and tables
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (scale if parameter.ndim < 2 else fan_in**-0.5))


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


def block_outputs(blocks, model, *inputs, **settings) -> tuple[object, list[np.ndarray]]:
    """What a torch model returns, and what each of these modules of it gave meanwhile."""
    import torch

    outputs = []
    hooks = [block.register_forward_hook(lambda module, given, made: outputs.append(made.numpy())) for block in blocks]
    with torch.no_grad():
        result = model(*inputs, **settings)
    for hook in hooks:
        hook.remove()
    return result, outputs


def compare(found: dict, blocks: list[np.ndarray], logits=None, features=None) -> None:
    """Ours against theirs, for a batch of images: every block's tokens, and what follows."""
    assert len(blocks) == sum(name.startswith("block/") for name in found)
    for i, tokens in enumerate(blocks):
        np.testing.assert_allclose(found[f"block/{i}"][:, 0], tokens, atol=ATOL)
    for name, wanted in (("logits", logits), ("features", features)):
        if wanted is not None:
            np.testing.assert_allclose(found[name], wanted.numpy(), atol=ATOL)


def refused_if_damaged(arrays: dict, config: dict, optional: str = "none") -> None:
    """Each array of a file, missing or of a wrong shape, is a UserError that names it or what was to be made from it.

    `optional`: a regular expression of names that a model may well lack.
    """
    for name in arrays:
        short = {key: array for key, array in arrays.items() if key != name}
        cut = arrays | {name: arrays[name][..., :-1]}
        for damaged in [cut] if re.fullmatch(optional, name) else [short, cut]:
            with pytest.raises(UserError, match="memory") as caught:
                from_arrays(damaged, {"config": config}, "memory")
            assert len(caught.value.lines) < 10 and all(line.isprintable() for line in caught.value.lines), name


def read(arrays: dict, config: dict | None = None, **changes) -> Pretrained:
    """Our reading of a file's arrays, which must leave nothing unexplained and give the model exactly its parameters."""
    pretrained = from_arrays(arrays, {"config": config or {}}, "memory", changes=changes)
    assert not pretrained.unexplained
    model = build(pretrained.config.model, {task: len(names) for task, names in pretrained.labels.items()})
    wanted = {name: x.shape for name, x in traverse_util.flatten_dict(model.abstract(), sep="/").items()}
    assert {name: x.shape for name, x in pretrained.params.items()} == wanted
    return pretrained
