"""Pretrained weights, wherever they come from: parameters under this project's names, with the model settings and class names that belong to them."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from vidjoint import validate
from vidjoint.checkpoints import load_params
from vidjoint.config import base_config, task_config
from vidjoint.data.labels import unusable_names
from vidjoint.errors import UserError
from vidjoint.models.build import OF_WEIGHTS, PRESETS, build
from vidjoint.run_folder import RunFolder
from vidjoint.weights.files import MOST_JSON, check_finite, find_weights, is_float, read_arrays, read_sidecars, whole_folder, write_safetensors
from vidjoint.weights.formats import FORMATS
from vidjoint.weights.mapped import shown
from vidjoint.weights.translate import NORMALISATION, TASK, Arrays, Format, Refused, translate

HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}  # width -> heads of published ViTs (so400m, H, g, G) whose heads are not 64 wide
MOST_LINES = 8  # of one message
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
      step: updates that the parameters have seen, None where that is not known.
      made_from: name -> names in the file, or in words what it was made from, for a file of another project.
      ignored: name in the file -> why it is not needed.
      unexplained: names in the file of which nothing is known.
      notes: what else there is to say of the file, a line each.
    """

    source: str
    format: str
    params: dict[str, np.ndarray]
    config: ConfigDict
    labels: dict[str, tuple[str, ...]]
    numbered: frozenset[str] = frozenset()
    step: int | None = None
    made_from: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    unexplained: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def open_weights(path: str | Path, step: int | str | None = None, format: str = "", changes: Mapping[str, Any] | None = None) -> Pretrained:
    """Reads pretrained weights: the folder of a run, one of imported or exported weights, or another project's file or folder.

    Args:
      step: of a run, which checkpoint: a number, "best" or None, the newest. Its moving average counts where there is one.
      format, changes: of another project's file, see `from_arrays`; "" recognises the format.

    Raises:
      UserError: there is nothing there, it is damaged, or of no known kind.
    """
    folder = RunFolder(Path(path).expanduser())
    if is_own(folder.path):
        if folder.weights.is_file():
            if step is not None:
                raise UserError(f"{path} holds weights, not a run with checkpoints: leave out --step={step}")
            return _own_weights(folder, str(path))
        else:
            step, stored = load_params(folder.path, step)
            params = flat(stored["params"]) | flat(stored["frozen"]) | flat(stored["ema"])
        return Pretrained(str(path), "vidjoint", dict(params), folder.config, folder.labels, step=step)
    formats = {known.name: known for known in FORMATS}
    if format and format not in formats:
        raise UserError(f"--format={format} is unknown: choose one of {', '.join(formats)}")
    if step is not None:
        raise UserError(f"{path} holds weights of another project, not a run with checkpoints: leave out --step={step}")
    notes: list[str] = []
    arrays = read_arrays(find_weights(folder.path), notes.append)
    check_finite(arrays, path)
    return dataclasses.replace(from_arrays(arrays, read_sidecars(folder.path), str(path), formats.get(format), changes), notes=notes)


def _own_weights(folder: RunFolder, source: str) -> Pretrained:
    """Reads imported or exported weights. Raises UserError if they are damaged, or are not those of the model that config.json describes."""
    arrays = read_arrays(folder.weights)
    if strange := [name for name, array in arrays.items() if not is_float(array.dtype)]:
        raise UserError(f"{folder.weights} holds {shown(strange[0])} as {arrays[strange[0]].dtype}, and parameters are floating-point numbers")
    check_finite(arrays, folder.weights)
    params = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    for line in validate.check_model(folder.config):
        raise UserError(f"{folder.path / 'config.json'}: {line}")
    weights = Pretrained(source, "vidjoint", params, folder.config, folder.labels)
    check_shapes(weights)
    return weights


