"""Annotations as published: UCF101, Tiny-ImageNet, ImageNet, mini-Kinetics and Toyota Smarthome, and what is told when parts of them are missing."""

import re
import time

import numpy as np
import pytest

from tests.data.listed import faults, opened, pairs, touch, write
from vidjoint.config import base_config, task_config
from vidjoint.data.lists import locate, read_list
from vidjoint.data.smarthome import CLASSES, CROSS_VIEW, SPLITS
from vidjoint.data.tasks import open_tasks
from vidjoint.errors import UserError

# UCF101

UCF = {"train": "u/lists/trainlist01.txt", "val": "u/lists/testlist01.txt", "root": "u/UCF-101"}


@pytest.fixture
def ucf(tmp_path):
    """Two classes whose order in classInd.txt is not that of sorting; one folder's name differs in case from its files'."""
    names = ["JumpingJack/v_JumpingJack_g08_c01.avi", "JumpRope/v_JumpRope_g08_c01.avi", "HandstandPushups/v_HandStandPushups_g08_c01.avi"]
    tests = [name.replace("g08", "g01") for name in names]
    touch(tmp_path / "u/UCF-101", *names, *tests)
    write(tmp_path / "u/lists/trainlist01.txt", "".join(f"{name} {number}\r\n" for name, number in zip(names, (1, 2, 3), strict=True)))
    write(tmp_path / "u/lists/testlist01.txt", "".join(f"{name}\r\n" for name in tests))
    write(tmp_path / "u/lists/classInd.txt", "1 JumpingJack\r\n2 JumpRope\r\n3 HandstandPushups\r\n")
    return tmp_path


def test_ucf101(ucf):
    train, val = opened(ucf, **UCF), opened(ucf, "val", **UCF)  # classInd.txt is found beside the list
    assert train.labels == val.labels == ("JumpingJack", "JumpRope", "HandstandPushups") and not train.warnings
    assert pairs(train) == [("v_JumpingJack_g08_c01.avi", 0), ("v_JumpRope_g08_c01.avi", 1), ("v_HandStandPushups_g08_c01.avi", 2)]
    assert pairs(val) == [("v_JumpingJack_g01_c01.avi", 0), ("v_JumpRope_g01_c01.avi", 1), ("v_HandStandPushups_g01_c01.avi", 2)]
    (ucf / "u/lists/classInd.txt").unlink()
    assert opened(ucf, "val", **UCF).labels == ("HandstandPushups", "JumpRope", "JumpingJack")


def test_ucf101_is_whole_or_refused(ucf):
    (ucf / "u/UCF-101/JumpRope/v_JumpRope_g08_c01.avi").unlink()
    (line,) = faults(ucf, **UCF)
    assert line.startswith(f"1 of 3 files of {ucf}/u/lists/trainlist01.txt are not in {ucf}/u/UCF-101: JumpRope/v_JumpRope_g08_c01.avi")
    lines = "".join(f"A/v_A_g{i:02d}_c01.avi 1\n" for i in range(25))
    write(ucf / "u/lists/trainlist01.txt", lines + "A/what.avi 1\n")
    assert faults(ucf, **UCF) == [f"{ucf}/u/lists/trainlist01.txt line 26: not CLASS/v_CLASS_gNN_cNN.avi and perhaps a number as in the lines before"]


def test_other_people_s_lists_of_ucf101_keep_their_numbers(tmp_path):
    touch(tmp_path, "B/v_B_g01_c01.avi", "A/v_A_g01_c01.avi")
    write(tmp_path / "l.txt", "B/v_B_g01_c01.avi 0\nA/v_A_g01_c01.avi 1\n")
    assert pairs(opened(tmp_path, train="l.txt")) == [("v_B_g01_c01.avi", 0), ("v_A_g01_c01.avi", 1)]
    assert read_list(tmp_path / "l.txt").layout == "plain"


# Class folders with a list of validation files: Tiny-ImageNet and ImageNet

FOLDERS = {"source": "folder", "media": "image", "train": "i/train"}


