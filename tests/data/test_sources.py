"""Sources: every layout, every fault named, folds, zips, TFDS without TensorFlow."""

import json
import os
import pickle
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from vidjoint.config import task_config
from vidjoint.data import sources
from vidjoint.data.sources import KINDS, Names, Source, open_source, read_labels, read_list
from vidjoint.data.video import DecodeError
from vidjoint.errors import UserError

SHARED = Path(os.environ.get("VIDJOINT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


def touch(root, *names):
    """Makes files whose content is their own name: sources never decode."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def opened(data_root, split="train", **changes):
    return open_source("t", task_config(**changes), split, str(data_root))


def pairs(source):
    return [(os.path.basename(os.fsdecode(source[i][source.media])), source[i]["label"]) for i in range(len(source))]


def faults(data_root, split="train", **changes):
    with pytest.raises(UserError) as error:
        opened(data_root, split, **changes)
    assert all(line.startswith(f"task t, {split}: ") and "\n" not in line for line in error.value.lines)
    return [line.removeprefix(f"task t, {split}: ") for line in error.value.lines]


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


def test_bad_label_files(tmp_path):
    with pytest.raises(UserError):
        read_labels(write(tmp_path / "l.txt", ""))
    with pytest.raises(UserError):
        read_labels(write(tmp_path / "l.json", '{"a": 1, "b": 2}'))
    with pytest.raises(UserError):
        read_labels(tmp_path / "none.txt")


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


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"train": ""}, "train is empty"),
        ({"train": "none.csv"}, "does not exist"),
        ({"train": "."}, "is a folder"),
        ({"train": "l.csv", "source": "sql"}, "choose one of csv, folder, tfds, demo"),
        ({"train": "l.csv", "media": "sound"}, "media 'sound'"),
        ({"train": "l.csv", "fold": "0/5"}, "k/n"),
        ({"train": "l.csv", "fold": "1/5", "val": "l.csv"}, "exclude each other"),
        ({"train": "l.csv", "fold": "1/5"}, "leaves no examples"),
        ({"train": "l.csv", "classes": 4}, "classes=4, but the training list has 2 class names"),
        ({"train": "l.csv", "root": "nowhere"}, "is not a folder"),
        ({"train": "l.csv", "labels": "nowhere.txt"}, "can't be read"),
        ({"train": "empty.csv"}, "is empty"),
        ({"train": "header.csv"}, "no lines after its header"),
        ({"train": "zeros.csv"}, "is not UTF-8 text"),
        ({"train": "paths.csv"}, "no label"),
        ({"train": "x.json"}, "is not JSON"),
        ({"train": "l.csv", "source": "folder"}, "neither a folder nor a zip"),
        ({"train": "nowhere", "source": "folder"}, "does not exist"),
        ({"train": "motions:train", "source": "demo"}, "choose one of digits:train"),
        ({"train": "cifar10", "source": "tfds"}, "name:split"),
    ],
)
def test_faults(tmp_path, changes, part):
    touch(tmp_path, "a.mp4", "b.mp4")
    write(tmp_path / "l.csv", "a.mp4 x\nb.mp4 y\n")
    write(tmp_path / "paths.csv", "a.mp4\nb.mp4\n")
    write(tmp_path / "empty.csv", "\n\n")
    write(tmp_path / "header.csv", "path,label\n")
    write(tmp_path / "zeros.csv", "a.mp4 x\n".encode("utf-16"))
    write(tmp_path / "x.json", "[{]")
    split = "val" if changes.get("fold") == "1/5" and "val" not in changes else "train"
    if split == "val":
        write(tmp_path / "l.csv", "a.mp4 x\n")
        changes = changes | {"fold": "2/5"}
    assert part in "\n".join(faults(tmp_path, split, **changes))


def test_repeated_files_are_told(tmp_path):
    touch(tmp_path, "a.mp4")
    write(tmp_path / "l.csv", "a.mp4 0\na.mp4 0\n")
    assert opened(tmp_path, train="l.csv").warnings == ["1 lines name a file that an earlier line names too"]


def test_one_listing_per_folder(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{c}/{i}.mp4" for c in "ab" for i in range(50)))
    write(tmp_path / "l.csv", "".join(f"{c}/{i}.mp4 {c}\n" for i in range(50) for c in "ab"))
    asked = []
    scandir = os.scandir
    monkeypatch.setattr(sources.os, "scandir", lambda path: asked.append(path) or scandir(path))
    monkeypatch.setattr(sources.os.path, "isfile", lambda path: pytest.fail("looked at a single file"))
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


# Folders and zips


def make_zip(file, folder, **settings):
    with zipfile.ZipFile(file, "w", **settings) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return file


@pytest.mark.parametrize("kind", ["folder", "stored", "deflated"])
@pytest.mark.parametrize("top", ["", "top/", "top/inner/"])
def test_folder_and_zip(tmp_path, kind, top):
    names = ["cat/1.jpg", "cat/more/2.PNG", "big dog/1.jpg", "ape/.hidden.jpg", "cat/notes.txt", ".git/x.jpg", "__MACOSX/cat/1.jpg"]
    touch(tmp_path / "d", *(top + name for name in names))
    what = "d"
    if kind != "folder":
        what = make_zip(tmp_path / "d.zip", tmp_path / "d", compression=zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED).name
    source = opened(tmp_path, source="folder", media="image", train=what)
    assert source.labels == ("ape", "big dog", "cat")
    assert source.warnings == ["1 of 3 classes have no examples: ape"]
    assert [source.records.names[i].split(top or "d/")[-1] for i in range(3)] == ["big dog/1.jpg", "cat/1.jpg", "cat/more/2.PNG"]
    assert [example["label"] for example in source] == [1, 2, 2]
    contents = [source[i]["image"] for i in range(3)]
    if kind == "folder":
        contents = [Path(content).read_bytes() for content in contents]
    assert contents == [os.fsencode(top + name) for name in ("big dog/1.jpg", "cat/1.jpg", "cat/more/2.PNG")]
    assert source[-1]["name"] == source.name(2) == str(tmp_path / what / top / "cat/more/2.PNG")


def test_one_class_folder_is_a_class(tmp_path):
    touch(tmp_path, "d/cat/1.jpg")
    assert opened(tmp_path, source="folder", media="image", train="d").labels == ("cat",)


def test_folder_validation_uses_the_training_classes(tmp_path):
    touch(tmp_path, "train/a/1.mp4", "train/b/1.mp4", "val/b/1.mp4")
    changes = {"source": "folder", "train": "train", "val": "val"}
    assert pairs(opened(tmp_path, "val", **changes)) == [("1.mp4", 1)]
    touch(tmp_path, "val/c/1.mp4")
    assert "folders c are not among the 2 classes (a, b)" in faults(tmp_path, "val", **changes)[0]
    assert "folder per split (train, val)" in faults(tmp_path, source="folder", train=".")[0]
    assert "it has videos: set media=video" in faults(tmp_path, source="folder", train="train", media="image")[0]
    write(tmp_path / "labels.txt", "B\nx\nA\n")
    assert pairs(opened(tmp_path, **changes, labels="labels.txt")) == [("1.mp4", 2), ("1.mp4", 0)]


def test_damaged_zip(tmp_path):
    touch(tmp_path / "d", "a/1.jpg", "b/2.jpg")
    file = make_zip(tmp_path / "d.zip", tmp_path / "d")
    file.write_bytes(file.read_bytes().replace(b"b/2.jpgb/2.jpg", b"b/2.jpgb/x.jpg"))  # the content, not the names
    source = opened(tmp_path, source="folder", media="image", train="d.zip")
    assert source[0]["image"] == b"a/1.jpg"
    with pytest.raises(DecodeError, match="checksum"):
        source[1]
    file.write_bytes(file.read_bytes()[:-30])
    assert "neither a folder nor a zip that can be read" in faults(tmp_path, source="folder", media="image", train="d.zip")[0]


def test_zip_is_read_from_threads_and_after_pickling(tmp_path):
    names = [f"{c}/{i}.jpg" for c in "ab" for i in range(100)]
    touch(tmp_path / "d", *names)
    make_zip(tmp_path / "d.zip", tmp_path / "d", compression=zipfile.ZIP_DEFLATED)
    source = pickle.loads(pickle.dumps(opened(tmp_path, source="folder", media="image", train="d.zip")))
    gate = threading.Barrier(4)

    def read(offset):
        gate.wait()
        return all(source[i]["image"] == os.fsencode(source.records.names[i]) for i in range(offset, 200, 4))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


# Folds, memory, pickling


def test_folds_are_stratified_and_disjoint(tmp_path):
    counts = {"a": 13, "b": 7, "c": 4}
    names = [f"{c}/{i:02d}.mp4" for c, n in counts.items() for i in range(n)]
    touch(tmp_path, *names)
    write(tmp_path / "l.csv", "".join(f"{name} {name[0]}\n" for name in names))
    held = []
    for k in range(1, 5):
        changes = {"train": "l.csv", "fold": f"{k}/4"}
        val, train = opened(tmp_path, "val", **changes), opened(tmp_path, "train", **changes)
        assert sorted([*val.records.names, *train.records.names]) == [str(tmp_path / name) for name in names]
        per_class = np.bincount(val.records.targets, minlength=3)
        assert (np.abs(per_class - np.array([13, 7, 4]) / 4) < 1).all() and len(val) == 6
        held += val.records.names
    assert sorted(held) == [str(tmp_path / name) for name in names]
    touch(tmp_path / "d", *names)
    make_zip(tmp_path / "d.zip", tmp_path / "d")
    val = opened(tmp_path, "val", source="folder", train="d.zip", fold="2/4")
    assert val.labels == ("a", "b", "c") and val[0]["video"] == b"a/01.mp4"


def test_names_are_compact_and_whole():
    names = [f"/some/long/root/folder/class {i % 400}/video_{i}_ü.mp4" for i in range(20000)]
    packed = pickle.loads(pickle.dumps(Names(names)))
    assert list(packed) == names and packed[-1] == names[-1]
    assert len(pickle.dumps(packed)) < 45 * len(names)
    assert list(Names([])) == [] and list(Names(["same", "same"])) == ["same", "same"]


def test_kinds_are_openers():
    assert set(KINDS) == {"csv", "folder", "tfds", "demo"} and all(map(callable, KINDS.values()))


# TFDS and demo


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A small dataset of pictures and one of clips, prepared without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("importlib_resources")
    import io

    from PIL import Image

    folder = tmp_path_factory.mktemp("tfds")
    features = tfds.features

    def encoded(i):
        buffer = io.BytesIO()
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(buffer, "png")
        return buffer.getvalue()

    def build(name, content, make):
        key = next(iter(content))
        generate = {
            "VERSION": tfds.core.Version("1.0.0"),
            "_info": lambda self: tfds.core.DatasetInfo(
                builder=self, features=features.FeaturesDict({**content, "label": features.ClassLabel(names=["x", "y"])})
            ),
            "_split_generators": lambda self, manager: {"train": self._generate_examples(6), "test": self._generate_examples(2)},
            "_generate_examples": lambda self, n: ((i, {key: make(i), "label": i % 2}) for i in range(n)),
        }
        builder = type(name.capitalize(), (tfds.core.GeneratorBasedBuilder,), generate)
        builder(data_dir=folder, file_format="array_record").download_and_prepare()

    build("stills", {"image": features.Image(shape=(None, None, 3))}, lambda i: io.BytesIO(encoded(i)))
    build("films", {"video": features.Scalar(np.object_)}, lambda i: b"film\0%d" % i)
    return folder, encoded


def test_tfds_gives_encoded_bytes(prepared):
    folder, encoded = prepared
    source = opened(folder, source="tfds", media="image", train="stills:train", val="stills:test")
    assert source.labels == ("x", "y") and len(source) == 6
    by_content = {encoded(i): i % 2 for i in range(6)}
    again = pickle.loads(pickle.dumps(source))
    for i in range(6):
        assert again[i] == source[i] and by_content[source[i]["image"]] == source[i]["label"] and source[i]["name"] == f"stills:train[{i}]"
    assert len(opened(folder, "val", source="tfds", media="image", train="stills:train", val="stills:test")) == 2
    assert len(opened(folder, source="tfds", media="image", train="stills:1.0.0:train[:50%]")) == 3
    films = opened(folder, source="tfds", media="video", train="films:train")
    assert {films[i]["video"]: films[i]["label"] for i in range(6)} == {b"film\0%d" % i: i % 2 for i in range(6)}


def test_tfds_faults(prepared, tmp_path):
    folder, _ = prepared
    changes = {"source": "tfds", "media": "image"}
    assert "its splits are" in faults(folder, train="stills:dev", **changes)[0]
    assert "TFDS can't open 'nothing'" in faults(folder, train="nothing:train", **changes)[0]
    assert "has no video" in faults(folder, train="stills:train", source="tfds")[0]
    assert "classes=3" in faults(folder, train="stills:train", classes=3, **changes)[0]
    assert "train[:90%]" in faults(folder, train="stills:train", fold="1/5", **changes)[0]
    (line,) = faults(tmp_path, train="cifar10:train", **changes)
    assert "is not prepared" in line and "file_format='array_record').download_and_prepare()" in line and str(tmp_path) in line


def test_demo_goes_through_folder_and_csv(tmp_path, monkeypatch):
    touch(tmp_path, "digits/train/0/a.png", "digits/train/1/b.png", "digits/test/1/c.png", "motion/a.mp4")
    for split in ("train", "test"):
        write(tmp_path / f"motion/{split}.csv", "a.mp4 1\n")
    write(tmp_path / "motion/labels.txt", "left\nright\n")
    monkeypatch.setattr(sources, "demo_folder", lambda root: tmp_path)
    changes = {"source": "demo", "media": "image", "train": "digits:train", "val": "digits:test"}
    assert pairs(opened("", **changes)) == [("a.png", 0), ("b.png", 1)]
    assert pairs(opened("", "val", **changes)) == [("c.png", 1)]
    source = opened("elsewhere", "val", source="demo", train="motion:train", val="motion:test")
    assert source.labels == ("left", "right") and pairs(source) == [("a.mp4", 1)] and "demo motion:test" in repr(source)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared data at {SHARED}")
def test_real_data():
    source = opened(SHARED, train="gestures/train.csv", val="gestures/val.csv", labels="gestures/labels.txt", classes=10)
    assert len(source) == 150 and source.labels[0] == "carret" and Path(source[0]["video"]).exists() and not source.warnings
    cifar = opened(SHARED, "val", source="folder", media="image", train="cifar10/train.zip", fold="1/10")
    assert len(cifar) == 1000 and (np.bincount(cifar.records.targets) == 100).all() and cifar[0]["image"][:2] == b"\xff\xd8"
    for file in sorted((SHARED / "label_maps").iterdir()):
        assert len(read_labels(file)[0]) >= 10
    assert isinstance(source, Source)
