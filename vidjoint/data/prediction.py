"""Files without labels to decoded clips, for prediction: bad files become errors, images and videos may be mixed, videos may be cut into windows."""

import contextlib
import glob
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from vidjoint.data.decode import DecodeError
from vidjoint.data.examples import ClipSpec, describe, view_parts
from vidjoint.data.files import has_extension, is_media, walk
from vidjoint.data.video import Video
from vidjoint.errors import UserError

LARGE = 4096 * 2304  # pixels; files with larger pictures are decoded one at a time, for each can take a gigabyte
PIECE = 16  # windows of a video that are decoded by one thread, one after the other
PIECE_SECONDS = 120  # and at most so much of a video
_one_large = threading.Lock()


@dataclass(frozen=True)
class Window:
    """A file, or the part of a video from `start` to `end` seconds."""

    path: str
    start: float = 0.0
    end: float | None = None

    def times(self) -> dict:
        return {} if self.end is None else {"start": self.start, "end": self.end}


class Film:
    """A video whose decoder can't jump, kept open from one piece to the next: they are read in order, in whichever threads of this process."""

    def __init__(self):
        self._turn, self._next, self._opened = threading.Condition(), 0, contextlib.ExitStack()
        self._videos: dict[int, Video] = {}

    @contextlib.contextmanager
    def turn(self, number: int, last: bool) -> Iterator[None]:
        """Waits until the pieces before `number` are done."""
        with self._turn:
            self._turn.wait_for(lambda: self._next == number)
        try:
            yield
        finally:
            with self._turn:
                self._next += 1
                if last:
                    self._opened.close()
                self._turn.notify_all()

    def video(self, kind: int, path: str, clip: ClipSpec) -> Video:
        """Each kind of clip has a decoder of its own, which goes forward only."""
        if kind not in self._videos:
            self._videos[kind] = self._opened.enter_context(Video(path, clip.max_pixels, clip.max_frames))
        self._videos[kind].decoded = 0  # the limit is for each piece
        return self._videos[kind]


@dataclass(frozen=True)
class Piece:
    """Windows of one file that are decoded together."""

    windows: tuple[Window, ...]
    film: Film | None = None
    number: int = 0  # among the pieces of the film
    last: bool = True


@dataclass(frozen=True)
class Row:
    """A decoded window."""

    number: int  # its place in the order asked, from 0
    window: Window
    kind: int  # which of the clip specs of its file
    kinds: int  # how many these are: a window has so many rows
    pixels: np.ndarray | None  # uint8[V, T, H, W, 3]; None if it can't be read
    error: str = ""  # then why, in one line


def list_files(names: Iterable[str]) -> list[str]:
    """The names as they are, but for folders and patterns: a folder stands for the images and videos in it, at any depth, sorted, without hidden
    ones; a pattern (`*`, `?`, `[..]`, and `**` for folders at any depth) for those that it fits. A file that is named twice counts once.

    Raises:
      UserError: folders that can't be listed, folders and patterns without an image or video.
    """
    files, problems = {}, []
    for name in names:
        if name.startswith("~"):
            name = os.path.expanduser(name)
        try:
            if os.path.isdir(name):
                inside = _media_in(name)
            elif not os.path.lexists(name) and glob.has_magic(name):
                found = sorted(glob.iglob(name, recursive=True))
                inside = [path for each in found for path in ([each] if is_media(each) else _media_in(each) if os.path.isdir(each) else [])]
            else:
                inside = [name]
        except UserError as error:
            problems += error.lines
            continue
        if not inside:
            problems.append(f"there are no images or videos in {name}: name another folder or pattern, or files themselves")
        files.update(dict.fromkeys(inside))
    if problems:
        raise UserError(*problems)
    return list(files)


def _media_in(folder: str) -> list[str]:
    return [os.path.join(folder, path) for path in walk(folder) if is_media(path)]


def whole_files(paths: Iterable[str]) -> Iterator[Piece]:
    return (Piece((Window(str(path)),)) for path in paths)


