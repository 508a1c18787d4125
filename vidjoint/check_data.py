"""Decodes every file of a list, folder or zip once; names those that can't be used, and says what the rest and its labels are like.

python -m vidjoint.check_data train.csv --val=val.csv --root=videos --labels=labels.txt --json=report.json
"""

import argparse
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from tqdm import tqdm

from vidjoint.data import isolated
from vidjoint.data.decode import DecodeError
from vidjoint.data.facts import facts_of, kind_of
from vidjoint.data.files import EXTENSIONS, has_extension, is_outside, same_name
from vidjoint.data.labels import empty_classes, labels_of, mirrored_classes, number_labels, one_label_per_row, read_labels
from vidjoint.data.lists import Rows, is_numeric, locate, read_list, split_labels, wrong_separator
from vidjoint.data.packed import PackedRecords, is_packed, name_split, open_manifest, open_packed
from vidjoint.data.records import ZipRecords
from vidjoint.data.sources import list_folder
from vidjoint.data.workers import cores
from vidjoint.errors import UserError, command, printable
from vidjoint.output_files import check_writable, write_json

CHUNK = 1024  # files handed to the threads at a time
SHOWN = 20  # lines of each kind in the table, but for bad files; the JSON has all


@dataclass
class Item:
    """One file to check."""

    name: str
    content: str | tuple[ZipRecords | PackedRecords, int]  # path, or archive or packed dataset and number of the member
    places: list[str] = field(default_factory=list)  # "list.csv line 3", ..; [] for files found in folders
    media: str = ""  # "": told by its extension
    labels: list[str] = field(default_factory=list)  # as written at each of these places, or the name of its folder
    splits: set[str] = field(default_factory=set)  # train, val


@dataclass
class Found:
    """What the arguments name."""

    items: dict[str, Item] = field(default_factory=dict)  # by `same_name`
    bad: list[dict] = field(default_factory=list)  # {"path", "error"} of files that are not there, or may not be used
    outside: list[dict] = field(default_factory=list)  # {"path", "place"} of files that are there, but not below the lists' root
    lists: dict[str, list[Rows]] = field(default_factory=lambda: {"train": [], "val": []})
    ignored: int = 0  # files in folders that are of no known kind


