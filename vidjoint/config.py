"""The schema: every key that a run may set, with its unit and its reason.

An experiment (`configs/*.py`) starts from `base_config()`, changes a few keys and returns it. The schema is locked: a key that is not here is an
error, in a file as on the command line (`--config.optim.lr=1e-3`). A dataset is an entry of `tasks`, made by `task_config()`.
"""

import contextlib
import difflib
import importlib.util
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

from absl import flags
from ml_collections import ConfigDict, config_flags

from vidjoint.errors import UserError

SHOWN = 8  # keys that a message names
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", tuple: "a tuple"}  # types of values, in words


def base_config() -> ConfigDict:
    """Returns the locked base: a ViT-B/16 without temporal mixing, AdamW, and no tasks."""
    c = ConfigDict()

    # The run
    c.seed = 0  # decides initial parameters, order of examples, clips and augmentation
    c.total_steps = 0  # length in updates; give this or total_epochs
    c.total_epochs = 0.0  # length in epochs: one is as many examples, of whichever set, as the union has (sum of size x sample_weight)
    c.eval_every = 0  # steps between evaluations on the validation splits; 0: only at the end
    c.checkpoint_every = 1000  # steps between checkpoints; the last step is always saved
    c.keep_checkpoints = 2  # how many of the newest checkpoints stay; the best one stays besides
    c.log_every = 50  # steps between log events; each is a mean over the steps since the last one
    c.log_to = ("tensorboard",)  # where events go besides metrics.jsonl: tensorboard, wandb (Weights & Biases), mlflow; vidjoint/running/trackers.py
    c.max_skipped = 10  # steps in a row with a loss or gradient that is not finite, which change nothing, before the run stops; 0: it goes on
    # folder of an earlier run or of imported weights, or a file of another project's weights (docs/weights.md), whose parameters this run starts
    # from
    c.init_from = ""
    c.init_heads = "matching"  # its classifiers: matching: those of the same class names are taken over; new: none, as in a transfer to a new head
    c.init_parts = ()  # parameters from other weights than init_from's, as "REGEX=PATH": "embed/video_.*=runs/vivit_k400"
    c.init_allow = ()  # regular expressions: parameters that may be new, or unused, though init_from gives no reason for it

    # Data
    c.data_root = ""  # folder that every relative path of a task starts from; "": the current folder
    c.batch_size = 64  # examples per step, over all batches of the step and all devices; tasks may have their own (tasks.NAME.batch_size)
    # parts that the batches of a step are worked off in, one after the other, gradients summed: for batches whose activations don't fit the memory.
    # The update is the same; batches are filled up to a multiple of devices (data x fsdp) x accumulate
    c.accumulate = 1
    # mixed: tasks side by side in every batch, in proportion to size (CoVeR). All others are PolyViT's, whose batches are of one task each:
    # round_robin (or alternating): in turn (IV-ViT); task_by_task: all steps of one, then of the next; uniform: each step's task is drawn evenly;
    # weighted: each task has its exact number of steps (tasks.NAME.steps), in a drawn order; accumulated: one batch of each in every step, gradients
    # summed (with loss.reduction=per_task)
    c.schedule = "mixed"
    c.task_order = ()  # order of the tasks in round_robin and task_by_task; (): alphabetical
    c.tasks = ConfigDict()  # name -> task_config(...)

    c.data = ConfigDict()
    c.data.threads = 0  # decoding threads of this process; 0: one and a half per core, as they wait for child processes, or one with isolate=none
    c.data.workers = 0  # worker processes that make whole batches; 0: this process does, whose threads have child processes that decode (isolate)
    c.data.prefetch = 4  # steps whose batches are decoded ahead (each worker process: at least four)
    c.data.max_bad_share = 0.1  # share of one training set's files that may fail to decode before the run stops with their list
    # Which files child processes decode, one per decoding thread: one that hangs, crashes the decoder or eats memory then costs an example and not
    # the run; and their decoding doesn't hold up the training loop's Python. all, video (pictures in the threads themselves), or none: without limits
    # of time and memory. Cost: docs/reliability.md
    c.data.isolate = "all"
    c.data.decode_seconds = 30.0  # isolate: time that one clip may take; above it, its file counts as one that can't be decoded
    c.data.decode_memory = 4096  # isolate: MiB of address space that a decoding process may take
    c.data.max_pixels = 8192 * 4352  # width x height above which a file is refused: bounds the memory of one decoder
    c.data.max_frames = 50_000  # frames decoded for one clip above which a file is refused: most have keyframes to jump to, and need few

    # Model
    m = c.model = ConfigDict()
    m.variant = "B/16"  # Ti, S, B, L or H (width, depth, heads), then patch size in pixels
    m.width = 0  # 0: the variant's
    m.depth = 0  # number of blocks; 0: the variant's
    m.heads = 0  # attention heads; 0: the variant's
    m.mlp_dim = 0  # hidden width of the MLP; 0: the variant's
    m.patch = 0  # patch side in pixels; 0: the variant's
    m.frames = 8  # frames per clip (images have one); any number works at run time, tables are resized
    m.image_size = 224  # side of the square input in pixels; a task may differ
    m.embed = "shared"  # shared: images and frames have one patch embedding; separate: videos have a projection and a position table of their own
    m.tubelet = 1  # frames per token of a video, 1: patches of one frame; above 1 (ViViT, PolyViT) needs embed=separate, and must divide the frames
    m.tubelet_init = "central_frame"  # how the video projection starts from that of images: central_frame (zero but for the middle frame) or average
    m.mixer = "none"  # how frames talk: none, divided, joint, token_shift, motion, am_flow
    m.mixer_blocks = ()  # numbers, from 0, of the blocks in which frames talk; (): all. MEViT is top-heavy: (4, 5, .., 10)
    # zero: time table and temporal branch start as the identity, for pretrained models; copied: the table is zero, the branch copies the spatial
    # attention that init_from brings and acts at once (ViViT); random: for training from scratch
    m.temporal_init = "zero"
    # class_token: mean of the frames' class tokens (late fusion); average: mean of all patches; patch_mean: the same before the last norm (VideoMAE);
    # class_and_average: both side by side (DINOv2's classifier); frame_mean: mean over frames before the last norm, then the class token (TimeSformer
    # space-only); last_frame: that frame's class token (AM Flow); first_token: the clip's first token, be it a patch (a VideoMAE that Hugging Face's
    # library fine-tuned); class_attention: MEViT; temporal_encoder: ViViT
    m.pool = "class_token"
    m.class_token = True  # False: no class token in the blocks; pool: average, patch_mean, first_token, class_attention or temporal_encoder
    m.dtype = "bfloat16"  # compute type; parameters, softmax and losses stay float32. On a CPU float32 is faster
    # xla: products and a softmax; cudnn: flash attention of NVIDIA GPUs (A100 and newer) in bfloat16, for sequences of 128 tokens and more, and xla
    # everywhere else. Which is faster for this model: benchmark --what=attention
    m.attention = "xla"
    # What the backward pass computes anew to save memory. none; dots: all but the dense layers, that is norms, GELU and attention maps; block: each
    # block (the least memory, a third more compute)
    m.remat = "none"
    # True: equal blocks are one loop, which compiles faster (a deep model on TPU: minutes in place of an hour or more) and copies their parameters in
    # every step; results differ by rounding alone
    m.scan = False
    m.drop_path = 0.0  # stochastic depth: share of dropped residuals in the last block, rising linearly from 0
    m.dropout = 0.0  # dropout on the pooled features, before the heads
    # What pretrained weights rely on. Left as they are here, these are taken from the weights that init_from names, or else as said
    m.gelu = ""  # exact, tanh or quick (CLIP); "": exact
    m.norm_eps = 0.0  # LayerNorm epsilon; 0: 1e-6
    m.last_norm_eps = 0.0  # that of the last norm, where it has one of its own (Hugging Face's VideoMAE); 0: norm_eps
    m.mean = ()  # RGB mean of the inputs in 0..1; (): 0.5 each
    m.std = ()  # RGB standard deviation; (): 0.5 each
    m.interpolation = ""  # how pictures are scaled to the input: bilinear or bicubic; "": bilinear
    m.layer_scale = -1.0  # initial factor on every residual (LayerScale: CaiT, DINOv2), one per channel; 0: none; -1: none
    m.registers = -1  # register tokens per frame (DINOv2 with registers); -1: none
    m.pre_norm = ""  # none, or layer_norm: a norm of the tokens before the blocks (CLIP); "": none
    # how position tables are stretched to another grid, now and in every step: bicubic (torch; Hugging Face), bicubic_antialias (timm),
    # bicubic_offset (DINOv2's own code), bilinear (timm for .npz), bilinear_corners (Google's ViT, big_vision), nearest (TimeSformer), nearest_1d
    # (TimeSformer's loader), sinusoid (VideoMAE: made anew); "": bicubic
    m.position_resize = ""
    m.video_position = ""  # embed=separate: grid (one table for all frames) or space_time (a row per token of a clip: ViViT, VideoMAE); "": grid
    m.divided = ConfigDict()  # mixer divided (TimeSformer)
    m.divided.image_temporal = "affine"  # at one frame: affine (softmax over one key, CoVeR appendix A), or skip the branch
    m.token_shift = ConfigDict()  # mixer token_shift (TokenShift, IV-ViT)
    m.token_shift.tokens = "class"  # class: only the class token moves (the papers); all: every token (needed from scratch)
    m.token_shift.fraction = 0.125  # share of the channels that comes from each neighbour frame (IV-ViT 1/8, TokenShift 1/4)
    m.token_shift.direction = "next_first"  # first channels from frame t+1 (the code of both papers), or previous_first (IV-ViT eq. 7)
    m.motion = ConfigDict()  # mixer motion (MEViT)
    m.motion.block = 2  # M: a patch attends to the M x M block it lies in, in all frames; 1 is divided attention over time
    m.motion.order = "time_space"  # motion before spatial attention (eqs. 8, 6), or space_time (fig. 2)
    m.motion.temporal_fc = True  # end the branch in a dense layer of its own, as TimeSformer does
    m.class_attention = ConfigDict()  # pool class_attention (MEViT eq. 10; CaiT)
    m.class_attention.blocks = 1  # blocks that update the class token alone, after model.depth blocks without it
    m.class_attention.keys = "patches"  # patches (MEViT), or all: the class token too (CaiT)
    m.temporal_encoder = ConfigDict()  # pool temporal_encoder (ViViT's factorised encoder)
    m.temporal_encoder.depth = 4  # transformer blocks over the frames' class tokens
    f = m.am_flow = ConfigDict()  # mixer am_flow: adapters with attention-map flow and temporal processing units (TPUs), usually with optim.freeze
    f.adapter = "parallel"  # parallel (scaled), serial, hyperformer (parallel, weights made by one shared net) or compacter (parallel, low-rank sums)
    f.bottleneck = 684  # r: width of the adapters' bottleneck; 684 gives the paper's number of parameters
    f.hyper_width = 16  # hyperformer: width of its embeddings and of the shared net; below 24 it has fewer parameters than parallel adapters
    f.flow = "vanilla"  # none; vanilla: still camera (eqs. 2-3); aligned: moving camera, with an aligning encoder (eqs. 4-5). In model.mixer_blocks
    f.flow_heads = "mean"  # mean: attention maps are averaged over heads, one number per token; each: one per head
    f.flow_last = "zeros"  # flow of the last frame, which has no next one: zeros or repeat
    f.flow_tokens = "all"  # all: class token and patches are in the attention map, and the class token's flow is set to 0; patches: only these are
    f.flow_softmax = "keys"  # axis of the softmax: keys or queries; the sum that gives one number per token is over the other
    f.flow_map = "softmax"  # flow=aligned: what is summed per token, softmax of the attention map or its logits
    f.encoder_width = 684  # aligning encoder: width
    f.encoder_mlp = 1368  # aligning encoder: hidden width
    f.encoder_heads = 12  # aligning encoder: heads of its linear attention
    f.encoder_input = "scalar"  # scalar: one number per token, projected to the width; tokens: one vector per frame that holds all patches' numbers
    f.tpu = "transformer"  # transformer, tcn, lstm, or none: adapters alone. In model.mixer_blocks
    f.tpu_sequence = "frames"  # frames: mean over tokens, then one sequence over time; tokens: a sequence for each token, then the mean
    f.tpu_squeeze = "auto"  # auto: the last state (lstm, tcn) or the mean over time (transformer); last; mean
    f.tpu_width = 684  # width of the unit; the transformer's is the bottleneck
    f.tpu_layers = 1  # layers: encoder blocks, residual blocks of two convolutions (dilation 2^i), or stacked LSTMs
    f.tpu_mlp = 1368  # transformer: hidden width
    f.tpu_heads = 12  # transformer: attention heads
    f.double_residual = False  # add the adapter's own input to its output once more, as eq. 1 is printed

    # Loss
    c.loss = ConfigDict()
    c.loss.reduction = "per_task"  # per_task: sum of loss_weight x mean over the task's examples (CoVeR); per_example: weighted mean over all
    c.loss.label_smoothing = 0.0  # multilabel tasks have none: it shares a label out among classes that exclude each other
    c.loss.mixup = 0.0  # alpha of Beta(alpha, alpha) for mixup; 0: off. Partners are of the same task
    c.loss.cutmix = 0.0  # alpha for CutMix; with both on, each batch takes one of the two at random

    # Optimiser
    o = c.optim = ConfigDict()
    o.name = "adamw"  # adamw or sgd (momentum; weight decay joins the gradient)
    o.lr = 1e-3  # peak learning rate, not scaled by anything
    o.schedule = "cosine"  # cosine (to zero), step (x decay_factor at each milestone) or constant
    o.warmup_steps = 0  # linear from zero; give this or warmup_epochs
    o.warmup_epochs = 0.0
    o.milestone_steps = ()  # where schedule=step drops; give these or milestone_epochs
    o.milestone_epochs = ()
    o.decay_factor = 0.1
    o.momentum = 0.9  # sgd
    o.nesterov = False  # sgd
    o.betas = (0.9, 0.999)  # adamw
    o.eps = 1e-8  # adamw
    o.weight_decay = 0.0
    o.decay = "matrices"  # matrices: no decay on biases, norms, tokens and tables; all: everything (TimeSformer's code)
    o.clip_norm = 0.0  # global gradient norm is clipped to this; 0: off
    o.ema = 0.0  # decay of the exponential moving average of the parameters, used for evaluation; 0: off
    # round_robin only, where a step for each task is a round. shared: one optimiser; independent: moments of its own for each task, so so many times
    # their memory; cumulative_ref: likewise, and each step takes the sum of the round's gradients so far (IV-ViT's code); accumulated: one update per
    # round, with the sum of its gradients (those of a round that total_steps cuts off are not used). Rates are always per step
    o.per_task = "shared"
    o.freeze = ()  # regular expressions on parameter paths ("blocks/.*"): these are neither trained nor differentiated

    # Evaluation
    c.eval = ConfigDict()
    c.eval.views = "1x1"  # temporal x spatial views whose predictions are averaged, in the last evaluation
    c.eval.average = "softmax"  # what is averaged over views: softmax (multilabel tasks: sigmoid) or logits
    c.eval.reversed = True  # also evaluate videos with their frames reversed in the last evaluation (CoVeR Table 2)
    c.eval.batch_size = 0  # examples per evaluation step; 0: batch_size

    # Devices: sizes of the mesh axes; one may be -1 (all that are left)
    c.mesh = ConfigDict()
    c.mesh.data = -1  # batches are split
    c.mesh.fsdp = 1  # batches and parameters are split
    c.mesh.tensor = 1  # heads and MLP channels are split
    c.mesh.cpu_devices = 0  # without GPU and TPU: as how many devices the CPU counts; 0: one per core, if pictures are large and batch_size divides

    c.lock()
    c.tasks.unlock()  # experiments add tasks; the keys of each are locked again
    return c


