"""Labels with their scores drawn on pictures and on every frame of a video, legible at any size."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vidjoint.data.decode import DecodeError
from vidjoint.data.encode import Encoding, transcode
from vidjoint.data.image import read_image
from vidjoint.data.transforms import Geometry
from vidjoint.data.video import Video, open_container

SHARE = 0.45  # of the picture's height that labels may cover
LEAST = 120  # pixels; smaller pictures are enlarged by a whole number, so that there is room for letters
SOUND = ("aac", "mp3", "ac3", "eac3", "alac", "flac", "opus")  # what MP4 takes as it is
BAR, SHADE, TEXT = (0, 114, 178), (0, 0, 0), (255, 255, 255)  # blue that the colour-blind tell from the shade
LUMA = {1: (0.2126, 0.0722)}  # weights of red and blue by FFmpeg's number of the colour space (1: BT.709); others are close to BT.601
BT601 = (0.299, 0.114)
FULL_RANGE = 2


@dataclass(frozen=True)
class Line:
    """A label of a task ("": there is only one) with its score in 0..1."""

    label: str
    score: float
    task: str = ""


@dataclass(frozen=True)
class Span:
    """What holds from `start` to `end` seconds; None: to the end."""

    start: float
    end: float | None
    lines: tuple[Line, ...]


def panel(height: int, width: int, lines: tuple[Line, ...]) -> np.ndarray:
    """A box of labels for a picture of height x width: uint8[h, w, 4], RGBA with even sides. The bar behind a label is as long as its score.

    Lines that would cover more than `SHARE` of the picture are left out, the last ones first.
    """
    size = max(10, round(min(height, 0.9 * width) / 27))
    step = round(1.45 * size)
    lines = lines[: max(1, int(SHARE * height / step))]
    font, bold = _font("DejaVuSans.ttf", size), _font("DejaVuSans-Bold.ttf", size)
    fonts = [bold if i == 0 or line.task != lines[i - 1].task else font for i, line in enumerate(lines)]
    numbers = [f"{100 * line.score:.0f} %" for line in lines]
    number_width = max(font.getlength("100 %"), *(font.getlength(number) for font, number in zip(fonts, numbers, strict=True)))
    gap = size // 2
    room = width - 4 * gap - number_width  # the box keeps away from the picture's edge by half a gap
    names = [
        _fit(f"{line.task}: {line.label}" if line.task else line.label, font, max(size, room - gap)) for line, font in zip(lines, fonts, strict=True)
    ]
    inner = max([font.getlength(name) for name, font in zip(names, fonts, strict=True)] + [min(8 * size, room - gap)])
    box = 2 * round((inner + number_width + 3 * gap) / 2), 2 * round((step * len(lines) + gap) / 2)
    image = Image.new("RGBA", (min(box[0], width - width % 2), min(box[1], height - height % 2)), (*SHADE, 190))
    draw = ImageDraw.Draw(image)
    for i, (line, name, number, font) in enumerate(zip(lines, names, numbers, fonts, strict=True)):
        top = gap // 2 + i * step
        draw.rectangle((gap // 2, top + 1, gap // 2 + (image.width - gap) * min(1.0, max(0.0, line.score)), top + step - 2), fill=(*BAR, 215))
        middle = top + step / 2
        draw.text((gap, middle), name, (*TEXT, 255), font, anchor="lm")
        draw.text((image.width - gap, middle), number, (*TEXT, 255), font, anchor="rm")
    return np.asarray(image)


def draw_on_picture(pixels: np.ndarray, lines: tuple[Line, ...]) -> np.ndarray:
    """uint8[H, W, 3] -> the same with labels at the lower left; enlarged if it is smaller than `LEAST`."""
    factor = _enlarged(*pixels.shape[:2])
    pixels = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    box = panel(*pixels.shape[:2], lines)
    (top, left), alpha = _place(pixels.shape[0], pixels.shape[1], box), box[..., 3:] / 255
    part = pixels[top : top + box.shape[0], left : left + box.shape[1]]
    part[:] = np.round((1 - alpha) * part + alpha * box[..., :3])
    return pixels


def annotate_image(file: str, target: Path, lines: tuple[Line, ...], max_pixels: int) -> None:
    """Writes a copy of a picture, upright, with labels drawn on it: PNG or JPEG by `target`'s ending.

    Raises:
      DecodeError: it can't be read.
    """
    pixels = read_image(file, lambda height, width: Geometry((height, width), 0, 0, height, width), max_pixels)[0]
    with _whole(target) as part, open(part, "wb") as opened:
        Image.fromarray(draw_on_picture(pixels.copy(), lines)).save(opened, "PNG" if target.suffix == ".png" else "JPEG", quality=93)


def annotate_video(file: str, target: Path, spans: list[Span], max_pixels: int) -> bool:
    """Writes a copy of a video as MP4 (H.264), upright, of the same size and frame times, with the labels of each moment drawn on it.

    Where spans overlap, the one whose middle is nearest holds. Odd sides lose a pixel; pictures smaller than `LEAST` are enlarged. Sound is copied
    where MP4 takes it as it is.

    Returns:
      Whether sound had to be left out.

    Raises:
      DecodeError: a frame can't be decoded.
    """
    with Video(file, max_pixels) as video, contextlib.ExitStack() as opened:
        info, factor = video.info, _enlarged(video.info.height, video.info.width)
        height, width = 2 * max(1, factor * info.height // 2), 2 * max(1, factor * info.width // 2)
        boxes = functools.lru_cache(maxsize=4)(lambda span, space, full: _to_yuv(panel(height, width, span.lines), space, full))

        def edit(seconds: float, frame: av.VideoFrame) -> av.VideoFrame:
            span = _span_at(spans, seconds)
            return _blend(frame, *boxes(span, frame.colorspace, frame.color_range == FULL_RANGE)) if span and span.lines else frame

        sound = _Sound(opened.enter_context(open_container(file, max_pixels)), video.began)
        with _whole(target) as part, av.open(str(part), "w", format="mp4", options={"movflags": "faststart"}) as out:
            how = Encoding(gop=48, crf=20, tune="")
            if not transcode(video, out, how, height, width, edit, sound.begin):
                raise DecodeError("no frame can be decoded")
        return sound.left_out


def _enlarged(height: int, width: int) -> int:
    return -(-LEAST // min(height, width)) if min(height, width) < LEAST else 1


def _span_at(spans: list[Span], seconds: float) -> Span | None:
    holding = [span for span in spans if span.start <= seconds and (span.end is None or seconds < span.end)]
    return min(holding, key=lambda span: abs((span.start + (span.end or span.start)) / 2 - seconds), default=None)


def _place(height: int, width: int, box: np.ndarray) -> tuple[int, int]:
    """Row and column of the upper left corner, both even."""
    margin = min(height, width) // 60
    return max(0, height - box.shape[0] - margin) // 2 * 2, min(margin, max(0, width - box.shape[1])) // 2 * 2


def _to_yuv(box: np.ndarray, colorspace: int, full: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """RGBA -> luma [h, w] and its opacity, chroma [2, h / 2, w / 2] and its opacity, float32; colours as the video has them."""
    red, blue = LUMA.get(colorspace, BT601)
    rgb, alpha = box[..., :3].astype(np.float32) / 255, box[..., 3].astype(np.float32) / 255
    y = rgb @ np.array([red, 1 - red - blue, blue], np.float32)
    chroma = np.stack([(rgb[..., 2] - y) / (2 - 2 * blue), (rgb[..., 0] - y) / (2 - 2 * red)])
    low, luma_range, chroma_range = (0, 255, 255) if full else (16, 219, 224)
    rows, columns = alpha.shape[0] // 2, alpha.shape[1] // 2
    alphas = alpha.reshape(rows, 2, columns, 2)
    weighted = (chroma * alpha).reshape(2, rows, 2, columns, 2).sum(axis=(2, 4)) / np.maximum(alphas.sum(axis=(1, 3)), 1e-6)
    return low + luma_range * y, alpha, 128 + chroma_range * weighted, alphas.mean(axis=(1, 3))


def _blend(frame: av.VideoFrame, luma: np.ndarray, alpha: np.ndarray, chroma: np.ndarray, chroma_alpha: np.ndarray) -> av.VideoFrame:
    """A copy of a yuv420p frame with the box at its lower left; nothing else of it changes."""
    height, width = frame.height, frame.width
    planes = frame.to_ndarray().reshape(-1).copy()
    whole = planes[: height * width].reshape(height, width)
    colours = planes[height * width :].reshape(2, height // 2, width // 2)
    top, left = _place(height, width, alpha)
    for plane, values, opacity, row, column in (
        (whole, luma, alpha, top, left),
        *((c, v, chroma_alpha, top // 2, left // 2) for c, v in zip(colours, chroma, strict=True)),
    ):
        part = plane[row : row + opacity.shape[0], column : column + opacity.shape[1]]
        part[:] = np.round(part + opacity * (values - part))
    made = av.VideoFrame.from_ndarray(planes.reshape(height * 3 // 2, width), format="yuv420p")
    made.colorspace, made.color_range = frame.colorspace, frame.color_range
    made.color_primaries, made.color_trc = frame.color_primaries, frame.color_trc
    return made


class _Sound:
    """The first sound of a file, copied packet by packet beside the pictures."""

    def __init__(self, container: av.container.InputContainer, began: float):
        self._container, self._began = container, began
        self.left_out = False

    def begin(self, out: av.container.OutputContainer) -> Callable[[float], None]:
        streams = self._container.streams.audio
        if not streams:
            return lambda seconds: None
        try:
            if streams[0].codec_context.name not in SOUND:
                raise ValueError
            target = out.add_stream_from_template(streams[0])
        except (av.error.FFmpegError, ValueError, AttributeError):  # no decoder, so no codec context; or MP4 refuses it
            self.left_out = True
            return lambda seconds: None
        packets, waiting = self._packets(streams[0]), []

        def write(until: float) -> None:
            while not self.left_out:
                packet = waiting.pop() if waiting else next(packets, None)
                if packet is None:
                    return
                if float(packet.pts * packet.time_base) > until:
                    waiting.append(packet)
                    return
                packet.stream = target
                try:
                    out.mux(packet)
                except (av.error.FFmpegError, ValueError):
                    self.left_out = True  # from here on

        return write

    def _packets(self, stream: av.AudioStream) -> Iterator[av.Packet]:
        shift = round(Fraction(self._began) / stream.time_base)
        with contextlib.suppress(av.error.FFmpegError):  # damaged: what can be read is heard
            for packet in self._container.demux(stream):
                if packet.size and packet.pts is not None and packet.dts is not None and min(packet.pts, packet.dts) >= shift:
                    packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                    yield packet


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, its end left out if it is wider than that."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A name to write under; what is there appears as `target` once it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
