"""Lists of files and of class names as people and data sets publish them, and where the listed files are on disk.

Layouts: plain (`path label` or `path`, with any usual separator, with or without a header), and Kinetics, Something-Something v2 and Moments in Time
as published. Faults are told with the file and the line.
"""

import csv
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


def some(items: Iterable) -> str:
    """The first few of many, with the number of the others."""
    items = list(items)
    return ", ".join(map(str, items[:SHOWN])) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")


def has_extension(path: str, media: str) -> bool:
    return os.path.splitext(path)[1].lower() in EXTENSIONS[media]


@dataclass
class Rows:
    """The lines of one list. For published layouts a key is what the list calls the file: its name without extension, or its path in the release."""

    file: Path
    layout: str  # plain, kinetics, something or moments
    keys: list[str]
    labels: list[str]  # as written; "" where a line has none
    lines: Sequence[int]  # line (or JSON entry) numbers, from 1


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
