"""The papers' datasets as entries of `config.tasks`, each with where to get it and how to lay out its files below data_root.

    from configs import datasets
    config.tasks.ssv2 = datasets.ssv2(short_side=(256, 320))

Annotations are read as they are published: nothing has to be converted. Every setting of a task (`vidjoint.config.task_config`) may be given by
keyword. Not run by itself. To check a copy before training: python -m vidjoint.check_data LIST --root=FOLDER.
"""

from ml_collections import ConfigDict

from vidjoint.config import task_config


def _task(defaults: dict, changes: dict) -> ConfigDict:
    return task_config(**defaults | changes)


def kinetics(number: int = 400, **changes) -> ConfigDict:
    """Kinetics-400, -600 or -700 (Kay et al. 2017; Carreira et al. 2018, 2019).

    Lists: storage.googleapis.com/deepmind-media/Datasets/kinetics400.tar.gz (kinetics600, kinetics700).
    Clips: github.com/cvdfoundation/kinetics-dataset
      kinetics400/train.csv, validate.csv     label,youtube_id,time_start,time_end,split
      kinetics400/ANY/FOLDERS/ID_START_END.mp4     seconds with six digits; the videos that YouTube has lost since may be missing
    """
    folder = f"kinetics{number}"
    return _task(dict(train=f"{folder}/train.csv", val=f"{folder}/validate.csv", classes=number), changes)


def ssv2(**changes) -> ConfigDict:
    """Something-Something v2 (Goyal et al. 2017). No flip: `from left to right` is a class.

    developer.qualcomm.com/software/ai-datasets/something-something (sign in; labels, and videos in parts that are unpacked together)
      something-v2/labels/train.json, validation.json, labels.json
      something-v2/ANY_FOLDER/ID.webm     as unpacked, 20bn-something-something-v2/
    """
    lists = dict(train="something-v2/labels/train.json", val="something-v2/labels/validation.json", labels="something-v2/labels/labels.json")
    return _task(dict(root="something-v2", classes=174, flip=False, **lists), changes)


def moments(**changes) -> ConfigDict:
    """Moments in Time (Monfort et al. 2019), 339 classes in the first version, 305 in the second.

    moments.csail.mit.edu (form), Moments_in_Time_Raw.zip
      moments/trainingSet.csv, validationSet.csv, moments_categories.txt
      moments/training/CLASS/FILE.mp4, moments/validation/CLASS/FILE.mp4
    """
    lists = dict(train="moments/trainingSet.csv", val="moments/validationSet.csv", labels="moments/moments_categories.txt")
    return _task(dict(classes=339, **lists), changes)


def imagenet(**changes) -> ConfigDict:
    """ImageNet-1k (ILSVRC 2012).

    image-net.org (sign in) or Kaggle's imagenet-object-localization-challenge
      imagenet/train/nXXXXXXXX/FILE.JPEG     each class's tar unpacked into a folder of its own
      imagenet/val/nXXXXXXXX/FILE.JPEG     or, as published, imagenet/val/ILSVRC2012_val_NNNNNNNN.JPEG, with one of these lists as `val`:
      val="imagenet/LOC_val_solution.csv"     Kaggle's
      val="imagenet/ILSVRC2012_validation_ground_truth.txt"     the development kit's, with its meta.mat beside it
    Names for plots: labels="imagenet/LOC_synset_mapping.txt" (Kaggle's), if you have it. Prepared by TFDS: source="tfds", train="imagenet2012:train",
    val="imagenet2012:validation".
    """
    return _task(dict(source="folder", media="image", train="imagenet/train", val="imagenet/val", root="imagenet/val", classes=1000), changes)


def imagenet21k(**changes) -> ConfigDict:
    """ImageNet-21k (Deng et al. 2009). It has no validation split: a two-hundredth of each class is held out.

    image-net.org (sign in). The release of autumn 2011 (fall11_whole.tar) has 21,841 classes; that of winter 2021 has 19,167: give classes=19167
      imagenet21k/nXXXXXXXX/FILE.JPEG     each class's tar unpacked into a folder of its own
    """
    return _task(dict(source="folder", media="image", train="imagenet21k", fold="1/200", classes=21841), changes)


def cifar100(**changes) -> ConfigDict:
    """CIFAR-100 (Krizhevsky 2009), prepared by TensorFlow Datasets once (needs tensorflow-cpu then, not for training):

    python -c "import tensorflow_datasets as t; t.builder('cifar100', data_dir='DATA_ROOT', file_format='array_record').download_and_prepare()"
    """
    return _task(dict(source="tfds", media="image", train="cifar100:train", val="cifar100:test", classes=100), changes)


def tiny_imagenet(**changes) -> ConfigDict:
    """Tiny-ImageNet: 200 classes of ImageNet, 64 x 64 pixels.

    cs231n.stanford.edu/tiny-imagenet-200.zip, unpacked in data_root:
      tiny-imagenet-200/train/nXXXXXXXX/images/FILE.JPEG
      tiny-imagenet-200/val/images/val_N.JPEG, tiny-imagenet-200/val/val_annotations.txt
      tiny-imagenet-200/words.txt     the classes' names
    """
    folder = "tiny-imagenet-200"
    lists = dict(train=f"{folder}/train", val=f"{folder}/val/val_annotations.txt", labels=f"{folder}/words.txt")
    return _task(dict(source="folder", media="image", classes=200, **lists), changes)


def ucf101(split: int = 1, **changes) -> ConfigDict:
    """UCF101 (Soomro et al. 2012), one of its three splits.

    crcv.ucf.edu/data/UCF101.php: UCF101.rar and UCF101TrainTestSplits-RecognitionTask.zip, unpacked in data_root/ucf101
      ucf101/ucfTrainTestlist/trainlist01.txt, testlist01.txt, classInd.txt
      ucf101/UCF-101/CLASS/v_CLASS_gNN_cNN.avi
    """
    lists = {key: f"ucf101/ucfTrainTestlist/{part}list{split:02d}.txt" for key, part in (("train", "train"), ("val", "test"))}
    return _task(dict(root="ucf101/UCF-101", labels="ucf101/ucfTrainTestlist/classInd.txt", classes=101, **lists), changes)


def mini_kinetics(**changes) -> ConfigDict:
    """Mini-Kinetics-200 (Xie et al. 2018): lists of YouTube ids, whose classes and times are in Kinetics-400's own lists.

    github.com/s9xie/Mini-Kinetics-200, and Kinetics-400 as above
      mini-kinetics/train_ytid_list.txt, val_ytid_list.txt     one id a line, 80,000 and 5,000
      kinetics400/     lists and clips (of these classes, at least)
    """
    lists = dict(train="mini-kinetics/train_ytid_list.txt", val="mini-kinetics/val_ytid_list.txt")
    return _task(dict(root="kinetics400", labels="kinetics400/train.csv,kinetics400/validate.csv", classes=200, **lists), changes)


def smarthome(protocol: str = "cross_subject", **changes) -> ConfigDict:
    """Toyota Smarthome, trimmed (Das et al. 2019): 31 classes cross-subject; cross_view1 and cross_view2 have 19.

    project.inria.fr/toyotasmarthome (form), toyota_smarthome_mp4.tar.gz. There are no lists: class, subject and camera are in the names.
      smarthome/mp4/CLASS_pNN_rNN_vNN_cNN.mp4
    """
    classes = 31 if protocol == "cross_subject" else 19
    return _task(dict(source="smarthome", root="smarthome/mp4", train=f"{protocol}:train", val=f"{protocol}:test", classes=classes), changes)
