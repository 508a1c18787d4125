"""Video and picture files to clips, as vidjoint reads them for one view. Needs PyAV (`pip install av`), for pictures Pillow."""

import math

import numpy as np

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif")


def read(file: str, settings: dict) -> np.ndarray:
    """uint8[T, H, W, 3] in RGB, for a task's entry of preprocessing.json."""
    if file.lower().endswith(PICTURES):
        return np.stack([_picture(file, settings)] * settings["frames"])
    import av

    with av.open(file) as container:
        stream = container.streams.video[0]
        frames, clip = (frame for frame in container.decode(stream) if frame.pts is not None), []
        now = next(frames)
        first, after = now.pts, next(frames, None)
        ticks = float(stream.time_base)  # seconds
        if stream.duration:
            duration = ((stream.start_time if stream.start_time is not None else first) + stream.duration - first) * ticks
        else:
            duration = ((container.start_time or 0) + container.duration) / av.time_base - first * ticks
        length = min(settings["window_seconds"] or duration, duration)
        for i in range(settings["frames"]):  # a frame is shown until the next one's time
            wanted = first + math.floor(((duration - length) / 2 + (i + 0.5) * length / settings["frames"]) / ticks + 1e-3)
            while after is not None and after.pts <= wanted:
                now, after = after, next(frames, None)
            clip.append(_frame(now, settings))
    return np.stack(clip)


def _frame(frame, settings: dict) -> np.ndarray:
    turns = round(frame.rotation / 90) % 4
    (height, width), (top, left) = _place(*((frame.width, frame.height) if turns % 2 else (frame.height, frame.width)), settings)
    size = {"width": height, "height": width} if turns % 2 else {"width": width, "height": height}
    small = np.rot90(frame.reformat(format="rgb24", interpolation=settings["interpolation"].upper(), **size).to_ndarray(), turns)
    return small[top : top + settings["height"], left : left + settings["width"]]


def _picture(file: str, settings: dict) -> np.ndarray:
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        picture = ImageOps.exif_transpose(image).convert("RGB")
    (height, width), (top, left) = _place(picture.height, picture.width, settings)
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
