"""Pretrained weights, wherever they come from: parameters under this project's names, with the settings, class names and preprocessing that belong to them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vidjoint.config import base_config, task_config
from vidjoint.errors import UserError
from vidjoint.models.build import PRESETS
from vidjoint.weights.formats import FORMATS
from vidjoint.weights.translate import TASK, Arrays, Format, translate

NORMALISATION = {  # of pixels in 0..1, where no file says it
    "half": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "kinetics": {"mean": (0.45, 0.45, 0.45), "std": (0.225, 0.225, 0.225)},
    "clip": {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)},
}
PILLOW = {2: "bilinear", 3: "bicubic"}  # numbers of Pillow's filters, as `resample` of preprocessor_config.json has them


@dataclass
class Pretrained:
    """Parameters with all that they rely on.

    Attributes:
      source: where they were read, for messages.
      format: name of the file's kind; "vidjoint" for a folder of this project.
      params: name -> float32 array, as in `blocks/3/attn/qkv/kernel`.
      config: `model` says what model they are of; `tasks` has one entry for each head.
      labels: task -> class names.
      numbered: tasks whose class names are mere numbers, for the file knows no others.
      made_from: name -> names in the file, for a file of another project.
      ignored: name in the file -> why it is not needed.
      unexplained: names in the file of which nothing is known.
    """

    source: str
    format: str
    params: dict[str, np.ndarray]
    config: ConfigDict
    labels: dict[str, tuple[str, ...]]
    numbered: frozenset[str] = frozenset()
    made_from: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    unexplained: list[str] = field(default_factory=list)


def recognise(names: list[str], config: Mapping[str, Any], source: str) -> Format:
    """The kind of file that has arrays of these names. Raises UserError if there is none, or several could be meant."""
    found = [format for format in FORMATS if format.recognises(names)]
    if len(found) > 1 and (named := [format for format in found if format.model_type and format.model_type == config.get("model_type")]):
        found = named
    if len(found) == 1:
        return found[0]
    known = "; ".join(f"{format.name} ({format.what})" for format in FORMATS)
    if found:
        raise UserError(f"{source} may be {' or '.join(format.name for format in found)}: say which with --format")
    raise UserError(f"{source} has {len(names)} arrays, such as {', '.join(sorted(names)[:3])}: that is none of the kinds known here: {known}")


def from_arrays(arrays: Arrays, sidecars: Mapping[str, dict], source: str, format: Format | None = None, changes: Mapping[str, Any] | None = None) -> Pretrained:
    """Translates what was read from another project's file.

    Args:
      arrays: name in the file -> array of any float type.
      sidecars: "config" and "preprocessor", the JSON files that lay beside it, as far as there were any.
      source: names the file in messages.
      format: None to recognise it by the names.
      changes: keys of `config.model` that the caller knows better.

    Raises:
      UserError: the file is of no known kind, or something of it is missing or has a shape that does not fit.
    """
    config, preprocessor = sidecars.get("config", {}), sidecars.get("preprocessor", {})
    format = format or recognise(list(arrays), config, source)
    try:
        found = translate(format, arrays, config)
        settings = _sizes(found.params, config) | format.settings(found.theirs, found.params, config) | _preprocessing(config, preprocessor)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise UserError(f"{source} looks like {format.what}, but its arrays don't fit together ({type(error).__name__}: {error})") from error
    settings |= changes or {}
    made = base_config()
    made.model.variant = _variant(settings)
    for key, value in settings.items():
        made.model[key] = value
    made.model.dtype = "float32"
    _shorten(made.model)
    labels, numbered = {}, frozenset()
    if (kernel := found.params.get(f"heads/{TASK}/kernel")) is not None:
        names = _labels(config, kernel.shape[-1])
        labels, numbered = {TASK: names or tuple(map(str, range(kernel.shape[-1])))}, frozenset() if names else frozenset({TASK})
        made.tasks[TASK] = task_config(media="video" if format.video else "image", classes=kernel.shape[-1], flip=False)
    return Pretrained(source, format.name, found.params, made, labels, numbered, found.made_from, found.ignored, found.unexplained)


def _sizes(params: Arrays, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the shapes tell of the model, for a square picture."""
    width, mlp_dim = params["blocks/0/mlp/fc1/kernel"].shape
    depth = 1 + max(int(name.split("/")[1]) for name in params if name.startswith("blocks/"))
    heads = int(config.get("num_attention_heads") or config.get("num_heads") or max(width // 64, 1))
    class_token = "embed/class_token" in params
    sizes = {"width": width, "depth": depth, "heads": heads, "mlp_dim": mlp_dim, "class_token": class_token}
    sizes["pool"] = "class_token" if class_token else "average"
    if (kernel := params.get("embed/proj/kernel")) is not None:
        sizes["patch"] = math.isqrt(len(kernel) // 3)
        if (position := params.get("embed/position")) is not None:
            side = math.isqrt(len(position) - class_token)
            if side**2 != len(position) - class_token:
                raise ValueError(f"a position table of {len(position)} rows is of no square grid")
            sizes["image_size"] = side * sizes["patch"]
    return sizes


def _variant(settings: Mapping[str, Any]) -> str:
    """The preset of these sizes, or of those the nearest by width."""
    size = min(PRESETS, key=lambda name: [abs(a - settings[key]) for a, key in zip(PRESETS[name], ("width", "depth", "heads", "mlp_dim"), strict=True)])
    return f"{size}/{settings['patch']}"


def _shorten(model: ConfigDict) -> None:
    """Unsets sizes that the variant has anyway."""
    size, patch = model.variant.split("/")
    for key, value in zip(("width", "depth", "heads", "mlp_dim", "patch"), (*PRESETS[size], int(patch)), strict=True):
        if model[key] == value:
            model[key] = 0


def _preprocessing(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Normalisation and interpolation as the file's neighbours have them: Hugging Face's preprocessor_config.json, timm's config.json."""
    timm = config.get("pretrained_cfg", {})
    found = {}
    for key, name in (("mean", "image_mean"), ("std", "image_std")):
        value = preprocessor.get(name) or timm.get(key)
        if value is not None:
            value = (value,) * 3 if isinstance(value, int | float) else tuple(float(v) for v in value)
            if len(value) != 3:
                raise ValueError(f"{key} {value} has not three numbers")
            found[key] = value
    interpolation = PILLOW.get(preprocessor.get("resample")) or timm.get("interpolation")
    return found | ({"interpolation": interpolation} if interpolation in ("bilinear", "bicubic") else {})


def _labels(config: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    """Class names of a config.json, () if it has none or mere place-holders."""
    names = config.get("id2label") or dict(enumerate(config.get("pretrained_cfg", {}).get("label_names") or config.get("label_names") or ()))
    names = tuple(str(names[key]) for key in sorted(names, key=int))
    return names if len(names) == classes and names != tuple(f"LABEL_{i}" for i in range(classes)) else ()
