"""Sources: what a task's `source`, `train` and `val` name, as a random-access list of (file or bytes, label). Nothing is decoded here.

Kinds: `csv` (lists of `path label`, or `path label|label` in multilabel tasks, and lists as published, see lists.py), `folder` (a folder or zip with
one folder per class; `val` may be a list), `smarthome` (Toyota Smarthome, whose file names hold classes and splits), `tfds` (a dataset prepared by
TensorFlow Datasets), `packed` (what `vidjoint.pack` wrote, on disk or behind a URL) and `demo` (the embedded dataset). Everything that is missing is
reported together, and so are all faults of a list.
"""

import os
import re
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from vidjoint.data.archives import list_archive
from vidjoint.data.demo import demo_folder
from vidjoint.data.files import EXTENSIONS, has_extension, is_outside, same_name, some, walk
from vidjoint.data.labels import (
    empty_classes,
    labels_of,
    number_labels,
    one_label_per_row,
    one_row_per_file,
    plain_name,
    published_labels,
    read_labels,
    read_wordnet,
    unusable_names,
)
from vidjoint.data.lists import Rows, add_kinetics, is_numeric, list_files, locate, name_files, read_list, wrong_separator
from vidjoint.data.packed import is_url, name_split, open_packed
from vidjoint.data.records import FileRecords, Source, TfdsRecords, ZipRecords
from vidjoint.data.smarthome import SPLITS, find_clips
from vidjoint.errors import UserError

INCOMPLETE = ("kinetics", "something", "moments")  # published lists of which nobody has all files: some may be missing


