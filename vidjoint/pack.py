"""Packs videos or pictures into ArrayRecord shards that are fast to read, also from afar: a TFDS data set, read by source=packed. Originals stay.

python -m vidjoint.pack train.csv OUT --val=val.csv --root=videos    # then: task_config(source="packed", train="OUT", val="OUT")
"""

import argparse
import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vidjoint.config import task_config
from vidjoint.data.decode import DecodeError
from vidjoint.data.encode import Encoding
from vidjoint.data.files import some
from vidjoint.data.image import describe_image
from vidjoint.data.packed import FORMAT, MANIFEST, is_url, open_manifest, open_packed
from vidjoint.data.shards import NAME, PARTS, Plan, in_order, make_features, read_part, write_split
from vidjoint.data.sources import open_source
from vidjoint.data.video import Video
from vidjoint.errors import UserError, command, printable
from vidjoint.output_files import UNFINISHED, write_whole

SHARD_SIZE = {"video": 512, "image": 8192}  # examples: some 100 to 300 MB
SOURCES = ("csv", "folder", "smarthome", "demo")


@command
def main(argv: list[str]) -> int:
    """Runs the command. Returns the exit status: 0 all is packed, 1 some files are bad and left out (0 with --allow_bad)."""
    parser = argparse.ArgumentParser(
        prog="python -m vidjoint.pack",
        description="Writes videos (H.264, short side and groups of pictures small) or pictures (JPEG) into ArrayRecord shards, as a TFDS data set "
        "that source=packed reads, on disk or by URL. Originals stay as they are. Killed at any time, the same command goes on.",
        epilog="Exit status: 0 if all is packed, 1 if files are bad and were left out (0 with --allow_bad), 2 if the command can't be run.",
    )
    parser.add_argument("data", help="the training set, as a task's `train`: a list of files, a folder with one folder per class, or a zip of that")
    parser.add_argument("out", help="folder to write; one that an earlier run of the same command has begun is finished")
    parser.add_argument("--val", default="", help="the validation set, packed beside the training set (the same kinds)")
    parser.add_argument("--source", choices=SOURCES, help="what data is (default: folder for a folder or zip, else csv)")
    parser.add_argument("--media", choices=sorted(SHARD_SIZE), default="video", help="what the files are (default: %(default)s)")
    parser.add_argument("--root", default="", help="folder that the paths in lists start from (default: each list's own folder)")
    parser.add_argument("--labels", default="", help="file with one class name per line, or the data set's own (default: from the data)")
    parser.add_argument("--multilabel", action="store_true", help="files have any number of labels: `path,label|label`, or several lines")
    default = Encoding()
    parser.add_argument("--short_side", type=int, default=default.short_side, help="larger pictures shrink to this, in pixels (default: %(default)s)")
    parser.add_argument("--gop", type=int, default=default.gop, help="frames from keyframe to keyframe; small seeks fast (default: %(default)s)")
    parser.add_argument("--crf", type=int, default=default.crf, help="H.264's quality: 0 to 51, lower is better and larger (default: %(default)s)")
    parser.add_argument("--preset", default=default.preset, help="H.264's effort (default: %(default)s)")
    parser.add_argument("--quality", type=int, default=default.quality, help="of JPEG, 1 to 100 (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="copy files as they are, byte for byte")
    sizes = " or ".join(f"{count} {media}s" for media, count in SHARD_SIZE.items())
    parser.add_argument("--shard_size", type=int, default=0, help=f"examples per shard (default: {sizes})")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that encode (default: %(default)s, one per core)")
    parser.add_argument("--allow_bad", action="store_true", help="exit with 0 even if some files are bad")
    args = parser.parse_args(argv)
    check(args)
    out, start = Path(args.out).expanduser(), time.perf_counter()
    how = Encoding(args.short_side, args.gop, args.crf, args.preset, quality=args.quality)
    plans = [make_plan(args, split) for split in (("train", "val") if args.val else ("train",))]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with alone_in(out):
            manifest = begin(out, args, how, plans)
            for plan in plans:
                write_split(out, plan, None if args.keep else how, args.workers)
                finish_split(out, plan, manifest)
            write_tfds(out, manifest)
            write_whole(out / MANIFEST, as_json(manifest))
            with ThreadPoolExecutor(args.workers) as pool:
                for plan in plans:
                    verify(out, plan, manifest, pool)
                    manifest["splits"][plan.split]["finished"] = True
            write_whole(out / MANIFEST, as_json(manifest))
    except BrokenProcessPool:
        raise UserError("a worker was killed, perhaps for want of memory: lower --workers; the same command goes on where this one stopped") from None
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}") from None
    bad = sum(len(manifest["splits"][plan.split]["bad"]) for plan in plans)
    print(*map(printable, as_lines(manifest, time.perf_counter() - start)), sep="\n")
    return 1 if bad and not args.allow_bad else 0


