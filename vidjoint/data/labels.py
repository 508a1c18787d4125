"""Class names: label files as people and data sets publish them, and lists' labels turned into class numbers. Faults are told by file and line."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vidjoint.data.files import SHOWN, shorten, some
from vidjoint.data.lists import WORDNET_ID, Rows, is_integer, is_numeric, split_labels
from vidjoint.errors import UserError

MOST_GAPS = 1000  # classes per label that occurs; more are a mistake in the list


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
    A name as it is written comes before another's spelling as `plain_name` has it: ImageNet has the dog Cardigan and the garment cardigan.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
        names = json_names(json.loads(text)) if file.suffix.lower() == ".json" else text_names(text)
    except OSError as error:
        raise UserError(f"labels: {file} can't be read ({error.strerror}): correct the path, or data_root") from None
    except UnicodeDecodeError:
        raise UserError(f"labels: {file} is not UTF-8 text: save it as UTF-8, one class name a line") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"labels: {file} is no list of class names ({error}): write one name per line") from None
    exact = [(alias, number) for number, aliases in enumerate(names) for alias in aliases]
    lookup = _of_one_class((plain_name(alias), number) for alias, number in exact) | _of_one_class(exact)
    return tuple(aliases[-1] for aliases in names), lookup


def _of_one_class(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """name -> class number, of the names that only one class has."""
    numbers = {}
    for name, number in pairs:
        numbers.setdefault(name, set()).add(number)
    return {name: min(found) for name, found in numbers.items() if len(found) == 1}


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
    """Class names read off the training labels: sorted names, or "0".."C-1" (no lookup) where labels are numbers.

    Raises:
      UserError: numbers are so far apart that they can't be meant as those of classes.
    """
    if is_numeric(texts):
        different = [text for text in set(texts) if is_integer(text)]
        longest = max(different, key=len)
        highest = 10**18 if len(longest) > 18 else max(map(int, different))
        if not classes and highest >= max(MOST_GAPS, MOST_GAPS * len(different)):
            raise UserError(
                f"labels go up to {longest[:30]}, but only {len(different)} different ones occur: number the classes 0 to {len(different) - 1}, "
                "or set classes if so many are meant"
            )
        return tuple(map(str, range(max(classes or highest + 1, 0)))), None
    names = tuple(sorted(set(texts) - {""}))
    return names, {name: number for number, name in enumerate(names)}


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


def empty_classes(labels: tuple[str, ...], targets: np.ndarray) -> list[str]:
    """Warns of classes without examples, in one line; of numbers it says whether they start at 1 or leave gaps."""
    counts = np.bincount(targets[targets >= 0], minlength=len(labels))
    absent = np.flatnonzero(counts == 0)
    if not len(absent):
        return []
    if labels == tuple(map(str, range(len(labels)))):
        if absent.tolist() == [0]:
            return [f"labels run from 1 to {len(labels) - 1}, so class 0 is empty: numbers should start at 0"]
        return [f"labels leave out {some(absent)}: {len(absent)} of the {len(labels)} classes, 0 to {len(labels) - 1}, have no examples"]
    return [f"{len(absent)} of {len(labels)} classes have no examples: {some(labels[c] for c in absent)}"]


MIRRORED = {"left": "right", "leftwards": "rightwards", "leftward": "rightward", "clockwise": "counterclockwise"}
MIRRORED |= {other: word for word, other in MIRRORED.items()} | {"anticlockwise": "clockwise"}


def mirrored_classes(labels: tuple[str, ...]) -> list[tuple[str, str]]:
    """Pairs of classes that a mirror turns into each other, by their names: `swipe left` and `swipe right`."""
    names = {_words(label): label for label in labels}
    pairs = []
    for words, label in names.items():
        other = names.get(tuple(MIRRORED.get(word, word) for word in words))
        if other is not None and other != label and (other, label) not in pairs:
            pairs.append((label, other))
    return pairs


def _words(label: str) -> tuple[str, ...]:
    return tuple(re.sub(r"(counter|anti)[\s_-]+(?=clockwise)", r"\1", plain_name(label)).replace("-", " ").split())


def unusable_names(names: tuple[str, ...]) -> list[str]:
    """What is wrong with class names that a run's folder, which keeps one a line in UTF-8, can't hold."""
    wrong = [name for name in names if re.search(r"[\n\r\ud800-\udfff]", name)]
    return [f"class names {some(map(ascii, wrong))} have line breaks or are not UTF-8: rename these classes"] if wrong else []


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
                fault = f"class {shorten(text)!r} is not among the {len(labels)} known ones ({some(labels)})"
            elif found[row] == none:
                fault = f"label {shorten(text)!r} is not a number, as others are"
            else:
                fault = f"label {shorten(text)} is not in 0..{len(labels) - 1}"
            problems.append(f"{rows.file} line {rows.lines[row]}: {fault}")
        if len(bad) > SHOWN:
            problems.append(f"{rows.file}: {len(bad) - SHOWN} more lines with such labels")
    targets = np.concatenate(values)
    return np.where((targets < 0) | (targets >= len(labels)), -1, targets).astype(np.int32), problems