def open_source(name: str, task: ConfigDict, split: str, data_root: str) -> Source | None:
    """Opens the "train" or "val" split of a task (`config.task_config`); None where the task has no validation split.

    Relative paths start from `data_root` ("": the current folder).

    Raises:
      UserError: the split can't be used; one line for each fault found.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}; it is train or val")
    try:
        part, parts = parse_fold(task.fold)
        if task.source not in KINDS:
            raise UserError(f"source {task.source!r} is unknown; choose one of {', '.join(KINDS)}")
        if task.media not in EXTENSIONS:
            raise UserError(f"media {task.media!r} is unknown; choose video or image")
        if task.val and parts:
            raise UserError(f"val={task.val!r} and fold={task.fold!r} exclude each other: remove one")
        if split == "val" and not task.val and not parts:
            return None
        what = task.train if split == "train" or parts else task.val
        if not what:
            raise UserError("train is empty: name a list, a folder, a zip or a TFDS split")
        source = KINDS[task.source](task, what, split, Path(data_root).expanduser())
        if faults := unusable_names(source.labels):
            raise UserError(*faults)
        if parts:
            source = hold_out(source, part, parts, split)
        if not len(source):
            raise UserError(f"{what} holds no examples")
        if hasattr(source.records, "targets"):
            source.warnings += empty_classes(source.labels, source.records.targets)
        return source
    except UserError as error:
        raise UserError(*(f"task {name}, {split}: {line}" for line in error.lines)) from None


def parse_fold(fold: str) -> tuple[int, int]:
    """Reads "k/n" as (k, n) with 1 <= k <= n; "" is (0, 0)."""
    if not fold:
        return 0, 0
    match = re.fullmatch(r"(\d+)/(\d+)", fold)
    if not match or not 1 <= int(match[1]) <= int(match[2]) or int(match[2]) < 2:
        raise UserError(f"fold={fold!r}: write k/n with n of at least 2 and k from 1 to n, for example 1/5")
    return int(match[1]), int(match[2])


def hold_out(source: Source, part: int, parts: int, split: str) -> Source:
    """Keeps the `part`-th of `parts` parts of the examples ("val"), or all but it ("train").

    Examples are dealt out in turn, class after class, each in its order: every part has its share of every class, within one example. Of a
    multilabel task, the first label is the one that counts.
    """
    by_class = np.argsort(source.records.targets.reshape(len(source), -1)[:, 0], kind="stable")
    dealt = np.empty(len(source), np.int64)
    dealt[by_class] = np.arange(len(source)) % parts + 1
    rows = np.flatnonzero((dealt == part) == (split == "val"))
    if not len(rows):
        raise UserError(f"fold {part}/{parts} leaves no examples: there are only {len(source)}")
    origin = f"{source.origin} {'fold' if split == 'val' else 'without fold'} {part}/{parts}"
    return Source(source.media, source.labels, source.records.select(rows), origin, source.missing, source.warnings)


def repeats(names: list[str], targets: np.ndarray) -> list[str]:
    """Warns of files that are named more than once, and of those with different labels."""
    first, again, unlike = {}, [], []
    for i, name in enumerate(map(same_name, names)):
        if first.setdefault(name, i) != i:
            again.append(i)
            if targets[first[name]] != targets[i]:
                unlike.append(i)
    notes = [f"{len(again)} lines name a file that an earlier line names too: {some(names[i] for i in again)}"] if again else []
    if unlike:
        notes.append(f"{len(unlike)} of these give it another label: {some(names[i] for i in unlike)}")
    return notes


def overlap(train: Source, val: Source) -> list[str]:
    """Warns of validation files that are training files too, by their paths."""
    if not (hasattr(train.records, "names") and hasattr(val.records, "names")) or not isinstance(val.records, FileRecords | ZipRecords):
        return []
    known = {same_name(train.name(i)) for i in range(len(train))}
    both = [name for i in range(len(val)) if same_name(name := val.name(i)) in known]
    return [f"{len(both)} of {len(val)} validation files are training files too: {some(both)}"] if both else []


# csv: lists of files -------------------------------------------------------------------------------------------------------------------------


def open_csv(task: ConfigDict, what: str, split: str, data_root: Path, folders: tuple[tuple[str, ...], dict[str, int]] | None = None) -> Source:
    """`folders`: class names and name -> number, where training examples lie in class folders and only `what` is a list."""
    refuse_absent(task, what, data_root)
    lists, unknown, label_file = read_lists(task, what, data_root)
    labelled, owners = one_label_per_row(lists) if task.multilabel else (lists, None)
    texts = [text for rows in labelled for text in rows.labels]

    if folders or label_file:
        labels, lookup = folders or read_labels(label_file)
        if is_numeric(texts) and not is_numeric(labels):
            lookup = None
    else:
        train = texts
        if split == "val" and what != task.train and not (task.classes and is_numeric(texts)):
            if not task.train:
                raise UserError(f"the classes of {what} are unknown: set labels to a file with one class name per line (or classes, for numbers)")
            others = read_lists(task, task.train, data_root)[0]
            train = [text for rows in (one_label_per_row(others)[0] if task.multilabel else others) for text in rows.labels]
        labels, lookup = labels_of(train, task.classes)

    problems = []
    if task.classes and task.classes != len(labels):
        where = "train has" if folders else f"{label_file} has" if label_file else "the training list has"
        advice = "correct classes" if label_file else "correct classes, or give all names in their order in a file named by labels"
        problems.append(f"classes={task.classes}, but {where} {len(labels)} class names: {advice}")
    targets, faults = number_labels(labelled, labels, lookup)
    problems += faults

    paths, absent, notes = [], list(unknown), []
    if unknown:
        message = f"{len(unknown)} of {len(unknown) + len(texts)} ids of {what} are not in {task.labels}: {some(unknown)}"
        if len(unknown) > len(texts):
            problems.append(f"{message}. More than half is unknown: set labels to Kinetics-400's own lists")
        else:
            notes.append(message)
    if not labels:
        problems = problems or [f"{what}: no line has a label; write `path,label|label`, or name a file of the classes by labels"]
    several = [text for text in texts if "|" in text and not (label_file and lookup and text in lookup)]
    if several:
        (problems if faults else notes).append(f"{several[0]!r} counts as one label: if it is meant as several, set multilabel=True")
    for rows in lists:
        root = data_root / Path(task.root).expanduser() if task.root else rows.file.parent
        try:
            found = locate(rows, str(root), task.media)
        except UserError as error:
            problems += error.lines
            continue
        bound = root if task.root else data_root if data_root != Path(".") else None
        if bound and not task.allow_outside and (outside := [path for path in found if path and is_outside(path, str(bound))]):
            count = f"{len(outside)} of {len(found)} files of {rows.file}"
            problems.append(f"{count} lie outside {bound}: {some(outside)}. Correct the list, or set allow_outside=True")
        missing = [key for key, path in zip(rows.keys, found, strict=True) if not path]
        if missing and (line := wrong_separator(rows)):
            problems = [problem for problem in problems if not problem.startswith(str(rows.file))] + [line]
            continue
        message = f"{len(missing)} of {len(found)} files of {rows.file} are not in {root}: {some(missing)}"
        if missing and rows.layout not in INCOMPLETE:
            windows = any(re.match(r"[A-Za-z]:[\\/]", key) for key in missing)
            problems.append(f"{message}. {'Write paths relative to root: these are of Windows' if windows else 'Correct root or the list'}")
        elif 2 * len(missing) > len(found):
            problems.append(f"{message}. More than half is missing: set root to the folder that holds the files")
        elif missing:
            notes.append(message)
        paths += found
        absent += missing
    if problems:
        raise UserError(*problems)

    if task.multilabel:
        paths, targets = one_row_per_file(paths, owners, targets, len(labels))
        return Source(task.media, labels, FileRecords(paths, targets), f"csv {what}", len(set(absent)), notes)
    keep = np.array([bool(path) for path in paths], bool)
    paths, targets = [path for path in paths if path], targets[keep]
    return Source(task.media, labels, FileRecords(paths, targets), f"csv {what}", len(absent), notes + repeats(paths, targets))


def refuse_absent(task: ConfigDict, what: str, data_root: Path) -> None:
    """Raises UserError if a list, the root or a label file is not there; one line for each that is not."""
    problems = []
    try:
        list_files(what, data_root)
    except UserError as error:
        problems += error.lines
    root = data_root / Path(task.root).expanduser()
    if task.root and not root.is_dir():
        problems.append(f"root {root} is not a folder: set root to the folder that the paths of {what} start from")
    problems += [f"labels: {file} can't be read (no such file): correct the path, or data_root" for file in absent_labels(task, data_root)]
    if problems:
        raise UserError(*problems)


def absent_labels(task: ConfigDict, data_root: Path) -> list[Path]:
    return [file for file in name_files(task.labels, data_root) if not file.is_file()] if task.labels else []


def read_lists(task: ConfigDict, what: str, data_root: Path) -> tuple[list[Rows], list[str], Path | None]:
    """Reads list files.

    Returns:
      The lists; the YouTube ids in them whose class is unknown; the file of class names, None if the training labels themselves are all there is.
    """
    lists = [read_list(file) for file in list_files(what, data_root)]
    if all(rows.layout != "youtube" for rows in lists):
        label_file = name_files(task.labels, data_root)[0] if task.labels else published_labels(lists[0])
        return lists, [], label_file
    kinetics = [read_list(file) for file in list_files(task.labels, data_root)] if task.labels else []
    if not kinetics or any(rows.layout != "kinetics" for rows in kinetics):
        where = "kinetics400/train.csv,kinetics400/validate.csv"
        raise UserError(f"{what} holds YouTube ids without classes: set labels to the lists that have them, as in labels='{where}'")
    joined = [add_kinetics(rows, kinetics) for rows in lists]
    return [rows for rows, _ in joined], [key for _, unknown in joined for key in unknown], None


# folder: one folder per class, on disk or in a zip -------------------------------------------------------------------------------------------


def open_folder(task: ConfigDict, what: str, split: str, data_root: Path) -> Source:
    """`what` names class folders or, as `val` of such a training set, may name a list (ImageNet's and Tiny-ImageNet's validation files lie flat)."""
    path = data_root / Path(what).expanduser()
    problems = [] if path.exists() else [f"{path} does not exist: correct the path, or data_root"]
    problems += [f"labels: {file} can't be read (no such file): correct the path, or data_root" for file in absent_labels(task, data_root)]
    if problems:
        raise UserError(*problems)
    if split == "val" and path.suffix.lower() in (".csv", ".txt") and path.is_file():
        return open_csv(task, what, split, data_root, read_classes(task, data_root))
    entries, infos = list_folder(path)
    base, classes, files = find_classes(entries, task.media)
    if not files:
        other = "image" if task.media == "video" else "video"
        hint = f"put the {task.media}s of each class into a folder of its own"
        if find_classes(entries, other)[2]:
            hint = f"it has {other}s: set media={other}"
        elif split == "val" and task.val and task.train and any(has_extension(entry, task.media) for entry in entries):
            hint += ", or set val to the list of their classes and root to this folder"
        if path.resolve() == Path.cwd():
            hint += "; or is another folder meant? Then set data_root"
        raise UserError(f"{path} has no class folders with {task.media}s: {hint}")
    if len(classes) > 1 and {plain_name(name) for name in classes} <= {"train", "training", "val", "valid", "validation", "test", "testing"}:
        raise UserError(f"{path} has a folder per split ({', '.join(classes)}), not per class: set train and val to one of them each")

    labels, lookup = read_classes(task, data_root, classes if split == "train" or what == task.train or not task.train else None)
    problems = []
    if task.classes and task.classes != len(labels):
        problems.append(f"classes={task.classes}, but there are {len(labels)} classes: correct one of them")
    number = {name: lookup.get(name, lookup.get(plain_name(name), -1)) for name in classes}
    strange = [name for name in classes if number[name] < 0]
    if strange:
        problems.append(f"{path}: folders {some(strange)} are not among the {len(labels)} classes ({some(labels)}): rename or remove them")
    if problems:
        raise UserError(*problems)

    targets = np.array([number[file[len(base) :].split("/", 1)[0]] for file in files], np.int32)
    beside = sum(1 for entry in entries if has_extension(entry, task.media)) - len(files)
    warnings = [f"{path}: {beside} {task.media}s outside the class folders are left out"] if beside else []
    if infos is None:
        records = FileRecords([os.path.join(path, file) for file in files], targets)
    else:
        records = ZipRecords(str(path), files, targets, np.array([infos[file] for file in files], np.int64))
    return Source(task.media, tuple(labels), records, f"folder {what}", warnings=warnings)


def read_classes(task: ConfigDict, data_root: Path, folders: tuple[str, ...] | None = None) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names and name -> number of a training set in class folders (listed here if not given): those of `labels`, or the folders, sorted.

    A file of WordNet's names (words.txt), which has more classes than the dataset, names the folders without ordering them.
    """
    label_file = data_root / Path(task.labels).expanduser() if task.labels else None
    words = read_wordnet(label_file) if label_file else {}
    if words is None:
        return read_labels(label_file)
    if folders is None:
        folders = find_classes(list_folder(data_root / Path(task.train).expanduser())[0], task.media)[1]
    return tuple(words.get(name, name) for name in folders), {name: number for number, name in enumerate(folders)}