def is_own(path: Path) -> bool:
    """Whether this is a folder of this project: that of a run, or of imported or exported weights."""
    if RunFolder(path).weights.is_file() or (path / "checkpoints").is_dir():
        return True
    try:
        with open(path / "config.json", "rb") as file:
            return "tasks" in json.loads(file.read(MOST_JSON))  # a run that has not saved yet; others have a config.json too
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def write_folder(weights: Pretrained, path: str | Path) -> None:
    """Writes weights as a self-contained folder: `config.json`, `labels/TASK.txt`, `weights.safetensors`. Raises UserError if that can't be done."""
    folder = RunFolder(Path(path).expanduser())
    if folder.path.exists() and not folder.weights.is_file() and (not folder.path.is_dir() or any(folder.path.iterdir())):
        raise UserError(f"{folder.path} is there and holds other things than weights: give a new folder")
    if problems := [f"{task}: {line}" for task, names in weights.labels.items() for line in unusable_names(names)]:
        raise UserError(*problems)
    with whole_folder(folder.path) as part:
        written = RunFolder(part)
        written.write(weights.config, weights.labels)
        write_safetensors(written.weights, weights.params, {"source": weights.source, "format": "vidjoint"})


def rename_task(weights: Pretrained, name: str) -> Pretrained:
    """The same weights, their only classifier under another name."""
    if set(weights.labels) == {name} or not weights.labels:
        return weights
    (old, names), *_ = weights.labels.items()
    config = weights.config.copy_and_resolve_references()
    config.task_order = ()
    config.tasks[name] = config.tasks[old]
    del config.tasks[old]

    def renamed(table: Mapping) -> dict:
        return {key.replace(f"heads/{old}/", f"heads/{name}/", 1): value for key, value in table.items()}

    changes = dict(params=renamed(weights.params), made_from=renamed(weights.made_from), numbered=frozenset({name} if weights.numbered else ()))
    return dataclasses.replace(weights, config=config, labels={name: names}, **changes)


def keep_task(weights: Pretrained, name: str) -> Pretrained:
    """The same weights without the classifiers of other tasks."""
    config = weights.config.copy_and_resolve_references()
    config.task_order = ()
    for task in set(config.tasks) - {name}:
        del config.tasks[task]
    params = {key: value for key, value in weights.params.items() if not key.startswith("heads/") or key.startswith(f"heads/{name}/")}
    return dataclasses.replace(weights, config=config, labels={name: weights.labels[name]}, params=params)


def adopt(config: ConfigDict, stored: ConfigDict) -> ConfigDict:
    """A copy of `config` in which model settings that pretrained weights decide (OF_WEIGHTS) are those of `stored`, unless they are set."""
    config = config.copy_and_resolve_references()
    for key, unset in OF_WEIGHTS.items():
        if config.model[key] == unset:
            config.model[key] = stored.model[key]
    return config


def flat(tree: Mapping) -> dict[str, np.ndarray]:
    """Nested dicts -> {"blocks/3/attn/qkv/kernel": array}."""
    return traverse_util.flatten_dict(tree, sep="/")


def recognise(arrays: Arrays, config: Mapping[str, Any], source: str) -> Format:
    """The kind of file that has such arrays. Raises UserError if there is none, or several could be meant."""
    found = [format for format in FORMATS if format.recognises(arrays)]
    if len(found) > 1 and (named := [format for format in found if format.model_type and format.model_type == config.get("model_type")]):
        found = named
    if len(found) == 1:
        return found[0]
    known = "; ".join(f"{format.name} ({format.what})" for format in FORMATS)
    if found:
        raise UserError(f"{source} may be {' or '.join(format.name for format in found)}: say which with --format")
    raise UserError(f"{source} has {len(arrays)} arrays, such as {', '.join(sorted(arrays)[:3])}: that is none of the kinds known here: {known}")


