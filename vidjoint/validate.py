"""Everything about a config that can be wrong is found here, before anything is allocated, and reported together."""

import math
import re
import sys

from ml_collections import ConfigDict

from vidjoint import losses, optim
from vidjoint.data import clips, sources
from vidjoint.data.decode import INTERPOLATIONS
from vidjoint.data.schedules import SCHEDULES
from vidjoint.data.tasks import clip_spec
from vidjoint.errors import UserError
from vidjoint.models.build import PRESETS
from vidjoint.models.layers import ATTENTIONS, GELUS
from vidjoint.models.mixers import MIXERS
from vidjoint.models.pooling import NEED_CLASS_TOKEN, POOLS
from vidjoint.models.position import RESIZERS
from vidjoint.models.vit import REMAT
from vidjoint.running import trackers

CHOICES = {
    "schedule": SCHEDULES,
    "data.isolate": ("all", "video", "none"),
    "model.mixer": MIXERS,
    "model.pool": POOLS,
    "model.dtype": ("bfloat16", "float32"),
    "init_heads": ("matching", "new"),
    "model.attention": ATTENTIONS,
    "model.remat": ("none", *REMAT),
    "model.gelu": ("", *GELUS),
    "model.interpolation": ("", *INTERPOLATIONS),
    "model.pre_norm": ("", "none", "layer_norm"),
    "model.position_resize": ("", *RESIZERS),
    "model.video_position": ("", "grid", "space_time"),
    "model.temporal_init": ("zero", "copied", "random"),
    "model.embed": ("shared", "separate"),
    "model.tubelet_init": ("central_frame", "average"),
    "model.divided.image_temporal": ("affine", "skip"),
    "model.token_shift.tokens": ("class", "all"),
    "model.token_shift.direction": ("next_first", "previous_first"),
    "model.motion.order": ("time_space", "space_time"),
    "model.class_attention.keys": ("patches", "all"),
    "model.am_flow.adapter": ("parallel", "serial", "hyperformer", "compacter"),
    "model.am_flow.flow": ("none", "vanilla", "aligned"),
    "model.am_flow.flow_heads": ("mean", "each"),
    "model.am_flow.flow_last": ("zeros", "repeat"),
    "model.am_flow.flow_tokens": ("all", "patches"),
    "model.am_flow.flow_softmax": ("keys", "queries"),
    "model.am_flow.flow_map": ("softmax", "logits"),
    "model.am_flow.encoder_input": ("scalar", "tokens"),
    "model.am_flow.tpu": ("none", "transformer", "tcn", "lstm"),
    "model.am_flow.tpu_sequence": ("frames", "tokens"),
    "model.am_flow.tpu_squeeze": ("auto", "last", "mean"),
    "optim.per_task": ("shared", "independent", "cumulative_ref", "accumulated"),
    "loss.reduction": losses.REDUCTIONS,
    "eval.average": ("softmax", "logits"),
}
TASK_CHOICES = {"source": sources.KINDS, "media": ("video", "image"), "sampler": clips.SAMPLERS, "crop": ("short_side", "area", "none")}
POSITIVE = ("batch_size", "log_every", "checkpoint_every", "keep_checkpoints", "model.frames", "model.image_size")
POSITIVE += tuple(f"data.{key}" for key in ("prefetch", "max_pixels", "max_frames", "decode_seconds", "decode_memory"))
POSITIVE += ("accumulate", "model.tubelet", "model.motion.block", "model.class_attention.blocks", "model.temporal_encoder.depth")
POSITIVE += tuple(f"model.am_flow.{key}" for key in ("bottleneck", "hyper_width", "encoder_width", "encoder_mlp", "encoder_heads"))
POSITIVE += tuple(f"model.am_flow.{key}" for key in ("tpu_width", "tpu_layers", "tpu_mlp", "tpu_heads"))
NOT_NEGATIVE = ("seed", "total_steps", "total_epochs", "eval_every", "data.threads", "data.workers", "loss.mixup", "loss.cutmix", "eval.batch_size")
NOT_NEGATIVE += ("max_skipped", "mesh.cpu_devices")
NOT_NEGATIVE += tuple(f"model.{key}" for key in ("width", "depth", "heads", "mlp_dim", "patch", "norm_eps", "last_norm_eps"))
TASK_POSITIVE = ("sample_weight", "window_seconds")
TASK_NOT_NEGATIVE = ("classes", "loss_weight", "steps", "batch_size", "frames", "randaugment_layers", "randaugment_magnitude")
LARGEST = 2**63  # what JAX takes for a seed
MOST_PARAMETERS, MOST_DEPTH = 10**12, 1000  # of a model
MOST_CPU_DEVICES = 1024  # JAX takes memory for each
MOST_PIXELS, MOST_BATCH, MOST_VIEWS = 2**33, 2**42, 2**36  # bytes of a clip with all its views, of a batch of one task, of one with all views
VARIANT = re.compile(r"(\w+)/([1-9]\d*)")
TEXTS = ("log_to", "task_order", "optim.freeze", "init_allow", "init_parts")  # tuples of texts; all others are of numbers
PAIRS = ("image_size", "short_side", "area", "aspect")


