"""Sources: what a task's `source`, `train` and `val` name, as a random-access list of (file or bytes, label). Nothing is decoded here.

Kinds: `csv` (lists of `path label`, and Kinetics, Something-Something and Moments in Time as published), `folder` (a folder or zip with one
folder per class), `tfds` (a dataset prepared by TensorFlow Datasets) and `demo` (the embedded dataset). All of a list's faults are reported together.
"""

import csv
import functools
import json
import os
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from vidjoint.data.demo import demo_folder
from vidjoint.data.video import DecodeError
from vidjoint.errors import UserError

EXTENSIONS = {
    "video": frozenset(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .flv .3gp .wmv .ogv .vob .gif".split()),
    "image": frozenset(".jpg .jpeg .png .webp .bmp .tif .tiff .ppm .pgm .gif .avif .jp2".split()),
}
SHOWN = 5  # faults of one kind that are named; the others are counted


@dataclass(repr=False, eq=False)
class Source:
    """Examples of one split of one task, by number. Cheap to index, small in memory, picklable.

    `source[i]` is {"video" | "image": path or encoded bytes, "label": int in 0..C-1, "name": str for logs}.
    Reading a damaged member of a zip raises DecodeError.
    """

    media: str  # video or image: the key of an example's content
    labels: tuple[str, ...]  # C class names; "0", "1", .. where only numbers are known
    records: "FileRecords | ZipRecords | TfdsRecords"  # records[i] -> (path or bytes, label, name)
    origin: str  # where it came from, for logs
    missing: int = 0  # files that a published list names and that this copy lacks
    warnings: list[str] = field(default_factory=list)  # oddities that stop nobody; the caller logs them

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        if not -len(self) <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        content, label, name = self.records[int(i) % len(self)]
        return {self.media: content, "label": label, "name": name}

    def name(self, i: int) -> str:
        """The name of example i for logs, without reading it."""
        return self.records.name(i)

    def __repr__(self) -> str:
        lacks = f", {self.missing} missing" if self.missing else ""
        return f"Source({self.origin}: {len(self)} {self.media}s, {len(self.labels)} classes{lacks})"


class Names(Sequence):
    """Strings packed into one bytes object (a million paths in some 40 MB, pickled at once), less the beginning that all share."""

    def __init__(self, names: Sequence[str]):
        self._prefix = os.path.commonprefix(names)  # noqa: RUF071 - characters, not folders, are what is wanted
        packed = [name[len(self._prefix) :].encode("utf-8", "surrogateescape") for name in names]
        self._ends = np.cumsum([0, *map(len, packed)], dtype=np.int64)
        self._text = b"".join(packed)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        i = range(len(self))[i]
        return self._prefix + self._text[self._ends[i] : self._ends[i + 1]].decode("utf-8", "surrogateescape")


class FileRecords:
    """Files on disk: the content of an example is its path."""

    def __init__(self, paths: Sequence[str], targets: np.ndarray):
        self.names = Names(paths)
        self.targets = np.asarray(targets, np.int32)  # [N]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[str, int, str]:
        name = self.names[i]
        return name, int(self.targets[i]), name

    def name(self, i: int) -> str:
        return self.names[i]

    def select(self, rows: np.ndarray) -> "FileRecords":
        return FileRecords([self.names[i] for i in rows], self.targets[rows])


class ZipRecords:
    """Members of a zip file: the content of an example is its bytes, read at their offset, so that any threads and processes may read at once."""

    def __init__(self, archive: str, members: Sequence[str], targets: np.ndarray, where: np.ndarray):
        self.archive = archive
        self.names = Names(members)
        self.targets = np.asarray(targets, np.int32)  # [N]
        self.where = where  # int64[N, 4]: offset of the local header, packed size, compression method, CRC-32

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[bytes, int, str]:
        return read_member(self.archive, *map(int, self.where[i])), int(self.targets[i]), self.name(i)

    def name(self, i: int) -> str:
        return f"{self.archive}/{self.names[i]}"

    def select(self, rows: np.ndarray) -> "ZipRecords":
        return ZipRecords(self.archive, [self.names[i] for i in rows], self.targets[rows], self.where[rows])


class TfdsRecords:
    """Records of a prepared TFDS split: the content of an example is its encoded bytes."""

    def __init__(self, records: Sequence[dict], content: str, label: str, origin: str):
        self.records, self.content, self.label, self.origin = records, content, label, origin

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[bytes, int, str]:
        record = self.records[i]
        return bytes(record[self.content]), int(record[self.label]), self.name(i)

    def name(self, i: int) -> str:
        return f"{self.origin}[{i}]"


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
        if parts:
            source = hold_out(source, part, parts, split)
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

    Examples are dealt out in turn, class after class, each in its order: every part has its share of every class, within one example.
    """
    by_class = np.argsort(source.records.targets, kind="stable")
    dealt = np.empty(len(source), np.int64)
    dealt[by_class] = np.arange(len(source)) % parts + 1
    rows = np.flatnonzero((dealt == part) == (split == "val"))
    if not len(rows):
        raise UserError(f"fold {part}/{parts} leaves no examples: there are only {len(source)}")
    origin = f"{source.origin} {'fold' if split == 'val' else 'without fold'} {part}/{parts}"
    return Source(source.media, source.labels, source.records.select(rows), origin, source.missing, source.warnings)


def empty_classes(labels: tuple[str, ...], targets: np.ndarray) -> list[str]:
    """Warns of classes without examples."""
    absent = [labels[c] for c in np.flatnonzero(np.bincount(targets, minlength=len(labels)) == 0)]
    return [f"{len(absent)} of {len(labels)} classes have no examples: {some(absent)}"] if absent else []


def some(items: Iterable) -> str:
    """The first few of many, with the number of the others."""
    items = list(items)
    return ", ".join(map(str, items[:SHOWN])) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")


def has_extension(path: str, media: str) -> bool:
    return os.path.splitext(path)[1].lower() in EXTENSIONS[media]


# csv: lists of files -------------------------------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """The lines of one list. For published layouts a key is what the list calls the file: its name without extension, or its path in the release."""

    file: Path
    layout: str  # plain, kinetics, something or moments
    keys: list[str]
    labels: list[str]  # as written; "" where a line has none
    lines: Sequence[int]  # line (or JSON entry) numbers, from 1


def open_csv(task: ConfigDict, what: str, split: str, data_root: Path) -> Source:
    lists = [read_list(file) for file in list_files(what, data_root)]
    texts = [text for rows in lists for text in rows.labels]
    label_file = data_root / Path(task.labels).expanduser() if task.labels else published_labels(lists[0])

    if label_file:
        labels, lookup = read_labels(label_file)
        if is_numeric(texts) and not is_numeric(labels):
            lookup = None
    else:
        train = texts
        if split == "val" and what != task.train and not (task.classes and is_numeric(texts)):
            if not task.train:
                raise UserError(f"the classes of {what} are unknown: set labels to a file with one class name per line (or classes, for numbers)")
            train = [text for file in list_files(task.train, data_root) for text in read_list(file).labels]
        labels, lookup = labels_of(train, task.classes)

    problems = []
    if task.classes and task.classes != len(labels):
        where = f"{label_file} has" if label_file else "the training list has"
        advice = "correct classes" if label_file else "correct classes, or give all names in their order in a file named by labels"
        problems.append(f"classes={task.classes}, but {where} {len(labels)} class names: {advice}")
    targets, faults = number_labels(lists, labels, lookup)
    problems += faults

    paths, absent, notes = [], [], []
    for rows in lists:
        root = data_root / Path(task.root).expanduser() if task.root else rows.file.parent
        try:
            found = locate(rows, str(root), task.media)
        except UserError as error:
            problems += error.lines
            continue
        missing = [key for key, path in zip(rows.keys, found, strict=True) if not path]
        message = f"{len(missing)} of {len(found)} files of {rows.file} are not in {root}: {some(missing)}"
        if missing and rows.layout == "plain":
            problems.append(f"{message}. Correct root or the list")
        elif 2 * len(missing) > len(found):
            problems.append(f"{message}. More than half is missing: set root to the folder that holds the files")
        elif missing:
            notes.append(message)
        paths += found
        absent += missing
    if problems:
        raise UserError(*problems)

    if split == "train" and lookup is None and targets.min() == 1:
        notes.append(f"labels run from 1 to {targets.max()}, so class 0 is empty: numbers should start at 0")
    keep = np.array([bool(path) for path in paths], bool)
    paths = [path for path in paths if path]
    repeated = len(paths) - len(set(paths))
    if repeated:
        notes.append(f"{repeated} lines name a file that an earlier line names too")
    return Source(task.media, labels, FileRecords(paths, targets[keep]), f"csv {what}", len(absent), notes)


def list_files(what: str, data_root: Path) -> list[Path]:
    """The list files that a comma-separated `what` names."""
    whole = data_root / Path(what).expanduser()
    files = [whole] if whole.exists() else [data_root / Path(part.strip()).expanduser() for part in what.split(",") if part.strip()]
    problems = [f"{file} does not exist: correct the path, or data_root" for file in files if not file.exists()]
    problems += [f"{file} is a folder: name a list in it, or set source=folder if it has one folder per class" for file in files if file.is_dir()]
    if problems or not files:
        raise UserError(*problems or [f"{what!r} names no file"])
    return files


def read_list(file: Path) -> Rows:
    """Reads a list in whatever layout it has.

    Raises:
      UserError: the file is no text, no list that is known, has lines that can't be read (numbers given), or none at all.
    """
    rows = read_known(file)
    if not rows.keys:
        raise UserError(f"{file} has no lines after its header")
    return rows


def read_known(file: Path) -> Rows:
    raw = file.read_bytes()
    if b"\0" in raw[:10000]:
        raise UserError(f"{file} is not UTF-8 text: save it as UTF-8, one `path,label` a line")
    text = raw.decode("utf-8-sig", "surrogateescape")
    if file.suffix.lower() == ".json":
        return read_something(file, text)
    lines = [(number, stripped) for number, line in enumerate(text.split("\n"), 1) if (stripped := line.strip())]
    if not lines:
        raise UserError(f"{file} is empty: it needs one `path,label` a line")
    header = [word.strip().lower() for word in split_line(lines[0][1], ",")]
    if {"youtube_id", "time_start", "time_end"} <= set(header):
        return read_kinetics(file, lines[1:], header)
    if all(is_moments(split_line(line, ",")) for _, line in lines[:20]):
        return read_moments(file, lines)
    return read_plain(file, lines)


def split_line(line: str, separator: str) -> list[str]:
    """The fields of one line; a quote that is never closed stays within its line."""
    if '"' not in line:
        return line.split(separator)
    return next(csv.reader([line], delimiter=separator, skipinitialspace=separator != " "))


def path_and_label(line: str, separator: str) -> tuple[str, str]:
    """Label = last field; path = all before it, with the separators that it may contain."""
    if '"' not in line:
        path, found, label = line.rpartition(separator)
        return (path.strip(), label.strip()) if found else (line.strip(), "")
    fields = split_line(line, separator)
    return (separator.join(fields[:-1]).strip(), fields[-1].strip()) if len(fields) > 1 else (line.strip().strip('"'), "")


def is_media(path: str) -> bool:
    return has_extension(path, "video") or has_extension(path, "image")


def is_integer(text: str) -> bool:
    return bool(re.fullmatch(r"[+-]?[0-9]+", text))


def is_numeric(texts: Iterable[str]) -> bool:
    """Whether labels are meant as numbers: most of them are."""
    counts = Counter(texts)
    return 2 * sum(count for text, count in counts.items() if is_integer(text)) > counts.total()


def find_separator(sample: list[str]) -> str:
    """The separator that leaves file names in front of it and labels (rather numbers) behind it on most lines; "" if lines hold only paths."""

    def score(separator):
        pairs = [path_and_label(line, separator) for line in sample]
        labels = [label for _, label in pairs if label]
        return sum(is_media(path) for path, label in pairs if label), sum(map(is_integer, labels)), len(labels)

    scores = {separator: score(separator) for separator in SEPARATORS}
    if sum(is_media(line.strip('"')) for line in sample) > max(named for named, _, _ in scores.values()):
        return ""
    return max(scores, key=scores.get)  # the first of equals


SEPARATORS = ("\t", ";", ",", " ")
PATH_WORDS = frozenset("path file filename file_name filepath file_path video video_path video_name image image_path clip clip_path name".split())
LABEL_WORDS = frozenset("label labels class classes class_name class_id category target label_id action".split())


def find_header(line: str) -> tuple[str, list[str], int, int] | None:
    """Separator, columns, and positions of path and label of a header in words that are known; None if the line is no such header."""
    for separator in SEPARATORS:
        columns = [word.strip().lower() for word in split_line(line, separator)]
        path = next((i for i, word in enumerate(columns) if word in PATH_WORDS), None)
        label = next((i for i, word in enumerate(columns) if word in LABEL_WORDS), None)
        if path is not None and label is not None and not any(map(is_media, columns)):
            return separator, columns, path, label
    return None


def read_plain(file: Path, lines: list[tuple[int, str]]) -> Rows:
    header = find_header(lines[0][1])
    if header and (len(header[1]) > 2 or header[2] > 0):
        separator, columns, path, label = header
        lines = lines[1:]
        fields = [split_line(line, separator) for _, line in lines]
        uneven = [number for (number, _), values in zip(lines, fields, strict=True) if len(values) != len(columns)]
        if uneven:
            raise UserError(f"{file} line {some(uneven)}: not {len(columns)} columns as in the header: put quotes around paths that hold separators")
        pairs = [(values[path].strip(), values[label].strip()) for values in fields]
    else:
        sample = [line for _, line in lines[1:1001]] or [lines[0][1]]
        separator = header[0] if header else find_separator(sample)
        if header or is_header(lines[0][1], separator, sample):
            lines = lines[1:]
        pairs = [path_and_label(line, separator) if separator else (line.strip('"'), "") for _, line in lines]
    return Rows(file, "plain", [path for path, _ in pairs], [label for _, label in pairs], [number for number, _ in lines])


def is_header(line: str, separator: str, sample: list[str]) -> bool:
    """Whether a first line is a header in unknown words: it names no file and has no number where the lines after it have numbers."""
    if not separator or line is sample[0]:
        return False
    path, label = path_and_label(line, separator)
    return not is_media(path) and not is_integer(label) and is_numeric([path_and_label(other, separator)[1] for other in sample])


def read_kinetics(file: Path, lines: list[tuple[int, str]], header: list[str]) -> Rows:
    """Kinetics as published: columns label, youtube_id, time_start, time_end (seconds), split."""
    if "label" not in header:
        raise UserError(f"{file} has no column label: Kinetics' test list has no labels; use the train and validation lists")
    columns = [header.index(word) for word in ("label", "youtube_id", "time_start", "time_end")]
    keys, labels, bad = [], [], []
    for number, line in lines:
        try:
            fields = split_line(line, ",")
            label, video, start, end = (fields[column].strip() for column in columns)
            keys.append(f"{video}_{int(float(start)):06d}_{int(float(end)):06d}")
            labels.append(label)
        except (IndexError, ValueError, OverflowError):
            bad.append(number)
    if bad:
        raise UserError(f"{file} line {some(bad)}: not label,youtube_id,time_start,time_end")
    return Rows(file, "kinetics", keys, labels, [number for number, _ in lines])


def is_moments(fields: list[str]) -> bool:
    return len(fields) == 4 and has_extension(fields[0], "video") and not is_integer(fields[1]) and is_integer(fields[2]) and is_integer(fields[3])


def read_moments(file: Path, lines: list[tuple[int, str]]) -> Rows:
    """Moments in Time as published: file, class, number of annotators who agree, number who disagree."""
    fields = [split_line(line, ",") for _, line in lines]
    bad = [number for (number, _), values in zip(lines, fields, strict=True) if not is_moments(values)]
    if bad:
        raise UserError(f"{file} line {some(bad)}: not file,class,votes,votes as in the lines before")
    return Rows(file, "moments", [values[0] for values in fields], [values[1] for values in fields], [number for number, _ in lines])


def read_something(file: Path, text: str) -> Rows:
    """Something-Something v2 as published: a JSON list of {"id", "label", "template"}; the class is the template without its brackets."""
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    known = isinstance(entries, list) and entries and all(isinstance(entry, dict) and "id" in entry for entry in entries)
    if not known:
        raise UserError(f'{file}: not Something-Something\'s list of {{"id", "label", "template"}}; other lists are text, one `path,label` a line')
    bad = [number for number, entry in enumerate(entries, 1) if not isinstance(entry.get("template"), str)]
    if bad:
        raise UserError(f"{file} entry {some(bad)}: no template (the test list has no labels): use the train and validation lists")
    keys = [str(entry["id"]) for entry in entries]
    return Rows(file, "something", keys, [re.sub(r"[\[\]]", "", entry["template"]) for entry in entries], range(1, len(keys) + 1))


# Labels --------------------------------------------------------------------------------------------------------------------------------------


def published_labels(rows: Rows) -> Path | None:
    """The label file that comes with a published list and lies beside it, if any."""
    names = {"something": ("labels.json", "something-something-v2-labels.json"), "moments": ("moments_categories.txt",)}
    return next((rows.file.parent / name for name in names.get(rows.layout, ()) if (rows.file.parent / name).exists()), None)


def plain_name(name: str) -> str:
    """A class name as folders and lists spell it alike: underscores for spaces, any case, no brackets."""
    return re.sub(r"[\s_]+", " ", re.sub(r"[\[\]]", "", name)).strip().casefold()


def read_labels(file: Path) -> tuple[tuple[str, ...], dict[str, int]]:
    """Reads class names and name -> class number from a label file.

    Known: one name per line; lines `name,number` (Moments in Time) or `number name`, numbered from 0 or 1; JSON lists; JSON {name: number}
    (Something-Something) and {number: name or [names]} (ImageNet). A name that two classes share (published lists have some) stands for neither.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
        names = json_names(json.loads(text)) if file.suffix.lower() == ".json" else text_names(text)
    except OSError as error:
        raise UserError(f"labels: {file} can't be read ({error.strerror}): correct the path, or data_root") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"labels: {file} is no list of class names ({error}): write one name per line") from None
    lookup, ambiguous = {}, set()
    for number, aliases in enumerate(names):
        for alias in {*aliases, *map(plain_name, aliases)}:
            if lookup.setdefault(alias, number) != number:
                ambiguous.add(alias)
    return tuple(aliases[-1] for aliases in names), {alias: number for alias, number in lookup.items() if alias not in ambiguous}


