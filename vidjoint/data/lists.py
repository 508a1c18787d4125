"""Lists of files as people and data sets publish them, and where the listed files are on disk.

Layouts: plain (`path label`, `path label|label` or `path`, with any usual separator, with or without a header), and what is published with Kinetics,
mini-Kinetics, Something-Something v2, Moments in Time, UCF101, Tiny-ImageNet and ImageNet. Faults are told with the file and the line.
"""

import csv
import functools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vidjoint.data.files import existing, has_extension, is_media, shorten, some, walk
from vidjoint.errors import UserError

MOST_BYTES = 4 << 30  # of a list: some 40 million lines
csv.field_size_limit(1 << 30)  # a line is in memory already
WORDNET_ID = r"n\d{8}"  # ImageNet's name of a class


@dataclass
class Rows:
    """The lines of one list. For published layouts a key is what the list calls the file: its name without extension, or its path in the release."""

    file: Path
    layout: str  # plain, kinetics, youtube (mini-Kinetics), something, moments, ucf, tiny (Tiny-ImageNet) or imagenet
    keys: list[str]
    labels: list[str]  # as written; "" where a line has none
    lines: Sequence[int]  # line (or JSON entry) numbers, from 1


def name_files(what: str, data_root: Path) -> list[Path]:
    """The paths that a comma-separated `what` stands for (one path, if a file with such a name is there)."""
    whole = data_root / Path(what).expanduser()
    return [whole] if whole.exists() else [data_root / Path(part.strip()).expanduser() for part in what.split(",") if part.strip()]


def list_files(what: str, data_root: Path) -> list[Path]:
    """The list files that a comma-separated `what` names."""
    files = name_files(what, data_root)
    problems = [f"{file} does not exist: correct the path, or data_root" for file in files if not file.exists()]
    problems += [f"{file} is a folder: name a list in it, or set source=folder if it has one folder per class" for file in files if file.is_dir()]
    problems += [f"{file} is no file: name a list" for file in files if file.exists() and not (file.is_file() or file.is_dir())]
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
    try:
        if file.stat().st_size > MOST_BYTES:
            raise UserError(f"{file} has {file.stat().st_size / 2**30:.0f} GiB, too much for a list of files: name another")
        raw = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} can't be read ({error.strerror}): change its permissions, or name another") from None
    if b"\0" in raw:
        raise UserError(f"{file} is not UTF-8 text: save it as UTF-8, one `path,label` a line")
    text = raw.decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n").replace("\r", "\n")
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
    if header == ["imageid", "predictionstring"]:
        return read_pattern(file, lines[1:], "imagenet")
    for layout in ("ucf", "tiny"):
        # lists of UCF101 that number classes from 0 are other people's, with an order of their own
        if all(PATTERNS[layout][0].fullmatch(line) for _, line in lines[:20]) and not any(line.endswith(" 0") for _, line in lines):
            return read_pattern(file, lines, layout)
    if all(re.fullmatch(WORDNET_ID, line) for _, line in lines) or GROUND_TRUTH.fullmatch(file.name):
        return read_ground_truth(file, lines)
    if all(re.fullmatch(r"[\w-]{11}", line, re.ASCII) for _, line in lines):
        return Rows(file, "youtube", [line for _, line in lines], [""] * len(lines), [number for number, _ in lines])
    return read_plain(file, lines)


def split_line(line: str, separator: str) -> list[str]:
    """The fields of one line; a quote that is never closed stays within its line."""
    if '"' not in line:
        return line.split(separator)
    return next(csv.reader([line], delimiter=separator, skipinitialspace=separator != " "))


def split_lines(lines: list[tuple[int, str]]) -> list[list[str]]:
    """The fields of comma-separated lines, as `split_line` gives them, in a fraction of the time."""
    quotes = {line.count('"') % 2 if '"' in line else 2 for _, line in lines}  # 0: pairs, 1: one is never closed, 2: none
    rows = list(csv.reader([line for _, line in lines], skipinitialspace=True)) if 0 in quotes and 1 not in quotes else []
    return rows if len(rows) == len(lines) else [split_line(line, ",") for _, line in lines]


def path_and_label(line: str, separator: str) -> tuple[str, str]:
    """Label = last field; path = all before it, with the separators that it may contain."""
    if '"' not in line:
        path, found, label = line.rpartition(separator)
        return (path.strip(), label.strip()) if found else (line.strip(), "")
    fields = split_line(line, separator)
    return (separator.join(fields[:-1]).strip(), fields[-1].strip()) if len(fields) > 1 else (line.strip().strip('"'), "")