@pytest.fixture
def tiny_imagenet(tmp_path):
    touch(tmp_path / "i", *(f"train/{name}/images/{name}_{i}.JPEG" for name in ("n00000002", "n00000001") for i in range(2)))
    write(tmp_path / "i/train/n00000001/n00000001_boxes.txt", "n00000001_0.JPEG\t0\t10\t63\t58\n")
    touch(tmp_path / "i", "val/images/val_0.JPEG", "val/images/val_1.JPEG", "val/images/val_2.JPEG")
    lines = "".join(f"val_{i}.JPEG\t{name}\t0\t32\t44\t62\n" for i, name in enumerate(("n00000002", "n00000001", "n00000002")))
    write(tmp_path / "i/val/val_annotations.txt", lines)
    write(tmp_path / "i/wnids.txt", "n00000002\nn00000001\n")
    write(tmp_path / "i/words.txt", "n00000000\tentity\nn00000001\tbell cote, bell cot\nn00000002\tlesser panda, red panda\n")
    return tmp_path


def test_tiny_imagenet(tiny_imagenet):
    changes = FOLDERS | {"val": "i/val/val_annotations.txt", "labels": "i/words.txt", "classes": 2}
    train, val = opened(tiny_imagenet, **changes), opened(tiny_imagenet, "val", **changes)
    assert train.labels == val.labels == ("bell cote, bell cot", "lesser panda, red panda")  # in the order of the folders
    assert [label for _, label in pairs(train)] == [0, 0, 1, 1]
    assert pairs(val) == [("val_0.JPEG", 1), ("val_1.JPEG", 0), ("val_2.JPEG", 1)]
    changes["labels"] = "i/wnids.txt"  # fixes an order
    assert opened(tiny_imagenet, **changes).labels == ("n00000002", "n00000001")
    assert [label for _, label in pairs(opened(tiny_imagenet, "val", **changes))] == [0, 1, 0]
    changes["labels"] = ""
    assert opened(tiny_imagenet, "val", **changes).labels == ("n00000001", "n00000002")


def test_tiny_imagenet_is_whole_or_refused(tiny_imagenet):
    changes = FOLDERS | {"val": "i/val/val_annotations.txt"}
    (tiny_imagenet / "i/val/images/val_1.JPEG").unlink()
    (line,) = faults(tiny_imagenet, "val", **changes)
    assert line.startswith("1 of 3 files of ") and "images/val_1.JPEG" in line
    write(tiny_imagenet / "i/val/val_annotations.txt", "val_0.JPEG\tn00000009\t0\t32\t44\t62\n")
    (line,) = faults(tiny_imagenet, "val", **changes)
    assert line.endswith("line 1: class 'n00000009' is not among the 2 known ones (n00000001, n00000002)")
    assert "folders images are not among the 2 classes" in faults(tiny_imagenet, "val", **FOLDERS, val="i/val")[0]
    both = faults(tiny_imagenet, **(changes | {"train": "i/none", "labels": "i/none.txt"}))
    assert [line.split(":")[0] for line in both] == [f"{tiny_imagenet}/i/none does not exist", "labels"]


