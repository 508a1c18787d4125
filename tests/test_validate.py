"""Every mistake in a config that can be seen without data is found, and all of them at once."""

import pytest

from vidjoint.config import base_config, task_config
from vidjoint.validate import CHOICES, TASK_CHOICES, check, views


def config_with(**changes):
    """A sound config with keys changed, as in `model__mixer="joint"` or `tasks__clips__area=(0, 1)`."""
    config = base_config()
    config.total_steps = 10
    config.model.update(variant="Ti/8", image_size=32)
    config.tasks.clips = task_config(train="train.csv", sampler="segments")
    config.tasks.stills = task_config(train="stills", source="folder", media="image")
    for path, value in changes.items():
        *groups, key = path.split("__")
        part = config
        for group in groups:
            part = part[group]
        part[key] = value
    return config


def test_a_sound_config_has_no_problems():
    assert check(config_with()) == []
    assert check(config_with(total_steps=0, total_epochs=0.5, optim__warmup_epochs=2.0, schedule="round_robin", task_order=("stills", "clips"))) == []
    assert check(config_with(model__embed="separate", model__tubelet=2, tasks__clips__frames=1)) == []  # one frame is an image
    assert check(config_with(model__temporal_init="copied", init_from="runs/images")) == []
    for schedule in ("round_robin", "alternating"):
        assert check(config_with(schedule=schedule, optim__per_task="cumulative_ref", tasks__clips__batch_size=2)) == []
    assert check(config_with(schedule="weighted", tasks__clips__steps=3, tasks__stills__steps=1)) == []
    assert check(config_with(schedule="accumulated", batch_size=1, tasks__clips__batch_size=3, tasks__stills__batch_size=1)) == []
    assert check(config_with(tasks__clips__image_size=(24, 40), eval__views="3x3", model__class_token=False, model__pool="average")) == []