@functools.lru_cache(4096)  # votes, seconds and class numbers are few
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
        unlabelled = sum(is_media(path) for (path, label), line in zip(pairs, sample, strict=True) if line.endswith(separator))  # `path,`
        return sum(is_media(path) for path, label in pairs if label), sum(map(is_integer, labels)), len(labels), unlabelled

    scores = {separator: score(separator) for separator in SEPARATORS}
    if sum(is_media(line.strip('"')) for line in sample) > max(named for named, *_ in scores.values()):
        return ""
    return max(scores, key=scores.get)  # the first of equals


SEPARATORS = ("\t", ";", ",", " ")
PATH_WORDS = frozenset("path file filename file_name filepath file_path video video_path video_name image image_path clip clip_path name".split())
LABEL_WORDS = frozenset("label labels class classes class_name class_id category target label_id action".split())


def split_labels(text: str) -> list[str]:
    """The labels of a multilabel line, `a|b`; "" has none."""
    return [label for part in text.split("|") if (label := part.strip())]


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
    _, label = path_and_label(line, separator)
    labels = [text for other in sample for text in split_labels(path_and_label(other, separator)[1])]
    names_a_file = any(is_media(field) for other in SEPARATORS for field in split_line(line, other))
    return not names_a_file and not is_integer(label) and is_numeric(labels)


def wrong_separator(rows: Rows) -> str:
    """Says so where the lines of a list have labels behind a sign that separates nothing here, or behind which nothing follows; "" if they don't."""
    lines = [(number, key) for number, key, label in zip(rows.lines, rows.keys, rows.labels, strict=True) if not label]
    odd = [(number, key) for number, key in lines if re.fullmatch(r".*\.\w+\s*([^\w\s]\s*[^/\\]*\w|[,;]\s*\w+\s*[,;]+)", key) and not is_media(key)]
    if rows.layout != "plain" or 2 * len(odd) <= len(rows.keys):
        return ""
    number, key = odd[0]
    return f"{rows.file} line {number}: {shorten(key)!r} is no path and label: separate them by a comma, a semicolon, a tab or a space"


def read_kinetics(file: Path, lines: list[tuple[int, str]], header: list[str]) -> Rows:
    """Kinetics as published: columns label, youtube_id, time_start, time_end (seconds), split."""
    if "label" not in header:
        raise UserError(f"{file} has no column label: Kinetics' test list has no labels; use the train and validation lists")
    columns = [header.index(word) for word in ("label", "youtube_id", "time_start", "time_end")]
    keys, labels, bad = [], [], []
    seconds = functools.lru_cache(4096)(lambda text: f"{int(float(text)):06d}")
    for (number, _), fields in zip(lines, split_lines(lines), strict=True):
        try:
            label, video, start, end = (fields[column] for column in columns)
            keys.append(f"{video.strip()}_{seconds(start)}_{seconds(end)}")
            labels.append(label.strip())
        except (IndexError, ValueError, OverflowError):
            bad.append(number)
    if bad:
        raise UserError(f"{file} line {some(bad)}: not label,youtube_id,time_start,time_end")
    return Rows(file, "kinetics", keys, labels, [number for number, _ in lines])


def is_moments(fields: list[str]) -> bool:
    return len(fields) == 4 and has_extension(fields[0], "video") and not is_integer(fields[1]) and is_integer(fields[2]) and is_integer(fields[3])


def read_moments(file: Path, lines: list[tuple[int, str]]) -> Rows:
    """Moments in Time as published: file, class, number of annotators who agree, number who disagree."""
    fields = split_lines(lines)
    bad = [number for (number, _), values in zip(lines, fields, strict=True) if not is_moments(values)]
    if bad:
        raise UserError(f"{file} line {some(bad)}: not file,class,votes,votes as in the lines before")
    return Rows(file, "moments", [values[0] for values in fields], [values[1] for values in fields], [number for number, _ in lines])


def read_something(file: Path, text: str) -> Rows:
    """Something-Something v2 as published: a JSON list of {"id", "label", "template"}; the class is the template without its brackets."""
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    known = isinstance(entries, list) and entries and all(isinstance(entry, dict) and "id" in entry for entry in entries)
    if not known:
        raise UserError(f'{file}: not Something-Something\'s list of {{"id", "label", "template"}}; other lists are text, one `path,label` a line')
    bad = [number for number, entry in enumerate(entries, 1) if not isinstance(entry.get("template"), str)]
    if bad:
        raise UserError(f"{file} entry {some(bad)}: no template (the test list has no labels): use the train and validation lists")
    keys = [str(entry["id"]) for entry in entries]
    return Rows(file, "something", keys, [re.sub(r"[\[\]]", "", entry["template"]) for entry in entries], range(1, len(keys) + 1))


