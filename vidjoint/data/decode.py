"""What the decoding of videos and of pictures have in common: what is raised, what is allowed, and how a file is opened."""

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 8192 * 4352  # width x height; also bounds the memory of one decoder, at most some 16 such pictures
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}  # of pictures; FFmpeg has them under the same names


class DecodeError(Exception):
    """A file that cannot be used; the message is one line that says what is wrong with it."""


class NoMemory(DecodeError):
    """It takes more memory than there is, or than a decoding process may have."""

    def __init__(self, message: str = "decoding it takes more memory than allowed (data.decode_memory)"):
        super().__init__(message)


def open_file(file: str | Path | bytes) -> io.IOBase:
    """Opens a local file by its very name, so that no library sees a protocol, a pattern or an option in it."""
    if isinstance(file, (bytes, bytearray, memoryview)):
        return io.BytesIO(file)
    return open_regular(file)


def open_regular(file: str | Path) -> io.IOBase:
    """Opens a file; raises DecodeError for a folder, or a pipe that would block, and OSError."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise DecodeError("not a file")
    return open(file, "rb", buffering=0)


@contextlib.contextmanager
def one_line_reasons() -> Iterator[None]:
    """Turns whatever a decoding library raises into a DecodeError. Broad on purpose: on hostile files, libraries raise almost anything."""
    try:
        yield
    except DecodeError:
        raise
    except MemoryError:
        raise NoMemory from None
    except Exception as error:
        raise DecodeError(reason(error)) from None


def reason(error: Exception) -> str:
    """The first line of what a library says, or the error's name."""
    if isinstance(error, UnidentifiedImageError):
        return "no picture, or of an unknown kind"
    text = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return text[0] if text else type(error).__name__


def copy(picture: np.ndarray, into: np.ndarray) -> None:
    """Copies uint8[H, W, 3]; where pixels don't lie one after the other (mirrored, turned), NumPy is ten times as fast with one channel at a time."""
    if picture.strides[1:] == (3, 1):
        into[...] = picture
    else:
        for channel in range(3):
            into[..., channel] = picture[..., channel]