MISTAKES = {
    "schedule='mixd' is unknown: choose one of mixed, round_robin": dict(schedule="mixd"),
    "model.mixer='shift' is unknown: choose one of none, divided, joint, token_shift": dict(model__mixer="shift"),
    "model.pool='mean' is unknown": dict(model__pool="mean"),
    "model.dtype='float16' is unknown": dict(model__dtype="float16"),
    "model.remat='all' is unknown": dict(model__remat="all"),
    "model.gelu='fast' is unknown": dict(model__gelu="fast"),
    "model.temporal_init='ones' is unknown": dict(model__temporal_init="ones"),
    "model.divided.image_temporal='no' is unknown": dict(model__divided__image_temporal="no"),
    "model.token_shift.tokens='some' is unknown": dict(model__token_shift__tokens="some"),
    "model.token_shift.direction='up' is unknown": dict(model__token_shift__direction="up"),
    "loss.reduction='sum' is unknown": dict(loss__reduction="sum"),
    "eval.average='max' is unknown": dict(eval__average="max"),
    "optim.name='adam' is unknown": dict(optim__name="adam"),
    "optim.schedule='linear' is unknown": dict(optim__schedule="linear"),
    "optim.decay='some' is unknown": dict(optim__decay="some"),
    "optim.lr=-1.0 is negative": dict(optim__lr=-1.0),
    "optim.ema=1.0 must be": dict(optim__ema=1.0),
    "optim.lr=nan must be a finite number": dict(optim__lr=float("nan")),
    "tasks.clips.area=(0.5, inf) must be a finite number": dict(tasks__clips__area=(0.5, float("inf"))),
    "seed=18446744073709551616 must be a finite number": dict(seed=2**64),
    "total_steps=-3 must be at least 0": dict(total_steps=-3, total_epochs=2.0, optim__warmup_steps=5),
    "total_steps=2000000000 is more than 1000000000": dict(total_steps=2 * 10**9),
    "data.isolate='no' is unknown: choose one of all, video, none": dict(data__isolate="no"),
    "data.decode_seconds=0.0 must be above 0": dict(data__decode_seconds=0.0),
    "data.prefetch=20000 is more than 10000": dict(data__prefetch=20_000),
    "a model of width 192 and depth 2000 has 9e+08 parameters": dict(model__depth=2000),
    "a model of width 1920000 and depth 12 has 5e+14 parameters": dict(model__width=1_920_000),
    "tasks.clips: a clip has 8 frames of 800000 x 800000 pixels, 1 views of it": dict(tasks__clips__image_size=(800_000, 800_000)),
    "tasks.clips: a batch would have more than 4096 GiB of pixels": dict(schedule="uniform", tasks__clips__batch_size=10**9),
    "tasks.clips: 64 examples with 100000 views each have more than 64 GiB of pixels: lower eval.views or eval.batch_size": dict(
        eval__views="1x100000"
    ),
    "tasks.clips: randaugment_magnitude=99.0 must be at most 10": dict(tasks__clips__randaugment_magnitude=99.0),
    "the warm-up (10 steps) is not shorter than the run (10 steps)": dict(optim__warmup_steps=10),
    "batch_size=0 must be above 0": dict(batch_size=0),
    "batch_size=1 is below the number of clip shapes, 2": dict(batch_size=1),
    "checkpoint_every=0 must be above 0": dict(checkpoint_every=0),
    "model.image_size=-8 must be above 0": dict(model__image_size=-8, tasks__clips__image_size=(8, 8), tasks__stills__image_size=(8, 8)),
    "eval_every=-1 must be at least 0": dict(eval_every=-1),
    "seed=-1 must be at least 0": dict(seed=-1),
    "loss.mixup=-0.1 must be at least 0": dict(loss__mixup=-0.1),
    "loss.label_smoothing=1.0 must be": dict(loss__label_smoothing=1.0),
    "data.max_bad_share=2.0 must be a share": dict(data__max_bad_share=2.0),
    "total_steps=0 and total_epochs=0.0: give exactly one": dict(total_steps=0),
    "total_steps=10 and total_epochs=2.0: give exactly one": dict(total_epochs=2.0),
    "task_order=('clips',) must name each task once: clips, stills": dict(task_order=("clips",)),
    "eval.views='3': write temporal x spatial": dict(eval__views="3"),
    "tasks.stills.batch_size is for batches of one task": dict(tasks__stills__batch_size=4),
    "tasks.clips.steps must be set, for stills has steps": dict(schedule="weighted", tasks__stills__steps=4),
    "tasks.stills.steps must be set, for clips has steps": dict(schedule="task_by_task", tasks__clips__steps=4),
    "total_steps=1 is below the number of tasks, 2": dict(schedule="weighted", total_steps=1),
    "batch_size=1 is below the number of tasks, 2": dict(schedule="accumulated", batch_size=1),
    "optim.per_task='own' is unknown: choose one of shared, independent, cumulative_ref, accumulated": dict(
        optim__per_task="own", schedule="round_robin"
    ),
    "optim.per_task=independent is for tasks that take turns": dict(optim__per_task="independent"),
    "optim.per_task=accumulated is for tasks that take turns": dict(optim__per_task="accumulated", schedule="accumulated"),
    "tasks.clips: steps=-1 must be at least 0": dict(tasks__clips__steps=-1),
    "tasks.clips: batch_size=-1 must be at least 0": dict(tasks__clips__batch_size=-1, schedule="uniform"),
    "model.variant='X/8' is unknown: write one of Ti, S, B, L, H": dict(model__variant="X/8"),
    "model.variant='B/x' is unknown": dict(model__variant="B/x"),
    "model.heads=5 does not divide the width 192": dict(model__heads=5),
    "model.pool=class_token needs model.class_token=True": dict(model__class_token=False),
    "model.attention=cudnn computes in bfloat16, not float32": dict(model__attention="cudnn", model__dtype="float32"),
    "model.token_shift.tokens=class needs a class token": dict(model__class_token=False, model__pool="average", model__mixer="token_shift"),
    "model.motion.block=0 must be above 0": dict(model__motion__block=0),
    "model.motion.order='space' is unknown": dict(model__motion__order="space"),
    "model.class_attention.blocks=0 must be above 0": dict(model__class_attention__blocks=0),
    "model.class_attention.keys='class' is unknown": dict(model__class_attention__keys="class"),
    "model.temporal_encoder.depth=0 must be above 0": dict(model__temporal_encoder__depth=0),
    "model.mixer_blocks has [3, 1.5], but the 3 blocks are numbered from 0 to 2": dict(model__depth=3, model__mixer_blocks=(1, 3, 1.5, -1)),
    "model.am_flow.bottleneck=0 must be above 0": dict(model__am_flow__bottleneck=0),
    "model.am_flow.tpu_heads=0 must be above 0": dict(model__mixer="am_flow", model__am_flow__tpu_heads=0),
    "model.am_flow.flow='camera' is unknown": dict(model__am_flow__flow="camera"),
    "model.am_flow.encoder_heads=7 does not divide model.am_flow.encoder_width=684": dict(
        model__mixer="am_flow", model__am_flow__flow="aligned", model__am_flow__encoder_heads=7
    ),
    "model.am_flow.tpu_heads=12 does not divide model.am_flow.bottleneck=100": dict(model__mixer="am_flow", model__am_flow__bottleneck=100),
    "model.am_flow.adapter=compacter needs a width and a bottleneck that 4 divides, not 192 and 198": dict(
        model__mixer="am_flow", model__am_flow__adapter="compacter", model__am_flow__bottleneck=198, model__am_flow__tpu="lstm"
    ),
    "tasks.clips: model.am_flow.encoder_input=tokens is for inputs of model.image_size alone, not 24 x 32": dict(
        model__mixer="am_flow", model__am_flow__flow="aligned", model__am_flow__encoder_input="tokens", tasks__clips__image_size=(24, 32)
    ),
    "model.token_shift.fraction=0.6 must be": dict(model__token_shift__fraction=0.6),
    "model.drop_path=1.0 and": dict(model__drop_path=1.0),
    "model.embed='own' is unknown: choose one of shared, separate": dict(model__embed="own"),
    "model.tubelet_init='first' is unknown": dict(model__tubelet_init="first"),
    "model.tubelet=0 must be above 0": dict(model__tubelet=0),
    "model.tubelet=2 is for videos alone: set model.embed=separate": dict(model__tubelet=2),
    "model.frames=8 cannot be cut into tubelets of 3": dict(model__tubelet=3, model__embed="separate", tasks__clips__frames=6),
    "tasks.clips: frames=9 cannot be cut into tubelets of 2": dict(model__tubelet=2, model__embed="separate", tasks__clips__frames=9),
    "model.temporal_init=copied copies the attention of an earlier run: set init_from": dict(model__temporal_init="copied"),
    "mesh.cpu_devices=1000000 must be at most 1024": dict(mesh__cpu_devices=10**6),
    "init_parts: 'embed/.*': write REGEX=PATH": dict(init_from="a", init_parts=("embed/.*",)),
    "init_parts: '(' is no regular expression": dict(init_from="a", init_parts=("(=b",)),
    "init_parts takes parameters in place of those of init_from: set init_from, too": dict(init_parts=("embed/.*=b",)),
    "model.layer_scale=-0.5 must be above 0": dict(model__layer_scale=-0.5),
    "model.registers=-2 must be at least 0": dict(model__registers=-2),
    "model.video_position=space_time is a table for videos": dict(model__video_position="space_time"),
    "model.position_resize='cubic' is unknown: choose one of bicubic,": dict(model__position_resize="cubic"),
    "model.interpolation='area' is unknown: choose one of bilinear, bicubic": dict(model__interpolation="area"),
    "model.mean=(0.5, 0.5) and": dict(model__mean=(0.5, 0.5)),
    "model.mean=() and model.std=(0.5, 0.0, 0.5) must": dict(model__std=(0.5, 0.0, 0.5)),
    "optim.betas=('a', 'b') must be a tuple of numbers": dict(optim__betas=("a", "b")),
    "optim.freeze=(1,) must be a tuple of texts": dict(optim__freeze=(1,)),
    "tasks.clips.area=('0', 1) must be a tuple of numbers": dict(tasks__clips__area=("0", 1)),
    "tasks.clips: source='list' is unknown: choose one of csv, folder, smarthome, tfds, packed, demo": dict(tasks__clips__source="list"),
    "tasks.clips: media='audio' is unknown": dict(tasks__clips__media="audio"),
    "tasks.clips: sampler='dense' is unknown": dict(tasks__clips__sampler="dense"),
    "tasks.clips: crop='centre' is unknown": dict(tasks__clips__crop="centre"),
    "tasks.stills: multilabel=True with source=folder": dict(tasks__stills__multilabel=True),
    "tasks.clips: train is empty": dict(tasks__clips__train=""),
    "tasks.clips: sample_weight=0.0 must be above 0": dict(tasks__clips__sample_weight=0.0),
    "tasks.clips: loss_weight=-1.0 must be at least 0": dict(tasks__clips__loss_weight=-1.0),
    "tasks.clips: short_side=(32,) must be a pair": dict(tasks__clips__short_side=(32,)),
    "tasks.clips: short_side=(64, 32) must be a range": dict(tasks__clips__short_side=(64, 32)),
    "tasks.clips: area=(0.5, 1.5) must be a range": dict(tasks__clips__area=(0.5, 1.5)),
    "tasks.clips: erase=1.5 must be a probability": dict(tasks__clips__erase=1.5),
    "tasks.clips: input of 30 x 32 pixels is not divisible by the patch of 8": dict(tasks__clips__image_size=(30, 32)),
    "tasks.clips: input of 0 x 32 pixels": dict(tasks__clips__image_size=(0, 32)),
    "tasks.clips: eval.views asks for 2 temporal views": dict(tasks__clips__sampler="uniform", eval__views="2x1"),
}