def task_config(**changes) -> ConfigDict:
    """Returns the locked settings of one dataset with `changes` made; a task is added by `config.tasks.NAME = task_config(...)`.

    Raises:
      KeyError, TypeError: a change names an unknown key or has the wrong type.
    """
    t = ConfigDict()
    t.source = "csv"  # csv, folder, smarthome, tfds, packed or demo: see vidjoint/data/sources.py for the layouts
    t.media = "video"  # video or image (a video of one frame)
    t.train = ""  # list file(s, comma-separated), folder, zip, TFDS name:split, packed folder or URL, Smarthome protocol:part; relative to data_root
    t.val = ""  # likewise; "": no evaluation, or what `fold` holds out
    t.fold = ""  # "k/n" (k from 1): hold out the k-th of n parts of `train` (stratified by class) in place of `val`
    t.root = ""  # folder that the paths in a list start from, relative to data_root; "": the list's own folder
    t.allow_outside = False  # True: lists may name files outside root (if that is "": outside data_root; if that is "" too, they always may)
    # file with one class name per line, or the dataset's own label file (mini-Kinetics: Kinetics' lists), relative to data_root; "": from the data
    t.labels = ""
    t.classes = 0  # number of classes; 0: as many as the labels
    t.multilabel = False  # True: an example has any number of labels (in a list: `path,label|label`); sigmoid per class, mean average precision

    t.loss_weight = 1.0  # w of CoVeR's weighted loss
    t.sample_weight = 1.0  # the set counts as so many copies of itself when tasks are drawn in proportion to size
    t.steps = 0  # task_by_task, weighted: share of total_steps is in proportion to this (PolyViT's U, steps alone); 0 in all: to size x sample_weight
    t.batch_size = 0  # examples per batch of this task, if not mixed; 0: config.batch_size, of which accumulated gives each task an even share

    t.frames = 0  # frames per clip; 0: model.frames. An image has one
    t.image_size = (0, 0)  # height, width in pixels; (0, 0): model.image_size squared
    t.sampler = "uniform"  # uniform: over the whole video (CoVeR); window: window_seconds at a random place (IV-ViT); segments (Something-Something)
    t.window_seconds = 2.67  # length of the window (IV-ViT 5.3)

    t.crop = "short_side"  # short_side: resize to a random short side, then crop; area: random area and aspect; none: resize to the input
    t.short_side = (256, 320)  # range of the random short side in pixels; evaluation resizes to the input's own short side
    t.area = (0.08, 1.0)  # crop=area: range of the share of the picture
    t.aspect = (3 / 4, 4 / 3)  # crop=area: range of width / height
    t.flip = True  # horizontal flip with probability 1/2; False where left and right are in the labels
    t.randaugment_layers = 0  # RandAugment operations per clip, the same for all its frames; 0: off
    t.randaugment_magnitude = 9.0  # 0..10
    t.erase = 0.0  # probability of random erasing
    t.lock()
    unknown = sorted(set(changes) - set(t))
    if unknown:
        raise KeyError(", ".join(f"a task has no key {key!r}{_nearest(key, t)}" for key in unknown))
    t.update(changes)
    return t


