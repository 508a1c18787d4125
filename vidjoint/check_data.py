"""Decodes every file of a list, folder or zip once; names those that can't be used, and says what the rest is like.

python -m vidjoint.check_data train.csv --root=videos --json=report.json
"""

import argparse
import json
import os
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from tqdm import tqdm

from vidjoint.data.files import EXTENSIONS, has_extension
from vidjoint.data.lists import locate, read_list, split_labels
from vidjoint.data.packed import PackedRecords, is_packed, open_manifest, open_packed
from vidjoint.data.records import ZipRecords
from vidjoint.data.sources import list_folder
from vidjoint.data.transforms import Geometry
from vidjoint.data.video import DecodeError, Video, read_image
from vidjoint.errors import UserError, command

CHUNK = 1024  # files handed to the threads at a time
SIDE = 8  # pixels; frames are decoded whole, then shrunk to this


@dataclass
class Item:
    """One file to check."""

    name: str
    content: str | tuple[ZipRecords | PackedRecords, int]  # path, or archive or packed dataset and number of the member
    places: list[str] = field(default_factory=list)  # "list.csv line 3", ..; [] for files found in folders
    media: str = ""  # "": told by its extension
    labels: list[str] = field(default_factory=list)  # as written at each of these places, or the name of its folder


@command
def main(argv: list[str]) -> int:
    """Runs the command. Returns the exit status: 0 all files are good, 1 some are bad, 2 there is nothing to check."""
    parser = argparse.ArgumentParser(
        prog="python -m vidjoint.check_data",
        description=__doc__.split("\n")[0],
        epilog="Exit status: 0 if every file is good, 1 if any is bad (or missing, or listed with two labels), 2 if the command can't be run.",
    )
    known = "lines `path label` or `path`, or a published list of one of the datasets in configs/datasets.py"
    parser.add_argument("data", nargs="+", help=f"a list of files ({known}), a folder, a zip, a packed data set, or a video or image file")
    parser.add_argument("--root", help="folder that the paths in lists start from (default: each list's own folder)")
    parser.add_argument("--media", choices=sorted(EXTENSIONS), help="what the files are (default: told by their extensions)")
    parser.add_argument("--multilabel", action="store_true", help="files in lists have any number of labels: `path,label|label`, or several lines")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="files decoded at a time (default: %(default)s, one per core)")
    parser.add_argument("--json", help="file that the report is written to, as one JSON object")
    args = parser.parse_args(argv)
    if args.threads < 1:
        raise UserError("--threads must be at least 1")
    start = time.perf_counter()
    items, bad, ignored = collect(args.data, args.root, args.media, args.multilabel)
    report = {"files": len(items) + len(bad), **check(items, bad, args.media, args.threads, args.multilabel), "ignored": ignored}
    report["seconds"] = round(time.perf_counter() - start, 3)
    if args.json:
        write_json(args.json, report)
    print(printable(as_text(report)))
    return 1 if report["bad"] else 0


def collect(data: list[str], root: str | None, media: str | None, multilabel: bool = False) -> tuple[list[Item], list[dict], int]:
    """Finds the files that the arguments name. In `multilabel` lists a file may have any number of labels, in one line or in several.

    Returns:
      The files that are there, each once; {"path", "error"} for each that is not; and how many files in folders are of no known kind.

    Raises:
      UserError: an argument can't be read, or names no file at all.
    """
    items, bad, ignored, problems = {}, [], 0, []

    def add(name, content, place="", label=""):
        item = items.setdefault(name, Item(name, content))
        item.places += [place] * bool(place)
        item.labels += split_labels(label) if multilabel else [label] * bool(label)

    for argument in data:
        path = Path(argument).expanduser()
        try:
            if is_packed(argument):
                for split in open_manifest(argument)["splits"]:
                    manifest, packed = open_packed(argument, split)
                    for i, target in enumerate(packed.targets):
                        item = items[f"{argument}:{split} {i}"] = Item(
                            f"{argument}:{split}[{i}] {packed.names[i]}", (packed, i), media=manifest["media"]
                        )
                        item.labels += [manifest["labels"][c] for c in np.atleast_1d(target) if c >= 0]
            elif path.is_dir() or path.suffix.lower() == ".zip":
                entries, infos = list_folder(path)
                files = [entry for entry in entries if not entry.endswith("/")]
                known = [file for file in files if any(has_extension(file, kind) for kind in ([media] if media else EXTENSIONS))]
                ignored += len(files) - len(known)
                records = None if infos is None else ZipRecords(str(path), known, np.zeros(len(known)), np.array([infos[file] for file in known]))
                for i, file in enumerate(known):
                    name = os.path.join(path, file)
                    add(name, (records, i) if records else name, label=os.path.dirname(file))
            elif not path.exists():
                problems.append(f"{path} does not exist")
            elif any(has_extension(str(path), kind) for kind in EXTENSIONS):
                add(str(path), str(path))
            else:
                rows = read_list(path)
                found = locate(rows, str(Path(root).expanduser()) if root else str(path.parent), media or "video")
                labelled = any(rows.labels)
                for key, there, label, line in zip(rows.keys, found, rows.labels, rows.lines, strict=True):
                    place = f"{path} line {line}"
                    if not there:
                        bad.append({"path": key, "error": f"missing ({place})"})
                    elif labelled and not label and not multilabel:
                        bad.append({"path": there, "error": f"no label ({place})"})
                    else:
                        add(there, there, place, label)
        except UserError as error:
            problems += error.lines
    if not problems and not items and not bad:
        problems.append(f"no {media or 'video or image'} files in {', '.join(data)}")
    if problems:
        raise UserError(*problems)
    return list(items.values()), bad, ignored


