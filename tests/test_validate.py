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
    "model.variant='X/8' is unknown: write one of Ti, S, B, L, H": dict(model__variant="X/8"),
    "model.variant='B/x' is unknown": dict(model__variant="B/x"),
    "model.heads=5 does not divide the width 192": dict(model__heads=5),
    "model.pool=class_token needs model.class_token=True": dict(model__class_token=False),
    "model.token_shift.tokens=class needs a class token": dict(model__class_token=False, model__pool="average", model__mixer="token_shift"),
    "model.token_shift.fraction=0.6 must be": dict(model__token_shift__fraction=0.6),
    "model.drop_path=1.0 and": dict(model__drop_path=1.0),
    "model.mean=(0.5, 0.5) and": dict(model__mean=(0.5, 0.5)),
    "model.mean=(0.5, 0.5, 0.5) and model.std=(0.5, 0.0, 0.5) must": dict(model__std=(0.5, 0.0, 0.5)),
    "optim.betas=('a', 'b') must be a tuple of numbers": dict(optim__betas=("a", "b")),
    "optim.freeze=(1,) must be a tuple of texts": dict(optim__freeze=(1,)),
    "tasks.clips.area=('0', 1) must be a tuple of numbers": dict(tasks__clips__area=("0", 1)),
    "tasks.clips: source='list' is unknown: choose one of csv, folder, tfds, demo": dict(tasks__clips__source="list"),
    "tasks.clips: media='audio' is unknown": dict(tasks__clips__media="audio"),
    "tasks.clips: sampler='dense' is unknown": dict(tasks__clips__sampler="dense"),
    "tasks.clips: crop='centre' is unknown": dict(tasks__clips__crop="centre"),
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