def text_names(text: str) -> list[list[str]]:
    """The names on the lines of a text file, each as [name]."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("it is empty")
    for body in (lines, lines[1:]):
        for pattern in (r"(?P<name>.*\S)\s*,\s*(?P<number>\d+)", r"(?P<number>\d+)[\s,]+(?P<name>.+)"):
            matches = [re.fullmatch(pattern, line) for line in body]
            if matches and all(matches):
                numbers = [int(match["number"]) for match in matches]
                if sorted(numbers) in (list(range(len(body))), list(range(1, len(body) + 1))):
                    return [[match["name"].strip('"')] for _, match in sorted(zip(numbers, matches, strict=True), key=lambda pair: pair[0])]
    return [[line] for line in lines]


def json_names(content: list | dict) -> list[list[str]]:
    """The names in a JSON label file, each with its aliases, ordered by class number."""
    if isinstance(content, list):
        return [[str(name)] for name in content]
    by_name = {int(value): [str(key)] for key, value in content.items()} if all(is_integer(str(value)) for value in content.values()) else None
    by_number = by_name or {int(key): [str(name) for name in (value if isinstance(value, list) else [value])] for key, value in content.items()}
    if sorted(by_number) != list(range(len(content))):
        raise ValueError(f"its numbers are not 0..{len(content) - 1}")
    return [by_number[number] for number in range(len(content))]


def labels_of(texts: list[str], classes: int) -> tuple[tuple[str, ...], dict[str, int] | None]:
    """Class names read off the training labels: sorted names, or "0".."C-1" (no lookup) where labels are numbers."""
    if is_numeric(texts):
        count = classes or max(int(text) for text in set(texts) if is_integer(text)) + 1
        return tuple(map(str, range(max(count, 0)))), None
    names = tuple(sorted(set(texts) - {""}))
    return names, {name: number for number, name in enumerate(names)}


def number_labels(lists: list[Rows], labels: tuple[str, ...], lookup: dict[str, int] | None) -> tuple[np.ndarray, list[str]]:
    """Turns labels as written into int32[N], by name or (lookup None) as numbers; the second value says what is wrong with them, by line."""
    texts = [text for rows in lists for text in rows.labels]
    none = -(2**63)
    if lookup is None:
        number = {text: int(text) if is_integer(text) and len(text) < 19 else none for text in set(texts)}
    else:
        number = {text: lookup[text] if text in lookup else lookup.get(plain_name(text), none) for text in set(texts)}
    values, problems = [], []
    for rows in lists:
        found = np.array([number[text] for text in rows.labels], np.int64)
        values.append(found)
        bad = np.flatnonzero((found < 0) | (found >= len(labels)))
        if len(bad) and lookup is None and found.min() == 1 and found.max() == len(labels):
            problems.append(f"{rows.file}: labels run from 1 to {len(labels)}; they must run from 0 to {len(labels) - 1}: subtract 1 from each")
            continue
        for row in bad[:SHOWN]:
            text = rows.labels[row]
            if not text:
                fault = "no label; write `path,label`"
            elif lookup is not None:
                fault = f"class {text!r} is not among the {len(labels)} known ones ({some(labels)})"
            elif found[row] == none:
                fault = f"label {text!r} is not a number, as others are"
            else:
                fault = f"label {text} is not in 0..{len(labels) - 1}"
            problems.append(f"{rows.file} line {rows.lines[row]}: {fault}")
        if len(bad) > SHOWN:
            problems.append(f"{rows.file}: {len(bad) - SHOWN} more lines with such labels")
    targets = np.concatenate(values)
    return np.where((targets < 0) | (targets >= len(labels)), -1, targets).astype(np.int32), problems


# Where the files are: one listing per folder, never a look at each file ----------------------------------------------------------------------


def locate(rows: Rows, root: str, media: str) -> list[str]:
    """The path of every row's file, "" where it is not there.

    Raises:
      UserError: the root folder is not there.
    """
    if not os.path.isdir(root):
        raise UserError(f"root {root} is not a folder: set root to the folder that the paths of {rows.file} start from")
    if rows.layout in ("kinetics", "something"):
        by_stem = {}
        for path in walk(root, depth=4):
            if has_extension(path, media):
                by_stem.setdefault(os.path.splitext(os.path.basename(path))[0], os.path.join(root, path))
        return [by_stem.get(key, "") for key in rows.keys]
    found = existing(root, rows.keys)
    if rows.layout == "moments":
        for folder in ("validation", "training") if "val" in rows.file.name.lower() else ("training", "validation"):
            if not all(found):
                elsewhere = existing(os.path.join(root, folder), rows.keys)
                found = [path or other for path, other in zip(found, elsewhere, strict=True)]
    return found


def existing(root: str, keys: list[str]) -> list[str]:
    """The keys' paths below root (a key may be absolute), with "" for those that are no file."""
    listings, found = {}, []
    for key in keys:
        leaf = key.rpartition("/")[2]
        folder = key[: len(key) - len(leaf)]
        if folder not in listings:
            path = os.path.join(root, folder)
            listings[folder] = path, files_in(path)
        path, names = listings[folder]
        found.append(path + leaf if leaf in names else "")
    absent = [i for i, path in enumerate(found) if not path]
    if len(absent) <= 1000:  # few enough to ask for: a file system may tell names apart less strictly than a set does
        for i in absent:
            path = os.path.join(root, keys[i])
            found[i] = path if os.path.isfile(path) else ""
    return found