def choose(argument: str, *groups: tuple[str, ...]) -> tuple[str, ...]:
    """Reads an experiment's argument, comma-separated words as in `high_res,k600`: of each group of alternatives one, by default the first.

    Raises:
      UserError: a word of no group, or two of one.
    """
    words = [word for word in argument.split(",") if word]
    chosen = [[word for word in words if word in group] or [group[0]] for group in groups]
    wrong = [word for word in words if not any(word in group for group in groups)] + [" and ".join(c) for c in chosen if len(c) > 1]
    if wrong:
        known = "; ".join(" | ".join(filter(None, group)) for group in groups)
        raise UserError(f"config argument {', '.join(wrong)}: choose from {known}, comma-separated")
    return tuple(c[0] for c in chosen)


def parse(argv: list[str], check: Callable[[ConfigDict], list[str]] = lambda config: []) -> tuple[ConfigDict, str]:
    """Reads `--config=FILE[:ARGUMENT]` and any number of `--config.KEY=VALUE`.

    Args:
      check: what else is wrong with a config (`validate.check`): told together with what is wrong with the arguments, if anything is.

    Returns:
      The config and its name (the file's, with the argument if there is one: cover_jft_high_res).

    Raises:
      UserError: no such file, an error in it, unknown keys or values of a wrong type; all that can be found, together.
    """
    path, changes, problems = "", [], []
    words = list(argv)
    while words:
        word = words.pop(0)
        if match := re.fullmatch(r"--?config(?:=(.*))?", word):
            path = match[1] if match[1] is not None else words.pop(0) if words else ""
        elif re.match(r"--?(no)?config\.", word):
            spaced = "=" not in word and words and not re.match(r"--?\D", words[0])  # --config.KEY VALUE
            changes.append(f"{word}={words.pop(0)}" if spaced else word)
        else:
            problems.append(f"unknown argument {word}: see --help")
    if not path:
        raise UserError("--config is missing: name an experiment, as in --config=configs/demo.py", *problems)
    file, colon, argument = path.partition(":")
    config = _load_file(Path(file), [argument] if colon else [])
    for change in changes:
        problems += override(config, change)
    if problems:
        raise UserError(*problems, *check(config))
    return config, "_".join(filter(None, [Path(file).stem, argument.replace(",", "_")]))


