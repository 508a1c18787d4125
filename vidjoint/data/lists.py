"""Lists of files and of class names as people and data sets publish them, and where the listed files are on disk.

Layouts: plain (`path label`, `path label|label` or `path`, with any usual separator, with or without a header), and what is published with Kinetics,
mini-Kinetics, Something-Something v2, Moments in Time, UCF101, Tiny-ImageNet and ImageNet. Faults are told with the file and the line.
"""

import csv
import functools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vidjoint.errors import UserError

EXTENSIONS = {
    "video": frozenset(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .flv .3gp .wmv .ogv .vob .gif".split()),
    "image": frozenset(".jpg .jpeg .png .webp .bmp .tif .tiff .ppm .pgm .gif .avif .jp2".split()),
}
SHOWN = 5  # faults of one kind that are named; the others are counted
WORDNET_ID = r"n\d{8}"  # ImageNet's name of a class


def some(items: Iterable) -> str:
    """The first few of many, with the number of the others."""
    items = list(items)
    return ", ".join(map(str, items[:SHOWN])) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")


def has_extension(path: str, media: str) -> bool:
    return path[path.rfind(".") :].lower() in EXTENSIONS[media]


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


def is_media(path: str) -> bool:
    return has_extension(path, "video") or has_extension(path, "image")


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
    labels = [text for other in sample for text in split_labels(path_and_label(other, separator)[1])]
    return not is_media(path) and not is_integer(label) and is_numeric(labels)


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


# Labels --------------------------------------------------------------------------------------------------------------------------------------


def published_labels(rows: Rows) -> Path | None:
    """The label file that comes with a published list and lies beside it, if any."""
    names = {"something": ("labels.json", "something-something-v2-labels.json"), "moments": ("moments_categories.txt",), "ucf": ("classInd.txt",)}
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


def read_wordnet(file: Path) -> dict[str, str] | None:
    """WordNet id -> name, of a file with lines `n01440764 tench, Tinca tinca` (words.txt, LOC_synset_mapping.txt); None for other label files."""
    lines = [line.strip() for line in file.read_bytes().decode("utf-8-sig", "surrogateescape").splitlines() if line.strip()]
    matches = [re.fullmatch(rf"({WORDNET_ID})\s+(.+)", line) for line in lines]
    return dict(match.groups() for match in matches) if matches and all(matches) else None


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


def split_labels(text: str) -> list[str]:
    """The labels of a multilabel line, `a|b`; "" has none."""
    return [label for part in text.split("|") if (label := part.strip())]


def one_label_per_row(lists: list[Rows]) -> tuple[list[Rows], np.ndarray]:
    """Multilabel lists with a row for each label of each line: `path,a|b` becomes two, and a line without a label none.

    Returns:
      The lists, and which of the given rows, counted over all lists, each new row comes from: int64[L].
    """
    expanded, owners, before = [], [np.zeros(0, np.int64)], 0
    for rows in lists:
        texts = [split_labels(text) for text in rows.labels]
        owner = np.repeat(np.arange(len(texts)), [len(labels) for labels in texts])
        labels = [label for labels in texts for label in labels]
        expanded.append(Rows(rows.file, rows.layout, [rows.keys[i] for i in owner], labels, [rows.lines[i] for i in owner]))
        owners.append(before + owner)
        before += len(texts)
    return expanded, np.concatenate(owners)


def one_row_per_file(paths: list[str], owners: np.ndarray, labels: np.ndarray, classes: int) -> tuple[list[str], np.ndarray]:
    """Gathers the labels of each file of multilabel lists, whether they stand in one line or in several.

    Args:
      paths: of every line; "" for a file that is not there, which is left out.
      owners: int[L], the line that each label is from, and `labels`, int[L], its class number in 0..classes-1.

    Returns:
      The N paths without repetition, in order; and int32[N, K], the classes of each in order and without repetition, filled up by -1. K is the most
      that any of them has, at least 1.
    """
    numbers = {}
    file = np.array([numbers.setdefault(path, len(numbers)) if path else -1 for path in paths], np.int64)[owners]  # [L]
    file, labels = file[file >= 0], labels[file >= 0].astype(np.int64)
    first = np.sort(np.unique(file * classes + labels, return_index=True)[1])  # where a file gets a label that it has not yet
    first = first[np.argsort(file[first], kind="stable")]
    file, labels = file[first], labels[first]
    counts = np.bincount(file, minlength=len(numbers))
    targets = np.full((len(numbers), max(1, counts.max(initial=0))), -1, np.int32)
    targets[file, np.arange(len(file)) - (np.cumsum(counts) - counts)[file]] = labels
    return list(numbers), targets


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
