"""Packed datasets: a folder of ArrayRecord shards, written by `vidjoint.pack`, that lies on disk or behind a URL.

Any TFDS reader opens the shards. Here they are read through an index of where in a shard each video or picture lies: one request of just these
bytes, from a file or, by fsspec, from a store such as gs://, s3:// or https://, without TensorFlow and without fetching whole shards.

  pack.json        what was packed and how: settings, class names, counts, files that could not be used
  index-train.npz  for each example of a split: shard, place, checksum, labels, path of the original
  packed-train.array_record-00000-of-00012, features.json, dataset_info.json: the TFDS data set
"""

import functools
import io
import json
import os
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vidjoint.data.archives import OpenArchive
from vidjoint.data.decode import DecodeError
from vidjoint.data.records import Names
from vidjoint.errors import UserError

MANIFEST = "pack.json"
FORMAT = 1  # of manifest and index
# An ArrayRecord is a Riegeli file: blocks, each with a header, through which chunks run on, each with a header of its own.
BLOCK, BLOCK_HEADER, CHUNK_HEADER = 1 << 16, 24, 40  # bytes
PAUSES = (1.0, 5.0)  # seconds before a remote read is tried again

open_shard = functools.lru_cache(maxsize=256)(OpenArchive)


def name_split(what: str) -> tuple[str, str]:
    """The folder or URL, and the split ("" if there is none), of FOLDER[:split] or URL[:split]."""
    named = os.path.isfile(os.path.join(what, MANIFEST))  # a folder may have a colon in its name
    match = None if named else re.fullmatch(r"(.+?):([A-Za-z]\w*)", what, re.DOTALL)
    return match.groups() if match else (what, "")


def is_packed(what: str) -> bool:
    """Whether FOLDER[:split] or URL[:split] names a packed dataset; every URL does."""
    return is_url(what) or os.path.isfile(os.path.join(name_split(what)[0], MANIFEST))


class PackedRecords:
    """Examples of one split of a packed dataset: the content of an example is its bytes."""

    def __init__(self, folder: str, shards: Sequence[str], index: dict[str, np.ndarray], names: Names | None = None):
        self.folder, self.shards = folder, tuple(shards)
        self.index = {key: index[key] for key in ("shard", "begin", "size", "crc")}  # int32, int64, int64, uint32 [N]
        self.targets = index["target"]  # int32[N] or [N, K]
        self.names = names or Names(index["names"].tobytes().decode("utf-8", "surrogateescape").split("\0"))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[bytes, int | np.ndarray, str]:
        shard, begin, size, crc = (int(column[i]) for column in self.index.values())
        try:
            content = read_through(functools.partial(read_range, self.folder, self.shards[shard]), begin, size)
        except OSError as error:
            raise DecodeError(f"{self.shards[shard]} can't be read: {getattr(error, 'strerror', None) or error}") from None
        if zlib.crc32(content) != crc:
            raise DecodeError(f"{self.shards[shard]} is damaged here: wrong checksum")
        target = self.targets[i]
        return content, target if target.ndim else int(target), self.name(i)

    def name(self, i: int) -> str:
        return f"{self.folder}/{self.names[i]}"

    def select(self, rows: np.ndarray) -> "PackedRecords":
        index = {key: column[rows] for key, column in self.index.items()}
        return PackedRecords(self.folder, self.shards, index | {"target": self.targets[rows]}, Names([self.names[i] for i in rows]))


# Files and URLs


def is_url(folder: str) -> bool:
    return "://" in folder


def read_range(folder: str, name: str, begin: int, end: int) -> bytes:
    """The bytes from `begin` to `end` of a file in a folder or behind a URL, fewer if it ends before. Remote reads that fail are tried three times.

    Raises:
      OSError: it can't be read.
    """
    if not is_url(folder):
        shard, pieces = open_shard(os.path.join(folder, name)), []
        while begin < end and (piece := os.pread(shard.descriptor, end - begin, begin)):
            pieces.append(piece)
            begin += len(piece)
        return b"".join(pieces)
    return _fetch(folder, name, begin, end)


def read_whole(folder: str, name: str) -> bytes:
    """A whole small file of a folder or behind a URL. Raises OSError if that fails."""
    return _fetch(folder, name) if is_url(folder) else Path(folder, name).read_bytes()


