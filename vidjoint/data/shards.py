"""The shards of a packed dataset: examples encoded by several processes, written one ArrayRecord file after the other, each whole or not there."""

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vidjoint.data import isolated
from vidjoint.data.decode import DecodeError
from vidjoint.data.encode import Encoding, content_of, encode_image, encode_video
from vidjoint.data.facts import facts_of
from vidjoint.data.packed import end_of, find_records
from vidjoint.data.records import Source
from vidjoint.output_files import UNFINISHED, write_whole

NAME = "packed"  # of the TFDS data set
PARTS = "parts"  # folder for what is known of each shard
LIMITS = isolated.Limits(3600.0, 4 << 30)  # of the child process that decodes and encodes a file, be it a long film


@dataclass(frozen=True)
class Plan:
    """One split: which example lands in which shard depends on the list and on `shard_size` alone."""

    split: str
    source: Source
    names: list[str]  # paths of the originals, from the folder that holds them all
    origin: str  # that folder
    shard_size: int

    @property
    def shards(self) -> list[str]:
        count = -(-len(self.source) // self.shard_size)
        return [f"{NAME}-{self.split}.array_record-{i:05d}-of-{count:05d}" for i in range(count)]

    def rows(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.source)))

    @property
    def hash(self) -> str:
        """Tells lists apart: paths, labels, their order."""
        digest = hashlib.sha256("\0".join(self.names).encode("utf-8", "surrogateescape"))
        digest.update(np.ascontiguousarray(self.source.records.targets, np.int32).tobytes())
        return digest.hexdigest()


def write_split(out: Path, plan: Plan, how: Encoding | None, workers: int) -> None:
    """Writes the shards of a split that are not there yet. A shard has its name only once it is whole."""
    shards = plan.shards
    todo = [i for i, name in enumerate(shards) if read_part(out, name) is None]
    rows = [row for shard in todo for row in plan.rows(shard)]
    done = len(plan.source) - len(rows)
    with (
        encoder(plan.source, how, min(workers, len(rows)), rows) as encoded,
        tqdm(total=len(plan.source), initial=done, desc=f"pack {plan.split}", unit=" files", delay=2, disable=None, leave=False) as progress,
    ):
        for shard in todo:
            write_shard(out, plan, shards[shard], itertools.islice(encoded, len(plan.rows(shard))), progress)


@contextlib.contextmanager
def encoder(source: Source, how: Encoding | None, workers: int, rows: list[int]) -> Iterator[Iterator[tuple[int, int, bytes | str]]]:
    """`encode` of each row, in order, by so many processes: two threads that encode were no faster than one."""
    if workers < 2:
        yield (encode(source, row, how) for row in rows)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, start_worker, (source, how, os.getpid())) as pool:
        yield in_order(pool, encode_here, rows, 3 * workers)


def start_worker(source: Source, how: Encoding | None, parent: int) -> None:
    """Readies a worker process, which ends with its parent however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent sees to the workers
    encode_here.settings = source, how

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def encode_here(row: int) -> tuple[int, int, bytes | str]:
    source, how = encode_here.settings
    return encode(source, row, how)


def in_order(pool: Executor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """Yields function(item) for each item, in order, with at most `ahead` of them under way or waiting to be taken."""
    items, running = iter(items), deque()
    try:
        running.extend(pool.submit(function, item) for item in itertools.islice(items, ahead))
        while running:
            yield running.popleft().result()
            running.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
    finally:
        for future in running:
            future.cancel()


def encode(source: Source, row: int, how: Encoding | None) -> tuple[int, int, bytes | str]:
    """The row, the size of its file in bytes (0: unknown) and what to store of it, or in words why it can't be used."""
    try:
        media = source.media
        file = source[row][media]
        size = len(file) if isinstance(file, bytes) else os.path.getsize(file)
        guarded = functools.partial(isolated.call, LIMITS, source.name(row))
        local = file if isinstance(file, bytes) else os.path.abspath(file)
        if how is None:
            guarded(facts_of, local, media)  # all of it can be decoded
            return row, size, content_of(file)
        return row, size, guarded(encode_video if media == "video" else encode_image, local, how)
    except (DecodeError, OSError) as error:
        return row, 0, getattr(error, "strerror", None) or str(error)


def write_shard(out: Path, plan: Plan, name: str, encoded: Iterable[tuple[int, int, bytes | str]], progress: tqdm) -> None:
    """Writes one shard and, beside it, what is known of its records."""
    from array_record.python.array_record_module import ArrayRecordWriter

    records, bad, original = [], [], 0
    beside = out / (UNFINISHED + name)
    serialize = make_serializer(tuple(plan.source.labels), plan.source.records.targets.ndim > 1, plan.source.media)
    writer = ArrayRecordWriter(str(beside), "group_size:1,uncompressed")  # encoded pictures don't shrink further; a record at a time is read
    try:
        for row, size, content in encoded:
            progress.update()
            if isinstance(content, str):
                bad.append([row, content])
                continue
            record = serialize(content, plan.source.records.targets[row], plan.names[row])
            writer.write(record)
            records.append((row, len(record), record.index(content), len(content), zlib.crc32(content)))
            original += size
    finally:
        writer.close()
    chunks = find_records(beside, len(records))
    begins = [end_of(start, body - length + where) for (start, body), (_, length, where, *_) in zip(chunks, records, strict=True)]
    part = {"bytes": beside.stat().st_size, "original_bytes": original, "bad": bad, "rows": [record[0] for record in records]}
    part |= {"begin": begins, "size": [record[3] for record in records], "crc": [record[4] for record in records]}
    descriptor = os.open(beside, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    write_whole(out / PARTS / f"{name}.json", json.dumps(part).encode())
    beside.rename(out / name)


def read_part(out: Path, name: str) -> dict | None:
    """What is known of a shard, None if it is not whole."""
    try:
        part = json.loads((out / PARTS / f"{name}.json").read_bytes())
        return part if (out / name).stat().st_size == part["bytes"] else None
    except (OSError, ValueError):
        return None


def make_features(labels: tuple[str, ...], multilabel: bool, media: str):
    """What a record holds, in TFDS's terms: {media: bytes, "label": class or classes, "path": of the original}."""
    import tensorflow_datasets as tfds

    label = tfds.features.ClassLabel(names=list(labels))
    label = tfds.features.Sequence(label) if multilabel else label
    return tfds.features.FeaturesDict({media: tfds.features.Scalar(np.object_), "label": label, "path": tfds.features.Text()})


def make_serializer(labels: tuple[str, ...], multilabel: bool, media: str) -> Callable[[bytes, np.ndarray, str], bytes]:
    import tensorflow_datasets as tfds

    features = make_features(labels, multilabel, media)
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())

    def serialize(content, target, path):
        label = target[target >= 0].tolist() if multilabel else int(target)
        return serializer.serialize_example(features.encode_example({media: content, "label": label, "path": os.fsencode(path)}))

    return serialize