PATTERNS = {  # layout -> its lines, and what they are in words
    "ucf": (re.compile(r"(?P<key>(?P<label>\w+)/v_\w+_g\d+_c\d+\.avi)( +\d+)?", re.ASCII), "CLASS/v_CLASS_gNN_cNN.avi and perhaps a number"),
    "tiny": (re.compile(rf"(?P<key>\w+\.JPEG)\t(?P<label>{WORDNET_ID})(\t\d+){{4}}", re.ASCII), "file, class and the four numbers of a box"),
    "imagenet": (re.compile(rf"(?P<key>\w+),(?P<label>{WORDNET_ID})( .*)?", re.ASCII), "ImageId,PredictionString"),
}


def read_pattern(file: Path, lines: list[tuple[int, str]], layout: str) -> Rows:
    """Lists whose lines have one form throughout: UCF101 (trainlistNN.txt, testlistNN.txt), Tiny-ImageNet (val_annotations.txt) and ImageNet's
    solutions at Kaggle (LOC_val_solution.csv). The class of a UCF101 video is its folder: the test lists have no numbers."""
    pattern, form = PATTERNS[layout]
    matches = [pattern.fullmatch(line) for _, line in lines]
    bad = [number for (number, _), match in zip(lines, matches, strict=True) if not match]
    if bad:
        raise UserError(f"{file} line {some(bad)}: not {form} as in the lines before")
    folder = "images/" if layout == "tiny" else ""
    return Rows(file, layout, [folder + match["key"] for match in matches], [match["label"] for match in matches], [number for number, _ in lines])


GROUND_TRUTH = re.compile(r"ILSVRC\d+_validation_ground_truth\.txt")


def read_ground_truth(file: Path, lines: list[tuple[int, str]]) -> Rows:
    """ImageNet's validation classes in the order of the files: WordNet ids, or the development kit's numbers, whose ids are in meta.mat beside it."""
    classes = [line for _, line in lines]
    if GROUND_TRUTH.fullmatch(file.name):
        ids = read_synsets(file.parent / "meta.mat")
        bad = [number for number, line in lines if line not in ids]
        if bad:
            raise UserError(f"{file} line {some(bad)}: not a number of a class in {file.parent / 'meta.mat'}")
        classes = [ids[line] for line in classes]
    return Rows(file, "imagenet", [f"ILSVRC2012_val_{i:08d}" for i in range(1, len(lines) + 1)], classes, [number for number, _ in lines])


def read_synsets(file: Path) -> dict[str, str]:
    """The number (as text) -> WordNet id table of ImageNet's development kit."""
    from scipy.io import loadmat  # comes with JAX

    if not file.is_file():
        raise UserError(f"{file} does not exist: it says which classes the numbers of the ground truth mean; copy it from the development kit")
    try:
        synsets = loadmat(file, squeeze_me=True)["synsets"]
        return {str(int(number)): str(name) for number, name in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
    except Exception as error:  # a damaged file can make the reader raise anything
        raise UserError(f"{file} is not the development kit's table of classes ({error}): copy it again") from None


def add_kinetics(rows: Rows, kinetics: list[Rows]) -> tuple[Rows, list[str]]:
    """Gives YouTube ids (mini-Kinetics) the classes and times that Kinetics' own lists have for them; also returns the ids that these lack."""
    names = {key.rsplit("_", 2)[0]: (key, label) for known in kinetics for key, label in zip(known.keys, known.labels, strict=True)}
    found = [(*names[key], line) for key, line in zip(rows.keys, rows.lines, strict=True) if key in names]
    keys, labels, lines = map(list, zip(*found, strict=True)) if found else ([], [], [])
    return Rows(rows.file, "kinetics", keys, labels, lines), [key for key in rows.keys if key not in names]


def locate(rows: Rows, root: str, media: str) -> list[str]:
    """The path of every row's file, "" where it is not there.

    Raises:
      UserError: the root folder is not there.
    """
    if not os.path.isdir(root):
        raise UserError(f"root {root} is not a folder: set root to the folder that the paths of {rows.file} start from")
    if rows.layout in ("kinetics", "youtube", "something", "imagenet"):
        by_stem = {}
        for path in walk(root, depth=4):
            if has_extension(path, media):
                stem = os.path.splitext(os.path.basename(path))[0]
                by_stem.setdefault(stem[:11] if rows.layout == "youtube" else stem, os.path.join(root, path))
        return [by_stem.get(key, "") for key in rows.keys]
    found = existing(root, rows.keys)
    if rows.layout == "moments":
        for folder in ("validation", "training") if "val" in rows.file.name.lower() else ("training", "validation"):
            if not all(found):
                elsewhere = existing(os.path.join(root, folder), rows.keys)
                found = [path or other for path, other in zip(found, elsewhere, strict=True)]
    return found