def list_folder(path: Path) -> tuple[list[str], dict[str, tuple[int, int, int, int]] | None]:
    """What a folder or zip holds, sorted, folders with a final "/"; for a zip also where each member lies (see `list_archive`)."""
    if path.is_dir():
        return sorted(walk(str(path))), None
    if not path.exists():
        raise UserError(f"{path} does not exist: correct the path, or data_root")
    infos = list_archive(path)
    parents = {"/".join(parts[:end]) + "/" for parts in {tuple(name.split("/")[:-1]) for name in infos} for end in range(1, len(parts) + 1)}
    return sorted(parents | set(infos)), infos


def find_classes(entries: list[str], media: str) -> tuple[str, tuple[str, ...], list[str]]:
    """Finds the level of the class folders: the top, or inside a single folder that holds nothing but folders.

    Returns that level's path ("" or ending in "/"), its folders' names, sorted, and all files of the medium inside them.
    """
    base = ""
    while True:
        inside = [entry[len(base) :] for entry in entries if entry.startswith(base) and entry != base]
        classes = sorted(entry[:-1] for entry in inside if entry.endswith("/") and entry.count("/") == 1)
        top_files = any("/" not in entry and has_extension(entry, media) for entry in inside)
        holds_folders = len(classes) == 1 and any(entry.count("/") == 2 and entry.endswith("/") for entry in inside)
        holds_files = len(classes) == 1 and any(entry.count("/") == 1 and has_extension(entry, media) for entry in inside)
        if top_files or not holds_folders or holds_files:
            return base, tuple(classes), [base + entry for entry in inside if "/" in entry and has_extension(entry, media)]
        base += classes[0] + "/"


