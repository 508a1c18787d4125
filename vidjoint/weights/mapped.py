"""Files mapped into memory, and zip archives read in place.

Nothing is unpacked to disk, and no size that a file claims is believed before it is checked.
"""

import contextlib
import math
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vidjoint.errors import UserError

MOST_ENTRIES = 100_000  # tensors or members of one file; a ViT-g with its optimiser has some 3,000
MOST_DIRECTORY = 16 << 20  # bytes of a zip's table of contents
MOST_AXES = 32
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, then the lengths of the name and of the extra field


class BadFile(Exception):
    """What is wrong with the file being read: the rest of a sentence that begins with its name."""


class Mapped(mmap.mmap):
    """A file's bytes, copy-on-write: arrays over it may be written to, and the file stays as it is."""

    def read(self, size: int = -1) -> bytes:  # only zipfile reads this way, and most at once where it reads the table of contents
        if size > MOST_DIRECTORY:
            raise BadFile(f"is refused: the table of contents of this zip archive takes {size:,} bytes")
        return super().read(size)


class Member(NamedTuple):
    """A member of a zip archive: where its bytes lie, packed and unpacked sizes in bytes, whether it is deflated, and its checksum."""

    start: int
    packed: int
    size: int
    deflated: bool
    crc: int


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with `path` becomes a UserError of one line that begins with its name."""
    try:
        yield
    except BadFile as error:
        raise UserError(f"{path} {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def map_file(path: Path) -> Mapped:
    """Returns the file's bytes.

    Raises:
      BadFile: it is no regular file (links are followed), or empty.
      OSError: it does not exist or may not be read.
    """
    if path.exists() and not path.is_file():
        raise BadFile("is a folder" if path.is_dir() else "is no regular file")
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise BadFile("is empty")
        return Mapped(file.fileno(), 0, access=mmap.ACCESS_COPY)


def shown(value: object) -> str:
    """A name, number or shape out of a file, short and printable; the type alone of anything else, whose text could be endless."""
    match value:
        case str() | int() | float():
            text = str(value)
        case list() | tuple():
            text = "[" + ", ".join(str(size) if isinstance(size, int) else "?" for size in value[:9]) + "]"
        case _:
            text = type(value).__name__
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 100 else f"{text[:97]}..."


def count_elements(shape: tuple | list, what: str) -> int:
    """Number of elements of an array of that shape; BadFile where it is no list of sizes or could not exist in memory."""
    possible = len(shape) <= MOST_AXES and all(type(size) is int and 0 <= size < 2**48 for size in shape)
    if not possible or math.prod(max(size, 1) for size in shape) >= 2**48:
        raise BadFile(f"is damaged: {shown(what)} has the impossible shape {shown(shape)}")
    return math.prod(shape)


def array_at(data, start: int, dtype: np.dtype, count: int) -> np.ndarray:
    """`count` elements from byte `start` of `data`, without a copy where their place is an aligned one. The caller has checked the range."""
    if not count:
        return np.empty(0, dtype)
    if dtype.kind == "b":
        return np.frombuffer(data, np.uint8, count, start) != 0  # a byte such as 7 would make a bool that is neither
    array = np.frombuffer(data, dtype, count, start)
    return array if array.flags.aligned else array.copy()


def zip_members(data: Mapped) -> dict[str, Member]:
    """Returns the members of a zip archive by name.

    Raises:
      BadFile: it is no zip archive, is damaged, encrypted or packed by another method than deflate, or has two members of one name or too many.
    """
    try:
        with zipfile.ZipFile(data) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, struct.error, OSError) as error:
        raise BadFile(f"is no zip archive, or a damaged or incomplete one ({shown(str(error))})") from None
    if len(entries) > MOST_ENTRIES:
        raise BadFile(f"is refused: it has {len(entries):,} members")
    found, end = {}, 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name = shown(entry.filename)
        if entry.filename in found:
            raise BadFile(f"is damaged: two members are called {name}")
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BadFile(f"is refused: its member {name} is encrypted or packed by an unusual method")
        here = entry.header_offset
        signature, *lengths = LOCAL_HEADER.unpack(data[here : here + 30]) if 0 <= here <= len(data) - 30 else (b"",)
        start = here + 30 + sum(lengths)
        deflated = entry.compress_type == zipfile.ZIP_DEFLATED
        sizes_agree = deflated or entry.compress_size == entry.file_size
        if here < end or signature != b"PK\3\4" or start + entry.compress_size > len(data) or not sizes_agree:
            raise BadFile(f"is damaged: its member {name} does not lie where the table of contents says")
        end = start + entry.compress_size  # the next begins behind it: members that share bytes would unpack to any size
        found[entry.filename] = Member(start, entry.compress_size, entry.file_size, deflated, entry.CRC)
    return found


def unpack(data: Mapped, member: Member, name: str) -> memoryview:
    """The member's bytes, unpacked and compared with their checksum; never more of them than `member.size`, which the caller has found reasonable."""
    content = memoryview(data)[member.start : member.start + member.packed]
    if member.deflated:
        try:
            unpacked = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, max(member.size, 1))
        except zlib.error as error:
            raise BadFile(f"is damaged: its member {shown(name)} cannot be unpacked ({error})") from None
        content = memoryview(bytearray(unpacked))  # may be written to, as what lies in the file
    if len(content) != member.size or zlib.crc32(content) != member.crc:
        raise BadFile(f"is damaged: the bytes of its member {shown(name)} do not match their checksum")
    return content
