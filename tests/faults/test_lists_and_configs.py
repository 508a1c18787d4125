"""Mutated lists, label files and configs: each is read or refused in lines, in little time and memory. `--full`: 500."""

import json
import resource
import string
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.listed import touch
from tests.test_validate import config_with
from vidjoint import config as config_module
from vidjoint.config import task_config
from vidjoint.data.sources import open_source
from vidjoint.errors import UserError
from vidjoint.models.build import build
from vidjoint.validate import check

SECONDS = 10  # of a file
PATHS = ["a/x.mp4", "b.mp4", "c d.mp4", "é.mp4", "e/v_Run_g01_c01.avi"]
ID = "abcdefghijk"
LISTS = {  # file -> its text; every one can be read as it is, with the settings of a task
    "comma.csv": ("a/x.mp4,0\nb.mp4,1\nc d.mp4,2\né.mp4,1\n", {}),
    "tab.txt": ("path\tlabel\na/x.mp4\trun\nb.mp4\tjump high\n", {}),
    "quoted.csv": ('path,split,label\n"a/x.mp4",train,"run, fast"\n"b.mp4",val,jump\n', {}),
    "space.csv": ("a/x.mp4 0\nb.mp4 1\nc d.mp4 1\n", dict(labels="labels.txt")),
    "several.csv": ("a/x.mp4,0|2\nb.mp4,\nc d.mp4,1\n", dict(multilabel=True)),
    "kinetics.csv": (f"label,youtube_id,time_start,time_end,split\nrun,{ID},1,11,train\njump,{ID},2,12,train\n", dict(root="k")),
    "something.json": (json.dumps([{"id": "1", "label": "x", "template": "Doing [something]"}]), dict(root="s", labels="labels.json")),
    "moments.csv": ("m/x.mp4,run,3,0\nm/y.mp4,jump,2,1\n", {}),
    "ucf.txt": ("Run/v_Run_g01_c01.avi 1\nRun/v_Run_g01_c02.avi 1\n", dict(labels="classInd.txt")),
}
LABELS = {
    "labels.txt": "walk\nrun fast\njump\n",
    "labels.json": json.dumps({"Doing something": "0", "Other": "1"}),
    "classInd.txt": "1 Run\n2 Walk\n",
}
FILES = [*PATHS, f"k/{ID}_000001_000011.mp4", f"k/{ID}_000002_000012.mp4", "s/1.webm", "m/x.mp4", "m/y.mp4"]
FILES += [f"Run/v_Run_g01_c0{i}.avi" for i in (1, 2)]
INSERTS = [b"\r\n", b"\r", b"\n", b"\0", b'"', b"'", b",", b";", b"\t", b" ", b"|", b"../", b"/", b"\\", b"-", b"~", b"*", b"[", b"{"]
INSERTS += [b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3", b"\x1b[2J", b"\xe2\x80\xae", b"path,label\n", b"99999999", b"9" * 30, b"1e9", b"NaN"]
INSERTS += [b"." * 300, b"[" * 5000, b"x" * 200_000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lists")
    touch(folder, *FILES)
    for name, text in {**{name: text for name, (text, _) in LISTS.items()}, **LABELS}.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    copy = bytearray(content)
    for _ in range(random.integers(1, 5)):
        place = int(random.integers(len(copy) + 1))
        match random.integers(5):
            case 0:
                copy[place:place] = INSERTS[random.integers(len(INSERTS))]
            case 1:
                copy[place : place + int(random.integers(1, 6))] = b""
            case 2:
                copy[place : place + 1] = random.bytes(1)
            case 3:
                copy[place:place] = copy[: random.integers(len(copy) + 1)]
            case 4:
                del copy[place + int(random.integers(20)) :]
    return bytes(copy)


def most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def in_lines(error: UserError) -> bool:
    """Whether a person can read what is wrong: a few lines, none of them endless (commands escape what does not belong on a terminal)."""
    return 0 < len(error.lines) < 100 and all(line and len(line) < 3000 for line in error.lines)


@pytest.mark.timeout(3600)
def test_mutated_lists_and_label_files(folder, full, capsys):
    before, read, refused, slowest = most_memory(), 0, 0, 0.0
    names = [*LISTS, *LABELS]
    for number in range(250 if full else 60):
        random = np.random.default_rng(number)
        name = names[number % len(names)]
        text = (folder / name).read_bytes()
        of = name if name in LISTS else {"labels.txt": "space.csv", "labels.json": "something.json", "classInd.txt": "ucf.txt"}[name]
        start = time.monotonic()
        try:
            (folder / name).write_bytes(mutated(text, random))
            source = open_source("t", task_config(train=of, val=of, **LISTS[of][1]), ("train", "val")[number % 2], str(folder))
            read += 1
            examples = [source[i] for i in range(len(source))]
            labels = np.concatenate([np.atleast_1d(each["label"]) for each in examples])
            assert (labels >= -1).all() and (labels < len(source.labels)).all()
            assert all(Path(each["video"]).resolve().is_relative_to(folder.resolve()) for each in examples)
        except UserError as error:
            refused += 1
            assert in_lines(error), (number, error.lines)
        finally:
            (folder / name).write_bytes(text)
        slowest = max(slowest, time.monotonic() - start)
    assert read and refused and slowest < SECONDS and most_memory() - before < 200
    with capsys.disabled():
        print(f"\nlists: {read} read, {refused} refused, slowest {slowest:.2f} s, {most_memory() - before} MiB more memory")


VALUES = ["", "[", "0", "-1", "1", "2", "3", "7", "1e30", "nan", "-inf", "9" * 25, "2147483648", "x", "B/16", "None", "()", "(1,2)", "('a',)"]
VALUES += ["True", "1x1", "divided", "token_shift", "am_flow", "joint", "motion", "average", "class_attention", "float32", "0.5", "64"]
VALUES += [
    "\n",
    "\x1b[2J",
    "é",
    "((((",
]


@pytest.mark.timeout(3600)
def test_mutated_configs(tmp_path, full, capsys):
    """Keys and values on the command line, and stored config files; what is found sound is a model that can be built."""
    (tmp_path / "x.py").write_text("from tests.test_validate import config_with\n\n\ndef get_config():\n    return config_with()\n")
    stored = config_module.as_json(config_with()).encode()
    keys = [*config_module.flat(config_with().to_dict())]
    before, sound, refused, slowest = most_memory(), 0, 0, 0.0
    for number in range(250 if full else 60):
        random = np.random.default_rng(number)
        start = time.monotonic()
        try:
            if number % 3:
                changes = []
                for _ in range(random.integers(1, 4)):
                    key, value = keys[random.integers(len(keys))], VALUES[random.integers(len(VALUES))]
                    if not random.integers(4):
                        place = random.integers(len(key))
                        key = key[:place] + random.choice(list(string.ascii_letters + "._-= ")) + key[place + 1 :]
                    changes.append(f"--config.{key}={value}")
                config, _ = config_module.parse([f"--config={tmp_path / 'x.py'}", *changes], check)
            else:
                (tmp_path / "config.json").write_bytes(mutated(stored, random))
                config = config_module.load(tmp_path / "config.json")
            if problems := check(config):
                raise UserError(*problems)
            build(config.model, {name: max(1, min(task.classes, 100)) for name, task in config.tasks.items()}).abstract()
            sound += 1
        except UserError as error:
            refused += 1
            assert in_lines(error), (number, error.lines)
        except Exception as error:
            raise AssertionError(f"seed {number}: {type(error).__name__}: {error}") from error
        slowest = max(slowest, time.monotonic() - start)
    assert sound and refused and slowest < SECONDS and most_memory() - before < 500
    with capsys.disabled():
        print(f"\nconfigs: {sound} sound, {refused} refused, slowest {slowest:.2f} s, {most_memory() - before} MiB more memory")