def as_json(config: ConfigDict) -> str:
    """A config as text that `load` and people can read."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def load(path: Path) -> ConfigDict:
    """Reads a file of `as_json` back into the locked schema; keys that the file lacks keep their defaults.

    Raises:
      UserError: the file is damaged, or has keys or values that this schema does not know.
    """
    config = base_config()
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        tasks = stored.pop("tasks")
        _update(config, stored)
        for name, settings in tasks.items():
            config.tasks[name] = task_config()
            _update(config.tasks[name], settings)
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise UserError(f"{path} is damaged or of another version of vidjoint ({_reason(error)}): mend it, or start in another folder") from error
    return config


def difference(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Keys in which two configs differ, as `key: old -> new` lines; a task that only one of them has is one line."""
    lines = [f"tasks.{name}: there -> not there" for name in sorted(set(old.tasks) - set(new.tasks))]
    lines += [f"tasks.{name}: not there -> there" for name in sorted(set(new.tasks) - set(old.tasks))]
    alone = tuple(line.partition(":")[0] + "." for line in lines)
    old, new = flat(old.to_dict()), flat(new.to_dict())
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and not key.startswith(alone)]
    return lines + [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys]


def _load_file(file: Path, arguments: list[str]) -> ConfigDict:
    """Runs `get_config(*arguments)` of an experiment's file; the config is checked against the schema and locked."""
    if not file.is_file():
        hint = " (it is a folder)" if file.is_dir() else f"; there is {file}.py" if Path(f"{file}.py").is_file() else ""
        raise UserError(f"--config={file}: there is no such file{hint}")
    spec = importlib.util.spec_from_file_location("<experiment>", file)
    if spec is None:
        raise UserError(f"--config={file}: an experiment is a Python file (NAME.py) with a function get_config")
    module = importlib.util.module_from_spec(spec)
    try:
        with _neighbours(Path(os.path.abspath(file)).parent), _registered(module):
            spec.loader.exec_module(module)
            if not hasattr(module, "get_config"):
                raise UserError(f"{file} has no function get_config: it is not run by itself, name an experiment (configs/demo.py)")
            if arguments and not inspect.signature(module.get_config).parameters:
                raise UserError(f"{file} takes no argument: write --config={file}")
            config = module.get_config(*arguments)
    except UserError:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).absolute().parent == file.absolute().parent]
        where = f"{frames[-1].filename} line {frames[-1].lineno}" if frames else f"{file}"
        where = f"{file} line {error.lineno}" if isinstance(error, SyntaxError) else where
        raise UserError(f"{where}: {_reason(error)}") from error

    if not isinstance(config, ConfigDict):
        raise UserError(f"{file}: get_config() returns no config: start from vidjoint.config.base_config() and return it")
    wanted, found = flat(base_config().to_dict()), flat(config.to_dict())
    problems = []
    for name, task in config.get("tasks", {}).items():
        if not isinstance(task, ConfigDict) or set(task_config()) - set(task):
            problems.append(f"{file}: tasks.{name} is no task: add it with config.tasks.{name} = task_config(...)")
        wanted |= {f"tasks.{name}": None} | {f"tasks.{name}.{key}": None for key in task_config()}
    missing = [key for key in wanted if key not in found and not key.startswith("tasks.")]
    if missing:
        problems.append(f"{file}: {len(missing)} keys are missing, such as {missing[0]}: start from base_config()")
    problems += [f"{file}: unknown key {key}{_nearest(key, wanted)}" for key in sorted(found.keys() - wanted.keys())]
    if problems:
        raise UserError(*problems)
    config.tasks.lock()
    return config.lock()


