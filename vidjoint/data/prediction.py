"""Files without labels to decoded clips, for prediction: bad files become errors, images and videos may be mixed, videos may be cut into windows."""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from vidjoint.data.examples import ClipSpec, views
from vidjoint.data.files import has_extension, walk
from vidjoint.data.video import DecodeError, Video
from vidjoint.errors import UserError

LARGE = 4096 * 2304  # pixels; files with larger pictures are decoded one at a time, for each can take a gigabyte
_one_large = threading.Lock()


@dataclass(frozen=True)
class Window:
    """A file, or the part of a video from `start` to `end` seconds."""

    path: str
    start: float = 0.0
    end: float | None = None

    def times(self) -> dict:
        return {} if self.end is None else {"start": self.start, "end": self.end}


@dataclass(frozen=True)
class Row:
    """A decoded window."""

    number: int  # its place in the order asked, from 0
    window: Window
    pixels: np.ndarray | None  # uint8[V, T, H, W, 3]; None if it can't be read
    error: str = ""  # then why, in one line


def list_files(names: Iterable[str]) -> list[str]:
    """The names as they are, but for folders: each stands for the images and videos in it, at any depth, sorted, without hidden ones.

    Raises:
      UserError: folders that can't be listed or hold no image or video.
    """
    files, problems = [], []
    for name in names:
        if name.startswith("~"):
            name = os.path.expanduser(name)
        if not os.path.isdir(name):
            files.append(name)
            continue
        try:
            inside = [os.path.join(name, path) for path in walk(name) if has_extension(path, "video") or has_extension(path, "image")]
            problems += [] if inside else [f"there are no images or videos in the folder {name}: name another"]
            files += inside
        except UserError as error:
            problems += error.lines
    if problems:
        raise UserError(*problems)
    return files


def cut_windows(path: str, length: float, stride: float, max_pixels: int) -> Iterator[Window]:
    """Windows of `length` seconds every `stride` seconds, as many as fit; the whole file if none does, if it is an image, or if it can't be read."""
    try:
        with Video(path, max_pixels) as video:
            duration = video.info.duration if video.info.frames > 1 else 0.0
    except DecodeError:
        duration = 0.0
    if duration < length:
        yield Window(path)
    count = 0
    while count * stride + length <= duration + 1e-6:  # what rounding takes off
        yield Window(path, round(count * stride, 6), round(count * stride + length, 6))
        count += 1


def decoded(windows: Iterable[Window], clip: ClipSpec, temporal: int, spatial: int, threads: int, ahead: int) -> Iterator[Row]:
    """Yields every window as a row, in order; decodes in `threads` threads and holds at most `ahead` rows, however many windows there are.

    A file is an image or a video by its extension, or else what the task's files are. An image gives a clip of one frame, whatever the task.
    """
    with ThreadPoolExecutor(threads, "decode") as pool:
        waiting = deque()
        try:
            for number, window in enumerate(windows):
                waiting.append(pool.submit(_load, number, window, clip, temporal, spatial))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def group(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Gathers rows of one clip shape into lists of `size`, so that images between videos do not break batches up; rows in error come alone.

    No row waits for more than 2 x size later ones, so some lists are shorter.
    """
    waiting: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.pixels is None:
            yield [row]
        else:
            shape = row.pixels.shape
            waiting.setdefault(shape, []).append(row)
            if len(waiting[shape]) == size:
                yield waiting.pop(shape)
        for late in [shape for shape, held in waiting.items() if row.number - held[0].number >= 2 * size]:
            yield waiting.pop(late)
    yield from waiting.values()


def _load(number: int, window: Window, clip: ClipSpec, temporal: int, spatial: int) -> Row:
    media = clip.settings.media
    other = {"image": "video", "video": "image"}[media]
    if has_extension(window.path, other) and not has_extension(window.path, media):
        media = other
    if media == "image":
        clip, temporal = replace(clip, frames=1), 1
    part = None if window.end is None else (window.start, window.end)
    try:
        try:
            pixels = views({media: window.path}, replace(clip, max_pixels=min(LARGE, clip.max_pixels)), temporal, spatial, part)
        except DecodeError:
            if clip.max_pixels <= LARGE:
                raise
            with _one_large:
                pixels = views({media: window.path}, clip, temporal, spatial, part)
        return Row(number, window, pixels)
    except (DecodeError, MemoryError) as error:
        return Row(number, window, None, " ".join(str(error).split()) or type(error).__name__)