@pytest.fixture
def imagenet(tmp_path):
    """Training classes n00000001, n00000002; three validation files that lie flat, of classes 2, 1, 2."""
    touch(tmp_path / "i", "train/n00000001/a.JPEG", "train/n00000002/b.JPEG", *(f"val/ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3)))
    return tmp_path


def meta_mat(file, ids):
    """The development kit's table: a struct array with more fields and more entries than the classes."""
    from scipy.io import savemat

    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")]
    savemat(file, {"synsets": np.array([(number, name, "word, other", 0) for number, name in ids.items()], kinds)[:, None]})


@pytest.mark.parametrize("kind", ["kaggle", "kit", "ids", "numbers", "folders"])
def test_imagenet_validation(imagenet, kind):
    changes = FOLDERS | {"root": "i/val", "classes": 2, "val": "i/LOC_val_solution.csv"}
    classes = ["n00000002", "n00000001", "n00000002"]
    names = [f"ILSVRC2012_val_{i:08d}" for i in (1, 2, 3)]
    if kind == "kaggle":
        lines = [f"{name},{label} 1 2 30 40 {label} 5 6 7 8 \n" for name, label in zip(names, classes, strict=True)]
        write(imagenet / changes["val"], "ImageId,PredictionString\n" + "".join(reversed(lines)))
    elif kind == "kit":
        changes["val"] = "i/ILSVRC2012_validation_ground_truth.txt"
        write(imagenet / changes["val"], "7\n490\n7\n")
        assert faults(imagenet, "val", **changes)[0].startswith(f"{imagenet}/i/meta.mat does not exist")
        write(imagenet / "i/meta.mat", b"no matrix")
        assert "is not the development kit's table" in faults(imagenet, "val", **changes)[0]
        meta_mat(imagenet / "i/meta.mat", {7: "n00000002", 490: "n00000001", 1001: "n00000000"})
    elif kind == "ids":
        changes["val"] = write(imagenet / "i/imagenet_2012_validation_synset_labels.txt", "\n".join(classes)).name
        changes["val"] = f"i/{changes['val']}"
    elif kind == "numbers":
        changes["val"] = "i/val.txt"
        write(imagenet / changes["val"], "".join(f"{name}.JPEG {int(label[-1]) - 1}\n" for name, label in zip(names, classes, strict=True)))
    else:
        changes["val"] = "i/val"
        assert "set val to the list of their classes and root to this folder" in faults(imagenet, "val", **changes)[0]
        for name, label in zip(names, classes, strict=True):
            (imagenet / "i/val" / label).mkdir(exist_ok=True)
            (imagenet / f"i/val/{name}.JPEG").rename(imagenet / f"i/val/{label}/{name}.JPEG")
    val = opened(imagenet, "val", **changes)
    assert sorted(pairs(val)) == [(f"{name}.JPEG", int(label[-1]) - 1) for name, label in zip(names, classes, strict=True)]
    assert val.labels == opened(imagenet, **changes).labels == ("n00000001", "n00000002")


def test_imagenet_ground_truth_must_fit(imagenet):
    changes = FOLDERS | {"root": "i/val", "val": "i/ILSVRC2012_validation_ground_truth.txt"}
    meta_mat(imagenet / "i/meta.mat", {1: "n00000001", 2: "n00000002"})
    write(imagenet / changes["val"], "2\n1\n2\n2\n")
    assert "1 of 4 files" in faults(imagenet, "val", **changes)[0]
    write(imagenet / changes["val"], "2\n1\nx\n")
    assert "line 3: not a number of a class" in faults(imagenet, "val", **changes)[0]
    write(imagenet / "i/labels.txt", "n00000001 tench, Tinca tinca\nn00000002 goldfish\n")
    write(imagenet / changes["val"], "2\n1\n2\n")
    assert opened(imagenet, "val", **changes, labels="i/labels.txt").labels == ("tench, Tinca tinca", "goldfish")
    assert faults(imagenet, "val", **changes, classes=3) == [
        "classes=3, but train has 2 class names: correct classes, or give all names in their order in a file named by labels"
    ]


# Mini-Kinetics

MINI = {"train": "m/train_ytid_list.txt", "val": "m/val_ytid_list.txt", "root": "k", "labels": "k/train.csv,k/validate.csv"}


@pytest.fixture
def mini(tmp_path):
    header = "label,youtube_id,time_start,time_end,split\n"
    write(tmp_path / "k/train.csv", header + 'yoga,-aaaaaaaaa1,10,20,train\n"air drumming",aaaaaaaa_a2,0,10,train\nzumba,aaaaaaaaaa3,1,11,train\n')
    write(tmp_path / "k/validate.csv", header + "air drumming,bbbbbbbbbb1,5,15,validate\nzumba,bbbbbbbbbb2,5,15,validate\n")
    touch(
        tmp_path / "k/train",
        "yoga/-aaaaaaaaa1_000010_000020.mp4",
        "air drumming/aaaaaaaa_a2_000000_000010.mp4",
        "zumba/aaaaaaaaaa3_000001_000011.mp4",
    )
    touch(tmp_path / "k/val", "bbbbbbbbbb1_000005_000015.mp4", "bbbbbbbbbb2_000005_000015.mp4")
    write(tmp_path / "m/train_ytid_list.txt", "aaaaaaaa_a2\n-aaaaaaaaa1\n")
    write(tmp_path / "m/val_ytid_list.txt", "bbbbbbbbbb1\n")
    return tmp_path


def test_mini_kinetics(mini):
    train, val = opened(mini, **MINI), opened(mini, "val", **MINI)
    assert train.labels == val.labels == ("air drumming", "yoga")  # the classes of the training ids alone
    assert pairs(train) == [("aaaaaaaa_a2_000000_000010.mp4", 0), ("-aaaaaaaaa1_000010_000020.mp4", 1)]
    assert pairs(val) == [("bbbbbbbbbb1_000005_000015.mp4", 0)] and train.missing == 0


def test_mini_kinetics_ids_and_clips_may_be_lost(mini):
    write(mini / "m/train_ytid_list.txt", "aaaaaaaa_a2\n-aaaaaaaaa1\nccccccccccc\n")
    source = opened(mini, **MINI)
    assert len(source) == 2 and source.missing == 1
    assert source.warnings == ["1 of 3 ids of m/train_ytid_list.txt are not in k/train.csv,k/validate.csv: ccccccccccc"]
    (mini / "k/train/yoga/-aaaaaaaaa1_000010_000020.mp4").unlink()
    source = opened(mini, **MINI)
    assert len(source) == 1 and source.missing == 2 and "1 of 2 files" in source.warnings[1]
    write(mini / "m/train_ytid_list.txt", "aaaaaaaa_a2\nccccccccccc\nddddddddddd\n")
    assert "2 of 3 ids" in faults(mini, **MINI)[0] and "set labels to" in faults(mini, **MINI)[0]
    write(mini / "m/train_ytid_list.txt", "ccccccccccc\n")
    assert "1 of 1 ids" in faults(mini, **MINI)[0]


def test_mini_kinetics_needs_kinetics_lists(mini):
    for labels in ("", "m/val_ytid_list.txt"):
        (line,) = faults(mini, **(MINI | {"labels": labels}))
        assert "holds YouTube ids without classes: set labels to the lists that have them" in line
    lines = faults(mini, **(MINI | {"labels": "k/train.csv,k/none.csv", "root": "none", "train": "m/none.txt"}))
    assert [re.sub(f"{mini}/", "", line.split(":")[0]) for line in lines] == ["m/none.txt does not exist", "root none is not a folder", "labels"]
    assert "k/none.csv" in lines[2]


def test_ids_alone_find_their_clips(mini):
    """As `check_data` asks for them."""
    rows = read_list(mini / "m/train_ytid_list.txt")
    assert [path.rpartition("/")[2] for path in locate(rows, str(mini / "k"), "video")] == [
        "aaaaaaaa_a2_000000_000010.mp4",
        "-aaaaaaaaa1_000010_000020.mp4",
    ]


# Toyota Smarthome

SMARTHOME = {"source": "smarthome", "root": "s", "train": "cross_subject:train", "val": "cross_subject:test"}


def test_smarthome_protocols():
    """Das et al. 2019, section 5.1: 11 and 7 of 18 subjects; 31 and 19 classes."""
    subjects = [set(SPLITS[f"cross_subject:{part}"][1]) for part in ("train", "test")]
    assert [len(part) for part in subjects] == [11, 7] and not subjects[0] & subjects[1]
    assert (len(CLASSES), len(CROSS_VIEW)) == (31, 19)


def test_smarthome(tmp_path):
    touch(
        tmp_path / "s",
        "Cook.Cleandishes_p02_r00_v02_c03.mp4",
        "Cook.Cleandishes_p03_r00_v02_c03.mp4",
        "deep/WatchTV_p25_r11_v02_c01.mp4",
        "Cutbread_p20_r03_v08_c01.mp4",
        "Cutbread_p04_r03_v08_c02.mp4",
        "Pour.Fromcup_p04_r00_v08_c02.mp4",  # in the published lists, but not among the 31 classes
        "holiday.mp4",
        "readme.txt",
    )
    train, val = opened(tmp_path, **SMARTHOME, classes=31), opened(tmp_path, "val", **SMARTHOME)
    assert train.labels == val.labels == tuple(sorted(CLASSES)) and train.labels[27:29] == ("Usetablet", "Usetelephone")
    assert pairs(train) == [
        ("Cook.Cleandishes_p03_r00_v02_c03.mp4", 0),
        ("Cutbread_p04_r03_v08_c02.mp4", 5),
        ("WatchTV_p25_r11_v02_c01.mp4", 30),
    ]
    assert pairs(val) == [("Cook.Cleandishes_p02_r00_v02_c03.mp4", 0), ("Cutbread_p20_r03_v08_c01.mp4", 5)]
    assert "1 clips of classes outside the published 31 are left out: Pour.Fromcup" in train.warnings[0]
    assert "1 videos without class and subject in their names are left out: holiday.mp4" in train.warnings[1]
    views = SMARTHOME | {"train": "cross_view1:train", "val": "cross_view1:test", "classes": 19}
    assert pairs(opened(tmp_path, **views)) == [("Cutbread_p20_r03_v08_c01.mp4", 0)]
    assert pairs(opened(tmp_path, "val", **views)) == [("Cutbread_p04_r03_v08_c02.mp4", 0)]


def test_smarthome_faults(tmp_path):
    assert "is not a folder" in faults(tmp_path, **SMARTHOME)[0]
    touch(tmp_path, "s/holiday.mp4")
    assert "names like Cook.Cleandishes_p02_r00_v02_c03.mp4" in faults(tmp_path, **SMARTHOME)[0]
    touch(tmp_path, "s/Walk_p02_r00_v02_c03.mp4")
    assert "has the subjects 3, 4, 6, 7, 9 and 6 more" in faults(tmp_path, **SMARTHOME)[0]
    assert "choose one of cross_subject:train" in faults(tmp_path, **(SMARTHOME | {"train": "cs:train"}))[0]
    assert faults(tmp_path, **SMARTHOME, classes=35) == ["classes=35, but cross_subject has 31"]


# What is missing


def test_all_that_is_missing_is_told_at_once(tmp_path, ucf, mini):
    """Of every task and split; names are counted."""
    (ucf / UCF["val"]).unlink()
    names = [f"A/v_A_g{i:02d}_c01.avi" for i in range(10)]
    write(ucf / UCF["train"], "".join(f"{name} 1\n" for name in names))
    write(ucf / "u/lists/classInd.txt", "1 A\n")
    config = base_config()
    config.data_root = str(tmp_path)
    config.tasks.ucf = task_config(**UCF)
    config.tasks.mini = task_config(**(MINI | {"root": "none", "train": "m/none.txt"}))
    config.tasks.home = task_config(**SMARTHOME)
    config.tasks.tiny = task_config(**FOLDERS, val="i/val/val_annotations.txt", labels="i/words.txt")
    with pytest.raises(UserError) as error:
        open_tasks(config)
    assert [line.replace(f"{tmp_path}/", "").split(":")[0] for line in error.value.lines] == ["task home, train", "task home, val"] + [
        "task mini, train",
        "task mini, train",
        "task mini, val",
        "task tiny, train",
        "task tiny, train",
        "task tiny, val",
        "task tiny, val",
        "task ucf, train",
        "task ucf, val",
    ]
    told = dict.fromkeys(line.replace(f"{tmp_path}/", "") for line in error.value.lines)
    assert "task mini, train: m/none.txt does not exist: correct the path, or data_root" in told
    assert any(line.startswith("task mini, val: root none is not a folder") for line in told)
    assert any(f"10 of 10 files of u/lists/trainlist01.txt are not in u/UCF-101: {', '.join(names[:5])} and 5 more" in line for line in told)


def test_long_lists_are_read_quickly(tmp_path):
    """Moments in Time has 800,000 lines. The limit is generous, for slow machines; reading a line takes a few microseconds."""
    count = 50_000
    lists = {
        "moments": "".join(f"playing+fun/yt-{i:09d}.mp4,playing+fun,3,0\n" for i in range(count)),
        "kinetics": "label,youtube_id,time_start,time_end,split\n" + "".join(f'"class {i % 400}",{i:011d},10,20,train\n' for i in range(count)),
        "youtube": "".join(f"{i:011d}\n" for i in range(count)),
        "ucf": "".join(f"A/v_A_g{i:02d}_c01.avi 1\n" for i in range(count)),
    }
    for layout, content in lists.items():
        file = write(tmp_path / f"{layout}.csv", content)
        start = time.process_time()
        rows = read_list(file)
        assert (rows.layout, len(rows.keys)) == (layout, count)
        assert time.process_time() - start < 2.5
