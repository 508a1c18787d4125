"""A source: examples of one split by number, (file or bytes, label, name), small in memory. Nothing is decoded here."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vidjoint.data.archives import read_member


@dataclass(repr=False, eq=False)
class Source:
    """Examples of one split of one task, by number. Cheap to index, small in memory, picklable.

    `source[i]` is {"video" | "image": path or encoded bytes, "label": int in 0..C-1, "name": str for logs}.
    In a multilabel task a label is int32[K], filled up by -1; K is the most labels that any file of the lists has, at least 1.
    Reading a damaged member of a zip, or one of a zip that is gone, raises DecodeError.
    """

    media: str  # video or image: the key of an example's content
    labels: tuple[str, ...]  # C class names; "0", "1", .. where only numbers are known
    records: "FileRecords | ZipRecords | TfdsRecords"  # records[i] -> (path or bytes, label, name)
    origin: str  # where it came from, for logs
    missing: int = 0  # files that a published list names and that this copy lacks
    warnings: list[str] = field(default_factory=list)  # oddities that stop nobody; the caller logs them

    @property
    def label_shape(self) -> tuple[int, ...]:
        """() or, in a multilabel task, (K,)."""
        return getattr(self.records, "targets", np.zeros(0)).shape[1:]

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
        self.targets = np.asarray(targets, np.int32)  # [N] or [N, K]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[str, int | np.ndarray, str]:
        name, target = self.names[i], self.targets[i]
        return name, target if target.ndim else int(target), name

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
        self.where = where  # int64[N, 4], see `list_archive`

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
