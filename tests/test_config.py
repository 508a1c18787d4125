"""The command line and the files of experiments: what they mean, and that every mistake is one line that helps."""

import re
import sys
from pathlib import Path

import pytest

from vidjoint.config import as_json, base_config, difference, load, parse, task_config
from vidjoint.errors import UserError

FILE = """
from ml_collections import ConfigDict
from vidjoint.config import base_config, task_config

def get_config(argument="small"):
    config = base_config()
    config.total_steps = 10
    config.model.width = {"small": 16, "large": 32}[argument]
    config.tasks.digits = task_config(source="demo", train="digits:train", flip=False)
    return config
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def problems(*argv) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(list(argv))
    assert all(line and "\n" not in line for line in caught.value.lines)
    return list(caught.value.lines)


def test_a_file_and_changes_become_a_config(file):
    config, name = parse(
        [
            f"--config={file}",
            "--config.optim.lr=1",
            "--config.tasks.digits.flip",
            "--config.tasks.digits.short_side=20,30",
            "--config.optim.freeze=blocks/.*",
            "--config.mesh.data",
            "-1",
            "--config.data_root=/a=b",
            "--noconfig.eval.reversed",
            "--config.model.mean=(0,0.5,1)",
        ]
    )
    assert name == "mine"
    assert (config.total_steps, config.model.width, config.optim.lr, config.tasks.digits.flip) == (10, 16, 1.0, True)
    assert isinstance(config.optim.lr, float)
    assert config.tasks.digits.short_side == (20, 30)
    assert config.optim.freeze == ("blocks/.*",)
    assert (config.mesh.data, config.data_root, config.eval.reversed, config.model.mean) == (-1, "/a=b", False, (0, 0.5, 1))
    assert config.is_locked and config.tasks.is_locked and config.tasks.digits.is_locked


def test_the_order_does_not_matter_and_the_last_of_a_key_holds(file):
    config, _ = parse(["--config.seed=3", "--config", str(file), "--config.seed", "4"])
    assert config.seed == 4


def test_what_follows_the_colon_goes_to_the_file(file):
    config, name = parse([f"--config={file}:large"])
    assert (config.model.width, name) == (32, "mine_large")


def test_all_mistakes_are_told_together_with_the_nearest_key(file):
    lines = problems(
        f"--config={file}",
        "--config.batch_size=abc",
        "--config.optim.lrr=1",
        "--config.lr=1",
        "--config.steps=1",
        "--config.data.batch_size=1",
        "--config.tasks.digits.weight=1",
        "--config.tasks.digits.flipp=False",
        "--config.tasks.digit.flip=False",
        "--config.tasks.new.train=x",
        "--config.optim.learning_rate=1",
        "--config.model.miksr=none",
        "--config.tasks.digits.flip=maybe",
        "--config.seed",
        "--config.optim=adamw",
        "--config.xyzzy=1",
        "stray",
    )
    expected = (
        "unknown argument stray",
        "--config.batch_size=abc: batch_size takes a whole number; it is 64 now",
        "--config.optim.lrr=1: there is no key optim.lrr; the nearest is optim.lr",
        "--config.lr=1: there is no key lr; the nearest is optim.lr",
        "--config.steps=1: there is no key steps; the nearest is total_steps",
        "--config.data.batch_size=1: there is no key data.batch_size; the nearest is batch_size",
        "--config.tasks.digits.weight=1: there is no key tasks.digits.weight; the nearest is tasks.digits.loss_weight",
        "--config.tasks.digits.flipp=False: there is no key tasks.digits.flipp; the nearest is tasks.digits.flip",
        "--config.tasks.digit.flip=False: there is no key tasks.digit.flip; the nearest is tasks.digits.flip",
        "--config.tasks.new.train=x: there is no key tasks.new.train; the tasks are digits",
        "--config.optim.learning_rate=1: there is no key optim.learning_rate; optim has betas, ",
        "--config.model.miksr=none: there is no key model.miksr; the nearest is model.mixer",
        "--config.tasks.digits.flip=maybe: tasks.digits.flip takes True or False; it is False now",
        "--config.seed: seed takes a whole number; it is 0 now",
        "--config.optim=adamw: optim holds several keys: set one of optim.betas, ",
        "--config.xyzzy=1: there is no key xyzzy (all are in ",
    )
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)


def test_what_else_is_wrong_is_told_with_them(file):
    argv = [f"--config={file}", "--config.batch_sise=3", "--config.batch_size=-4"]
    with pytest.raises(UserError) as caught:
        parse(argv, lambda config: [f"batch_size={config.batch_size} is wrong"])
    assert len(caught.value.lines) == 2 and caught.value.lines[1] == "batch_size=-4 is wrong"


@pytest.mark.parametrize("key", ["optim..lr", "optim.lr.x", "lock", "", "tasks['digits'].flip"])
def test_strange_keys_are_unknown_keys(file, key):
    change = f"--config.{key}=1"
    (line,) = problems(f"--config={file}", change)
    assert line.startswith(f"{change}: there is no key")


def test_a_missing_file_is_named(tmp_path):
    assert problems() == ["--config is missing: name an experiment, as in --config=configs/demo.py"]
    assert problems("--config=") == problems("--config")
    assert problems(f"--config={tmp_path}/none.py:small") == [f"--config={tmp_path}/none.py: there is no such file"]
    (tmp_path / "here.py").write_text("")
    assert problems(f"--config={tmp_path}/here") == [f"--config={tmp_path}/here: there is no such file; there is {tmp_path}/here.py"]
    assert problems(f"--config={tmp_path}") == [f"--config={tmp_path}: there is no such file (it is a folder)"]
    (tmp_path / "notes.txt").write_text("")
    assert problems(f"--config={tmp_path}/notes.txt") == [
        f"--config={tmp_path}/notes.txt: an experiment is a Python file (NAME.py) with a function get_config"
    ]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("total_steps = 10", "total_stebs = 10", " line 7: there is no key total_stebs; the nearest is total_steps"),
        ("total_steps = 10", "optim.update(lrr=1)", " line 7: there is no key lrr; the nearest is optim.lr"),
        ("total_steps = 10", "total_steps = '10 a'", " line 7: total_steps cannot be '10 a': that is of another type"),
        ("flip=False", "flipp=False", " line 9: a task has no key 'flipp'; the nearest is flip"),
        ("flip=False", "flip='no'", " line 9: flip cannot be 'no': that is of another type"),
        ("return config", "return confg", " line 10: NameError: name 'confg' is not defined"),
        ("return config", "return 3", ": get_config() returns no config: start from vidjoint.config.base_config() and return it"),
        ("def get_config", "def config", " has no function get_config: it is not run by itself, name an experiment (configs/demo.py)"),
        ("base_config()", "base_config(", " line 6: SyntaxError: '(' was never closed"),
        ("vidjoint.config", "vidjoint.konfig", " line 3: ModuleNotFoundError: No module named 'vidjoint.konfig'"),
        ("return config", "config.optim.unlock(); config.optim.lrr = 1; return config", ": unknown key optim.lrr; the nearest is optim.lr"),
        ("= task_config(", "= dict(", ": tasks.digits is no task: add it with config.tasks.digits = task_config(...)"),
        ("return config", "return ConfigDict(dict(seed=1, tasks={}))", ": 68 keys are missing, such as batch_size: start from base_config()"),
        ("config.tasks.digits = task_config", "config.tasks.digits = len", " line 9: TypeError: len() takes no keyword arguments"),
        ("config.tasks.digits = ", "config.tasks.digits = 3 #", ": tasks.digits is no task: add it with config.tasks.digits = task_config(...)"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_line(file, old, new, line):
    file.write_text(FILE.replace(old, new, 1) if old != "vidjoint.config" else FILE.replace(old, new))
    (told,) = problems(f"--config={file}")
    assert re.sub(r"\d+ keys are missing, such as \w+", "68 keys are missing, such as batch_size", told) == f"{file}{line}"


def test_a_wrong_argument_is_an_error_of_the_file(file):
    assert problems(f"--config={file}:huge") == [f"{file} line 8: KeyError: huge"]
    file.write_text(FILE.replace('argument="small"', "").replace("[argument]", "['small']"))
    assert problems(f"--config={file}:huge") == [f"{file} takes no argument: write --config={file}"]


NEIGHBOUR = """
from configs.shared import WIDTH
from vidjoint.config import base_config