def from_arrays(
    arrays: Arrays, sidecars: Mapping[str, dict], source: str, format: Format | None = None, changes: Mapping[str, Any] | None = None
) -> Pretrained:
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
    format = format or recognise(arrays, config, source)
    try:
        found = translate(format, arrays, config)
        settings = _sizes(found.params, config) | NORMALISATION[format.normalisation] | format.settings(found.theirs, found.params, config)
        settings |= _preprocessing(config, preprocessor)
        if empty := [key for key, value in settings.items() if value is None]:
            raise ValueError(f"its config.json has null where {empty[0]} should be")
        base_config().model.update(settings)  # its types are right
        names = _labels(config, found.params[f"heads/{TASK}/kernel"].shape[-1]) if f"heads/{TASK}/kernel" in found.params else ()
    except Refused as error:
        raise UserError(f"{source} looks like {format.what}, but {error}") from error
    except KeyError as error:
        name = str(error.args[0])
        raise UserError(f"{source} looks like {format.what}, but lacks {', '.join(_names_in_file(format.name, name)) or name}") from error
    except (ValueError, IndexError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{source} looks like {format.what}, but its arrays don't fit together ({type(error).__name__}: {error})") from error
    made = base_config()
    made.model.variant = _variant(settings)
    made.model.update(settings | dict(changes or {}))
    made.model.dtype = "float32"
    if problems := validate.check_model(made):
        raise UserError(*(f"{source}: {line}" for line in problems))
    _shorten(made.model)
    labels, numbered = {}, frozenset()
    if (kernel := found.params.get(f"heads/{TASK}/kernel")) is not None:
        labels, numbered = {TASK: names or tuple(map(str, range(kernel.shape[-1])))}, frozenset() if names else frozenset({TASK})
        made.tasks[TASK] = task_config(media="video" if format.video else "image", classes=kernel.shape[-1], flip=False)
    told = dict(made_from=found.made_from, ignored=found.ignored, unexplained=found.unexplained)
    pretrained = Pretrained(source, format.name, found.params, made, labels, numbered, **told)
    check_shapes(pretrained)
    return pretrained


def check_shapes(weights: Pretrained) -> None:
    """Compares the parameters with those of a model of these settings. Raises UserError with a line for each that is missing or does not fit."""
    model = build(weights.config.model, {task: len(names) for task, names in weights.labels.items()})
    if model.spec.image_size % model.spec.patch:
        raise UserError(f"{weights.source}: pictures of {model.spec.image_size} pixels cannot be cut into patches of {model.spec.patch}")
    wanted = {name: tuple(x.shape) for name, x in flat(model.abstract()).items()}
    found = {name: x.shape for name, x in weights.params.items()}
    lines = []
    for name in sorted(wanted.keys() | found.keys()):
        theirs = ", ".join(weights.made_from.get(name) or _names_in_file(weights.format, name)) or name
        if theirs == name and found.get(name) != wanted.get(name):
            shapes = (list(found.get(name, ())), list(wanted.get(name, ())))
            fault = f"lacks {name}" if name not in found else f"has {name} {shapes[0]}"
            lines.append(f"{weights.source} {fault}, which " + (f"is {shapes[1]} in its model" if name in wanted else "its model has no place for"))
        elif name not in found:
            lines.append(f"{weights.source} lacks {theirs} (here {name}, {list(wanted[name])})")
        elif name not in wanted:
            lines.append(f"{weights.source} has {theirs} (here {name}, {list(found[name])}), but not the rest of what such a model has")
        elif found[name] != wanted[name]:
            lines.append(f"{weights.source}: {theirs} makes {name} {list(found[name])}, which should be {list(wanted[name])}")
    if lines:
        raise UserError(*lines[:MOST_LINES], *[f"and {len(lines) - MOST_LINES} more of this kind"] * (len(lines) > MOST_LINES))


def _names_in_file(format: str, name: str) -> list[str]:
    """What a format's table calls a parameter of ours."""
    rules = [rule for known in FORMATS if known.name == format for rule in known.rules]
    number = re.search(r"(?<=/)\d+(?=/)", name)
    numbered = name if number is None else name.replace(number[0], "{i}", 1)
    names = next((rule.theirs for rule in rules if rule.ours == numbered), ())
    return [name.replace("{i}", number[0] if number else "") for name in names if name]


def swap_colours(weights: Pretrained) -> Pretrained:
    """Weights that were trained on pixels in the order blue, green, red, for red, green, blue.

    TimeSformer's own code reads the frames of Something-Something with OpenCV, so its weights for that dataset expect them so.
    """
    params, config = dict(weights.params), weights.config.copy_and_resolve_references()
    for name in ("embed/proj/kernel", "embed/video_proj/kernel"):
        if name in params:
            kernel = params[name]  # [(t) p q 3, D]
            params[name] = np.ascontiguousarray(kernel.reshape(-1, 3, kernel.shape[-1])[:, ::-1].reshape(kernel.shape))
    config.model.mean, config.model.std = config.model.mean[::-1], config.model.std[::-1]
    return dataclasses.replace(weights, params=params, config=config)


def _sizes(params: Arrays, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the shapes tell of the model, for a square picture."""
    width, mlp_dim = params["blocks/0/mlp/fc1/kernel"].shape
    numbers = sorted({int(name.split("/")[1]) for name in params if name.startswith("blocks/")})
    depth = len(numbers)
    expected = config.get("num_hidden_layers", depth)
    if numbers[-1] != depth - 1 or depth != expected:
        raise ValueError(f"there are {depth} blocks, the last is number {numbers[-1]}, and its config.json expects {expected}")
    heads = int(config.get("num_attention_heads") or config.get("num_heads") or HEADS.get(width) or max(width // 64, 1))
    class_token = "embed/class_token" in params
    sizes = {"width": width, "depth": depth, "heads": heads, "mlp_dim": mlp_dim, "class_token": class_token}
    if "blocks/0/scale1/gamma" in params:
        sizes["layer_scale"] = 1.0
    if (registers := params.get("embed/registers")) is not None:
        sizes["registers"] = len(registers)
    if "embed/norm/scale" in params:
        sizes["pre_norm"] = "layer_norm"
    sizes["pool"] = "class_token" if class_token else "average"
    sizes["patch"] = math.isqrt(len(params["embed/proj/kernel"]) // 3)
    side = math.isqrt(len(params["embed/position"]) - class_token)
    if side**2 != len(params["embed/position"]) - class_token:
        raise ValueError(f"a position table of {len(params['embed/position'])} rows is of no square grid")
    sizes["image_size"] = side * sizes["patch"]
    return sizes


def _variant(settings: Mapping[str, Any]) -> str:
    """The preset of these sizes, or of those the nearest by width."""
    sizes = [settings[key] for key in ("width", "depth", "heads", "mlp_dim")]
    size = min(PRESETS, key=lambda name: [abs(a - b) for a, b in zip(PRESETS[name], sizes, strict=True)])
    return f"{size}/{settings['patch']}"


def _shorten(model: ConfigDict) -> None:
    """Unsets sizes that the variant has anyway."""
    size, patch = model.variant.split("/")
    for key, value in zip(("width", "depth", "heads", "mlp_dim", "patch"), (*PRESETS[size], int(patch)), strict=True):
        if model[key] == value:
            model[key] = 0


def _preprocessing(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Normalisation and interpolation as the file's neighbours have them: Hugging Face's preprocessor_config.json, timm's config.json.

    Hugging Face scales pixels by a factor of their own, may take 1 off (`offset`, of ViViT), and normalises then; ours normalises pixels / 255.
    """
    timm = config.get("pretrained_cfg", {})
    found = {}
    for key, name in (("mean", "image_mean"), ("std", "image_std")):
        value = preprocessor.get(name, timm.get(key))
        if value is not None:
            value = (value,) * 3 if isinstance(value, int | float) else tuple(float(v) for v in value)
            if len(value) != 3:
                raise ValueError(f"{key} {value} has not three numbers")
            found[key] = value
    if preprocessor.get("do_normalize") is False:
        found = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    scale = round(255 * preprocessor.get("rescale_factor", 1 / 255), 6) if preprocessor.get("do_rescale", True) else 255.0
    offset = float(preprocessor.get("offset", False))
    if found and (scale, offset) != (1.0, 0.0):
        found = {"mean": tuple((value + offset) / scale for value in found["mean"]), "std": tuple(value / scale for value in found["std"])}
    interpolation = PILLOW.get(preprocessor.get("resample")) or timm.get("interpolation")
    return found | ({"interpolation": interpolation} if interpolation in ("bilinear", "bicubic") else {})


def _labels(config: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    """Class names of a config.json, () if it has none or mere place-holders."""
    names = config.get("id2label") or dict(enumerate(config.get("pretrained_cfg", {}).get("label_names") or config.get("label_names") or ()))
    names = tuple(str(names[key]) for key in sorted(names, key=int))
    return names if len(names) == classes and names != tuple(f"LABEL_{i}" for i in range(classes)) else ()
