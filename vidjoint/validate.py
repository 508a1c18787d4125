"""Everything about a config that can be wrong is found here, before anything is allocated, and reported together."""

import re

from ml_collections import ConfigDict

from vidjoint import losses, optim
from vidjoint.data import clips, sources
from vidjoint.data.mixture import SCHEDULES, clip_spec
from vidjoint.models.build import PRESETS
from vidjoint.models.heads import POOLS
from vidjoint.models.mixers import MIXERS

CHOICES = {
    "schedule": SCHEDULES,
    "model.mixer": MIXERS,
    "model.pool": POOLS,
    "model.dtype": ("bfloat16", "float32"),
    "model.remat": ("none", "block"),
    "model.gelu": ("exact", "tanh"),
    "model.divided.temporal_init": ("zero", "random"),
    "model.divided.image_temporal": ("affine", "skip"),
    "model.token_shift.tokens": ("class", "all"),
    "model.token_shift.direction": ("next_first", "previous_first"),
    "loss.reduction": losses.REDUCTIONS,
    "optim.name": optim.OPTIMIZERS,
    "optim.schedule": optim.SCHEDULES,
    "optim.decay": optim.DECAYS,
    "eval.average": ("softmax", "logits"),
}
TASK_CHOICES = {"source": sources.KINDS, "media": ("video", "image"), "sampler": clips.SAMPLERS, "crop": ("short_side", "area", "none")}
AT_LEAST_ONE = ("batch_size", "log_every", "checkpoint_every", "keep_checkpoints", "data.prefetch", "model.frames", "model.image_size", "data.max_pixels")


def check(config: ConfigDict) -> list[str]:
    """Returns the problems of a config, one line each with what to do; [] if it can run. Reads no file."""
    problems = [
        f"{key}={_get(config, key)!r} is unknown: choose one of {', '.join(choices)}" for key, choices in CHOICES.items() if _get(config, key) not in choices
    ]
    problems += [f"{key}={_get(config, key)} must be at least 1" for key in AT_LEAST_ONE if _get(config, key) < 1]
    if bool(config.total_steps) == bool(config.total_epochs):
        problems.append(f"total_steps={config.total_steps} and total_epochs={config.total_epochs}: give exactly one of them")
    if not config.tasks:
        problems.append("there are no tasks: add one with config.tasks.NAME = task_config(...)")
    if config.task_order and sorted(config.task_order) != sorted(config.tasks):
        problems.append(f"task_order={config.task_order} must name each task once: {', '.join(sorted(config.tasks))}")
    problems += _check_model(config.model)
    for name in sorted(config.tasks):
        problems += [f"tasks.{name}: {line}" if not line.startswith("tasks.") else line for line in _check_task(config, name)]
    if views(config.eval.views) is None:
        problems.append(f"eval.views={config.eval.views!r}: write temporal x spatial views, as in 1x3")
    return problems


def views(text: str) -> tuple[int, int] | None:
    """Reads "TxS" as (temporal, spatial) views, None if it is no such thing."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    return (int(match[1]), int(match[2])) if match else None


def _check_model(model: ConfigDict) -> list[str]:
    problems = []
    match = re.fullmatch(r"(\w+)/([1-9]\d*)", model.variant)
    if not match or match[1] not in PRESETS:
        return [f"model.variant={model.variant!r} is unknown: write one of {', '.join(PRESETS)}, a slash and the patch size, as in B/16"]
    width, _, heads, _ = PRESETS[match[1]]
    width, heads = model.width or width, model.heads or heads
    if width % heads:
        problems.append(f"model.heads={heads} does not divide the width {width}: choose model.heads or model.width so that it does")
    if not model.class_token and model.pool == "class_token":
        problems.append("model.pool=class_token needs model.class_token=True: set it, or use model.pool=average")
    if model.mixer == "token_shift" and model.token_shift.tokens == "class" and not model.class_token:
        problems.append("model.token_shift.tokens=class needs a class token: set model.class_token=True or model.token_shift.tokens=all")
    if not 0 < model.token_shift.fraction <= 0.5:
        problems.append(f"model.token_shift.fraction={model.token_shift.fraction} must be above 0 and at most 0.5: each direction takes so much")
    if not 0 <= model.drop_path < 1 or not 0 <= model.dropout < 1:
        problems.append(f"model.drop_path={model.drop_path} and model.dropout={model.dropout} must be at least 0 and below 1")
    return problems


def _check_task(config: ConfigDict, name: str) -> list[str]:
    task = config.tasks[name]
    if not name.isidentifier():
        return ["a task's name must be letters, digits and underscores, for it names parameters and folders"]
    problems = [f"{key}={task[key]!r} is unknown: choose one of {', '.join(choices)}" for key, choices in TASK_CHOICES.items() if task[key] not in choices]
    if problems:
        return problems
    patch = config.model.patch or int(config.model.variant.partition("/")[2] or 1)
    height, width = clip_spec(config, name).size
    if height % patch or width % patch:
        problems.append(f"input of {height} x {width} pixels is not divisible by the patch of {patch}: change image_size or the model's patch")
    if task.loss_weight < 0 or task.sample_weight <= 0:
        problems.append("loss_weight must be at least 0 and sample_weight above 0")
    if not 0 < task.short_side[0] <= task.short_side[1]:
        problems.append(f"short_side={tuple(task.short_side)} must be a range of pixels, smaller first")
    if not 0 < task.area[0] <= task.area[1] <= 1 or not 0 < task.aspect[0] <= task.aspect[1]:
        problems.append(f"area={tuple(task.area)} must be a range within 0..1 and aspect={tuple(task.aspect)} a range above 0, smaller first")
    if task.media == "video" and views(config.eval.views):
        problems += clips.check_views(task, views(config.eval.views)[0])
    return problems


def _get(config: ConfigDict, path: str):
    for key in path.split("."):
        config = config[key]
    return config
