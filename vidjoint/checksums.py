"""Checksums of a folder's files, in a file of the folder: what tells whether they still are what was written."""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILE = "checksums.json"  # {file: [bytes, CRC-32]}
PIECE = 2**24  # bytes that are read at a time
THREADS = 4  # zlib lets other threads run


def write(folder: Path) -> None:
    """Writes the checksums of all files in the folders of `folder`; those beside these folders may still change."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.parent != folder)
    with open(folder / FILE, "w", encoding="utf-8") as file:
        json.dump(_sums(folder, names), file)
        file.flush()
        os.fsync(file.fileno())


def damage(folder: Path) -> str | None:
    """What is wrong with the files, which are all read; None if they are those that were written.

    Raises:
      FileNotFoundError: there are no checksums.
    """
    try:
        written = json.loads((folder / FILE).read_bytes())
        found = _sums(folder, written)
    except (ValueError, TypeError, NotADirectoryError) as error:
        return f"{FILE}: {str(error).splitlines()[0]}"
    wrong = [name for name in written if found[name] != written[name]]
    return f"{wrong[0]} {'can not be read' if found[wrong[0]] is None else 'is not what was written'}" if wrong else None


def _sums(folder: Path, names) -> dict[str, list[int] | None]:
    """Size in bytes and CRC-32 of files; None for one that can't be read."""

    def sums(name: str) -> list[int] | None:
        size = crc = 0
        try:
            with open(folder / name, "rb") as file:
                while piece := file.read(PIECE):
                    size, crc = size + len(piece), zlib.crc32(piece, crc)
        except (OSError, ValueError):  # ValueError: no name of a file
            return None
        return [size, crc]

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(sums, names), strict=True))
