"""Lists and label files: every layout, every fault named with its line, files found by one listing per folder."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.data.listed import faults, opened, pairs, touch, write
from vidjoint.config import base_config, task_config
from vidjoint.data import files
from vidjoint.data.labels import mirrored_classes, read_labels
from vidjoint.data.lists import read_list
from vidjoint.data.sources import open_source
from vidjoint.data.tasks import open_tasks
from vidjoint.errors import UserError

# Plain lists


@pytest.mark.parametrize(
    "content",
    [
        "a/x.mp4 1\nb.mp4 0\n",
        "a/x.mp4,1\nb.mp4,0",
        "a/x.mp4\t1\r\nb.mp4\t0\r\n",
        "a/x.mp4;1\n\nb.mp4;0\n",
        "a/x.mp4 , 1\n b.mp4 , 0 \n",
        b"\xef\xbb\xbfpath,label\r\na/x.mp4,1\r\nb.mp4,0\r\n",
        "Video_Path;split;Label\na/x.mp4;train;1\nb.mp4;train;0\n",
        "label,path\n1,a/x.mp4\n0,b.mp4\n",
        "where what\na/x.mp4 1\nb.mp4 0\n",  # a header in words that nobody foresaw
        '"a/x.mp4",1\n"b.mp4","0"\n',
        '"a/x.mp4", "1"\n"b.mp4", "0"\n',
    ],
)
def test_lists_of_numbers(tmp_path, content):
    touch(tmp_path, "a/x.mp4", "b.mp4")
    write(tmp_path / "train.csv", content)
    source = opened(tmp_path, train="train.csv")
    assert [source[0], source[1]] == [
        {"video": str(tmp_path / "a/x.mp4"), "label": 1, "name": str(tmp_path / "a/x.mp4")},
        {"video": str(tmp_path / "b.mp4"), "label": 0, "name": str(tmp_path / "b.mp4")},
    ]
    assert source.labels == ("0", "1") and not source.warnings
    assert "2 videos, 2 classes" in repr(source)


@pytest.mark.parametrize(
    ("content", "name", "label"),
    [
        ("my  nice clip.mp4 jumping\n", "my  nice clip.mp4", "jumping"),
        ("my clip.mp4,jumping high\n", "my clip.mp4", "jumping high"),
        ("a, b.mp4 jumping\n", "a, b.mp4", "jumping"),
        ('"a, b.mp4","jumping, high"\n', "a, b.mp4", "jumping, high"),
        ("path,label\na, b.mp4,jumping\n", "a, b.mp4", "jumping"),
        ('6" wide.mp4 jumping\n', '6" wide.mp4', "jumping"),
        ("päth.mp4,springen\n", "päth.mp4", "springen"),
        ("noextension jumping\n", "noextension", "jumping"),
        ("video 1.mp4 class\n", "video 1.mp4", "class"),
    ],
)
def test_awkward_names(tmp_path, content, name, label):
    touch(tmp_path, name)
    write(tmp_path / "train.csv", content)
    source = opened(tmp_path, train="train.csv")
    assert pairs(source) == [(name, 0)] and source.labels == (label,)


def test_an_unclosed_quote_stays_in_its_line(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    write(tmp_path / "train.csv", 'a.mp4 0\n"b.mp4 1\n')
    assert any("line 2" in line or "1 of 2 files" in line for line in faults(tmp_path, train="train.csv"))


def test_names_keep_bytes_that_are_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9.mp4")
    try:
        touch(tmp_path, name)
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    write(tmp_path / "train.csv", b"caf\xe9.mp4 0\n")
    assert opened(tmp_path, train="train.csv")[0]["video"] == str(tmp_path / name)


def test_several_lists_and_a_root(tmp_path):
    touch(tmp_path, "clips/a.mp4", "clips/b.mp4")
    write(tmp_path / "lists/1.csv", "a.mp4 0\n")
    write(tmp_path / "lists/2.txt", "b.mp4,1\n")
    source = opened(tmp_path, train="lists/1.csv, lists/2.txt", root="clips")
    assert pairs(source) == [("a.mp4", 0), ("b.mp4", 1)]


def test_absolute_paths_need_no_data_root(tmp_path):
    touch(tmp_path, "a.mp4")
    write(tmp_path / "l.csv", f"{tmp_path / 'a.mp4'} 0\n")
    assert open_source("t", task_config(train=str(tmp_path / "l.csv"), root=str(tmp_path)), "train", "")[0]["video"] == str(tmp_path / "a.mp4")


def test_validation_numbers_names_as_training_does(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    write(tmp_path / "train.csv", "a.mp4 walk\nb.mp4 run\nc.mp4 jump\n")
    write(tmp_path / "val.csv", "a.mp4 walk\n")
    source = opened(tmp_path, "val", train="train.csv", val="val.csv")
    assert source.labels == ("jump", "run", "walk") and pairs(source) == [("a.mp4", 2)]
    assert source.warnings == ["2 of 3 classes have no examples: jump, run"]
    write(tmp_path / "val.csv", "a.mp4 walk\nb.mp4 swim\n")
    assert faults(tmp_path, "val", train="train.csv", val="val.csv") == [
        f"{tmp_path}/val.csv line 2: class 'swim' is not among the 3 known ones (jump, run, walk)"
    ]
    write(tmp_path / "val.csv", "a.mp4 0\n")
    assert "class '0' is not among" in faults(tmp_path, "val", train="train.csv", val="val.csv")[0]


def test_validation_of_numbers_knows_the_training_range(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    write(tmp_path / "train.csv", "a.mp4 0\nb.mp4 1\n")
    write(tmp_path / "val.csv", "a.mp4 0\nb.mp4 2\n")
    assert "line 2: label 2 is not in 0..1" in faults(tmp_path, "val", train="train.csv", val="val.csv")[0]
    assert len(opened(tmp_path, "val", train="gone.csv", val="val.csv", classes=3).labels) == 3
    assert "val" not in task_config(train="train.csv").val and opened(tmp_path, "val", train="train.csv") is None


def test_label_file_fixes_the_order(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    write(tmp_path / "labels.txt", "walk\nrun fast\njump\n")
    write(tmp_path / "train.csv", "a.mp4,walk\nb.mp4,run_fast\n")  # as a folder would spell it
    source = opened(tmp_path, train="train.csv", labels="labels.txt")
    assert source.labels == ("walk", "run fast", "jump") and pairs(source) == [("a.mp4", 0), ("b.mp4", 1)]
    write(tmp_path / "numbers.csv", "a.mp4 2\nb.mp4 0\n")
    assert pairs(opened(tmp_path, train="numbers.csv", labels="labels.txt")) == [("a.mp4", 2), ("b.mp4", 0)]


@pytest.mark.parametrize(
    ("name", "content", "labels"),
    [
        ("a.txt", "b\na\n", ("b", "a")),
        ("a.txt", "b,1\na,0\n", ("a", "b")),
        ("a.csv", "id,name\n0,a\n1,b c\n", ("a", "b c")),
        ("a.txt", "1 a\n2 b\n", ("a", "b")),  # UCF101 counts from 1
        ("a.txt", "eat meal/snack\npoint, 1 finger\n", ("eat meal/snack", "point, 1 finger")),
        ("a.txt", "b\na\nb\n", ("b", "a", "b")),
        ("a.json", '["x", "y"]', ("x", "y")),
        ("a.json", '{"x": "1", "y": "0"}', ("y", "x")),
        ("a.json", '{"0": ["n01", "crane"], "1": ["n02", "crane"]}', ("crane", "crane")),
    ],
)
def test_label_files(tmp_path, name, content, labels):
    names, lookup = read_labels(write(tmp_path / name, content))
    assert names == labels
    for number, label in enumerate(names):
        assert lookup.get(label, number) == number
    if "n02" in content:
        assert lookup["n02"] == 1 and "crane" not in lookup


def test_names_as_written_come_before_other_spellings(tmp_path):
    content = json.dumps({"0": ["n01", "Cardigan"], "1": ["n02", "cardigan"], "2": ["crane"], "3": ["Crane", "Bird"], "4": "crane", "5": "BIRD"})
    _, lookup = read_labels(write(tmp_path / "l.json", content))
    assert {name: lookup.get(name) for name in ("Cardigan", "cardigan", "n01")} == {"Cardigan": 0, "cardigan": 1, "n01": 0}
    assert {name: lookup.get(name) for name in ("crane", "Crane", "Bird", "BIRD", "bird")} == {
        "crane": None,  # of two classes
        "Crane": 3,
        "Bird": 3,
        "BIRD": 5,
        "bird": None,  # another spelling of two
    }


def test_bad_label_files(tmp_path):
    with pytest.raises(UserError):
        read_labels(write(tmp_path / "l.txt", ""))
    with pytest.raises(UserError):
        read_labels(write(tmp_path / "l.json", '{"a": 1, "b": 2}'))
    with pytest.raises(UserError):
        read_labels(tmp_path / "none.txt")
    (tmp_path / "l.txt").write_bytes(b"cat\n\xe9t\xe9\n")
    with pytest.raises(UserError, match=r"l\.txt is not UTF-8 text: save it as UTF-8, one class name a line$"):
        read_labels(tmp_path / "l.txt")


def test_class_names_that_a_run_cannot_keep(tmp_path):
    touch(tmp_path, "a.mp4", "folders/cat/1.mp4", os.fsdecode(b"folders/\xe9t\xe9/1.mp4"))
    write(tmp_path / "list.csv", "a.mp4 0\n")
    write(tmp_path / "labels.json", '["up\\ndown", "left"]')
    (line,) = faults(tmp_path, train="list.csv", labels="labels.json")
    assert line == r"class names 'up\ndown' have line breaks or are not UTF-8: rename these classes"
    (line,) = faults(tmp_path, source="folder", train="folders")
    assert line == r"class names '\udce9t\udce9' have line breaks or are not UTF-8: rename these classes"


# Faults


def test_all_faults_at_once(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    write(tmp_path / "train.csv", "a.mp4 0\nb.mp4 7\nc.mp4 -1\ngone.mp4 x\n")
    lines = faults(tmp_path, train="train.csv", classes=3)
    assert lines == [
        f"{tmp_path}/train.csv line 2: label 7 is not in 0..2",
        f"{tmp_path}/train.csv line 3: label -1 is not in 0..2",
        f"{tmp_path}/train.csv line 4: label 'x' is not a number, as others are",
        f"1 of 4 files of {tmp_path}/train.csv are not in {tmp_path}: gone.mp4. Correct root or the list",
    ]


def test_many_missing_files_are_counted(tmp_path):
    write(tmp_path / "train.csv", "".join(f"{i:04d}.mp4 0\n" for i in range(2000)))
    (line,) = faults(tmp_path, train="train.csv")
    assert "2000 of 2000 files" in line and "0000.mp4, 0001.mp4, 0002.mp4, 0003.mp4, 0004.mp4 and 1995 more" in line


def test_counting_from_one(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    write(tmp_path / "train.csv", "a.mp4 1\nb.mp4 2\n")
    assert faults(tmp_path, train="train.csv", classes=2) == [
        f"{tmp_path}/train.csv: labels run from 1 to 2; they must run from 0 to 1: subtract 1 from each"
    ]
    assert "labels run from 1 to 2, so class 0 is empty: numbers should start at 0" in opened(tmp_path, train="train.csv").warnings


def test_repeated_files_are_told(tmp_path):
    touch(tmp_path, "a.mp4")
    write(tmp_path / "l.csv", "a.mp4 0\na.mp4 0\n")
    assert opened(tmp_path, train="l.csv").warnings == [f"1 lines name a file that an earlier line names too: {tmp_path}/a.mp4"]
    touch(tmp_path, "b.mp4", "c/d.mp4")
    write(tmp_path / "l.csv", "a.mp4 0\nb.mp4 1\n./a.mp4 0\nc/../b.mp4 0\nc//d.mp4 0\n")
    assert opened(tmp_path, train="l.csv").warnings == [
        f"2 lines name a file that an earlier line names too: {tmp_path}/./a.mp4, {tmp_path}/c/../b.mp4",
        f"1 of these give it another label: {tmp_path}/c/../b.mp4",
    ]


# Spellings, places and separators


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("a\\b c.mp4,0\n", "a/b c.mp4"),
        ("e\u0301t\u00e9.mp4 0\n", "\u00e9t\u00e9.mp4"),
        ("\u00e9.mp4 0\n", "e\u0301.mp4"),
        ("a.mp4,0\rb.mp4,1\r", "b.mp4"),
        ("\ufeffa.mp4,0\r\nb.mp4,1\r\n", "b.mp4"),
        ("a\\b.mp4,0\n", "a\\b.mp4"),  # a name with a backslash comes first
    ],
)
def test_spellings_of_paths(tmp_path, content, name):
    touch(tmp_path, name, "a.mp4")
    (tmp_path / "l.csv").write_bytes(content.encode())
    assert str(tmp_path / name) in [opened(tmp_path, train="l.csv")[i]["video"] for i in range(content.count(".mp4"))]


def test_files_outside_the_root_are_refused_unless_allowed(tmp_path):
    touch(tmp_path, "videos/a.mp4", "other/b.mp4")
    os.symlink(tmp_path / "other/b.mp4", tmp_path / "videos/link.mp4")
    for path in ("../other/b.mp4", str(tmp_path / "other/b.mp4"), "x/../../other/b.mp4"):
        (tmp_path / "videos/x").mkdir(exist_ok=True)
        write(tmp_path / "l.csv", f"a.mp4 0\nlink.mp4 1\n{path} 1\n")
        (line,) = faults(tmp_path, train="l.csv", root="videos")
        where = f"1 of 3 files of {tmp_path}/l.csv lie outside {tmp_path}/videos: "
        assert line.startswith(where) and line.endswith("other/b.mp4. Correct the list, or set allow_outside=True")
        assert len(opened(tmp_path, train="l.csv", root="videos", allow_outside=True)) == 3
        write(tmp_path / "videos/l.csv", f"a.mp4 0\nlink.mp4 1\n{path} 1\n")
        assert len(opened(tmp_path, train="videos/l.csv")) == 3  # without root, data_root is what bounds
        assert "lie outside" in faults(tmp_path / "videos", train="l.csv")[0]
        assert len(open_source("t", task_config(train=str(tmp_path / "videos/l.csv")), "train", "")) == 3  # and nothing without either
    os.symlink(tmp_path / "videos", tmp_path / "alias")
    write(tmp_path / "l.csv", f"{tmp_path / 'videos/a.mp4'} 0\n")
    assert len(opened(tmp_path, train="l.csv", root="alias")) == 1


@pytest.mark.parametrize("content", ["a.mp4|1\nb.mp4|0\n", "a.mp4:1\nb.mp4:0\n", "a.mp4,1,\nb.mp4,0,\n"])
def test_wrong_separators_are_one_line(tmp_path, content):
    touch(tmp_path, "a.mp4", "b.mp4")
    write(tmp_path / "l.csv", content)
    (line,) = faults(tmp_path, train="l.csv")
    assert line.startswith(f"{tmp_path}/l.csv line 1: {content.splitlines()[0]!r} is no path and label: separate them by a comma")


def test_a_first_line_that_names_a_file_is_no_header(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    write(tmp_path / "l.csv", "a.mp4,0\nb.mp4 1\n")
    assert "line 1: no label" in faults(tmp_path, train="l.csv")[0]


def test_paths_of_windows_and_endless_names_are_told_in_a_line(tmp_path):
    write(tmp_path / "l.csv", "C:\\data\\a.mp4,0\n")
    assert faults(tmp_path, train="l.csv")[0].endswith("Write paths relative to root: these are of Windows")
    write(tmp_path / "l.csv", f'"{"y" * 200_000}.mp4",{"z" * 200_000}\n')
    assert all(len(line) < 1000 for line in faults(tmp_path, train="l.csv", classes=3))


def test_labels_that_leave_gaps(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    write(tmp_path / "l.csv", "a.mp4 0\nb.mp4 4\n")
    assert opened(tmp_path, train="l.csv").warnings == ["labels leave out 1, 2, 3: 3 of the 5 classes, 0 to 4, have no examples"]
    write(tmp_path / "l.csv", "a.mp4 1\nb.mp4 2\n")
    assert opened(tmp_path, train="l.csv").warnings == ["labels run from 1 to 2, so class 0 is empty: numbers should start at 0"]
    for number in ("99999", "9" * 5000):  # neither a model of so many classes, nor a hang
        write(tmp_path / "l.csv", f"a.mp4 0\nb.mp4 {number}\n")
        assert f"labels go up to {number[:30]}, but only 2 different ones occur: number the classes 0 to 1" in faults(tmp_path, train="l.csv")[0]
    write(tmp_path / "l.csv", "a.mp4 0\nb.mp4 99999\n")
    assert len(opened(tmp_path, train="l.csv", classes=100_000).labels) == 100_000


def test_lists_that_may_not_be_read(tmp_path, monkeypatch):
    write(tmp_path / "l.json", "[" * 100_000)
    assert "is not JSON" in faults(tmp_path, train="l.json")[0]
    os.mkfifo(tmp_path / "pipe")
    assert faults(tmp_path, train="pipe") == [f"{tmp_path}/pipe is no file: name a list"]
    write(tmp_path / "l.csv", "videos/a.mp4 0\n")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    assert faults(tmp_path, train="l.csv")[0].startswith(f"{tmp_path}/videos/ can't be read (Permission denied): change its permissions")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert faults(tmp_path, train="l.csv") == [f"{tmp_path}/l.csv can't be read (Permission denied): change its permissions, or name another"]


def test_training_and_validation_overlap_is_told(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    write(tmp_path / "train.csv", "a.mp4 left\nb.mp4 right\n")
    write(tmp_path / "val.csv", "./b.mp4 right\nc.mp4 left\n")
    config = base_config()
    config.data_root = str(tmp_path)
    config.tasks.t = task_config(train="train.csv", val="val.csv")
    task = open_tasks(config)["t"]
    assert task.val.warnings == [f"1 of 2 validation files are training files too: {tmp_path}/./b.mp4"]
    assert task.train.warnings == ["flip=True mirrors pictures, and 'left' and 'right' become each other: set tasks.t.flip=False"]
    config.tasks.t.flip = False
    assert not open_tasks(config)["t"].train.warnings


def test_classes_that_a_mirror_exchanges():
    names = ("swipe_left", "jump", "Swipe Right", "turning counter-clockwise", "turning clockwise")
    names += ("from left to right", "from right to left", "left")
    pairs = [("swipe_left", "Swipe Right"), ("turning counter-clockwise", "turning clockwise"), ("from left to right", "from right to left")]
    assert mirrored_classes(names) == pairs


def test_one_listing_per_folder(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{c}/{i}.mp4" for c in "ab" for i in range(50)))
    write(tmp_path / "l.csv", "".join(f"{c}/{i}.mp4 {c}\n" for i in range(50) for c in "ab"))
    asked = []
    scandir = os.scandir
    monkeypatch.setattr(files.os, "scandir", lambda path: asked.append(path) or scandir(path))
    monkeypatch.setattr(files.os.path, "isfile", lambda path: pytest.fail("looked at a single file"))
    assert len(opened(tmp_path, train="l.csv")) == 100
    assert len(asked) == 2


# Published layouts


def test_kinetics(tmp_path):
    touch(tmp_path, "k/train/playing_drums/abc_000010_000020.mkv", "k/train/-x,y_000000_000010.mp4", "k/train/deep/er/c_000001_000011.webm")
    rows = 'label,youtube_id,time_start,time_end,split\n"playing drums",abc,10,20,train\nclapping,"-x,y",0,10,train\nclapping,c,1.0,11.0,train\n'
    write(tmp_path / "k/train.csv", rows + "zapping,lost,5,15,train\n")
    source = opened(tmp_path, train="k/train.csv")
    assert pairs(source) == [("abc_000010_000020.mkv", 1), ("-x,y_000000_000010.mp4", 0), ("c_000001_000011.webm", 0)]
    assert source.labels == ("clapping", "playing drums", "zapping") and source.missing == 1 and "1 missing" in repr(source)
    assert any("1 of 4 files" in line and "lost_000005_000015" in line for line in source.warnings)
    write(tmp_path / "k/train.csv", rows + "".join(f"zapping,lost{i},5,15,train\n" for i in range(4)))
    assert "4 of 7 files" in faults(tmp_path, train="k/train.csv")[0]
    write(tmp_path / "k/train.csv", rows + "zapping,lost,soon,15,train\n")
    assert "line 5" in faults(tmp_path, train="k/train.csv")[0]
    write(tmp_path / "k/train.csv", "youtube_id,time_start,time_end,split\nabc,10,20,test\n")
    assert "no column label" in faults(tmp_path, train="k/train.csv")[0]


def test_something_something(tmp_path):
    touch(tmp_path, "clips/7.webm", "clips/8.mp4")
    entries = [
        {"id": "7", "label": "closing box", "template": "Closing [something]", "placeholders": ["box"]},
        {"id": "8", "label": "bending a spoon until it breaks", "template": "Bending [something] until it breaks"},
    ]
    write(tmp_path / "something-something-v2-train.json", json.dumps(entries))
    write(tmp_path / "val.json", json.dumps(entries[:1]))
    changes = {"train": "something-something-v2-train.json", "val": "val.json", "root": "clips"}
    assert opened(tmp_path, **changes).labels == ("Bending something until it breaks", "Closing something")
    assert pairs(opened(tmp_path, "val", **changes)) == [("7.webm", 1)]
    official = {"Closing something": "0", "Bending something until it breaks": "1", "Opening something": "2"}
    write(tmp_path / "labels.json", json.dumps(official))  # found beside the list
    source = opened(tmp_path, **changes)
    assert source.labels == tuple(official) and pairs(source) == [("7.webm", 0), ("8.mp4", 1)]
    write(tmp_path / "val.json", json.dumps([{"id": "7"}]))
    assert "no template" in faults(tmp_path, "val", **changes)[0]


def test_moments_in_time(tmp_path):
    touch(tmp_path, "mit/training/playing+fun/a_1.mp4", "mit/training/burying/b,1.mp4", "mit/validation/burying/c.mp4")
    write(tmp_path / "mit/moments_categories.txt", "playing+fun,1\nburying,0\n")
    write(tmp_path / "mit/trainingSet.csv", 'playing+fun/a_1.mp4,playing+fun,3,0\n"burying/b,1.mp4",burying,4,1\n')
    write(tmp_path / "mit/validationSet.csv", "burying/c.mp4,burying,3,0\n")
    changes = {"train": "mit/trainingSet.csv", "val": "mit/validationSet.csv"}
    source = opened(tmp_path, **changes)
    assert source.labels == ("burying", "playing+fun") and pairs(source) == [("a_1.mp4", 1), ("b,1.mp4", 0)]
    assert pairs(opened(tmp_path, "val", **changes)) == [("c.mp4", 0)]
    assert pairs(opened(tmp_path, root="mit/training", **changes)) == pairs(source)


def test_lists_of_paths_alone(tmp_path):
    rows = read_list(write(tmp_path / "l.txt", "my clip, one.mp4\nb.mp4\n"))
    assert rows.keys == ["my clip, one.mp4", "b.mp4"] and rows.labels == ["", ""]


# Multilabel lists


def labels_in(source):
    return [source[i]["label"].tolist() for i in range(len(source))]


@pytest.mark.parametrize("separator", [",", ";", "\t", " ", ", "])
@pytest.mark.parametrize("header", ["", "path{}label\n", "video{}labels\n", "clip_id{}tags\n"])
@pytest.mark.parametrize("kind", ["names", "numbers"])
def test_several_labels_of_a_file(tmp_path, separator, header, kind):
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4", "d.mp4")
    rows = {"a.mp4": "run|eat | jump", "b.mp4": "eat", "c.mp4": "eat|run", "d.mp4": "jump"}
    if separator == " ":
        rows["a.mp4"] = "run|eat|jump"
    text = (header.format(separator) if "clip" not in header or kind == "numbers" else "") + "".join(f"{k}{separator}{v}\n" for k, v in rows.items())
    if kind == "numbers":
        for number, name in enumerate(("eat", "jump", "run")):
            text = text.replace(name, str(number))
    write(tmp_path / "l.csv", text)
    source = opened(tmp_path, train="l.csv", multilabel=True)
    assert source.labels == (("eat", "jump", "run") if kind == "names" else ("0", "1", "2"))
    assert labels_in(source) == [[2, 0, 1], [0, -1, -1], [0, 2, -1], [1, -1, -1]] and source.label_shape == (3,)
    assert source[0]["label"].dtype == np.int32 and not source.warnings


def test_lines_that_name_the_same_file_are_one_example(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    write(tmp_path / "l.csv", "b.mp4,x\na.mp4,y\nb.mp4,z|x\nc.mp4,\nb.mp4,x\n")
    write(tmp_path / "more.csv", "a.mp4,w\n")
    source = opened(tmp_path, train="l.csv,more.csv", multilabel=True)
    assert [Path(source.name(i)).name for i in range(len(source))] == ["b.mp4", "a.mp4", "c.mp4"]
    assert source.labels == ("w", "x", "y", "z") and labels_in(source) == [[1, 3], [2, 0], [-1, -1]] and not source.warnings
    assert pickle.loads(pickle.dumps(source)).label_shape == (2,)
    assert opened(tmp_path, train="more.csv").label_shape == ()  # of a task of one label per example


def test_files_of_published_multilabel_lists_that_are_not_there(tmp_path):
    touch(tmp_path, "x/abc_000010_000020.mp4", "x/c_000001_000011.mp4")
    rows = "label,youtube_id,time_start,time_end,split\nrun,abc,10,20,train\neat|run|x|y,lost,0,10,train\neat,abc,10,20,train\nrun,c,1,11,train\n"
    write(tmp_path / "k.csv", rows)
    source = opened(tmp_path, train="k.csv", multilabel=True)
    assert labels_in(source) == [[1, 0], [1, -1]] and source.missing == 1  # K is of the files that are there
    assert source.warnings[0].startswith("1 of 4 files") and source.warnings[1] == "2 of 4 classes have no examples: x, y"


def test_a_multilabel_validation_list(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    write(tmp_path / "train.csv", "a.mp4,x|y|z\n")
    write(tmp_path / "val.csv", "b.mp4,z\na.mp4,\n")
    changes = {"train": "train.csv", "val": "val.csv", "multilabel": True}
    assert labels_in(opened(tmp_path, "val", **changes)) == [[2], [-1]]
    write(tmp_path / "names.txt", "z\ny\nx\n")
    assert labels_in(opened(tmp_path, "val", **changes, labels="names.txt")) == [[0], [-1]]
    write(tmp_path / "val.csv", "b.mp4,\na.mp4,\n")
    assert labels_in(opened(tmp_path, "val", **changes)) == [[-1], [-1]]


def test_multilabel_faults_are_told_by_line(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    write(tmp_path / "train.csv", "a.mp4,0|7\nb.mp4,\nc.mp4,1|-1|2|x\ngone.mp4,0\n")
    assert faults(tmp_path, train="train.csv", classes=3, multilabel=True) == [
        f"{tmp_path}/train.csv line 1: label 7 is not in 0..2",
        f"{tmp_path}/train.csv line 3: label -1 is not in 0..2",
        f"{tmp_path}/train.csv line 3: label 'x' is not a number, as others are",
        f"1 of 4 files of {tmp_path}/train.csv are not in {tmp_path}: gone.mp4. Correct root or the list",
    ]
    write(tmp_path / "train.csv", "a.mp4,x|mouse\nb.mp4,\n")
    write(tmp_path / "names.txt", "x\ny\n")
    (line,) = faults(tmp_path, train="train.csv", labels="names.txt", multilabel=True)
    assert line == f"{tmp_path}/train.csv line 1: class 'mouse' is not among the 2 known ones (x, y)"
    write(tmp_path / "train.csv", "a.mp4,1|2\nb.mp4,2\n")
    assert "they must run from 0 to 1" in faults(tmp_path, train="train.csv", classes=2, multilabel=True)[0]
    write(tmp_path / "train.csv", "a.mp4,\nb.mp4,\n")
    assert "no line has a label" in faults(tmp_path, train="train.csv", multilabel=True)[0]


def test_labels_that_look_like_several_are_told_of(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    hint = "'x|y' counts as one label: if it is meant as several, set multilabel=True"
    write(tmp_path / "l.csv", "a.mp4,x|y\nb.mp4,x\n")
    assert opened(tmp_path, train="l.csv").warnings == [hint]
    write(tmp_path / "names.txt", "x\nz\n")
    assert faults(tmp_path, train="l.csv", labels="names.txt")[-1] == hint
    write(tmp_path / "names.txt", "x\nx|y\n")
    assert opened(tmp_path, train="l.csv", labels="names.txt").warnings == []


def test_folds_of_a_multilabel_list(tmp_path):
    names = [f"{i:02d}.mp4" for i in range(24)]
    touch(tmp_path, *names)
    write(tmp_path / "l.csv", "".join(f"{name},{'abc'[i % 3]}{'|d|e' if i == 5 else ''}\n" for i, name in enumerate(names)))
    changes = {"train": "l.csv", "fold": "1/4", "multilabel": True}
    val, train = opened(tmp_path, "val", **changes), opened(tmp_path, "train", **changes)
    assert sorted([*val.records.names, *train.records.names]) == [str(tmp_path / name) for name in names]
    assert np.bincount(val.records.targets[:, 0]).tolist() == [2, 2, 2]
    assert val.label_shape == train.label_shape == (3,)