@command
def main(argv: list[str]) -> int:
    """Runs the command. Returns the exit status: 0 all files are good, 1 some are bad, 2 there is nothing to check."""
    parser = argparse.ArgumentParser(
        prog="python -m vidjoint.check_data",
        description=__doc__.split("\n")[0],
        epilog="Exit status: 0 if every file is good; 1 if any is bad, missing, outside --root, has two labels or one of no class, or is in both "
        "training and validation; 2 if the command can't be run. Files named twice and empty classes are only told.",
    )
    known = "lines `path label` or `path`, or a published list of one of the datasets in configs/datasets.py"
    parser.add_argument("data", nargs="+", help=f"a list of files ({known}), a folder, a zip, a packed data set, or a video or image file")
    parser.add_argument(
        "--val", action="append", default=[], metavar="DATA", help="the same for validation: no file may be in both (may be repeated)"
    )
    parser.add_argument("--root", help="folder that the paths in lists start from (default: each list's own folder)")
    parser.add_argument("--allow_outside", action="store_true", help="lists may name files outside --root")
    parser.add_argument("--labels", metavar="FILE", help="class names, one per line: labels in lists must be among them")
    parser.add_argument("--classes", type=int, default=0, metavar="C", help="number of classes: labels in lists must be 0 to C-1, or C names")
    parser.add_argument("--media", choices=sorted(EXTENSIONS), help="what the files are (default: told by their extensions)")
    parser.add_argument("--multilabel", action="store_true", help="files in lists have any number of labels: `path,label|label`, or several lines")
    parser.add_argument("--threads", type=int, default=cores(), metavar="N", help="files decoded at a time (default: %(default)s, one per core)")
    parser.add_argument(
        "--seconds", type=float, default=600.0, metavar="S", help="time after which decoding a file is given up (default: %(default)g)"
    )
    parser.add_argument("--memory", type=int, default=4096, metavar="MIB", help="address space for decoding a file, in MiB (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="file that the report is written to, as one JSON object")
    args = parser.parse_args(argv)
    if args.threads < 1 or args.seconds <= 0 or args.memory < 1:
        raise UserError("--threads and --memory must be at least 1, and --seconds above 0")
    check_writable(args.json)
    start = time.perf_counter()
    found, problems = Found(), []
    for split, names in (("train", args.data), ("val", args.val)):
        for name in names:
            try:
                collect(found, name, split, args)
            except UserError as error:
                problems += error.lines
    if not problems and not found.items and not found.bad:
        problems.append(f"no {args.media or 'video or image'} files in {', '.join(args.data)}")
    if problems:
        raise UserError(*problems)
    faults, warnings = check_labels(found.lists, args.labels, args.classes, args.multilabel)
    report = {"files": len(found.items) + len(found.bad), **check(found, args), "ignored": found.ignored}
    report |= {"label_faults": faults, "label_warnings": warnings, "seconds": round(time.perf_counter() - start, 3)}
    for line in as_text(report):
        print(printable(line))
    write_json(args.json, report)
    return 1 if report["bad"] or report["overlap"] or faults else 0


def collect(found: Found, argument: str, split: str, args: argparse.Namespace) -> None:
    """Finds the files that an argument names. In `multilabel` lists a file may have any number of labels, in one line or in several.

    Raises:
      UserError: the argument can't be read.
    """
    path = Path(argument).expanduser()

    def add(name, content, place="", labels=(), media=""):
        item = found.items.setdefault(same_name(name), Item(name, content, media=media))
        item.places += [place] * bool(place)
        item.labels += labels
        item.splits.add(split)

    if is_packed(argument):
        folder, one = name_split(argument)
        for part in [one] if one else open_manifest(folder)["splits"]:
            manifest, packed = open_packed(folder, part)
            for i, target in enumerate(packed.targets):
                labels = [manifest["labels"][c] for c in np.atleast_1d(target) if c >= 0]
                add(f"{folder}:{part}[{i}] {packed.names[i]}", (packed, i), labels=labels, media=manifest["media"])
    elif path.is_dir() or path.suffix.lower() == ".zip":
        entries, infos = list_folder(path)
        files = [entry for entry in entries if not entry.endswith("/")]
        known = [file for file in files if any(has_extension(file, kind) for kind in ([args.media] if args.media else EXTENSIONS))]
        found.ignored += len(files) - len(known)
        records = None if infos is None else ZipRecords(str(path), known, np.zeros(len(known)), np.array([infos[file] for file in known]))
        for i, file in enumerate(known):
            name = os.path.join(path, file)
            add(name, (records, i) if records else name, labels=[label] if (label := os.path.dirname(file)) else [])
    elif not path.exists():
        raise UserError(f"{path} does not exist")
    elif any(has_extension(str(path), kind) for kind in EXTENSIONS):
        add(str(path), str(path))
    else:
        rows = read_list(path)
        root = str(Path(args.root).expanduser()) if args.root else str(path.parent)
        places = locate(rows, root, args.media or ("image" if rows.layout == "imagenet" else "video"))
        labelled = any(rows.labels) and not args.multilabel
        if not all(places) and (line := wrong_separator(rows)):
            raise UserError(line)
        found.lists[split].append(rows)
        for key, there, label, line in zip(rows.keys, places, rows.labels, rows.lines, strict=True):
            place = f"{path} line {line}"
            if not there:
                found.bad.append({"path": key, "error": f"missing ({place})"})
                continue
            if is_outside(there, root):
                found.outside.append({"path": there, "place": place})
                if args.root and not args.allow_outside:
                    found.bad.append({"path": there, "error": f"outside {root} ({place})"})
                    continue
            if labelled and not label:
                found.bad.append({"path": there, "error": f"no label ({place})"})
            else:
                add(there, there, place, split_labels(label) if args.multilabel else [label] * bool(label))


def check_labels(lists: dict[str, list[Rows]], labels_file: str | None, classes: int, multilabel: bool) -> tuple[list[str], list[str]]:
    """What training would refuse in the labels of lists, and what it would warn of, one line each. Lines without a label are not among it."""
    labelled = {split: one_label_per_row(several)[0] if multilabel else [_with_label(rows) for rows in several] for split, several in lists.items()}
    texts = [text for rows in labelled["train"] for text in rows.labels]
    try:
        known = read_labels(Path(labels_file).expanduser()) if labels_file else None
        if not texts:
            return [], []
        names, lookup = known or labels_of(texts, classes)
    except UserError as error:
        return list(error.lines), []
    if is_numeric(texts) and not is_numeric(names):
        lookup = None
    faults = [f"--classes={classes}, but there are {len(names)} class names"] if classes and classes != len(names) else []
    warnings = [f"{one!r} and {other!r} become each other in a mirror: set flip=False" for one, other in mirrored_classes(names)[:SHOWN]]
    for split, several in labelled.items():
        if several := [rows for rows in several if rows.labels]:
            targets, wrong = number_labels(several, names, lookup)
            faults += [f"{split}: {line}" for line in wrong]
            warnings += [f"{split}: {line}" for line in empty_classes(names, targets)] if not wrong else []
    return faults, warnings


def _with_label(rows: Rows) -> Rows:
    kept = [(label, line) for label, line in zip(rows.labels, rows.lines, strict=True) if label]
    return Rows(rows.file, rows.layout, [], [label for label, _ in kept], [line for _, line in kept])


def check(found: Found, args: argparse.Namespace) -> dict:
    """Decodes all files, each in a child process under limits, `threads` at a time, and sums up what was found."""
    facts, bad, limits = [], list(found.bad), isolated.Limits(args.seconds, args.memory << 20)
    labels, repeated, copies, overlap = Counter(), [], defaultdict(list), []

    def attempt(item):
        try:
            content = os.path.abspath(item.content) if isinstance(item.content, str) else item.content[0][item.content[1]][0]
            return isolated.call(limits, item.name, facts_of, content, item.media or args.media or kind_of(item.name))
        except (DecodeError, OSError) as error:
            return getattr(error, "strerror", None) or str(error).replace("data.decode_seconds", "--seconds").replace(
                "data.decode_memory", "--memory"
            )

    items = list(found.items.values())
    for item, outcome in _outcomes(items, attempt, args.threads):
        labels.update(set(item.labels) if args.multilabel else item.labels)
        if len(item.splits) > 1:
            overlap.append({"path": item.name, "places": item.places})
        elif len(item.places) > 1 and not args.multilabel:
            repeated.append({"path": item.name, "places": item.places})
        if isinstance(outcome, str):
            bad.append({"path": item.name, "error": outcome})
            continue
        copies[outcome.pop("digest")].append(item)
        facts.append(outcome)
        if len(set(item.labels)) > 1 and item.places and not args.multilabel:
            bad.append({"path": item.name, "error": f"listed with labels {', '.join(sorted(set(item.labels)))} ({', '.join(item.places)})"})

    columns = defaultdict(list)
    for fact in facts:
        for key, value in fact.items():
            columns[key].append(value)
    alike = [group for group in copies.values() if len(group) > 1]
    for group in alike:
        if len(set.union(*(item.splits for item in group))) > 1 and all(len(item.splits) == 1 for item in group):
            overlap.append({"path": group[0].name, "places": [item.name for item in group[1:]]})
    good = len(items) - len({entry["path"] for entry in bad} & {item.name for item in items})
    return {
        "good": good,
        "bad": sorted(bad, key=lambda entry: entry["path"]),
        "repeated": repeated,
        "copies": [[item.name for item in group] for group in alike],
        "overlap": overlap,
        "outside": found.outside,
        "media": dict(Counter(columns["media"])),
        "sizes": dict(Counter(columns["size"]).most_common()),
        **{key: spread(columns[key]) for key in ("duration", "fps", "frames") if columns[key]},
        "classes": dict(sorted(labels.items(), key=lambda pair: (len(pair[0]), pair[0]) if pair[0].isdecimal() else (0, pair[0]))),
    }


def _outcomes(items: list[Item], attempt, threads: int) -> Iterator[tuple[Item, dict | str]]:
    with tqdm(total=len(items), unit=" files", delay=2, disable=None, leave=False) as progress, ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(items), CHUNK):
            chunk = items[start : start + CHUNK]
            for item, outcome in zip(chunk, pool.map(attempt, chunk), strict=True):
                progress.update()
                yield item, outcome