def files_in(folder: str) -> frozenset[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return frozenset(entry.name for entry in entries if not entry.is_dir())
    except OSError:
        return frozenset()


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def walk(root: str, depth: int = 100) -> Iterator[str]:
    """Paths below root, relative to it, sorted within each folder, hidden ones left out; a folder comes before what it holds and ends in "/"."""
    try:
        with os.scandir(root) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries if not is_hidden(entry.name))
    except OSError as error:
        raise UserError(f"{root} can't be listed: {error.strerror}") from None
    for name, is_folder in found:
        if not is_folder:
            yield name
        elif depth > 1:
            yield f"{name}/"
            yield from (f"{name}/{below}" for below in walk(os.path.join(root, name), depth - 1))


# folder: one folder per class, on disk or in a zip -------------------------------------------------------------------------------------------


def open_folder(task: ConfigDict, what: str, split: str, data_root: Path) -> Source:
    path = data_root / Path(what).expanduser()
    entries, infos = list_folder(path)
    base, classes, files = find_classes(entries, task.media)
    if not files:
        other = "image" if task.media == "video" else "video"
        hint = f"put the {task.media}s of each class into a folder of its own"
        if find_classes(entries, other)[2]:
            hint = f"it has {other}s: set media={other}"
        raise UserError(f"{path} has no class folders with {task.media}s: {hint}")
    if len(classes) > 1 and {plain_name(name) for name in classes} <= {"train", "training", "val", "valid", "validation", "test", "testing"}:
        raise UserError(f"{path} has a folder per split ({', '.join(classes)}), not per class: set train and val to one of them each")

    if task.labels:
        labels, lookup = read_labels(data_root / Path(task.labels).expanduser())
    else:
        labels = classes
        if split == "val" and what != task.train and task.train:
            labels = find_classes(list_folder(data_root / Path(task.train).expanduser())[0], task.media)[1]
        lookup = {name: number for number, name in enumerate(labels)}
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