def _fetch(url: str, name: str, begin: int | None = None, end: int | None = None) -> bytes:
    system, path = _file_system(url)
    for pause in (*PAUSES, None):
        try:
            return system.cat_file(f"{path.rstrip('/')}/{name}", begin, end)
        except FileNotFoundError:
            raise
        except Exception as error:  # each kind of store has errors of its own
            if pause is None:
                raise OSError(str(error) or type(error).__name__) from None
            time.sleep(pause)


@functools.lru_cache(maxsize=16)
def _file_system(url: str):
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:  # the store's own package
        raise UserError(f"{url} needs a package: {error}") from None
    except ValueError as error:  # no such protocol
        raise UserError(f"{url} can't be opened: {error}") from None


def open_manifest(folder: str) -> dict:
    """Reads what a packed dataset says of itself.

    Raises:
      UserError: it is none, or can't be read, or was written by a later version.
    """
    try:
        manifest = json.loads(read_whole(folder, MANIFEST))
        version = manifest["format"]
    except FileNotFoundError:
        raise UserError(f"{folder} has no {MANIFEST}: name a folder (or its URL) that python -m vidjoint.pack has written") from None
    except OSError as error:
        raise UserError(f"{folder} can't be read: {getattr(error, 'strerror', None) or error}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder}/{MANIFEST} is damaged: pack the dataset again") from None
    if version != FORMAT:
        raise UserError(f"{folder} was packed by another version of vidjoint (format {version}, here {FORMAT}): pack it again")
    return manifest


def open_packed(folder: str, split: str, unfinished: bool = False) -> tuple[dict, PackedRecords]:
    """Opens one split of a packed dataset, `unfinished` too if asked. Returns its manifest and its records.

    Raises:
      UserError: it is none, has no such split, or is not finished.
    """
    manifest = open_manifest(folder)
    splits = manifest["splits"]
    if split not in splits:
        raise UserError(f"{folder} has no split {split!r}: choose one of {', '.join(splits)}, as in {folder}:{next(iter(splits))}")
    if not (splits[split].get("finished") or unfinished):
        raise UserError(f"{folder}: packing {split} has not finished: run its python -m vidjoint.pack again, which goes on where it stopped")
    try:
        with np.load(io.BytesIO(read_whole(folder, f"index-{split}.npz"))) as index:
            return manifest, PackedRecords(folder, splits[split]["shards"], dict(index))
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{folder}/index-{split}.npz can't be read ({error}): run python -m vidjoint.pack again, which writes it anew") from None


# Places in a shard


def read_through(read: Callable[[int, int], bytes], begin: int, size: int) -> bytes:
    """`size` bytes that start at `begin` in a Riegeli file and run through its blocks; `read(begin, end)` gives bytes of the file as they lie."""
    raw = read(begin, end_of(begin, size))
    pieces, at = [], begin
    while at < begin + len(raw):
        at += max(0, BLOCK_HEADER - at % BLOCK)
        stop = min(at - at % BLOCK + BLOCK, begin + len(raw))
        pieces.append(raw[at - begin : stop - begin])
        at = stop
    return b"".join(pieces)


def end_of(begin: int, size: int) -> int:
    """Where `size` bytes that start at `begin` end, block headers between them counted."""
    begin += max(0, BLOCK_HEADER - begin % BLOCK)
    before = begin % BLOCK - BLOCK_HEADER  # bytes of content in the block, before these
    headers = max(0, before + size - 1) // (BLOCK - BLOCK_HEADER)
    return begin + size + headers * BLOCK_HEADER


def find_records(file: Path, count: int) -> list[tuple[int, int]]:
    """Where the first `count` records of a shard lie, written uncompressed and each in a chunk of its own.

    Returns:
      Of each chunk, where its body starts in the file and how many bytes it holds, of which the record is the last.

    Raises:
      OSError: the file is not whole.
    """
    chunks, at = [], 0
    with open(file, "rb") as shard:

        def read(begin, end):
            shard.seek(begin)
            return shard.read(end - begin)

        while len(chunks) < count:
            header = read_through(read, at, CHUNK_HEADER)
            if len(header) < CHUNK_HEADER:
                raise OSError(f"{file} holds {len(chunks)} of {count} records")
            start, length = end_of(at, CHUNK_HEADER), int.from_bytes(header[8:16], "little")
            if header[24:25] == b"r":  # a chunk of records
                chunks.append((start, length))
            at = end_of(start, length)
    return chunks