def check(config: ConfigDict, trains: bool = True) -> list[str]:
    """Returns the problems of a config, one line each with what to do; [] if it can run. Reads no file. Lines about a task start with its key.

    Args:
      trains: False where nothing is to be trained: a length and training data are not asked for then, as imported weights have none.
    """
    problems = _check_tuples(config)
    if problems:
        return problems
    problems = _check_numbers(config, CHOICES, POSITIVE, NOT_NEGATIVE)
    problems += check_start(config)
    if config.init_parts and not config.init_from:
        problems.append("init_parts takes parameters in place of those of init_from: set init_from, too")
    if trains and min(config.total_steps, config.total_epochs) >= 0 and bool(config.total_steps) == bool(config.total_epochs):
        problems.append(f"total_steps={config.total_steps} and total_epochs={config.total_epochs}: give exactly one of them")
    if config.mesh.cpu_devices > MOST_CPU_DEVICES:
        problems.append(f"mesh.cpu_devices={config.mesh.cpu_devices} must be at most {MOST_CPU_DEVICES}")
    problems += trackers.check(config.log_to) if trains else []
    if not config.tasks:
        problems.append("there are no tasks: add one with config.tasks.NAME = task_config(...)")
    if config.task_order and sorted(config.task_order) != sorted(config.tasks):
        problems.append(f"task_order={config.task_order} must name each task once: {', '.join(sorted(config.tasks))}")
    problems += _check_schedule(config)
    if not 0 <= config.loss.label_smoothing < 1:
        problems.append(f"loss.label_smoothing={config.loss.label_smoothing} must be at least 0 and below 1")
    if not 0 <= config.data.max_bad_share <= 1:
        problems.append(f"data.max_bad_share={config.data.max_bad_share} must be a share, 0 to 1")
    if views(config.eval.views) is None:
        problems.append(f"eval.views={config.eval.views!r}: write temporal x spatial views, as in 1x3")
    problems += _check_optim(config)
    problems += _check_model(config.model)
    if trains and config.model.temporal_init == "copied" and not config.init_from:
        problems.append("model.temporal_init=copied copies the attention of an earlier run: set init_from, or use model.temporal_init=zero or random")
    for name in sorted(config.tasks):
        problems += [f"tasks.{name}: {line}" for line in _check_task(config, name, trains)]
    if not any(line.startswith("model.variant=") for line in problems):
        problems += _check_sizes(config)
    shapes = {clip_spec(config, name).shape for name in config.tasks}
    if config.schedule == "mixed" and 0 < config.batch_size < len(shapes):
        problems.append(f"batch_size={config.batch_size} is below the number of clip shapes, {len(shapes)}, which each need a batch: raise it")
    return problems