def check(args: argparse.Namespace) -> None:
    problems = [f"--{name} must be at least 1" for name in ("short_side", "gop", "workers") if getattr(args, name) < 1]
    problems += ["--shard_size must not be negative"] * (args.shard_size < 0)
    problems += ["--crf must be 0 to 51"] * (not 0 <= args.crf <= 51) + ["--quality must be 1 to 100"] * (not 1 <= args.quality <= 100)
    presets = "ultrafast superfast veryfast faster fast medium slow slower veryslow placebo".split()
    problems += [f"--preset={args.preset} is unknown: choose one of {', '.join(presets)}"] * (args.preset not in presets)
    problems += [f"{args.out}: pack into a local folder, then copy that to where it is to be read"] * is_url(args.out)
    if problems:
        raise UserError(*problems)


def make_plan(args: argparse.Namespace, split: str) -> Plan:
    path = Path(args.data).expanduser()
    if not (args.source or path.exists()):
        raise UserError(f"{args.data} does not exist: name a list, a folder or a zip")
    kind = args.source or ("folder" if path.is_dir() or path.suffix.lower() == ".zip" else "csv")
    settings = {"train": args.data, "val": args.val, "root": args.root, "labels": args.labels, "multilabel": args.multilabel}
    source = open_source("pack", task_config(source=kind, media=args.media, **settings), split, "")
    names = [source.name(i) for i in range(len(source))]
    if len({os.path.isabs(name) for name in names}) > 1:  # there is no folder that holds them all
        names = [os.path.abspath(name) for name in names]
    origin = os.path.commonpath([os.path.dirname(name) for name in names])
    return Plan(split, source, [os.path.relpath(name, origin or ".") for name in names], origin, args.shard_size or SHARD_SIZE[args.media])


# What is in the folder


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Sees to it that no other run writes here, and that none has left half a file."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run of vidjoint.pack is writing to {out}: wait for it, or name another folder") from None
        except OSError:  # a file system without locks
            pass
        for leftover in (*out.glob(f"{UNFINISHED}*"), *out.glob(f"{PARTS}/{UNFINISHED}*")):
            leftover.unlink()
        yield
    finally:
        os.close(descriptor)


def begin(out: Path, args: argparse.Namespace, how: Encoding, plans: list[Plan]) -> dict:
    """Starts the manifest, or takes up that of an earlier run of the same command.

    Raises:
      UserError: the folder holds something else, or the list or the settings have changed since.
    """
    source = plans[0].source
    videos, pictures = ("short_side", "gop", "crf", "preset", "tune", "max_pixels"), ("short_side", "quality", "max_pixels")
    settings = {key: value for key, value in asdict(how).items() if key in (videos if args.media == "video" else pictures)}
    settings = {"keep": True} if args.keep else settings
    head = {
        "media": args.media,
        "labels": list(source.labels),
        "multilabel": args.multilabel,
        "settings": settings,
        "shard_size": plans[0].shard_size,
    }
    splits = {
        plan.split: {
            "list": plan.source.origin,
            "folder": plan.origin,
            "hash": plan.hash,
            "examples": len(plan.source),
            "missing": plan.source.missing,
        }
        for plan in plans
    }
    if (out / MANIFEST).exists():
        old = open_manifest(str(out))
        changed = [f"{key} was {short(old[key])}, now {short(head[key])}" for key in head if old[key] != head[key]]
        changed += [
            f"the {split} list has changed" for split in splits if split in old["splits"] and old["splits"][split]["hash"] != splits[split]["hash"]
        ]
        if changed:
            raise UserError(f"{out} was begun otherwise ({'; '.join(changed)}): name another folder, or remove this one")
        splits = old["splits"] | {split: old["splits"].get(split, {}) | splits[split] | {"finished": False} for split in splits}
    elif strangers := [entry.name for entry in out.iterdir() if not entry.name.startswith(UNFINISHED)]:
        raise UserError(f"{out} is not empty and was not written by vidjoint.pack (it holds {some(sorted(strangers))}): name another folder")
    manifest = {"format": FORMAT} | head | {"splits": splits}
    (out / PARTS).mkdir(exist_ok=True)
    write_whole(out / MANIFEST, as_json(manifest))
    return manifest


def short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}.."


def as_json(content: dict) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


# The whole


def finish_split(out: Path, plan: Plan, manifest: dict) -> None:
    """Writes the index of a split and its entry in the manifest."""
    parts = [read_part(out, name) for name in plan.shards]
    rows = np.array([row for part in parts for row in part["rows"]], np.int64)
    if not len(rows):
        raise UserError(f"no file of {plan.source.origin} can be used: {some(reason for part in parts for _, reason in part['bad'])}")
    targets = plan.source.records.targets
    index = {
        "shard": np.repeat(np.arange(len(parts), dtype=np.int32), [len(part["rows"]) for part in parts]),
        "begin": np.array([begin for part in parts for begin in part["begin"]], np.int64),
        "size": np.array([size for part in parts for size in part["size"]], np.int64),
        "crc": np.array([crc for part in parts for crc in part["crc"]], np.uint32),
        "target": targets[rows],
        "names": np.frombuffer("\0".join(plan.names[row] for row in rows).encode("utf-8", "surrogateescape"), np.uint8),
    }
    beside = out / f"{UNFINISHED}index-{plan.split}.npz"
    np.savez_compressed(beside, **index)
    beside.rename(out / f"index-{plan.split}.npz")
    counts = np.bincount(targets[rows][targets[rows] >= 0], minlength=len(plan.source.labels))
    manifest["splits"][plan.split] |= {
        "packed": len(rows),
        "shards": plan.shards,
        "shard_lengths": [len(part["rows"]) for part in parts],
        "bytes": sum(part["bytes"] for part in parts),
        "original_bytes": sum(part["original_bytes"] for part in parts),
        "counts": counts.tolist(),  # examples of each class
        "bad": [{"path": plan.names[row], "error": reason} for part in parts for row, reason in part["bad"]],
    }


