"""Videos and pictures written anew, small and fast to seek in: what `vidjoint.pack` stores. The same file and settings give the same bytes."""

import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import av
from av.video.frame import PictureType
from PIL import Image

from vidjoint.data.decode import MAX_PIXELS, DecodeError
from vidjoint.data.image import describe_image, read_image
from vidjoint.data.transforms import Geometry
from vidjoint.data.video import Video

FINEST_TICK = 1_000_000  # per second; finer time stamps than these are rounded
KEPT_FORMATS = ("JPEG", "PNG", "WEBP")  # a small picture in one of these stays as it is, byte for byte


Edit = Callable[[float, av.VideoFrame], av.VideoFrame]
Sound = Callable[[av.container.OutputContainer], Callable[[float], None]]


@dataclass(frozen=True)
class Encoding:
    """How examples are written."""

    short_side: int = 256  # pixels; larger pictures are shrunk to it, smaller ones keep their size
    gop: int = 8  # frames from one keyframe to the next, at most
    crf: int = 20  # x264's constant quality: lower is better and larger
    preset: str = "veryfast"  # x264's
    tune: str = "fastdecode"  # x264's: no arithmetic coding, no deblocking; half as fast again to read for a tenth more bytes (docs/performance.md)
    quality: int = 95  # of JPEG
    max_pixels: int = MAX_PIXELS  # width x height above which a file is refused


def encode_video(file: str | bytes, how: Encoding) -> bytes:
    """Writes a video anew as MP4 with H.264, upright and without sound: the frame shown at any time is the one that `file` shows then.

    No B-frames, so that time stamps need no edit list and any keyframe can be the start. Odd sides lose a pixel: H.264's colours need even ones.

    Raises:
      DecodeError: a frame can't be decoded, or the file holds far fewer than it claims.
    """
    with Video(file, how.max_pixels) as video:
        info = video.info
        width, height = (2 * max(1, side // 2) for side in shrink(info.width, info.height, how.short_side))
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as out:
            count = transcode(video, out, how, height, width)
        if 2 * count < info.frames:
            raise DecodeError(f"it ends early: {count} frames of the {info.frames} that it claims")
    return buffer.getvalue()


def transcode(
    video: Video, out: av.container.OutputContainer, how: Encoding, height: int, width: int, edit: Edit | None = None, sound: Sound | None = None
) -> int:
    """Writes all frames of a video as a stream of H.264 that shows each of them for as long as the video does; returns how many they are.

    Args:
      height, width: of the pictures, both even.
      edit: (seconds, picture yuv420p) -> the picture to write in its place.
      sound: begins other streams of `out` and returns a function that writes them up to so many seconds.
    """
    info, frames = video.info, video.frames(height, width)
    per_second = min(FINEST_TICK, video.time_base.denominator)
    begin, first = next(frames)
    stream = out.add_stream("libx264", rate=Fraction(min(max(info.fps, 1.0), 240.0)).limit_denominator(1001))
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    stream.time_base = context.time_base = Fraction(1, per_second)
    context.thread_count, context.gop_size, context.max_b_frames = 1, how.gop, 0
    context.color_range, context.colorspace = first.color_range, first.colorspace
    context.color_primaries, context.color_trc = first.color_primaries, first.color_trc
    # mbtree: see demo.write_video; without it x264 writes the same bytes every time.
    context.options = {"preset": how.preset, "crf": str(how.crf), "x264-params": "mbtree=0"} | ({"tune": how.tune} if how.tune else {})
    heard = sound(out) if sound else lambda seconds: None
    count, start, waiting = 0, -1, None
    for ticks, picture in itertools.chain([(begin, first)], frames):
        moment = round(ticks * video.time_base * per_second)
        if moment <= start:
            continue  # shown for less than a tick
        start, count = moment, count + 1
        if edit:
            picture = edit(float(ticks * video.time_base), picture)
        picture.pts, picture.time_base = start, Fraction(1, per_second)
        picture.pict_type = PictureType.NONE  # else x264 would make keyframes where the original has them
        waiting = _write(out, stream.encode(picture), waiting)
        heard(start / per_second)
    waiting = _write(out, stream.encode(None), waiting)
    end = round(info.duration * per_second)
    step = max(1, round(per_second / info.fps))
    waiting.duration = end - waiting.pts if end > waiting.pts else step  # the header may claim less than there is
    last = waiting.pts + waiting.duration
    out.mux(waiting)
    heard(last / per_second)
    return count


def _write(out: av.container.OutputContainer, packets: list[av.Packet], waiting: av.Packet | None) -> av.Packet | None:
    """Writes packets, each once the next one tells how long it is shown. Returns the one that waits for its next."""
    for packet in packets:
        if waiting is not None:
            waiting.duration = packet.pts - waiting.pts
            out.mux(waiting)
        waiting = packet
    return waiting


def encode_image(file: str | bytes, how: Encoding) -> bytes:
    """Writes a picture anew as JPEG; one that is upright, small enough and a JPEG, PNG or WebP already stays as it is, byte for byte.

    Raises:
      DecodeError: it can't be decoded.
    """
    kind, upright, width, height = describe_image(file, how.max_pixels)
    small = min(width, height) <= how.short_side

    def whole(height: int, width: int) -> Geometry:
        width, height = shrink(width, height, how.short_side)
        return Geometry((height, width), 0, 0, height, width)

    pixels = read_image(file, whole, how.max_pixels, "bicubic")[0]
    if small and upright and kind in KEPT_FORMATS:
        return content_of(file)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=how.quality)
    return buffer.getvalue()


def shrink(width: int, height: int, short_side: int) -> tuple[int, int]:
    """The size with the same shape whose short side is `short_side` pixels, or (width, height) if that is no smaller."""
    scale = short_side / min(width, height)
    return (width, height) if scale >= 1 else (max(1, round(width * scale)), max(1, round(height * scale)))


def content_of(file: str | bytes) -> bytes:
    """The bytes of a file, or those given.

    Raises:
      DecodeError: the file can't be read.
    """
    if isinstance(file, bytes):
        return file
    try:
        with open(file, "rb") as opened:
            return opened.read()
    except OSError as error:
        raise DecodeError(error.strerror or str(error)) from None