def cut_windows(path: str, length: float, stride: float, clip: ClipSpec, most: int = PIECE) -> Iterator[Piece]:
    """Windows of `length` seconds every `stride` seconds, as many as fit; the whole file if none does, if it is an image, or if it can't be read.

    Windows that lie side by side or overlap are decoded together, up to `most`, so that a frame which several of them show is decoded once.
    """
    duration, film = 0.0, None
    if not has_extension(path, "image") or has_extension(path, "video"):
        try:
            info, seekable = describe(path, clip)
            if info.frames > 1:
                duration = info.duration
            if not seekable and info.width * info.height <= LARGE:
                film = Film()
        except DecodeError:
            duration = 0.0
    if duration < length:
        yield Piece((Window(path),))
        return
    count = int((duration - length + 1e-6) / stride) + 1  # what rounding takes off
    most = max(1, min(most, int(PIECE_SECONDS / max(stride, length))))
    for number, first in enumerate(range(0, count, most)):
        starts = range(first, min(first + most, count))
        windows = tuple(Window(path, round(i * stride, 6), round(i * stride + length, 6)) for i in starts)
        yield Piece(windows, film, number, starts.stop == count)


def decoded(
    pieces: Iterable[Piece], clips: Callable[[str], tuple[ClipSpec, ...]], temporal: int, spatial: int, threads: int, ahead: int
) -> Iterator[Row]:
    """Yields the rows of every window, in order; decodes in `threads` threads, and holds no more rows than `ahead`, or than those of
    `threads` + 1 pieces.

    `clips` tells for a path how it is to be read: each way gives a row. A file is an image or a video by its extension, or else what the task's files
    are. An image gives a clip of one frame, whatever the task.
    """
    with ThreadPoolExecutor(threads, "decode") as pool:
        waiting: deque[Future] = deque()
        sizes: deque[int] = deque()
        try:
            number = 0
            for piece in pieces:
                specs = clips(piece.windows[0].path)
                sizes.append(len(specs) * len(piece.windows))
                waiting.append(pool.submit(_load, number, piece, specs, temporal, spatial))
                number += sizes[-1]
                while sum(sizes) >= ahead and len(waiting) > threads:
                    yield from waiting.popleft().result()
                    sizes.popleft()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def group(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Gathers rows of one kind and shape into lists of `size`, so that images between videos do not break batches up; rows in error come alone.

    No row waits for more than 2 x size later ones, so some lists are shorter.
    """
    waiting: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.pixels is None:
            yield [row]
        else:
            key = (row.kinds, row.kind, row.pixels.shape)
            waiting.setdefault(key, []).append(row)
            if len(waiting[key]) == size:
                yield waiting.pop(key)
        for late in [key for key, held in waiting.items() if row.number - held[0].number >= 2 * size]:
            yield waiting.pop(late)
    yield from waiting.values()


def _load(number: int, piece: Piece, clips: tuple[ClipSpec, ...], temporal: int, spatial: int) -> list[Row]:
    """The rows of a piece, window by window."""
    with piece.film.turn(piece.number, piece.last) if piece.film else contextlib.nullcontext():
        read = [_read(piece, kind, clip, temporal, spatial) for kind, clip in enumerate(clips)]
    rows = [(window, kind, *read[kind][i]) for i, window in enumerate(piece.windows) for kind in range(len(clips))]
    return [Row(number + i, window, kind, len(clips), pixels, error) for i, (window, kind, pixels, error) in enumerate(rows)]


def _read(piece: Piece, kind: int, clip: ClipSpec, temporal: int, spatial: int) -> list[tuple[np.ndarray | None, str]]:
    """(pixels, "") or (None, error) of each window."""
    path, media = piece.windows[0].path, clip.settings.media
    other = {"image": "video", "video": "image"}[media]
    if has_extension(path, other) and not has_extension(path, media):
        media = other
    if media == "image":
        clip, temporal = replace(clip, frames=1), 1
    parts = [None if window.end is None else (window.start, window.end) for window in piece.windows]
    try:
        opened = piece.film and piece.film.video(kind, path, clip)
        try:
            limited = replace(clip, max_pixels=min(LARGE, clip.max_pixels), limits=None if opened else clip.limits)
            pixels = view_parts({media: path}, limited, temporal, spatial, parts, opened)
        except DecodeError:
            if clip.max_pixels <= LARGE or opened:
                raise
            with _one_large:
                pixels = view_parts({media: path}, clip, temporal, spatial, parts)
        return [(part, "") for part in pixels]
    except (DecodeError, MemoryError) as error:
        if len(piece.windows) > 1:  # some of them may be good
            return [_read(replace(piece, windows=(window,)), kind, clip, temporal, spatial)[0] for window in piece.windows]
        return [(None, " ".join(str(error).split()) or type(error).__name__)]