@contextlib.contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
    """While it is open, `from FOLDER import ...` finds the files of this folder, from any current folder and whatever bears the folder's name."""

    def forget() -> dict:
        ours = __name__.partition(".")[0]
        names = [name for name in sys.modules if name.partition(".")[0] == folder.name != ours]
        return {name: sys.modules.pop(name) for name in names}

    before, path = forget(), sys.path[:]
    sys.path.insert(0, str(folder.parent))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        forget()
        sys.modules.update(before)


@contextlib.contextmanager
def _registered(module: ModuleType) -> Iterator[None]:
    """While it is open, code finds the module by its name, as dataclasses look for theirs."""
    before = sys.modules.get(module.__name__)  # of an experiment that loads this one
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        sys.modules.pop(module.__name__, None)
        if before is not None:
            sys.modules[module.__name__] = before


def override(config: ConfigDict, change: str) -> list[str]:
    """Makes one `--config.KEY=VALUE` change in place (for a bool also --config.KEY and --noconfig.KEY); returns what is wrong with it."""
    known = flat(config.to_dict())
    key = re.sub(r"^--?(no)?config\.", "", change.partition("=")[0])
    if group := sorted(name for name in known if name.startswith(f"{key}.")):
        return [f"{change}: {key} holds several keys: set one of {', '.join(group[:SHOWN])}{', ...' * (len(group) > SHOWN)}"]
    if key not in known:
        return [f"{change}: there is no key {key}{_nearest(key, known)}"]
    argv, values = ["", change], flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except (flags.Error, ValueError, TypeError):
        return [f"{change}: {key} takes {KINDS[type(known[key])]}; it is {known[key]!r} now"]
    return []


