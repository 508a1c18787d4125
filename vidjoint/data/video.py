"""Video files to pixels: the frames shown at wanted times, upright, resized and cropped. Whatever is wrong with a file is a DecodeError.

Decoding runs on the calling thread (PyAV releases the GIL, so callers parallelise over files) and holds one clip and at most two decoded frames.
"""

import bisect
import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Self

import av
import numpy as np
from av.stream import Discard, Disposition
from av.video.reformatter import VideoReformatter

from vidjoint.data.decode import MAX_PIXELS, DecodeError, NoMemory, copy, one_line_reasons, open_file, reason
from vidjoint.data.packets import PacketsAhead
from vidjoint.data.transforms import Geometry

MAX_FRAMES = 50_000  # decoded for one clip: half an hour of a video that has no keyframes to jump to
MAX_RATE = 240  # frames per second; headers that claim more are checked against the packets

# Containers whose index can be trusted to find keyframes -> the time stamp that their index holds. Every other format is decoded from its start.
INDEX_STAMP = {"mov,mp4,m4a,3gp,3g2,mj2": "dts", "avi": "dts", "matroska,webm": "pts"}


@dataclass(frozen=True)
class VideoInfo:
    """What a video says of itself. Sizes are those of the picture as displayed, after rotation; pixels count as square."""

    width: int  # pixels
    height: int  # pixels
    duration: float  # seconds from the first displayed frame to the end of the last one, > 0
    fps: float  # frames per second, on average
    frames: int  # how many; an estimate where the file does not say