def list_folder(path: Path) -> tuple[list[str], dict[str, tuple[int, int, int, int]] | None]:
    """What a folder or zip holds, sorted, folders with a final "/"; for a zip also where each member lies (see ZipRecords)."""
    if path.is_dir():
        return sorted(walk(str(path))), None
    if not path.exists():
        raise UserError(f"{path} does not exist: correct the path, or data_root")
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if not any(map(is_hidden, info.filename.split("/")))]
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} is neither a folder nor a zip that can be read ({error})") from None
    if any(info.flag_bits & 1 for info in members):
        raise UserError(f"{path} is encrypted: unpack it and name the folder")
    if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in members):
        raise UserError(f"{path} is packed by a rare method: unpack it and name the folder, or pack it again with `zip -0 -r`")
    infos = {info.filename: (info.header_offset, info.compress_size, info.compress_type, info.CRC) for info in members}
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


@functools.lru_cache(maxsize=16)
def open_archive(path: str, process: int) -> int:
    """A file descriptor of this process; a forked child opens its own."""
    return os.open(path, os.O_RDONLY)


def read_member(archive: str, offset: int, size: int, method: int, crc: int) -> bytes:
    """Reads one member of a zip at its offset, without a shared file position.

    Raises:
      DecodeError: the member is damaged.
    """
    descriptor = open_archive(archive, os.getpid())
    header = os.pread(descriptor, 30, offset)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise DecodeError("the zip is damaged here: no member header")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start, packed = offset + 30 + name_length + extra_length, b""
    while len(packed) < size and (piece := os.pread(descriptor, size - len(packed), start + len(packed))):
        packed += piece
    try:
        content = zlib.decompress(packed, -zlib.MAX_WBITS) if method == zipfile.ZIP_DEFLATED else packed
    except zlib.error as error:
        raise DecodeError(f"the zip is damaged here: {error}") from None
    if zlib.crc32(content) != crc:
        raise DecodeError("the zip is damaged here: wrong checksum")
    return content


# tfds and demo -------------------------------------------------------------------------------------------------------------------------------


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


KINDS = {"csv": open_csv, "folder": open_folder, "tfds": open_tfds, "demo": open_demo}