def _nearest(key: str, known: Iterable[str]) -> str:
    """Names the known key that is most like an unknown one, or what there is in its place, to be appended to a message."""
    section, _, word = key.rpartition(".")
    tasks = {name.split(".")[1]: None for name in known if name.startswith("tasks.")}
    if tasks and key.startswith("tasks.") and not difflib.get_close_matches(key.split(".")[1], tasks, 1, 0.75):
        return f"; the tasks are {', '.join(tasks)}, and a new one goes into the experiment's file"
    beside = {name.rpartition(".")[2]: name for name in known if section and name.rpartition(".")[0] == section}
    elsewhere = (name for name in known if not name.startswith("tasks."))
    anywhere = {name.rpartition(".")[2]: name for name in sorted(elsewhere, key=lambda name: -name.count("."))}

    def like(words: dict[str, str]) -> list[str]:
        longer = [name for name in words if len(word) > 2 and (name.startswith(word) or name.endswith(f"_{word}"))]
        longer = sorted(longer, key=lambda name: (words[name].count("."), words[name]))[:1]
        return [words[name] for name in longer or difflib.get_close_matches(word, words, 1, 0.6)]

    close = like(beside) or [anywhere[name] for name in anywhere if name == word] or difflib.get_close_matches(key, known, 1, 0.75)
    if not close and beside:
        return f"; {section} has {', '.join(sorted(beside))}"
    close = close or like(anywhere)
    return f"; the nearest is {close[0]}" if close else f" (all are in {__file__})"


def _reason(error: Exception) -> str:
    """An error in one line, with the messages of ml_collections shortened."""
    text = str(error.args[0] if error.args else error).strip()
    if match := re.match(r"'?Key \"(.{1,60})\" does not exist", text):
        return f"there is no key {match[1]}{_nearest(match[1], [*flat(base_config().to_dict()), *task_config()])}"
    if match := re.match(r"Could not override field '(\w+)'.*?\. (.*) is of original type", text, re.DOTALL):
        return f"{match[1]} cannot be {match[2]!r}: that is of another type"
    line = next(iter(text.splitlines()), "")
    line = line if len(line) <= 300 else f"{line[:300]}..."  # what a file of others says may be endless
    return line if isinstance(error, ValueError | KeyError) and " " in line else f"{type(error).__name__}: {line}"


def _update(config: ConfigDict, values: dict) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _update(config[key], value)
        else:
            config[key] = tuple(value) if isinstance(value, list) else value


def flat(tree: dict, prefix: str = "") -> dict:
    """Nested dicts as one, keys joined by dots."""
    result = {}
    for key, value in tree.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result
