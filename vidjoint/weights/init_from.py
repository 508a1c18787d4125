"""Starting a model from the parameters of an earlier run: what fits is taken, tables are stretched, and everything is accounted for."""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import traverse_util

from vidjoint.checkpoints import load_params
from vidjoint.errors import UserError
from vidjoint.models.build import spec_from_config
from vidjoint.models.layers import resize_position, resize_time
from vidjoint.models.spec import ViTSpec
from vidjoint.run_folder import RunFolder

SAME = ("gelu", "norm_eps", "mean", "std", "pool")  # settings without parameters that pretrained parameters rely on
flat = functools.partial(traverse_util.flatten_dict, sep="/")  # nested dicts -> {"blocks/3/attn/qkv/kernel": array}


def init_from(path: str, fresh: dict, spec: ViTSpec, labels: dict[str, tuple[str, ...]], report: Callable[[str], None]) -> dict:
    """Returns `fresh` with the parameters of the run at `path` put in wherever they fit.

    The newest checkpoint counts, and of it the moving average where there is one. The position table is stretched to the new grid and the time table
    to the new number of frames. A head is taken over when its task and class names are the same; else it stays new. Parameters that the earlier
    model lacks, such as the temporal ones after a stage on images alone (CoVeR, eq. 1), stay as they are in `fresh`.

    Args:
      path: folder of the earlier run.
      fresh: parameters of a new model, nested dict.
      spec: that model's.
      labels: task -> class names of the new run.
      report: takes a line per group of parameters (loaded, resized, new, unused) and per setting that differs and should not.

    Raises:
      UserError: there is no run, or parameters of the two models differ in shape; lists every one that does.
    """
    folder = RunFolder(Path(path).expanduser())
    old_spec, old_labels = spec_from_config(folder.config.model), folder.labels
    step, stored = load_params(folder.path)
    old = flat(stored["params"]) | flat(stored["frozen"]) | flat(stored["ema"])
    new, problems = flat(fresh), []
    result, counts = dict(new), {"loaded": [], "resized": [], "new": [], "unused": [name for name in old if name not in new]}
    for name, value in new.items():
        source = old.get(name)
        task = name.split("/")[1] if name.startswith("heads/") else None
        if source is None or (task and old_labels.get(task) != tuple(labels[task])):
            counts["new"].append(name)
        elif name == "embed/position" and old_spec.prefix == spec.prefix and source.shape[1] == value.shape[1] and old_spec.grid != spec.grid:
            result[name] = np.asarray(resize_position(source, spec.prefix, old_spec.grid, spec.grid))
            counts["resized"].append(name)
        elif name == "embed/time" and source.shape[1] == value.shape[1] and len(source) != len(value):
            result[name] = np.asarray(resize_time(source, len(value)))
            counts["resized"].append(name)
        elif source.shape == value.shape:
            result[name] = source
            counts["loaded"].append(name)
        else:
            shapes = f"{list(source.shape)} there and {list(value.shape)} here"
            problems.append(f"init_from={path}: {name} is {shapes}: use the model settings of that run")
    if not counts["loaded"] and not problems:
        problems.append(f"init_from={path}: no parameter of it has a name of this model's")
    if problems:
        raise UserError(*problems)
    for kind, names in counts.items():
        if names:
            which = "" if kind == "loaded" else ": " + ", ".join(sorted({re.sub(r"/\d+/", "/*/", name) for name in names}))
            report(f"init_from={path} (step {step}): {len(names)} parameters {kind}{which}")
    for key in SAME:
        if getattr(old_spec, key) != getattr(spec, key):
            report(f"init_from={path}: model.{key} was {getattr(old_spec, key)} there and is {getattr(spec, key)} here: is that meant?")
    return traverse_util.unflatten_dict(result, sep="/")