# smarthome, tfds, packed and demo -----------------------------------------------------------------------------------------------------------


def open_smarthome(task: ConfigDict, what: str, split: str, data_root: Path) -> Source:
    """`what` is `PROTOCOL:PART`, a key of `smarthome.SPLITS`; the clips lie below `root`. Classes are numbered in alphabetical order."""
    if what not in SPLITS:
        raise UserError(f"Toyota Smarthome has no {what!r}; choose one of {', '.join(SPLITS)}")
    labels = tuple(sorted(SPLITS[what][2]))
    if task.classes and task.classes != len(labels):
        raise UserError(f"classes={task.classes}, but {what.partition(':')[0]} has {len(labels)}")
    paths, names, notes = find_clips(str(data_root / Path(task.root).expanduser()), what, task.media)
    targets = np.array([labels.index(name) for name in names], np.int32)
    return Source(task.media, labels, FileRecords(paths, targets), f"smarthome {what}", warnings=notes)


def open_tfds(task: ConfigDict, what: str, split: str, data_root: Path) -> Source:
    """`what` is `name[/config][:version]:split`; the dataset must lie prepared as array_record files, which are read without TensorFlow."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError("source=tfds needs TensorFlow Datasets: pip install tensorflow-datasets importlib_resources") from None
    match = re.fullmatch(r"([^:]+(?::[\d.*]+)?):([A-Za-z].*)", what)
    if not match:
        raise UserError(f"{what!r}: write name:split, for example cifar100:train or imagenet2012:train[:90%]")
    name, part = match.groups()
    if task.fold:
        raise UserError(f"fold is not for tfds: use its own notation, train='{name}:train[:90%]' and val='{name}:train[90%:]'")
    data_dir = str(data_root / Path(task.root).expanduser()) if task.root else None if str(data_root) == "." else str(data_root)
    settings = f"{name!r}{f', data_dir={data_dir!r}' if data_dir else ''}, file_format='array_record'"
    command = f'python -c "import tensorflow_datasets as t; t.builder({settings}).download_and_prepare()"'
    advice = f"prepare it once with: {command} (if that asks for TensorFlow: pip install tensorflow-cpu; training does without)"
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.registered.DatasetNotFoundError, ValueError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"TFDS can't open {name!r}: {reason} Correct the name, or set root to the data_dir that holds it prepared") from None
    if not builder.info.splits:
        raise UserError(f"{name} is not prepared in {builder.data_path}: {advice}")

    builder = tfds.builder_from_directory(builder.data_path)  # without the builder's own class, worker processes can unpickle it
    features = dict(builder.info.features.items())
    label = "label" if "label" in features else next((key for key in features if isinstance(features[key], tfds.features.ClassLabel)), None)
    wanted = (tfds.features.Image,) if task.media == "image" else (tfds.features.Scalar, tfds.features.Text)
    content = task.media if task.media in features else next((key for key in features if isinstance(features[key], tfds.features.Image)), None)
    if content is None or type(features[content]) not in wanted or not isinstance(features.get(label), tfds.features.ClassLabel):
        raise UserError(f"{name} has no {task.media} (encoded) with a class label among its features {', '.join(features)}")
    labels = tuple(features[label].names)
    if task.classes and task.classes != len(labels):
        raise UserError(f"classes={task.classes}, but {name} has {len(labels)} classes")
    decoders = {content: tfds.decode.SkipDecoding()} if task.media == "image" else None
    try:
        records = builder.as_data_source(split=part, decoders=decoders)
    except NotImplementedError:
        raise UserError(f"{name} lies in {builder.data_path} in a format without random access: remove it, then {advice}") from None
    except ValueError as error:
        raise UserError(f"{what}: {str(error).splitlines()[0]}; its splits are {', '.join(builder.info.splits)}") from None
    return Source(task.media, labels, TfdsRecords(records, content, label, what), f"tfds {what}")


def open_pack(task: ConfigDict, what: str, split: str, data_root: Path) -> Source:
    """`what` is `FOLDER[:split]` or `URL[:split]`, by default the split that is asked for. Paths, labels and their number lie in it."""
    folder, part = name_split(what)
    part = part or ("val" if split == "val" and task.val else "train")  # a fold's "val" is held out of train
    manifest, records = open_packed(folder if is_url(folder) else str(data_root / Path(folder).expanduser()), part)
    labels, media = tuple(manifest["labels"]), manifest["media"]
    problems = []
    if task.media != media:
        problems.append(f"{folder} holds {media}s: set media={media}")
    if task.classes and task.classes != len(labels):
        problems.append(f"classes={task.classes}, but {folder} has {len(labels)} classes")
    if task.multilabel != manifest["multilabel"]:
        problems.append(f"multilabel={task.multilabel}, but {folder} was packed with multilabel={manifest['multilabel']}: set it so")
    if problems:
        raise UserError(*problems)
    return Source(media, labels, records, f"packed {folder}:{part}", manifest["splits"][part]["missing"])


def open_demo(task: ConfigDict, what: str, split: str, data_root: Path) -> Source:
    """`what` is `digits|appearance|motion:train|test` of the embedded dataset, opened as anyone's folder or list of files."""
    places = {f"digits:{part}": f"digits/{part}" for part in ("train", "test")}
    places |= {f"{name}:{part}": f"{name}/{part}.csv" for name in ("appearance", "motion") for part in ("train", "test")}
    for wanted in (what, task.train):
        if wanted and wanted not in places:
            raise UserError(f"the embedded dataset has no {wanted!r}; choose one of {', '.join(places)}")
    name = what.split(":")[0]
    folder = demo_folder(str(data_root / Path(task.root).expanduser()) if task.root else "")
    local = task.copy_and_resolve_references()
    with local.unlocked():
        local.root, local.train = "", places.get(task.train, "")
        local.labels = "" if name == "digits" else f"{name}/labels.txt"
    source = (open_folder if name == "digits" else open_csv)(local, places[what], split, folder)
    source.origin = f"demo {what}"
    return source


KINDS = {"csv": open_csv, "folder": open_folder, "smarthome": open_smarthome, "tfds": open_tfds, "packed": open_pack, "demo": open_demo}