def check_start(config: ConfigDict) -> list[str]:
    """Those problems of a config that are about which parameters `init_allow` and `init_parts` name."""
    if problems := [line for line in _check_tuples(config) if line.startswith("init_")]:
        return problems
    for key, patterns in (("init_allow", config.init_allow), ("init_parts", [part.partition("=")[0] for part in config.init_parts])):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"{key}: {pattern!r} is no regular expression ({error}): correct it")
    problems += [f"init_parts: {part!r}: write REGEX=PATH" for part in config.init_parts if not all(part.partition("="))]
    return problems


def check_model(config: ConfigDict) -> list[str]:
    """Those problems of a config that are about `config.model`."""
    if problems := [line for line in _check_tuples(config) if line.startswith("model.")]:
        return problems
    choices = {key: names for key, names in CHOICES.items() if key.startswith("model.")}
    positive, not_negative = ([key for key in keys if key.startswith("model.")] for keys in (POSITIVE, NOT_NEGATIVE))
    return _check_numbers(config, choices, positive, not_negative) or _check_model(config.model)


def views(text: str) -> tuple[int, int] | None:
    """Reads "TxS" as (temporal, spatial) views, None if it is no such thing."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    return (int(match[1]), int(match[2])) if match else None


def _check_tuples(config: ConfigDict, prefix: str = "") -> list[str]:
    """The schema fixes the type of a value, but not that of a tuple's members, nor that numbers are some that a run can have."""
    problems = []
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            problems += _check_tuples(value, f"{prefix}{key}.")
            continue
        members = value if isinstance(value, tuple) else (value,)
        if isinstance(value, tuple):
            kind, name = (str, "texts") if prefix + key in TEXTS else (int | float, "numbers")
            if not all(isinstance(member, kind) for member in value):
                problems.append(f"{prefix}{key}={value} must be a tuple of {name}")
                continue
        if not all(isinstance(member, str) or abs(member) < LARGEST for member in members):
            problems.append(f"{prefix}{key}={value} must be a finite number below {LARGEST:.0e}")
    return problems


def _check_sizes(config: ConfigDict) -> list[str]:
    """Refuses sizes that are a slip of the hand, before anything of that size is made."""
    problems, model = [], config.model
    width, depth = (size or preset for size, preset in zip((model.width, model.depth), PRESETS[VARIANT.fullmatch(model.variant)[1]], strict=False))
    parameters = depth * width * (4 * width + 2 * (model.mlp_dim or 4 * width))
    if parameters > MOST_PARAMETERS or depth > MOST_DEPTH:
        problems.append(f"a model of width {width} and depth {depth} has {parameters:.0e} parameters: lower model.width, mlp_dim or depth")
    views_of = math.prod(views(config.eval.views) or (1,))
    for name in sorted(config.tasks):
        shape = clip_spec(config, name).shape
        if math.prod(shape) * views_of > MOST_PIXELS:
            size = f"{shape[0]} frames of {shape[1]} x {shape[2]} pixels, {views_of} views of it"
            problems.append(f"tasks.{name}: a clip has {size}: lower frames, image_size or eval.views")
        elif math.prod(shape) * max(config.batch_size, config.eval.batch_size, config.tasks[name].batch_size) > MOST_BATCH:
            problems.append(f"tasks.{name}: a batch would have more than {MOST_BATCH >> 30} GiB of pixels: lower batch_size")
        elif math.prod(shape) * views_of * (config.eval.batch_size or config.batch_size) > MOST_VIEWS:
            asked = f"{config.eval.batch_size or config.batch_size} examples with {views_of} views each"
            problems.append(f"tasks.{name}: {asked} have more than {MOST_VIEWS >> 30} GiB of pixels: lower eval.views or eval.batch_size")
    for key, most in (("total_steps", 10**9), ("data.threads", 10**4), ("data.workers", 10**4), ("data.prefetch", 10**4)):
        if _get(config, key) > most:
            problems.append(f"{key}={_get(config, key)} is more than {most}: lower it")
    return problems


def _check_numbers(config: ConfigDict, choices: dict, positive: tuple, not_negative: tuple) -> list[str]:
    value = {key: _get(config, key) for key in (*choices, *positive, *not_negative)}
    wrong = {key: filter(None, names) for key, names in choices.items() if value[key] not in names}
    problems = [f"{key}={value[key]!r} is unknown: choose one of {', '.join(names)}" for key, names in wrong.items()]
    problems += [f"{key}={value[key]} must be above 0" for key in positive if not value[key] > 0]
    return problems + [f"{key}={value[key]} must be at least 0" for key in not_negative if not value[key] >= 0]


