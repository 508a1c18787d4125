"""Starting a model from the parameters of an earlier run: what fits is taken, tables are stretched, and everything is accounted for."""

from collections.abc import Callable

import numpy as np

from vidjoint.checkpoints import load_params
from vidjoint.errors import UserError
from vidjoint.models.layers import resize_position, resize_time
from vidjoint.models.vit import ViTSpec
from vidjoint.run_folder import RunFolder


def init_from(path: str, fresh: dict, spec: ViTSpec, labels: dict[str, tuple[str, ...]], report: Callable[[str], None]) -> dict:
    """Returns `fresh` with the parameters of the run at `path` put in wherever they fit.

    The position table is stretched to the new grid and the time table to the new number of frames. A head is taken over when its task and label list
    are the same; else it stays new. Temporal parameters that an image-only run lacks stay as they are in `fresh` (CoVeR's second stage, eq. 1).

    Args:
      path: folder of the earlier run.
      fresh: parameters of a new model, nested dict.
      spec: that model's.
      labels: task -> class names of the new run.
      report: takes one line per group of parameters: what was loaded, resized, new or unused.

    Raises:
      UserError: there is no run, or the shapes of the two models differ; lists every parameter that does.
    """
    folder = RunFolder(path)
    stored = load_params(folder.path)
    # A trained run is best represented by the average it was evaluated with
    old = _flatten(stored["params"]) | _flatten(stored["frozen"]) | _flatten(stored["ema"])
    new, result, problems = _flatten(fresh), {}, []
    counts = {"loaded": [], "resized": [], "new": [], "unused": []}
    old_size = folder.config.model.image_size
    for name, value in new.items():
        source = old.get(name)
        task = name.split("/")[1] if name.startswith("heads/") else None
        if source is None or (task and folder.labels.get(task) != tuple(labels[task])):
            kind, source = "new", value
        elif source.shape == value.shape:
            kind = "loaded"
        elif name == "embed/position" and source.shape[1] == value.shape[1]:
            grid = (old_size // spec.patch,) * 2
            kind, source = "resized", resize_position(source, spec.prefix, grid, spec.grid)
        elif name == "embed/time" and source.shape[1] == value.shape[1]:
            kind, source = "resized", resize_time(source, spec.frames)
        else:
            kind = "new"
            problems.append(f"init_from={path}: {name} is {source.shape} there and {value.shape} here: use the model settings of that run")
        counts[kind].append(name)
        result[name] = np.asarray(source)
    counts["unused"] = [name for name in old if name not in new]
    if not counts["loaded"]:
        problems.append(f"init_from={path}: no parameter of it fits this model")
    if problems:
        raise UserError(*problems)
    for kind, names in counts.items():
        if names:
            report(f"init_from {path}: {len(names)} parameters {kind}" + ("" if kind == "loaded" else f": {', '.join(sorted(names))}"))
    return _unflatten(result)


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _unflatten(flat: dict) -> dict:
    tree: dict = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return tree