@pytest.mark.parametrize("line", MISTAKES)
def test_each_mistake_is_one_line(line):
    found = check(config_with(**MISTAKES[line]))
    assert len(found) == 1 and found[0].startswith(line), found


def test_all_mistakes_are_found_together():
    changes = dict(model__mixer="shift", batch_size=0, optim__lr=-1.0, optim__name="adam", tasks__clips__crop="centre", tasks__stills__train="")
    assert len(check(config_with(**changes))) == len(changes)


def test_names_of_tasks_must_be_words():
    config = config_with()
    config.tasks["my clips"] = task_config(train="x")
    (line,) = check(config)
    assert line.startswith("tasks.my clips: a task's name must be letters")
    empty = base_config()
    empty.total_steps = 1
    assert check(empty) == ["there are no tasks: add one with config.tasks.NAME = task_config(...)"]


@pytest.mark.parametrize(
    ("text", "expected"), [("1x3", (1, 3)), ("10x1", (10, 1)), ("3", None), ("0x1", None), ("1x0", None), ("1 x 3", None), ("", None)]
)
def test_views_are_temporal_by_spatial(text, expected):
    assert views(text) == expected


def test_every_key_that_names_a_choice_is_checked():
    """A text in the schema that is a choice, a path or free text: whoever adds one decides which here."""
    free = {"init_from", "data_root", "model.variant", "eval.views", "optim.name", "optim.schedule", "optim.decay"}
    task_free = {"train", "val", "fold", "root", "labels"}

    def texts(part, prefix=""):
        for key, value in part.items():
            if hasattr(value, "items"):
                yield from texts(value, f"{prefix}{key}.")
            elif isinstance(value, str):
                yield prefix + key

    assert set(texts(base_config())) == free | set(CHOICES)
    assert set(texts(task_config())) == task_free | set(TASK_CHOICES)