def get_config():
    from configs.late import DEPTH
    config = base_config()
    config.model.update(width=WIDTH, depth=DEPTH)
    return config
"""


WITH_A_DATACLASS = """from __future__ import annotations

import dataclasses
import sys

from vidjoint.config import base_config, parse


@dataclasses.dataclass
class Sizes:
    steps: int = 7


def get_config():
    {more}

    @dataclasses.dataclass
    class Others:
        batch: int = 5

    assert sys.modules[__name__].Sizes is Sizes
    config = base_config()
    config.update(total_steps=Sizes().steps, batch_size=Others().batch)
    return config
"""


def test_an_experiment_may_have_dataclasses_and_load_others(tmp_path):
    """They look for their module by its name, which no other program must find afterwards."""
    before = set(sys.modules)
    (tmp_path / "inner.py").write_text(WITH_A_DATACLASS.format(more=""))
    (tmp_path / "broken.py").write_text(WITH_A_DATACLASS.format(more="raise ValueError('no data')"))
    (tmp_path / "outer.py").write_text(WITH_A_DATACLASS.format(more=f"parse(['--config={tmp_path}/inner.py'])"))
    assert parse([f"--config={tmp_path}/outer.py"])[0].total_steps == 7
    with pytest.raises(UserError, match="no data"):
        parse([f"--config={tmp_path}/broken.py"])
    assert not {name for name in set(sys.modules) - before if "experiment" in name}


def test_an_experiment_imports_its_neighbours_from_any_folder(tmp_path, monkeypatch):
    clone = Path(__file__).parents[1]
    for place, width in (("mine", 24), ("yours", 32)):
        folder = tmp_path / place / "configs"
        folder.mkdir(parents=True)
        (folder / "new.py").write_text(NEIGHBOUR)
        (folder / "shared.py").write_text(f"WIDTH = {width}")
        (folder / "late.py").write_text(f"DEPTH = {width // 8}")
        (folder / "wrong.py").write_text("import sys\nsys.path.append('elsewhere')\nfrom configs.shared import HEIGHT")
    monkeypatch.chdir(tmp_path)
    path, known = sys.path[:], {name for name in sys.modules if name.partition(".")[0] == "configs"}
    for _ in range(2):
        for place, width in (("mine", 24), ("yours", 32)):
            config, _ = parse([f"--config={place}/configs/new.py"])
            assert (config.model.width, config.model.depth) == (width, width // 8)
        assert parse([f"--config={clone}/configs/cover_in21k.py"])[1] == "cover_in21k"
    monkeypatch.chdir(tmp_path / "mine" / "configs")
    assert parse(["--config=new.py"])[0].model.width == parse(["--config=../configs/new.py"])[0].model.width == 24
    assert "cannot import name 'HEIGHT'" in problems("--config=wrong.py")[0]
    assert sys.path == path and {name for name in sys.modules if name.partition(".")[0] == "configs"} == known


def test_a_folder_may_be_called_as_the_package(tmp_path):
    (tmp_path / "vidjoint").mkdir()
    (tmp_path / "vidjoint" / "new.py").write_text(FILE)
    assert parse([f"--config={tmp_path}/vidjoint/new.py"])[0].total_steps == 10
    assert sys.modules["vidjoint.config"].parse is parse


def test_a_config_comes_back_from_its_file(file, tmp_path):
    config, _ = parse([f"--config={file}", "--config.task_order=('digits',)", "--config.optim.lr=0.1", "--config.tasks.digits.area=(0.1,1)"])
    stored = tmp_path / "config.json"
    stored.write_text(as_json(config))
    again = load(stored)
    assert again.to_dict() == config.to_dict() and difference(config, again) == []
    assert again.task_order == ("digits",)
    with pytest.raises((AttributeError, KeyError)):
        again.optim.lrr = 1
    shorter = re.sub(r'  "seed": 0,\n', "", stored.read_text())
    stored.write_text(shorter)
    assert load(stored).seed == 0  # a key that came later has its default


@pytest.mark.parametrize(("old", "new"), [('"decay"', '"'), ('"seed"', '"sead"'), ('"seed": 0', '"seed": "a"'), ('"tasks"', '"task"')])
def test_a_damaged_config_is_an_error_of_one_line(tmp_path, old, new):
    stored = tmp_path / "config.json"
    config = base_config()
    config.tasks.a = task_config()
    stored.write_text(as_json(config).replace(old, new))
    with pytest.raises(UserError, match=f"^{stored} is damaged or of another version of vidjoint \\(.*") as caught:
        load(stored)
    assert len(caught.value.lines) == 1 and "\n" not in caught.value.lines[0]


def test_differences_are_named():
    old, new = base_config(), base_config()
    for config in (old, new):
        config.tasks.a = task_config()
    old.tasks.gone, new.tasks.came = task_config(), task_config()
    new.optim.lr, new.tasks.a.flip = 0.5, False
    assert difference(old, new) == [
        "tasks.gone: there -> not there",
        "tasks.came: not there -> there",
        "optim.lr: 0.001 -> 0.5",
        "tasks.a.flip: True -> False",
    ]