def spread(values: list[float]) -> dict:
    return {"min": min(values), "median": median(values), "max": max(values), "total": round(sum(values), 3)}


def as_text(report: dict) -> list[str]:
    """The lines of the report as a table, faults first."""
    lines = [f"BAD  {entry['path']}: {entry['error']}" for entry in report["bad"]]
    lines += _first("LABELS  {}", report["label_faults"])
    lines += _first("LABELS  {}", report["label_warnings"])
    for word, entries in (("BOTH", report["overlap"]), ("TWICE", report["repeated"])):
        lines += _first(f"{word}  {{}}", [f"{entry['path']}: {', '.join(entry['places'])}" for entry in entries])
    lines += _first("COPIES  {}", [", ".join(names) for names in report["copies"]])
    rows = [("files", f"{report['files']}: {report['good']} good, {len(report['bad'])} bad")]
    if report["ignored"]:
        rows.append(("ignored", f"{report['ignored']} files in folders, of no known kind"))
    if report["repeated"]:
        rows.append(("twice", f"{len(report['repeated'])} files are named by several lines"))
    if report["copies"]:
        rows.append(("copies", f"{sum(map(len, report['copies'])) - len(report['copies'])} files have the same bytes as another"))
    if report["overlap"]:
        rows.append(("train and val", f"{len(report['overlap'])} files are in both, by path or by content"))
    if report["outside"]:
        rows.append(("outside", f"{len(report['outside'])} lines name files outside the lists' root, such as {report['outside'][0]['path']}"))
    if report["media"]:
        rows.append(("media", ", ".join(f"{count} {kind}s" for kind, count in report["media"].items())))
    sizes = [f"{size} ({count})" for size, count in report["sizes"].items()]
    if sizes:
        rows.append(("size, pixels", ", ".join(sizes[:5]) + (f" and {len(sizes) - 5} more" if len(sizes) > 5 else "")))
    for key, unit in (("duration", "s"), ("fps", "frames/s"), ("frames", "frames")):
        if key in report:
            low, middle, high, total = (report[key][name] for name in ("min", "median", "max", "total"))
            rows.append((key, f"{low:g} to {high:g} {unit}, median {middle:g}" + (f", {total / 3600:.2f} h in all" if key == "duration" else "")))
    if report["classes"]:
        counts = report["classes"]
        fewest, most = min(counts, key=counts.get), max(counts, key=counts.get)
        rows.append(("classes", f"{len(counts)}, of {counts[fewest]} ({fewest}) to {counts[most]} ({most}) files"))
    rows.append(("time", f"{report['seconds']:.1f} s"))
    return lines + [f"{name:<13}  {value}" for name, value in rows]


def _first(form: str, entries: list[str]) -> list[str]:
    more = [f"  and {len(entries) - SHOWN} more of these (--json has all)"] if len(entries) > SHOWN else []
    return [form.format(entry) for entry in entries[:SHOWN]] + more


if __name__ == "__main__":
    sys.exit(main())