def check(items: list[Item], bad: list[dict], media: str | None, threads: int, multilabel: bool = False) -> dict:
    """Decodes all files, on `threads` threads (decoding releases the GIL), and sums up what was found."""
    facts, bad = [], list(bad)
    labels, repeated = Counter(), []

    def attempt(item):
        try:
            content = item.content if isinstance(item.content, str) else item.content[0][item.content[1]][0]
            return decode(content, item.media or media or kind_of(item.name))
        except (DecodeError, OSError) as error:
            return getattr(error, "strerror", None) or str(error)

    with tqdm(total=len(items), unit=" files", delay=2, disable=None, leave=False) as progress, ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(items), CHUNK):
            chunk = items[start : start + CHUNK]
            for item, outcome in zip(chunk, pool.map(attempt, chunk), strict=True):
                progress.update()
                labels.update(set(item.labels) if multilabel else item.labels)
                if len(item.places) > 1 and not multilabel:
                    repeated.append({"path": item.name, "places": item.places})
                if isinstance(outcome, str):
                    bad.append({"path": item.name, "error": outcome})
                    continue
                facts.append(outcome)
                if len(set(item.labels)) > 1 and item.places and not multilabel:
                    bad.append({"path": item.name, "error": f"listed with labels {', '.join(sorted(set(item.labels)))} ({', '.join(item.places)})"})

    columns = defaultdict(list)
    for fact in facts:
        for key, value in fact.items():
            columns[key].append(value)
    good = len(items) - len({entry["path"] for entry in bad} & {item.name for item in items})
    return {
        "good": good,
        "bad": sorted(bad, key=lambda entry: entry["path"]),
        "repeated": repeated,
        "media": dict(Counter(columns["media"])),
        "sizes": dict(Counter(columns["size"]).most_common()),
        **{key: spread(columns[key]) for key in ("duration", "fps", "frames") if columns[key]},
        "classes": dict(sorted(labels.items(), key=lambda pair: (len(pair[0]), pair[0]) if pair[0].isdecimal() else (0, pair[0]))),
    }


def kind_of(name: str) -> str:
    """The medium that an extension tells; a GIF counts as a video, and so does what has no known extension."""
    return "image" if has_extension(name, "image") and not has_extension(name, "video") else "video"


def decode(content: str | bytes, media: str) -> dict:
    """Decodes all of a file: every frame that any clip of it could show. Returns what it is like.

    Raises:
      DecodeError: some of it can't be decoded.
    """
    if media == "image":
        seen = []

        def whole(height, width):
            seen.append(f"{width}x{height}")
            return Geometry((height, width), 0, 0, height, width)

        read_image(content, whole)
        return {"media": "image", "size": seen[0]}
    with Video(content) as video:
        info = video.info
        # Twice as dense as the frames, and the end: no frame that is shown for a while is passed over.
        times = np.append(np.arange(0, info.duration, 0.5 * info.duration / max(info.frames, 1)), info.duration)
        video.read(times, Geometry((SIDE, SIDE), 0, 0, SIDE, SIDE))
        if 2 * video.decoded < info.frames:
            raise DecodeError(f"it ends early: {video.decoded} frames of the {info.frames} that it claims")
    facts = {"duration": round(info.duration, 3), "fps": round(info.fps, 3), "frames": info.frames}
    return {"media": "video", "size": f"{info.width}x{info.height}", **facts}


def spread(values: list[float]) -> dict:
    return {"min": min(values), "median": median(values), "max": max(values), "total": round(sum(values), 3)}


def as_text(report: dict) -> str:
    """The report as a table, bad files first."""
    lines = [f"BAD  {entry['path']}: {entry['error']}" for entry in report["bad"]]
    lines += [f"TWICE  {entry['path']}: {', '.join(entry['places'])}" for entry in report["repeated"]]
    rows = [("files", f"{report['files']}: {report['good']} good, {len(report['bad'])} bad")]
    if report["ignored"]:
        rows.append(("ignored", f"{report['ignored']} files in folders, of no known kind"))
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
    return "\n".join(lines + [f"{name:<12}  {value}" for name, value in rows])


def printable(text: str) -> str:
    """Text that any terminal takes: bytes of file names that are no UTF-8 are shown as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def write_json(file: str, report: dict) -> None:
    try:
        Path(file).write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{file} can't be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