class Video:
    """An open video file.

    A frame is shown from its presentation time until the next frame's: at time t the picture is the last frame whose time is <= t; before the first
    frame it is the first, after the end the last. Times count from the first displayed frame, so edit lists and late first time stamps need no care.

    Attributes:
      info: VideoInfo.
      decoded: frames decoded so far, a measure of the work done.
    """

    def __init__(self, file: str | Path | bytes, max_pixels: int = MAX_PIXELS, max_frames: int = MAX_FRAMES):
        """Opens a local file, or one held in memory, and decodes its first frame.

        Args:
          max_pixels: width x height of its pictures above which it is refused.
          max_frames: how many frames `read` decodes, all calls together, before it gives up.

        Raises:
          DecodeError: no frame can be decoded, or pictures have more than `max_pixels` pixels (refused before decoding where the header tells).
        """
        self.decoded = 0
        self._file, self._max_pixels, self._max_frames = file, max_pixels, max_frames
        self._opened = contextlib.ExitStack()
        self._resizer = VideoReformatter()
        self._wanted = None  # the pts that read() was asked for, rising; None: all
        self._chooses = True  # pictures that are not wanted may be left out
        try:
            with one_line_reasons():
                self._stream_index = self._choose_stream()
                self.info = self._describe()
        except DecodeError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._current = self._ahead = self._frames = None
        self._opened.close()

    def read(self, times: np.ndarray, geometry: Geometry, interpolation: str = "bilinear") -> np.ndarray:
        """Returns the frames shown at `times`, as uint8[T, height, width, 3] RGB in the order asked.

        Args:
          times: float[T], seconds from the first displayed frame; any order, repeats allowed.
          geometry: resize, crop and flip of the upright picture.
          interpolation: how it is resized, one of INTERPOLATIONS.

        Raises:
          DecodeError: a wanted frame cannot be decoded. Damage after the last wanted frame does not matter.
        """
        times = np.asarray(times, np.float64)
        box_fits = 0 <= geometry.top <= geometry.resize[0] - geometry.height and 0 <= geometry.left <= geometry.resize[1] - geometry.width
        if not (times.ndim == 1 and np.isfinite(times).all() and box_fits):
            raise ValueError(f"times must be a finite vector and the crop lie in the picture: {times}, {geometry}")
        clip = np.empty((len(times), geometry.height, geometry.width, 3), np.uint8)
        # A thousandth of a tick absorbs the rounding of times that were computed from time stamps.
        ticks = np.floor(np.clip(times, 0, 1e8) / float(self._stream.time_base) + 1e-3)
        order = np.argsort(times, kind="stable")
        self._wanted = [self._first_pts + int(ticks[i]) for i in order]
        if self._partial:  # for an earlier read
            self._current = None
        done, row = None, None
        with one_line_reasons():
            for i, pts in zip(order, self._wanted, strict=True):
                self._move_to(pts)
                copy(clip[row] if self._current is done else self._picture(geometry, interpolation), clip[i])
                done, row = self._current, i
        return clip

    @property
    def time_base(self) -> Fraction:
        """Seconds in a tick of the file's time stamps."""
        return self._stream.time_base

    @property
    def seekable(self) -> bool:
        """Whether a later frame can be had without decoding all before it."""
        return self._seekable

    @property
    def began(self) -> float:
        """The time stamp of the first displayed frame in the file, in seconds; what accompanies the pictures counts from there, too."""
        return float(self._first_pts * self._stream.time_base)

    def frames(self, height: int, width: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Plays the whole video: yields (ticks, picture) of each frame that is ever shown, from ticks 0 on, rising.

        A frame is shown from its own ticks to the next one's. Pictures are upright, yuv420p, of height x width pixels, both even (bicubic), with the
        colour space and range of the file.

        Raises:
          DecodeError: a frame can't be decoded.
        """
        self._wanted = None
        with one_line_reasons():
            self._start(self._stream_index)
            ticks = 0
            while self._current is not None:
                position = self._next()
                if position is None and self._damage:
                    raise DecodeError(f"damaged after {float(ticks * self._stream.time_base):.2f} s: {self._damage}")
                after = None if position is None else max(ticks, position[0] - self._first_pts)
                if after != ticks:  # else the next frame takes its place at once
                    yield ticks, self._yuv(height, width)
                self._current, ticks = position, after

    # Opening

    def _choose_stream(self) -> int:
        """Opens the file on the first frame of the stream that a player would show, or of the next if that one has none. Returns its index."""
        self._open()
        streams = [s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            kinds = sorted({s.type for s in self._container.streams})
            raise DecodeError(f"no video in it ({', '.join(kinds)} only)" if kinds else "no video in it: it has no streams")
        best = self._container.streams.best("video")
        reasons = []
        for index in sorted((s.index for s in streams), key=lambda i: (best is None or i != best.index, i)):
            try:
                with one_line_reasons():
                    self._start(index)
                    return index
            except DecodeError as error:
                reasons.append(str(error))
        raise DecodeError(reasons[0])

    def _open(self) -> None:
        self.close()
        self._container = self._opened.enter_context(open_container(self._file, self._max_pixels))
        self._untouched = True

    def _start(self, index: int) -> None:
        """Stands on the first frame of stream `index`, in a file opened anew unless nothing has been read yet."""
        if not self._untouched:
            self._open()
        self._untouched = False
        stream = self._stream = self._container.streams[index]
        context = stream.codec_context
        if context is None:
            raise DecodeError("there is no decoder for its codec")
        self._check_size(context.width, context.height)
        self._chooses = self._chooses and context.name == "h264"  # which says of each picture whether others lean on it
        context.thread_type = "NONE"
        context.thread_count = 1
        context.options = _codec_options(self._max_pixels)
        for other in self._container.streams:
            if other is not stream:
                other.discard = Discard.all

        self._stamp = INDEX_STAMP.get(self._container.format.name)
        # AVI holds no presentation times. For these codecs FFmpeg makes some up, each the time of decoding of the next packet. Without B-frames the
        # picture's own is right; with them these times are in the order of decoding, but pictures come out rightly ordered all the same
        self._no_pts = self._container.format.name == "avi" and context.name in ("h264", "hevc")
        self._made_up = self._no_pts and context.has_b_frames
        if self._made_up:
            self._stamp, self._chooses = None, False
        if self._stamp == "pts":  # Matroska reads its list of keyframes at the first seek
            try:
                self._container.seek(stream.start_time or 0, stream=stream)
            except av.error.FFmpegError:  # not seekable: take it as it comes
                self._stamp = None
        wanted, self._wanted = self._wanted, None
        self._play()
        self._current = self._next()
        self._wanted = wanted
        if self._current is None:
            raise DecodeError(f"no frame can be decoded{': ' + self._damage if self._damage else ''}")
        self._first_pts = self._current[0]
        self._seekable = self._stamp is not None and self._first_key is not None
        if self._seekable:
            self._start_key, key_pts = self._first_key
            self._delay = max(0, key_pts - self._start_key)  # from the index's stamps to presentation times

    def _describe(self) -> VideoInfo:
        stream, container = self._stream, self._container
        frame = self._current[1]
        self._matrix = _display_matrix(frame)
        first = self._first_pts * stream.time_base
        duration, frames, rate = 0.0, stream.frames, stream.average_rate or stream.guessed_rate or 0
        if container.format.name == "avi" and (index := stream.index_entries) and 2 * index[-1].timestamp >= frames:
            frames = len(index)  # the header counts those that were dropped, too
        elif frames and container.format.name.startswith("mov"):
            frames = max(frames, len(stream.index_entries))  # the header counts those before the first fragment alone
        if stream.duration:
            start = self._first_pts if stream.start_time is None or self._made_up else stream.start_time
            end = start + stream.duration
            if self._seekable and self._container.format.name.startswith("mov"):
                end = self._checked_end(end)
            duration = float(end * stream.time_base - first)
        elif container.duration:  # from the first time stamp, but in Matroska from time 0
            start = 0 if self._stamp == "pts" else container.start_time or 0
            duration = float(Fraction(start + container.duration, av.time_base) - first)
        if duration <= 0 or not (frames > 0 or 0 < rate <= MAX_RATE):
            duration, frames = _scan(self._file, self._max_pixels, stream.index, self._first_pts)
        if duration <= 0:
            duration = max(frames, 1) / (float(rate) if 0 < rate <= MAX_RATE else 25.0)
        fps = frames / duration if frames > 0 else float(rate)
        width, height = (frame.height, frame.width) if _is_transposed(self._matrix) else (frame.width, frame.height)
        return VideoInfo(width, height, duration, fps, frames if frames > 0 else max(1, round(duration * fps)))

    def _checked_end(self, end: int) -> int:
        """When an MP4 ends, in ticks, given what its header says. That may add up what lies between the times of decoding, which, with B-frames and a
        variable rate, can end before the last pictures are shown."""
        stream, shown = self._stream, [(end - 1, 1)]
        if stream.codec_context.has_b_frames and stream.average_rate != stream.base_rate:
            with contextlib.suppress(av.error.FFmpegError), open_container(self._file, self._max_pixels) as container:
                container.seek(stream.index_entries[-1].timestamp, stream=container.streams[stream.index])  # to the last keyframe
                packets = container.demux(container.streams[stream.index])
                shown += [(packet.pts, max(packet.duration or 0, 1)) for packet in packets if packet.pts is not None and not packet.is_discard]
        return sum(max(shown))

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self._max_pixels:
            raise DecodeError(f"its pictures of {width} x {height} are larger than the {self._max_pixels} pixels allowed (data.max_pixels)")

    # Moving about. A position is (pts, frame): `_current`, and `_ahead` if the frame after it has been decoded.

    def _play(self) -> None:
        """Starts decoding where the container stands."""
        self._packets = PacketsAhead(self._demuxed())
        self._frames = self._decode()
        self._current = self._ahead = None
        self._given = set()  # pts of the wanted pictures that the decoder has been given
        self._partial = False  # not all pictures come out of the decoder, but those wanted do
        self._damage = ""  # why decoding ended early
        self._first_key = None  # index stamp and pts of the first keyframe read since
        self._reached = -(2**63)  # largest index stamp of a keyframe read since

    def _demuxed(self) -> Iterator[av.Packet]:
        for packet in self._container.demux(self._stream):
            if self._no_pts and not self._made_up:
                packet.pts = packet.dts
            yield packet

    def _decode(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yields (pts, frame) in order of display. Damage before the first frame is passed over: streams may begin between keyframes."""
        step = max(1, round(1 / (float(self._stream.time_base) * float(self._stream.guessed_rate or 25))))
        last = None
        context, drained = self._stream.codec_context, False
        for packet in self._packets:
            if packet.is_keyframe and packet.size and self._stamp:
                stamp = getattr(packet, self._stamp)
                if stamp is not None and packet.pts is not None:
                    self._first_key = self._first_key or (stamp, packet.pts)
                    self._reached = max(self._reached, stamp)
            chooses = self._chooses and self._wanted is not None and packet.size > 0
            wanted = not chooses or self._packets.may_show(packet, self._wanted)
            if wanted:
                self._given.add(packet.pts)
            drained = chooses and self._jumps_next()
            self._partial = self._partial or drained or not wanted
            context.skip_frame = "DEFAULT" if wanted or packet.is_keyframe else "NONREF"
            try:
                frames = packet.decode()
                if drained:  # no need to decode on until they come out
                    frames += context.decode(None)
            except av.error.FFmpegError as error:
                if last is not None:
                    raise
                self._damage = self._damage or reason(error)
                continue
            for frame in frames:
                self.decoded += 1
                self._check_size(frame.width, frame.height)
                stamp = frame.dts if self._made_up else frame.pts
                last = stamp if stamp is not None else (0 if last is None else last + step)
                yield last, frame
            if drained:
                return

    def _jumps_next(self) -> bool:
        """Whether the decoder has been given all pictures that are wanted before the next jump."""
        for i in range(self._place, len(self._wanted)):
            key = self._keyframe_before(self._wanted[i])
            if i > self._place and key is not None and key > self._reached:
                return True
            if self._packets.shown_at(self._wanted[i]) not in self._given:
                return False
        return True

    def _next(self) -> tuple[int, av.VideoFrame] | None:
        """The next frame, or None at the end; `_damage` then tells whether the file ended in order."""
        try:
            position = next(self._frames, None)
        except av.error.FFmpegError as error:
            self._damage = reason(error)
            return None
        if position is not None:
            self._damage = ""
        return position

    def _move_to(self, pts: int) -> None:
        """Makes `_current` the frame shown at `pts` (>= the first): plays on, or jumps if that is shorter or if it lies behind."""
        self._place = bisect.bisect_left(self._wanted, pts)
        if self._is_there(pts):
            return
        key = self._keyframe_before(pts)
        if self._current is None or pts < self._current[0] or (key is not None and key > self._reached):
            self._jump(pts)
        try:
            self._play_to(pts)
        except DecodeError:
            if not self._partial:
                raise
        if self._partial and not self._is_there(pts):  # time stamps that lie, or damage: never again in this file
            self._chooses = False
            self._jump(pts)
            self._play_to(pts)

    def _is_there(self, pts: int) -> bool:
        """Whether packets tell that `_current` is the frame shown at `pts`."""
        return self._chooses and self._current is not None and self._packets.shown_at(pts) == self._current[0]

    def _play_to(self, pts: int) -> None:
        while not self._is_there(pts):
            self._ahead = self._ahead or self._next()
            if self._ahead is None:
                now, frame = self._current
                step = frame.duration or 1 / (self.info.fps * float(self._stream.time_base))
                if self._damage and pts >= now + step:
                    raise DecodeError(f"damaged after {float((now - self._first_pts) * self._stream.time_base):.2f} s: {self._damage}")
                return
            if self._ahead[0] > pts:
                return
            if self.decoded > self._max_frames:
                raise DecodeError(f"more than {self._max_frames} frames would have to be decoded for one clip (data.max_frames)")
            self._current, self._ahead = self._ahead, None

    def _keyframe_before(self, pts: int) -> int | None:
        """The index stamp of the last keyframe shown at or before `pts`, as far as the index tells; None if it does not."""
        if not self._seekable:
            return None
        index = self._stream.index_entries
        entry = index.search_timestamp(pts - self._delay)
        return index[entry].timestamp if entry >= 0 else None

    def _jump(self, pts: int) -> None:
        """Stands on a keyframe at or before `pts`, or on the first frame of the file.

        A keyframe counts only if it comes out of the decoder first, as a keyframe, with its own presentation time: the frames shown after it are then
        what decoding from the start gives. If not (open groups of pictures whose first frames lean on earlier ones, indices that lie), the keyframe
        before it is tried; after three failures in one place the file is never jumped in again. In AVI its time must be the index's, too: FFmpeg
        tells it by counting chunks, and beside sound counts the empty ones before the keyframe twice.
        """
        limit = pts
        for _ in range(3):
            key = self._keyframe_before(limit)
            if key is None or key <= self._start_key:
                break
            try:
                self._container.seek(key + self._delay, stream=self._stream)
                self._play()
                self._current = self._next()
                while self._current and self._first_key and self._current[0] < self._first_key[1]:
                    self._current = self._next()
            except av.error.FFmpegError:
                self._current = None
            stamp, shown = self._first_key or (None, None)
            in_time = stamp == key or self._container.format.name != "avi"
            if in_time and self._current and self._current[0] == shown <= pts and self._current[1].key_frame:
                self._reached = max(self._reached, key)
                return
            limit = key - 1 + self._delay
        else:
            self._seekable = False
        seekable = self._seekable
        self._start(self._stream_index)
        self._seekable = seekable

    def _picture(self, geometry: Geometry, interpolation: str) -> np.ndarray:
        """The current frame as uint8[height, width, 3]: colour conversion and resize in one, then upright, crop, flip (views)."""
        height, width = geometry.resize
        if _is_transposed(self._matrix):
            height, width = width, height
        small = self._resizer.reformat(self._current[1], width=width, height=height, format="rgb24", interpolation=interpolation.upper(), threads=1)
        picture = _upright(small.to_ndarray(), self._matrix)
        picture = picture[geometry.top : geometry.top + geometry.height, geometry.left : geometry.left + geometry.width]
        return picture[:, ::-1] if geometry.flip else picture

    def _yuv(self, height: int, width: int) -> av.VideoFrame:
        """The current frame, whole and upright, as yuv420p."""
        frame = self._current[1]
        turned = _is_transposed(self._matrix)
        # YUV keeps its colour space; from RGB (colour space 0) it is made as read() takes it where a file doesn't say: BT.601, limited range
        colours = {"dst_colorspace": "itu601", "dst_color_range": "MPEG"} if frame.colorspace == 0 or frame.format.is_rgb else {}
        size = {"height": width, "width": height} if turned else {"height": height, "width": width}
        small = self._resizer.reformat(frame, format="yuv420p", interpolation="BICUBIC", threads=1, **size, **colours)
        if not (turned or self._matrix[0] < 0 or self._matrix[3] < 0):
            return small
        rows, columns = size["height"], size["width"]
        planes = small.to_ndarray().reshape(-1)
        luma, chroma = planes[: rows * columns].reshape(rows, columns), planes[rows * columns :].reshape(2, rows // 2, columns // 2)
        upright = [_upright(plane, self._matrix).ravel() for plane in (luma, *chroma)]
        picture = av.VideoFrame.from_ndarray(np.concatenate(upright).reshape(height * 3 // 2, width), format="yuv420p")
        picture.colorspace, picture.color_range = small.colorspace, small.color_range
        picture.color_primaries, picture.color_trc = small.color_primaries, small.color_trc
        return picture


# Files


@contextlib.contextmanager
def open_container(file: str | Path | bytes, max_pixels: int) -> Iterator[av.container.InputContainer]:
    with open_file(file) as opened:
        options = {**_codec_options(max_pixels), "protocol_whitelist": "none"}  # playlists may not open anything else
        try:
            container = av.open(opened, "r", buffer_size=1 << 16, options=options, metadata_errors="replace")
        except av.error.MemoryError:
            raise NoMemory from None
        except av.error.FFmpegError as error:
            raise DecodeError(f"no video, or damaged at its head: {reason(error)}") from None
        with container:
            yield container


def _codec_options(max_pixels: int) -> dict[str, str]:
    return {"max_pixels": str(2 * max_pixels)}  # a second line of defence, inside the decoder; twice, because coded sizes are padded


def _scan(file: str | Path | bytes, max_pixels: int, index: int, first_pts: int) -> tuple[float, int]:
    """Returns the duration in seconds (0 if packets have no times) and the number of frames of one stream, from its packets, without decoding."""
    frames, end = 0, first_pts
    with open_container(file, max_pixels) as container:
        stream = container.streams[index]
        with contextlib.suppress(av.error.FFmpegError):  # damaged: what can be read counts
            for packet in container.demux(stream):
                if packet.size and packet.pts is not None and packet.pts >= first_pts:
                    end = max(end, packet.pts + (packet.duration or 0))
                frames += packet.size > 0
        return float((end - first_pts) * stream.time_base), frames


# Rotation. A display matrix (a, b, c, d) puts source pixel (x, y) at (a x + c y, b x + d y), x to the right, y down.


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    try:
        side_data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV 18 knows not every kind of side data (multiview HEVC has others); the angle alone it can tell
        turn = math.radians(-frame.rotation)
        return (round(math.cos(turn)), round(math.sin(turn)), -round(math.sin(turn)), round(math.cos(turn)))
    if side_data is None:
        return (1, 0, 0, 1)
    a, b, _, c, d = np.frombuffer(bytes(side_data), np.int32)[:5].tolist()
    return (a, b, c, d)


def _is_transposed(matrix: tuple[int, int, int, int]) -> bool:
    a, b, c, d = matrix
    return abs(b) + abs(c) > abs(a) + abs(d)


def _upright(picture: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Turns and mirrors [H, W] or [H, W, 3] by the nearest of the eight right-angled cases; returns a view."""
    a, b, c, d = matrix
    if _is_transposed(matrix):
        picture, mirrored, upside_down = picture.swapaxes(0, 1), c < 0, b < 0
    else:
        mirrored, upside_down = a < 0, d < 0
    if mirrored:
        picture = picture[:, ::-1]
    return picture[::-1] if upside_down else picture
