"""Zip archives as folders of files: what they hold, and the bytes of one member, read by any threads and processes at once."""

import functools
import os
import struct
import weakref
import zipfile
import zlib
from pathlib import Path

from vidjoint.data.decode import DecodeError
from vidjoint.data.files import is_hidden
from vidjoint.errors import UserError

MOST_RATIO = 50  # how often its packed size what is in a zip (or .npz) may unpack to; pictures, videos and trained weights hardly shrink at all
FREE_RATIO = 64 << 20  # bytes for which the ratio does not count: a plain bitmap of one colour, or a small file of zeros, is fine
MOST_MEMBER = 4 << 30  # bytes of a member, unpacked: it is held in memory whole


def list_archive(path: Path) -> dict[str, tuple[int, int, int, int]]:
    """The members of a zip, hidden ones left out, and where each lies: offset of its local header, packed size, compression method, CRC-32.

    Raises:
      UserError: it is no zip, or packed in a way that `read_member` does not know.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if not any(map(is_hidden, info.filename.split("/")))]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, OverflowError, struct.error, EOFError) as error:  # of what is damaged
        raise UserError(f"{path} is neither a folder nor a zip that can be read ({error})") from None
    if any(info.flag_bits & 1 for info in members):
        raise UserError(f"{path} is encrypted: unpack it and name the folder")
    if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in members):
        raise UserError(f"{path} is packed by a rare method: unpack it and name the folder, or pack it again with `zip -0 -r`")
    return {info.filename: (info.header_offset, info.compress_size, info.compress_type, info.CRC) for info in members}


class OpenArchive:
    """A zip that is open for reading. It closes when neither the cache nor a reader in any thread holds it any more."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)  # a forked child may go on with it: `os.pread` moves no position
        weakref.finalize(self, os.close, self.descriptor).atexit = False


open_archive = functools.lru_cache(maxsize=16)(OpenArchive)


def read_member(archive: str, offset: int, size: int, method: int, crc: int) -> bytes:
    """Reads one member of a zip at its offset, without a shared file position.

    Raises:
      DecodeError: the member is damaged, or the archive can't be read any more.
    """
    try:
        opened = open_archive(archive)  # held here, so another thread's reading cannot close it
        header = os.pread(opened.descriptor, 30, offset)
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise DecodeError("the zip is damaged here: no member header")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        start, packed = offset + 30 + name_length + extra_length, b""
        if max(size, start) > os.fstat(opened.descriptor).st_size or size > MOST_MEMBER:
            raise DecodeError("the zip is damaged here: the member is larger than the archive, or than 4 GiB")
        while len(packed) < size and (piece := os.pread(opened.descriptor, size - len(packed), start + len(packed))):
            packed += piece
        content = _inflate(packed) if method == zipfile.ZIP_DEFLATED else packed
    except OSError as error:
        raise DecodeError(f"the zip can't be read any more: {error.strerror}") from None
    except zlib.error as error:
        raise DecodeError(f"the zip is damaged here: {error}") from None
    if zlib.crc32(content) != crc:
        raise DecodeError("the zip is damaged here: wrong checksum")
    return content


def _inflate(packed: bytes) -> bytes:
    """Unpacks a member, and no more of it than a picture or a video can have."""
    most = min(max(FREE_RATIO, MOST_RATIO * len(packed)), MOST_MEMBER)
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    content = unpacker.decompress(packed, most)
    if len(content) == most:
        raise DecodeError(f"refused: its {len(packed)} bytes unpack to {most} or more")
    if not unpacker.eof:
        raise DecodeError("the zip is damaged here: cut off")
    return content
