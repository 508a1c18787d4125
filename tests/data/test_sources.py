"""Sources: folders, zips, folds, TFDS without TensorFlow, the demo, and what can be wrong with a task's settings."""

import os
import pickle
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.data.listed import faults, opened, pairs, touch, write
from vidjoint.data import archives, files, sources
from vidjoint.data.archives import list_archive, read_member
from vidjoint.data.decode import DecodeError
from vidjoint.data.labels import read_labels
from vidjoint.data.records import Names, Source
from vidjoint.data.sources import KINDS

SHARED = Path(os.environ.get("VIDJOINT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"train": ""}, "train is empty"),
        ({"train": "none.csv"}, "does not exist"),
        ({"train": "."}, "is a folder"),
        ({"train": "l.csv", "source": "sql"}, "choose one of csv, folder, smarthome, tfds, packed, demo"),
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


def test_links_to_a_folder_above_are_left_out(tmp_path, monkeypatch):
    touch(tmp_path, "d/a/0.mp4", "d/b/1.mp4", "d/lost+found/2.mp4", "elsewhere/3.mp4")
    os.symlink("..", tmp_path / "d/a/up")
    os.symlink(tmp_path, tmp_path / "d/all")
    os.symlink("../b", tmp_path / "d/a/beside")  # and from there back again
    os.symlink("../a", tmp_path / "d/b/back")
    os.symlink("../elsewhere", tmp_path / "d/c")
    entries = [*files.walk(str(tmp_path / "d"))]
    assert entries == ["a/", "a/0.mp4", "a/beside/", "a/beside/1.mp4", "b/", "b/1.mp4", "b/back/", "b/back/0.mp4", "c/", "c/3.mp4"]
    assert opened(tmp_path, source="folder", train="d").labels == ("a", "b", "c")
    scandir = os.scandir

    def guarded(folder):
        if os.path.basename(folder) == "b":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)  # a class less would be no training that anyone wants
    assert faults(tmp_path, source="folder", train="d") == [f"{tmp_path}/d/b can't be listed: Permission denied"]


def test_a_folder_without_classes_says_what_to_do(tmp_path, monkeypatch):
    touch(tmp_path, "flat/1.mp4", "flat/2.mp4", "pictures/a/1.png")
    told = f"{tmp_path}/flat has no class folders with videos: put the videos of each class into a folder of its own"
    assert faults(tmp_path, source="folder", train="flat") == [told]
    assert faults(tmp_path, "val", source="folder", train="flat", fold="1/5") == [told]
    (line,) = faults(tmp_path, "val", source="folder", train="a", val="flat")
    assert line == f"{told}, or set val to the list of their classes and root to this folder"
    monkeypatch.chdir(tmp_path / "pictures")
    (line,) = faults("", source="folder", train=".")
    assert line == ". has no class folders with videos: it has images: set media=image; or is another folder meant? Then set data_root"


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


def test_zip_bombs_are_refused_in_little_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/flat.bmp", bytes(1 << 20))
        archive.writestr("a/bomb.bmp", bytes(200 << 20))
    source = opened(tmp_path, source="folder", media="image", train="d.zip")
    assert [source.name(i)[-8:] for i in range(2)] == ["bomb.bmp", "flat.bmp"] and len(source[1]["image"]) == 1 << 20
    with pytest.raises(DecodeError, match=r"^refused: its \d+ bytes unpack to 67108864 or more$"):
        source[0]
    offset, _, method, crc = list_archive(tmp_path / "d.zip")["a/flat.bmp"]
    with pytest.raises(DecodeError, match="larger than the archive"):
        read_member(str(tmp_path / "d.zip"), offset, 1 << 50, method, crc)


def test_names_in_a_zip_lead_nowhere(tmp_path):
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in/d.zip", "w") as archive:
        for name in ("../../out/1.png", "/abs/2.png", "a/../../3.png"):
            archive.writestr(name, name)
    source = opened(tmp_path / "in", source="folder", media="image", train="d.zip")
    assert sorted(source[i]["image"].decode() for i in range(len(source)))
    assert [path.name for path in tmp_path.iterdir()] == ["in"] and [path.name for path in (tmp_path / "in").iterdir()] == ["d.zip"]


def test_a_zip_that_is_gone(tmp_path):
    touch(tmp_path / "d", "a/1.jpg")
    file = make_zip(tmp_path / "d.zip", tmp_path / "d")
    source = opened(tmp_path, source="folder", media="image", train="d.zip")
    file.unlink()
    with pytest.raises(DecodeError, match=r"^the zip can't be read any more: No such file or directory$"):
        source[0]


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


def test_many_zips_keep_few_files_open_while_threads_read_them_all(tmp_path):
    """More archives than stay open, each read by threads that come back to it after others have pushed it out of the cache."""
    touch(tmp_path / "d", *(f"a/{i}.jpg" for i in range(8)))
    zips = [str(make_zip(tmp_path / f"{n}.zip", tmp_path / "d")) for n in range(24)]
    members = [(file, name, place) for file in zips for name, place in archives.list_archive(Path(file)).items() if name.endswith(".jpg")]
    gate = threading.Barrier(4)

    def read(thread):
        gate.wait()
        order = np.random.default_rng(thread).permutation(np.repeat(np.arange(len(members)), 3))
        return all(archives.read_member(members[i][0], *members[i][2]) == os.fsencode(members[i][1]) for i in order)

    def still_open():
        return sum(os.path.realpath(f"/proc/self/fd/{number}") in zips for number in os.listdir("/proc/self/fd"))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))
    assert still_open() == archives.open_archive.cache_info().maxsize < len(zips)
    archives.open_archive.cache_clear()
    assert still_open() == 0


def test_an_archive_stays_open_for_its_reader(tmp_path):
    touch(tmp_path / "d", "a/1.jpg")
    zips = [str(make_zip(tmp_path / f"{n}.zip", tmp_path / "d")) for n in range(17)]
    reader = archives.open_archive(zips[0])
    for file in zips[1:]:
        archives.open_archive(file)
    assert archives.open_archive(zips[0]) is not reader  # it was pushed out
    assert os.pread(reader.descriptor, 2, 0) == b"PK"
    number = reader.descriptor
    del reader
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


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
    assert set(KINDS) == {"csv", "folder", "smarthome", "tfds", "packed", "demo"} and all(map(callable, KINDS.values()))


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
