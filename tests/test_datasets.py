"""Every dataset of the papers: its published layout in miniature opens with the right files and labels, and tells what of it is missing."""

import inspect
import io
import json

import numpy as np
import pytest
from PIL import Image

from configs import datasets
from tests.data.listed import pairs, touch, write
from vidjoint import validate
from vidjoint.config import base_config
from vidjoint.data.tasks import open_tasks
from vidjoint.errors import UserError

KINETICS = "label,youtube_id,time_start,time_end,split,is_cc\n"


def write_kinetics(root, number=400):
    write(root / f"kinetics{number}/train.csv", KINETICS + 'yoga,aaaaaaaaaa1,10,20,train,0\n"air drumming",aaaaaaaaaa2,0,10,train,1\n')
    write(root / f"kinetics{number}/validate.csv", KINETICS + '"air drumming",bbbbbbbbbb1,5,15,validate,0\n')
    touch(root / f"kinetics{number}", "train/yoga/aaaaaaaaaa1_000010_000020.mp4", "train/air drumming/aaaaaaaaaa2_000000_000010.mkv")
    touch(root / f"kinetics{number}", "val/bbbbbbbbbb1_000005_000015.mp4")


def write_mini_kinetics(root):
    write_kinetics(root)
    write(root / "mini-kinetics/train_ytid_list.txt", "aaaaaaaaaa2\naaaaaaaaaa1\n")
    write(root / "mini-kinetics/val_ytid_list.txt", "bbbbbbbbbb1\n")


def write_ssv2(root):
    entries = [
        {"id": str(i), "label": "a box", "template": f"{verb} [something]", "placeholders": ["box"]} for i, verb in ((7, "Closing"), (8, "Opening"))
    ]
    write(root / "something-v2/labels/train.json", json.dumps(entries))
    write(root / "something-v2/labels/validation.json", json.dumps([entries[1] | {"id": "9"}]))
    write(root / "something-v2/labels/labels.json", json.dumps({"Opening something": "0", "Closing something": "1"}))
    touch(root / "something-v2/20bn-something-something-v2", "7.webm", "8.webm", "9.webm")


def write_moments(root):
    write(root / "moments/moments_categories.txt", "burying,0\nplaying+fun,1\n")
    write(root / "moments/trainingSet.csv", "playing+fun/a_1.mp4,playing+fun,3,0\nburying/b_1.mp4,burying,4,1\n")
    write(root / "moments/validationSet.csv", "burying/c_1.mp4,burying,3,0\n")
    touch(root / "moments", "training/playing+fun/a_1.mp4", "training/burying/b_1.mp4", "validation/burying/c_1.mp4")


def write_imagenet(root):
    touch(root / "imagenet", "train/n00000002/n00000002_7.JPEG", "train/n00000001/n00000001_3.JPEG", "val/n00000002/ILSVRC2012_val_00000001.JPEG")


def write_flat_imagenet(root):
    write_imagenet(root)
    (root / "imagenet/val/n00000002/ILSVRC2012_val_00000001.JPEG").rename(root / "imagenet/val/ILSVRC2012_val_00000001.JPEG")
    (root / "imagenet/val/n00000002").rmdir()
    write(root / "imagenet/LOC_val_solution.csv", "ImageId,PredictionString\nILSVRC2012_val_00000001,n00000002 85 1 499 272 \n")


def write_imagenet21k(root):
    touch(root / "imagenet21k", *(f"n0000000{c}/n0000000{c}_{i:03d}.JPEG" for c in (1, 2) for i in range(200)))