def write_tfds(out: Path, manifest: dict) -> None:
    """Writes what TFDS reads a data set's folder by: features.json and dataset_info.json."""
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(data_dir=out, dataset_name=NAME, filetype_suffix="array_record")
    splits = [
        tfds.core.SplitInfo(name=split, shard_lengths=entry["shard_lengths"], num_bytes=entry["bytes"], filename_template=template)
        for split, entry in manifest["splits"].items()
        if "shard_lengths" in entry
    ]
    features = make_features(tuple(manifest["labels"]), manifest["multilabel"], manifest["media"])
    tfds.folder_dataset.write_metadata(
        data_dir=out, features=features, split_infos=splits, filename_template=template, check_data=False, version="1.0.0"
    )


def verify(out: Path, plan: Plan, manifest: dict, pool: ThreadPoolExecutor) -> None:
    """Reads everything back, both as TFDS and as source=packed do: bytes, labels, paths, counts; each content is opened and its first frame decoded.

    Raises:
      UserError: something is not as it was written.
    """
    import tensorflow_datasets as tfds

    entry = manifest["splits"][plan.split]
    records = open_packed(str(out), plan.split, unfinished=True)[1]
    data = tfds.builder_from_directory(out).as_data_source(split=plan.split)
    media, rows = manifest["media"], [row for name in plan.shards for row in read_part(out, name)["rows"]]

    def problem(i: int) -> str:
        target = plan.source.records.targets[rows[i]]
        try:
            content, ours, _ = records[i]
            theirs = data[i]
            if media == "video":
                Video(content).close()
            else:
                describe_image(content)
        except (DecodeError, RuntimeError) as error:  # RuntimeError: ArrayRecord's checksums
            return str(error).partition("\n")[0]
        same_label = np.array_equal(np.atleast_1d(theirs["label"]), np.atleast_1d(target[target >= 0])) and np.array_equal(ours, target)
        same_path = theirs["path"] == os.fsencode(plan.names[rows[i]]) and records.names[i] == plan.names[rows[i]]
        return "" if same_label and same_path and bytes(theirs[media]) == content else "it is not what was written"

    if not len(data) == len(records) == len(rows) == entry["packed"]:
        raise UserError(f"{out}: {plan.split} has {len(data)} records in place of {len(rows)}: remove the folder and pack again")
    counts = np.zeros(len(manifest["labels"]), np.int64)
    with tqdm(total=len(rows), desc=f"verify {plan.split}", unit=" files", delay=2, disable=None, leave=False) as progress:
        for i, wrong in enumerate(in_order(pool, problem, range(len(rows)), 64)):
            if wrong:
                shard = records.shards[records.index["shard"][i]]
                raise UserError(f"{out / shard}: {plan.names[rows[i]]}: {wrong}. Remove this shard and run the command again")
            np.add.at(counts, records.targets[i][records.targets[i] >= 0], 1)
            progress.update()
    if counts.tolist() != entry["counts"]:
        raise UserError(f"{out}: the classes of {plan.split} have not as many examples as were written: remove the folder and pack again")


def as_lines(manifest: dict, seconds: float) -> list[str]:
    lines = []
    for split, entry in manifest["splits"].items():
        if not entry.get("finished"):
            continue
        lines += [f"BAD  {bad['path']}: {bad['error']}" for bad in entry["bad"]]
        counts = dict(zip(manifest["labels"], entry["counts"], strict=True))
        fewest, most = min(counts, key=counts.get), max(counts, key=counts.get)
        what = f"{entry['packed']} of {entry['examples']} {manifest['media']}s in {len(entry['shards'])} shards, {len(entry['bad'])} bad"
        what += f", {entry['missing']} missing" if entry["missing"] else ""
        lines.append(f"{split:<8}  {what}; read back and compared")
        lines.append(f"{'':<8}  {len(counts)} classes of {counts[fewest]} ({fewest}) to {counts[most]} ({most})")
        lines.append(f"{'':<8}  {entry['original_bytes'] / 1e6:.1f} MB -> {entry['bytes'] / 1e6:.1f} MB")
    return [*lines, f"{'time':<8}  {seconds:.1f} s"]


if __name__ == "__main__":
    sys.exit(main())