def _check_schedule(config: ConfigDict) -> list[str]:
    problems, schedule, tasks = [], config.schedule, config.tasks
    own_size, own_steps = ([name for name in sorted(tasks) if tasks[name][key]] for key in ("batch_size", "steps"))
    shares_steps = schedule in ("task_by_task", "weighted")
    if own_size and schedule == "mixed":
        problems.append(f"tasks.{own_size[0]}.batch_size is for batches of one task: set it to 0, or another schedule than mixed")
    if shares_steps and own_steps and len(own_steps) < len(tasks):
        missing = ", ".join(f"tasks.{name}.steps" for name in sorted(tasks) if name not in own_steps)
        problems.append(f"{missing} must be set, for {own_steps[0]} has steps (or set none: steps are then in proportion to size)")
    if shares_steps and 0 < config.total_steps < len(tasks):
        problems.append(f"total_steps={config.total_steps} is below the number of tasks, {len(tasks)}, which each need a step: train longer")
    if schedule == "accumulated" and 0 < config.batch_size < len(tasks) and len(own_size) < len(tasks):
        problems.append(f"batch_size={config.batch_size} is below the number of tasks, {len(tasks)}, which each need a row: raise it or set theirs")
    if config.optim.per_task != "shared" and schedule not in ("round_robin", "alternating"):
        problems.append(f"optim.per_task={config.optim.per_task} is for tasks that take turns: set schedule=round_robin, or optim.per_task=shared")
    return problems


def _check_optim(config: ConfigDict) -> list[str]:
    """What the makers of the optimiser refuse, as far as that does not hang on the size of the data: durations in epochs count as nothing."""
    problems = []
    attempts = (
        lambda: optim.make_schedule(config.optim, config.total_steps if config.total_steps > 0 else sys.maxsize, 0.0),
        lambda: optim.make_optimizer(config.optim, lambda step: 0.0),
    )
    for attempt in attempts:
        try:
            attempt()
        except UserError as error:
            problems += error.lines
    return problems


def _check_model(model: ConfigDict) -> list[str]:
    problems = []
    match = VARIANT.fullmatch(model.variant)
    if not match or match[1] not in PRESETS:
        return [f"model.variant={model.variant!r} is unknown: write one of {', '.join(PRESETS)}, a slash and the patch size, as in B/16"]
    width, depth, heads, _ = PRESETS[match[1]]
    width, depth, heads = model.width or width, model.depth or depth, model.heads or heads
    if width % heads:
        problems.append(f"model.heads={heads} does not divide the width {width}: choose model.heads or model.width so that it does")
    if wrong := [number for number in model.mixer_blocks if number not in range(-depth, depth)]:
        problems.append(f"model.mixer_blocks has {wrong}, but the {depth} blocks are numbered from 0 to {depth - 1}: name these, or () for all")
    if not model.class_token and model.pool in NEED_CLASS_TOKEN:
        problems.append(f"model.pool={model.pool} needs model.class_token=True: set it, or use another model.pool, such as average")
    if model.mixer == "token_shift" and model.token_shift.tokens == "class" and not model.class_token:
        problems.append("model.token_shift.tokens=class needs a class token: set model.class_token=True or model.token_shift.tokens=all")
    if not 0 < model.token_shift.fraction <= 0.5:
        problems.append(f"model.token_shift.fraction={model.token_shift.fraction} must be above 0 and at most 0.5: each direction takes so much")
    if not 0 <= model.drop_path < 1 or not 0 <= model.dropout < 1:
        problems.append(f"model.drop_path={model.drop_path} and model.dropout={model.dropout} must be at least 0 and below 1")
    if model.attention == "cudnn" and model.dtype != "bfloat16":
        problems.append(f"model.attention=cudnn computes in bfloat16, not {model.dtype}: set model.dtype=bfloat16, or model.attention=xla")
    if model.tubelet > 1 and model.embed != "separate":
        problems.append(f"model.tubelet={model.tubelet} is for videos alone: set model.embed=separate, or model.tubelet=1")
    if model.tubelet > 0 and model.frames % model.tubelet:
        problems.append(f"model.frames={model.frames} cannot be cut into tubelets of {model.tubelet}: change model.frames or model.tubelet")
    if model.mixer == "am_flow":
        problems += _check_am_flow(model.am_flow, width)
    if model.layer_scale < 0 and model.layer_scale != -1:
        problems.append(f"model.layer_scale={model.layer_scale} must be above 0, or 0 for none, or -1 for that of init_from")
    if model.registers < -1:
        problems.append(f"model.registers={model.registers} must be at least 0, or -1 for that of init_from")
    if model.video_position == "space_time" and model.embed != "separate":
        problems.append("model.video_position=space_time is a table for videos alone: set model.embed=separate")
    finite = all(math.isfinite(value) for value in (*model.mean, *model.std))
    if len(model.mean) not in (0, 3) or len(model.std) not in (0, 3) or not finite or not all(value > 0 for value in model.std):
        problems.append(f"model.mean={model.mean} and model.std={model.std} must be three numbers each (red, green, blue), std above 0; or ()")
    return problems