def write_cifar100(root):
    """A dataset of the catalogue's name and version, of two classes."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("importlib_resources")
    features = tfds.features

    def picture(i):
        buffer = io.BytesIO()
        Image.fromarray(np.full((32, 32, 3), i, np.uint8)).save(buffer, "png")
        return {"id": str(i), "image": io.BytesIO(buffer.getvalue()), "coarse_label": 0, "label": i % 2}

    names = dict(coarse_label=features.ClassLabel(names=["things"]), label=features.ClassLabel(names=["apple", "wardrobe"]))
    content = features.FeaturesDict({"id": features.Text(), "image": features.Image(shape=(32, 32, 3)), **names})
    methods = {
        "VERSION": tfds.builder_cls("cifar100").VERSION,
        "_info": lambda self: tfds.core.DatasetInfo(builder=self, features=content),
        "_split_generators": lambda self, manager: {"train": self._generate_examples(2), "test": self._generate_examples(1)},
        "_generate_examples": lambda self, n: ((i, picture(i)) for i in range(n)),
    }
    with tfds.core.registered.skip_registration():
        builder = type("Cifar100", (tfds.core.GeneratorBasedBuilder,), methods)
    builder(data_dir=root, file_format="array_record").download_and_prepare()


def write_tiny_imagenet(root):
    folder = root / "tiny-imagenet-200"
    touch(
        folder,
        "train/n00000002/images/n00000002_0.JPEG",
        "train/n00000001/images/n00000001_0.JPEG",
        "val/images/val_0.JPEG",
        "test/images/test_0.JPEG",
    )
    write(folder / "train/n00000001/n00000001_boxes.txt", "n00000001_0.JPEG\t0\t10\t63\t58\n")
    write(folder / "val/val_annotations.txt", "val_0.JPEG\tn00000002\t0\t32\t44\t62\n")
    write(folder / "wnids.txt", "n00000002\nn00000001\n")
    write(folder / "words.txt", "n00000000\tentity\nn00000001\tbell cote, bell cot\nn00000002\tred panda\n")


def write_ucf101(root):
    folder = root / "ucf101"
    names = ["JumpingJack/v_JumpingJack_g08_c01.avi", "JumpRope/v_JumpRope_g08_c01.avi", "JumpRope/v_JumpRope_g01_c01.avi"]
    touch(folder / "UCF-101", *names)
    write(folder / "ucfTrainTestlist/classInd.txt", "1 JumpingJack\r\n2 JumpRope\r\n")
    for split in "01", "02":
        write(folder / f"ucfTrainTestlist/trainlist{split}.txt", f"{names[0]} 1\r\n{names[1]} 2\r\n")
        write(folder / f"ucfTrainTestlist/testlist{split}.txt", f"{names[2]}\r\n")


def write_smarthome(root):
    touch(
        root / "smarthome/mp4", "Walk_p03_r00_v02_c03.mp4", "Cutbread_p25_r00_v02_c01.mp4", "Walk_p02_r00_v02_c02.mp4", "Cook.Cut_p20_r01_v01_c02.mp4"
    )


KINETICS_FILES = [("aaaaaaaaaa1_000010_000020.mp4", 1), ("aaaaaaaaaa2_000000_000010.mkv", 0)], [("bbbbbbbbbb1_000005_000015.mp4", 0)]
IMAGENET_FILES = [("n00000001_3.JPEG", 0), ("n00000002_7.JPEG", 1)], [("ILSVRC2012_val_00000001.JPEG", 1)]
UCF_FILES = [("v_JumpingJack_g08_c01.avi", 0), ("v_JumpRope_g08_c01.avi", 1)], [("v_JumpRope_g01_c01.avi", 1)]
# entry -> how its files are written, its settings, (file, label) of both splits, and what is told missing in an empty folder
ENTRIES = {
    "kinetics": (write_kinetics, {}, KINETICS_FILES, ["kinetics400/train.csv", "kinetics400/validate.csv"]),
    "mini_kinetics": (
        write_mini_kinetics,
        {},
        tuple(files[::-1] for files in KINETICS_FILES),
        [
            "mini-kinetics/train_ytid_list.txt",
            "root kinetics400",
            "kinetics400/train.csv",
            "kinetics400/validate.csv",
            "mini-kinetics/val_ytid_list.txt",
        ],
    ),
    "ssv2": (
        write_ssv2,
        {},
        ([("7.webm", 1), ("8.webm", 0)], [("9.webm", 0)]),
        ["something-v2/labels/train.json", "root something-v2", "something-v2/labels/labels.json", "something-v2/labels/validation.json"],
    ),
    "moments": (
        write_moments,
        {},
        ([("a_1.mp4", 1), ("b_1.mp4", 0)], [("c_1.mp4", 0)]),
        ["moments/trainingSet.csv", "moments/moments_categories.txt", "moments/validationSet.csv"],
    ),
    "imagenet": (write_imagenet, {}, IMAGENET_FILES, ["imagenet/train", "imagenet/val"]),
    "imagenet as published": (
        write_flat_imagenet,
        {"val": "imagenet/LOC_val_solution.csv"},
        IMAGENET_FILES,
        ["imagenet/train", "imagenet/LOC_val_solution.csv"],
    ),
    "imagenet21k": (
        write_imagenet21k,
        {},
        (
            [(f"n0000000{c}_{i:03d}.JPEG", c - 1) for c in (1, 2) for i in range(1, 200)],
            [(f"n0000000{c}_000.JPEG", c - 1) for c in (1, 2)],
        ),
        ["imagenet21k"],
    ),
    "cifar100": (write_cifar100, {}, None, ["cifar100 is not prepared"]),
    "tiny_imagenet": (
        write_tiny_imagenet,
        {},
        ([("n00000001_0.JPEG", 0), ("n00000002_0.JPEG", 1)], [("val_0.JPEG", 1)]),
        ["tiny-imagenet-200/train", "tiny-imagenet-200/words.txt", "tiny-imagenet-200/val/val_annotations.txt"],
    ),
    "ucf101": (
        write_ucf101,
        {},
        UCF_FILES,
        ["ucfTrainTestlist/trainlist01.txt", "root ucf101/UCF-101", "ucfTrainTestlist/classInd.txt", "ucfTrainTestlist/testlist01.txt"],
    ),
    "ucf101 split 2": (write_ucf101, {"split": 2}, UCF_FILES, ["ucfTrainTestlist/trainlist02.txt", "ucfTrainTestlist/testlist02.txt"]),
    "smarthome": (
        write_smarthome,
        {"classes": 31},  # the 31 names are known
        (
            [("Cutbread_p25_r00_v02_c01.mp4", 5), ("Walk_p03_r00_v02_c03.mp4", 29)],
            [("Cook.Cut_p20_r01_v01_c02.mp4", 2), ("Walk_p02_r00_v02_c02.mp4", 29)],
        ),
        ["root smarthome/mp4"],
    ),
    "smarthome cross-view": (
        write_smarthome,
        {"protocol": "cross_view2", "classes": 19},
        ([("Cutbread_p25_r00_v02_c01.mp4", 0), ("Walk_p03_r00_v02_c03.mp4", 18)], [("Walk_p02_r00_v02_c02.mp4", 18)]),
        ["root smarthome/mp4"],
    ),
}
CLASSES = {"ssv2": 174, "moments": 339, "imagenet": 1000, "imagenet21k": 21841, "cifar100": 100, "tiny_imagenet": 200, "ucf101": 101}
CLASSES |= {"mini_kinetics": 200, "smarthome": 31, "kinetics": 400}
MADE = {
    name: entry for name, entry in vars(datasets).items() if inspect.isfunction(entry) and entry.__module__ == datasets.__name__ and name[0] != "_"
}


def make(name, root, **changes):
    """A config with one entry of the table, for two classes unless it says otherwise."""
    settings = {"classes": 2, **ENTRIES[name][1], **changes}
    config = base_config()
    config.total_steps = 1
    config.data_root = str(root)
    config.tasks.it = MADE[name.split()[0]](**settings)
    return config


def test_the_table_is_complete():
    assert {name.split()[0] for name in ENTRIES} == set(MADE) == set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_an_entry_is_what_the_papers_use(name):
    task = MADE[name]()
    assert task.classes == CLASSES[name] and task.is_locked
    assert task.flip == (name != "ssv2")  # left and right are in the labels
    assert task.media == ("image" if name in ("imagenet", "imagenet21k", "cifar100", "tiny_imagenet") else "video")
    changed = MADE[name](flip=True, short_side=(10, 20), root="elsewhere")
    assert (changed.flip, changed.short_side, changed.root) == (True, (10, 20), "elsewhere")
    with pytest.raises(KeyError):
        MADE[name](no_such_key=1)
    assert "\n" in MADE[name].__doc__.strip()  # where to get it, and its files
    config = base_config()
    config.total_steps = 1
    config.tasks[name] = task
    assert validate.check(config) == []


@pytest.mark.parametrize("name", ENTRIES)
def test_the_published_layout_opens(name, tmp_path):
    write_files, _, files, _ = ENTRIES[name]
    write_files(tmp_path)
    task = open_tasks(make(name, tmp_path))["it"]
    if files is None:  # TFDS: bytes in an order of its own
        assert [[source[i]["label"] for i in range(len(source))] for source in (task.train, task.val)] in ([[0, 1], [0]], [[1, 0], [0]])
        assert task.labels == ("apple", "wardrobe") and task.train[0]["image"].startswith(b"\x89PNG")
        return
    assert (sorted(pairs(task.train)), sorted(pairs(task.val))) == tuple(map(sorted, files))
    assert len(task.labels) == make(name, tmp_path).tasks.it.classes and task.train.labels == task.val.labels
    assert not task.train.missing and not task.val.missing


def test_kinetics_600_and_700(tmp_path):
    for number in (600, 700):
        write_kinetics(tmp_path, number)
        config = base_config()
        config.data_root = str(tmp_path)
        config.tasks.it = datasets.kinetics(number, classes=2)
        task = open_tasks(config)["it"]
        assert (pairs(task.train), pairs(task.val)) == KINETICS_FILES and task.labels == ("air drumming", "yoga")
        assert datasets.kinetics(number).classes == number


@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_missing_is_told(name, tmp_path):
    """In an empty folder: all of it, together."""
    if name == "cifar100":
        pytest.importorskip("tensorflow_datasets")
    with pytest.raises(UserError) as error:
        open_tasks(make(name, tmp_path))
    told = "\n".join(line.replace(f"{tmp_path}/", "") for line in error.value.lines)
    for part in ENTRIES[name][3]:
        assert part in told
    assert all(line.startswith(("task it, train: ", "task it, val: ")) and "\n" not in line for line in error.value.lines)


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry[2] and name.split()[0] not in ("imagenet21k", "smarthome")])
def test_missing_files_are_named(name, tmp_path):
    """Only the lists are there, and training pictures in class folders."""
    ENTRIES[name][0](tmp_path)
    for file in tmp_path.rglob("*.*"):
        if file.suffix in (".mp4", ".mkv", ".avi", ".webm", ".JPEG") and "train/n0" not in str(file):
            file.unlink()
    with pytest.raises(UserError) as error:
        open_tasks(make(name, tmp_path))
    told = "\n".join(error.value.lines)
    train, val = ENTRIES[name][2]
    for path, _ in val if "imagenet" in name else train + val:
        assert path.rpartition(".")[0] in told or name == "imagenet"
    assert "are not in" in told or "has no class folders with images" in told
