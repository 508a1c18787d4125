"""Starting a model from the parameters of an earlier run: what fits is taken, what is missing is made from it, and everything is accounted for."""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import traverse_util

from vidjoint.checkpoints import load_params
from vidjoint.errors import UserError
from vidjoint.models.build import spec_from_config
from vidjoint.models.embed import inflate
from vidjoint.models.position import resize_position, resize_time
from vidjoint.models.spec import ViTSpec
from vidjoint.run_folder import RunFolder

SAME = ("gelu", "norm_eps", "mean", "std", "pool")  # settings without parameters that pretrained parameters rely on
KINDS = ("loaded", "resized", "inflated from the image embedding", "copied from the spatial attention", "new", "unused")
flat = functools.partial(traverse_util.flatten_dict, sep="/")  # nested dicts -> {"blocks/3/attn/qkv/kernel": array}

Found = dict[str, tuple[str, np.ndarray]]  # name of a parameter of the new model -> one of KINDS, value


def init_from(path: str, fresh: dict, spec: ViTSpec, labels: dict[str, tuple[str, ...]], report: Callable[[str], None]) -> dict:
    """Returns `fresh` with the parameters of the run at `path` put in wherever they fit.

    The newest checkpoint counts, and of it the moving average where there is one. Position tables are stretched to the new grid, and lose the row of
    the class token if the new model's patches have none with them; the time table is stretched to the new number of time steps. A head is taken over
    if its task, its class names and its shape are the same; else it stays new. Where the new model has an embedding for videos and the earlier one
    has not, it is made from that of the images (ViViT 3.4). Where it has temporal attention that the earlier one lacks, as after a stage on images
    alone (CoVeR, eq. 1), that is a copy of the block's spatial attention and norm, unless `temporal_init="random"`; whether it acts at once or starts
    as the identity is decided by the branch's last layer in `fresh`. Other parameters that the earlier model lacks stay as they are in `fresh`.

    Args:
      path: folder of the earlier run.
      fresh: parameters of a new model, nested dict.
      spec: that model's.
      labels: task -> class names of the new run.
      report: takes a line per kind of parameters (see KINDS) and per setting that differs and should not.

    Raises:
      UserError: there is no run, or parameters of the two models differ in shape; lists every one that does.
    """
    folder = RunFolder(Path(path).expanduser())
    old_spec, old_labels = spec_from_config(folder.config.model), folder.labels
    step, stored = load_params(folder.path)
    old, new = flat(stored["params"]) | flat(stored["frozen"]) | flat(stored["ema"]), flat(fresh)
    found: Found = {name: ("loaded", value) for name, value in old.items() if name in new}
    found |= _resized(old, old_spec, spec, new)
    found |= _inflated(found, old_spec, spec)
    found |= _copied(found, spec, new)
    for task in labels:
        kernel = f"heads/{task}/kernel"
        if kernel in found and (old_labels.get(task) != tuple(labels[task]) or old[kernel].shape != new[kernel].shape):
            del found[kernel], found[f"heads/{task}/bias"]

    problems = [
        f"init_from={path}: {name} is {list(old.get(name, value).shape)} there and {list(new[name].shape)} here: use the model settings of that run"
        for name, (_, value) in found.items()
        if value.shape != new[name].shape
    ]
    kinds = {name: found[name][0] if name in found else "new" for name in new} | {name: "unused" for name in old if name not in new}
    if "loaded" not in kinds.values() and not problems:
        problems.append(f"init_from={path}: no parameter of it has a name of this model's")
    if problems:
        raise UserError(*problems)
    for kind in KINDS:
        names = [name for name in kinds if kinds[name] == kind]
        if names:
            report(f"init_from={path} (step {step}): {len(names)} parameters {kind}{'' if kind == 'loaded' else ': ' + shortened(names)}")
    for key in SAME:
        if getattr(old_spec, key) != getattr(spec, key):
            report(f"init_from={path}: model.{key} was {getattr(old_spec, key)} there and is {getattr(spec, key)} here: is that meant?")
    return traverse_util.unflatten_dict(new | {name: value for name, (_, value) in found.items()}, sep="/")


def shortened(names: list[str]) -> str:
    """Parameters as one line: a star for the numbers of blocks, one entry per module, as in `blocks/*/norm1/{bias,scale}, embed/time`."""
    modules = {}
    for name in sorted(re.sub(r"/\d+(?=/)", "/*", name) for name in names):
        module, _, last = name.rpartition("/")
        modules.setdefault(module, {})[last] = None
    return ", ".join(f"{module}/{next(iter(last)) if len(last) == 1 else '{' + ','.join(last) + '}'}" for module, last in modules.items())


def _resized(old: dict, old_spec: ViTSpec, spec: ViTSpec, new: dict) -> Found:
    """The tables of the old model, stretched to the new one's grid and time steps. What has the right size already is left out."""
    found = {}
    for name in ("embed/position", "embed/video_position"):
        if name in old and name in new and (old_spec.grid != spec.grid or old_spec.prefix > spec.prefix):
            table = old[name][max(old_spec.prefix - spec.prefix, 0) :]
            prefix = min(old_spec.prefix, spec.prefix)
            found[name] = "resized", np.asarray(resize_position(table, prefix, old_spec.grid, spec.grid))
    for name in ("embed/time", "pool/time"):
        if name in old and name in new and len(old[name]) != len(new[name]):
            found[name] = "resized", np.asarray(resize_time(old[name], len(new[name])))
    if spec.tubelet > old_spec.tubelet == 1 and "embed/video_proj/kernel" in old:
        found["embed/video_proj/kernel"] = "resized", np.asarray(inflate(old["embed/video_proj/kernel"], spec.tubelet, spec.tubelet_init))
    return found


def _inflated(found: Found, old_spec: ViTSpec, spec: ViTSpec) -> Found:
    """An embedding for videos, made from the image embedding of a model that has no other."""
    if spec.embed != "separate" or old_spec.embed == "separate":
        return {}
    kernel, bias, position = (found[f"embed/{name}"][1] for name in ("proj/kernel", "proj/bias", "position"))
    kernel = np.asarray(inflate(kernel, spec.tubelet, spec.tubelet_init))
    made = {"embed/video_proj/kernel": kernel, "embed/video_proj/bias": bias, "embed/video_position": position}
    return {name: ("inflated from the image embedding", value) for name, value in made.items()}


def _copied(found: Found, spec: ViTSpec, new: dict) -> Found:
    """Temporal attention and its norm for blocks that had none, from the spatial ones of the block (TimeSformer's and ViViT's loaders do so).

    A branch without a dense layer ends in the attention's own projection: with `temporal_init="zero"` that stays zero.
    """
    copied = {}
    for name in new:
        match = re.fullmatch(r"(blocks/\d+)/mixer/temporal_(attn|norm)/(.+)", name)
        if match is None or name in found or spec.temporal_init == "random":
            continue
        block, part, rest = match.groups()
        source = f"{block}/{'attn' if part == 'attn' else 'norm1'}/{rest}"
        ends_branch = part == "attn" and rest.startswith("proj/") and f"{block}/mixer/temporal_fc/kernel" not in new
        if source in found and not (ends_branch and spec.temporal_init == "zero"):
            copied[name] = "copied from the spatial attention", found[source][1]
    return copied