def _check_am_flow(settings: ConfigDict, width: int) -> list[str]:
    problems = []
    pairs = [("encoder_heads", "encoder_width")] * (settings.flow == "aligned") + [("tpu_heads", "bottleneck")] * (settings.tpu == "transformer")
    for heads, key in pairs:
        if settings[heads] > 0 and settings[key] % settings[heads]:
            problems.append(f"model.am_flow.{heads}={settings[heads]} does not divide model.am_flow.{key}={settings[key]}: change one of them")
    if settings.adapter == "compacter" and (width % 4 or settings.bottleneck % 4):
        problems.append(f"model.am_flow.adapter=compacter needs a width and a bottleneck that 4 divides, not {width} and {settings.bottleneck}")
    return problems


def _check_task(config: ConfigDict, name: str, trains: bool) -> list[str]:
    task = config.tasks[name]
    if not name.isidentifier():
        return ["a task's name must be letters, digits and underscores, for it names parameters and folders"]
    problems = _check_numbers(task, TASK_CHOICES, TASK_POSITIVE, TASK_NOT_NEGATIVE)
    problems += [f"{key}={task[key]} must be a pair of numbers" for key in PAIRS if len(task[key]) != 2]
    if problems:
        return problems
    if trains and not task.train:
        problems.append("train is empty: name the training data")
    if task.multilabel and task.source not in ("csv", "packed"):
        problems.append(f"multilabel=True with source={task.source}: only lists hold several labels of a file, so set source=csv and write one")
    height, width = clip_spec(config, name).size
    patch = config.model.patch or (VARIANT.fullmatch(config.model.variant) or ("", "", 1))[2]
    if height < 1 or width < 1 or height % int(patch) or width % int(patch):
        problems.append(f"input of {height} x {width} pixels is not divisible by the patch of {patch}: change image_size or the model's patch")
    if task.media == "video" and task.frames > 1 and config.model.tubelet > 0 and task.frames % config.model.tubelet:
        problems.append(f"frames={task.frames} cannot be cut into tubelets of {config.model.tubelet}: change frames or model.tubelet")
    flow = config.model.am_flow
    fixed = (config.model.mixer, flow.flow, flow.encoder_input) == ("am_flow", "aligned", "tokens")
    if fixed and task.media == "video" and (height, width) != (config.model.image_size,) * 2:
        problems.append(f"model.am_flow.encoder_input=tokens is for inputs of model.image_size alone, not {height} x {width}: set it to scalar")
    if task.randaugment_magnitude > 10:
        problems.append(f"randaugment_magnitude={task.randaugment_magnitude} must be at most 10")
    if not 0 <= task.erase <= 1:
        problems.append(f"erase={task.erase} must be a probability, 0 to 1")
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
