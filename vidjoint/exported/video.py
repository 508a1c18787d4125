"""Video and picture files to clips, as vidjoint reads them for one view. Needs PyAV (`pip install av`), for pictures Pillow."""

import math

import numpy as np

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2")  # .gif is one for picture tasks


def read(file: str, settings: dict) -> np.ndarray:
    """uint8[T, H, W, 3] in RGB, for a task's entry of preprocessing.json. Raises OSError if there is no picture in it."""
    if file.lower().endswith(PICTURES) or (file.lower().endswith(".gif") and settings["media"] == "image"):
        return np.stack([_picture(file, settings)] * settings["frames"])
    import av

    with av.open(file) as container:
        stream = container.streams.best("video")
        frames = _shown(container, stream) if stream else iter(())
        first, now = next(frames, (0, None))
        if now is None:
            raise OSError(f"{file}: no video in it, or no frame can be decoded")
        clip, ticks = [], float(stream.time_base)  # seconds
        duration = _duration(av, file, container, stream, first)
        after = next(frames, None)
        length = min(settings["window_seconds"] or duration, duration)
        for i in range(settings["frames"]):  # a frame is shown until the next one's time
            wanted = first + math.floor(((duration - length) / 2 + (i + 0.5) * length / settings["frames"]) / ticks + 1e-3)
            while after is not None and after[0] <= wanted:
                (_, now), after = after, next(frames, None)
            clip.append(_frame(now, settings))
    return np.stack(clip)


def _made_up(container, stream) -> bool:
    """Whether the times that PyAV gives are of no use: AVI holds none, and for these codecs each is that of the next packet to decode."""
    return container.format.name == "avi" and stream.codec_context.name in ("h264", "hevc")


def _shown(container, stream):
    """Yields (time in ticks, frame) in order of display."""
    made_up = _made_up(container, stream)
    step, last = max(1, round(1 / float(stream.time_base * (stream.guessed_rate or 25)))), None
    for frame in container.decode(stream):
        time = frame.dts if made_up else frame.pts
        last = time if time is not None else (0 if last is None else last + step)
        yield last, frame


def _duration(av, file: str, container, stream, first: int) -> float:
    """Seconds from the first displayed frame, at `first` ticks, to the end of the last one."""
    ticks, rate = float(stream.time_base), float(stream.average_rate or stream.guessed_rate or 0)
    duration, frames = 0.0, stream.frames
    if stream.duration:
        end = (first if stream.start_time is None or _made_up(container, stream) else stream.start_time) + stream.duration
        # An MP4's head may add up times of decoding, which, with B-frames and a variable rate, can end before the last frames are shown
        if container.format.name.startswith("mov") and stream.codec_context.has_b_frames and stream.average_rate != stream.base_rate:
            end = sum(max([(end - 1, 1)] + [(pts, max(shown, 1)) for pts, shown in _packets(av, file, stream) if pts is not None]))
        duration = (end - first) * ticks
    elif container.duration:  # from the first time stamp, but in Matroska from time 0
        start = 0 if container.format.name == "matroska,webm" else container.start_time or 0
        duration = (start + container.duration) / av.time_base - first * ticks
    if duration <= 0 or not (frames > 0 or 0 < rate <= 240):  # the head does not tell: the packets do
        packets = _packets(av, file, stream)
        duration, frames = (max([first, *(pts + shown for pts, shown in packets if pts is not None and pts >= first)]) - first) * ticks, len(packets)
    return duration if duration > 0 else max(frames, 1) / (rate if 0 < rate <= 240 else 25.0)


def _packets(av, file: str, stream) -> list[tuple]:
    """Of each packet that is to be shown: when (None: unknown), and for how long, in ticks."""
    with av.open(file) as again:
        return [(p.pts, p.duration or 0) for p in again.demux(again.streams[stream.index]) if p.size and not p.is_discard]


def _frame(frame, settings: dict) -> np.ndarray:
    a, b, c, d = _matrix(frame)
    sideways = abs(b) + abs(c) > abs(a) + abs(d)
    (height, width), (top, left) = _place(*((frame.width, frame.height) if sideways else (frame.height, frame.width)), settings)
    size = {"width": height, "height": width} if sideways else {"width": width, "height": height}
    small = frame.reformat(format="rgb24", interpolation=settings["interpolation"].upper(), **size).to_ndarray()
    small, right, down = (small.swapaxes(0, 1), c, b) if sideways else (small, a, d)
    return small[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1][top : top + settings["height"], left : left + settings["width"]]


def _matrix(frame) -> tuple:
    """How the picture is turned and mirrored: (x, y), to the right and down, is shown at (a x + c y, b x + d y)."""
    try:
        found = frame.side_data.get("DISPLAYMATRIX")
        return (1, 0, 0, 1) if found is None else tuple(np.frombuffer(bytes(found), np.int32)[[0, 1, 3, 4]].tolist())
    except ValueError:  # PyAV 18 knows not every kind of side data; the angle alone it can tell
        cos, sin = (round(f(math.radians(frame.rotation))) for f in (math.cos, math.sin))
        return cos, -sin, sin, cos


def _picture(file: str, settings: dict) -> np.ndarray:
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        sideways = image.getexif().get(0x0112, 1) >= 5  # EXIF orientation
        (height, width), (top, left) = _place(*(image.size if sideways else image.size[::-1]), settings)
        image.draft("RGB", (height, width) if sideways else (width, height))  # JPEG: decoded at 1/2, 1/4 or 1/8, not below what is wanted
        picture = ImageOps.exif_transpose(image)
        if picture.mode.startswith("I;16") or (picture.mode == "I" and image.format in ("PNG", "PPM")):  # 16 bits: the upper ones
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        picture = picture.convert("RGB")
    down, right = picture.height / height, picture.width / width
    box = (left * right, top * down, (left + settings["width"]) * right, (top + settings["height"]) * down)
    box = (*box[:2], min(box[2], picture.width), min(box[3], picture.height))
    return np.asarray(picture.resize((settings["width"], settings["height"]), Image.Resampling[settings["interpolation"].upper()], box=box))


def _place(height: int, width: int, settings: dict) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size to which a whole picture is scaled, and the top left corner of what is cut out: the middle, unless crop is none."""
    crop = settings["height"], settings["width"]
    if settings["crop"] == "none":
        return crop, (0, 0)
    scale = max(crop[0] / height, crop[1] / width)
    size = tuple(max(least, min(round(side * scale), 8192)) for side, least in zip((height, width), crop, strict=True))
    return size, ((size[0] - crop[0]) // 2, (size[1] - crop[1]) // 2)
