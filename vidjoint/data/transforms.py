"""Spatial transforms: where a clip is cut from its pictures (Geometry), and the augmentation of the pixels cut out.

Everything random is drawn once per clip, from the generator that is passed in, and holds for all its frames: augmentation adds no motion.
"""

from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance, ImageOps

from vidjoint.errors import UserError

_LONGEST = 8192  # pixels; a resized picture has no longer side (unless the input has), which bounds the memory for a picture of 4000 x 2 pixels
_TRIES = 10  # random boxes that are drawn until one fits
_GREY = (128, 128, 128)  # what comes into view from outside the frame


@dataclass(frozen=True)
class Geometry:
    """How a picture becomes model input: scale the whole picture to `resize` (h, w), cut out a box, then mirror it if `flip`. All in pixels."""

    resize: tuple[int, int]
    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def train_geometry(height: int, width: int, task: ConfigDict, size: tuple[int, int], rng: np.random.Generator) -> Geometry:
    """Draws the part of a height x width picture that fills an input of `size` (h, w), as task.crop says; mirrored half of the time if task.flip.

    short_side: the short side is scaled to a number of pixels drawn from task.short_side (ends included), or to more where the input would not fit
    otherwise; then an input-sized box is cut at random. area: a box with a random share of the picture (task.area) and a random width / height
    (task.aspect, log-uniform) is scaled to the input, whatever the input's own shape; where none fits, the largest central one of an allowed aspect
    (Szegedy et al. 2015, section 6). none: the whole picture is scaled to the input.

    Raises:
      UserError: task.crop is none of these.
    """
    if task.crop == "short_side":
        low, high = task.short_side
        side = rng.integers(low, high, endpoint=True)
        scale = max(side / min(height, width), size[0] / height, size[1] / width)
        geometry = _random_box(_resized((height, width), (scale, scale), size), size, rng)
    elif task.crop == "area":
        box = _area_box(height, width, task.area, task.aspect, rng)
        central = box is None
        box_height, box_width = _central_box(height, width, task.aspect) if central else box
        resize = _resized((height, width), (size[0] / box_height, size[1] / box_width), size)
        geometry = _spread_box(resize, size, 0, 1) if central else _random_box(resize, size, rng)
    elif task.crop == "none":
        geometry = Geometry(tuple(size), 0, 0, *size)
    else:
        raise _unknown_crop(task.crop)
    flip = bool(task.flip and rng.random() < 0.5)
    return Geometry(geometry.resize, geometry.top, geometry.left, geometry.height, geometry.width, flip)


def view_geometry(height: int, width: int, task: ConfigDict, size: tuple[int, int], view: int, views: int) -> Geometry:
    """Returns spatial view `view` of `views` for evaluation; nothing is random and nothing mirrored.

    The picture is scaled until it just covers the input of `size` (h, w). One view is the centre; several are spread evenly, from end to end, along
    the side that stands out (three: left, centre, right, or top, centre, bottom). With task.crop = none every view is the whole picture.

    Raises:
      UserError: task.crop is unknown.
      ValueError: there is no such view.
    """
    if not 0 <= view < views:
        raise ValueError(f"view {view} is not one of {views}")
    if task.crop == "none":
        return Geometry(tuple(size), 0, 0, *size)
    if task.crop not in ("short_side", "area"):
        raise _unknown_crop(task.crop)
    scale = max(size[0] / height, size[1] / width)
    return _spread_box(_resized((height, width), (scale, scale), size), size, view, views)


def _unknown_crop(crop: str) -> UserError:
    return UserError(f"crop={crop!r} is unknown: set it to short_side, area or none")


def _resized(picture: tuple[int, int], scale: tuple[float, float], size: tuple[int, int]) -> tuple[int, int]:
    """Returns the height and width of the scaled picture in whole pixels: at least the input's, at most _LONGEST."""
    return tuple(max(crop, min(round(side * factor), _LONGEST)) for side, factor, crop in zip(picture, scale, size, strict=True))


def _random_box(resize: tuple[int, int], size: tuple[int, int], rng: np.random.Generator) -> Geometry:
    top, left = (int(rng.integers(0, side - crop, endpoint=True)) for side, crop in zip(resize, size, strict=True))
    return Geometry(resize, top, left, *size)


def _spread_box(resize: tuple[int, int], size: tuple[int, int], view: int, views: int) -> Geometry:
    over = [side - crop for side, crop in zip(resize, size, strict=True)]
    start = [over[0] // 2, over[1] // 2]
    if views > 1:
        longer = 0 if over[0] > over[1] else 1
        start[longer] = over[longer] * view // (views - 1)
    return Geometry(resize, *start, *size)


def _area_box(
    height: int, width: int, area: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float] | None:
    """Draws the height and width of a box with a share of the picture in `area` and a width / height in `aspect`; None if no try fits."""
    for _ in range(_TRIES):
        pixels = height * width * rng.uniform(*area)
        ratio = np.exp(rng.uniform(np.log(aspect[0]), np.log(aspect[1])))
        box = float(np.sqrt(pixels / ratio)), float(np.sqrt(pixels * ratio))
        if box[0] <= height and box[1] <= width:
            return box
    return None


def _central_box(height: int, width: int, aspect: tuple[float, float]) -> tuple[float, float]:
    """Returns the height and width of the largest box in the picture whose width / height is in `aspect` and nearest to the picture's own."""
    ratio = min(max(width / height, aspect[0]), aspect[1])
    return min(height, width / ratio), min(width, height * ratio)


def augment(clip: np.ndarray, task: ConfigDict, rng: np.random.Generator) -> np.ndarray:
    """Applies task.randaugment_layers random operations of strength task.randaugment_magnitude, then random erasing with probability task.erase.

    RandAugment: Cubuk et al. 2019, arXiv:1909.13719; random erasing: Zhong et al. 2017, arXiv:1708.04896. Operations are drawn with replacement from
    OPERATIONS; none mirrors a clip, so labels that tell left from right stay true. Not as in the papers: every strength rises with the magnitude
    (their posterize and solarize weaken), and statistics (autocontrast, equalize, contrast) are the clip's, so that a video doesn't flicker.

    Args:
      clip: uint8[T, H, W, 3], left as it is.

    Returns:
      uint8[T, H, W, 3]; the clip itself if there is nothing to do.
    """
    for _ in range(task.randaugment_layers):
        name = _NAMES[rng.integers(len(_NAMES))]
        sign = 1 if rng.random() < 0.5 else -1
        clip = OPERATIONS[name](clip, task.randaugment_magnitude / 10, sign)
    if task.erase and rng.random() < task.erase:
        clip = _erase(clip, rng)
    return clip


def _erase(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Covers one box, the same in all frames, by a still patch of uniform noise (0..255, each pixel and channel by itself)."""
    height, width = clip.shape[1:3]
    box = _area_box(height, width, (0.02, 1 / 3), (0.3, 1 / 0.3), rng)
    if box is None:
        return clip
    rows, columns = (max(1, round(side)) for side in box)
    top = rng.integers(0, height - rows, endpoint=True)
    left = rng.integers(0, width - columns, endpoint=True)
    clip = clip.copy()
    clip[:, top : top + rows, left : left + columns] = rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return clip


# The operations: (clip uint8[T, H, W, 3], strength 0..1, sign -1 or 1) -> uint8[T, H, W, 3].


def _whole(clip: np.ndarray, change) -> np.ndarray:
    """Changes all frames as one tall picture: right where a pixel's new value does not depend on its place."""
    frames, height, width, _ = clip.shape
    return np.array(change(Image.fromarray(clip.reshape(frames * height, width, 3)))).reshape(clip.shape)


def _each(clip: np.ndarray, change) -> np.ndarray:
    return np.stack([np.asarray(change(Image.fromarray(frame))) for frame in clip])


def _solarize_add(clip, strength, sign):
    levels = np.arange(256)
    table = np.where(levels < 128, np.minimum(levels + int(110 * strength), 255), levels).astype(np.uint8)
    return table[clip]


def _solarize(clip, strength, sign):
    return np.where(clip >= 256 * (1 - strength), 255 - clip, clip)


def _posterize(clip, strength, sign):
    return clip & np.uint8(256 - 2 ** round(4 * strength))  # keeps 8 bits down to 4


def _enhance(kind, apply):
    def change(clip, strength, sign):
        return apply(clip, lambda picture: kind(picture).enhance(1 + 0.9 * strength * sign))

    return change


def _rotate(clip, strength, sign):
    return _each(clip, lambda frame: frame.rotate(30 * strength * sign, Image.Resampling.BILINEAR, fillcolor=_GREY))


def _affine(clip, matrix):
    """Shows at (x, y), counted from the centre, what was at matrix[0] . (x, y, 1), matrix[1] . (x, y, 1)."""
    height, width = clip.shape[1:3]
    (a, b, c), (d, e, f) = matrix
    c += (width - a * width - b * height) / 2
    f += (height - d * width - e * height) / 2
    coefficients = (a, b, c, d, e, f)
    return _each(clip, lambda frame: frame.transform(frame.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=_GREY))


OPERATIONS = {
    "identity": lambda clip, strength, sign: clip,
    "autocontrast": lambda clip, strength, sign: _whole(clip, ImageOps.autocontrast),
    "equalize": lambda clip, strength, sign: _whole(clip, ImageOps.equalize),
    "invert": lambda clip, strength, sign: 255 - clip,
    "rotate": _rotate,  # by up to 30 degrees
    "posterize": _posterize,
    "solarize": _solarize,  # inverts all that is brighter than a threshold, from none to everything
    "solarize_add": _solarize_add,  # brightens the darker half by up to 110
    "color": _enhance(ImageEnhance.Color, _whole),  # the enhancements: factors from 0.1 to 1.9
    "contrast": _enhance(ImageEnhance.Contrast, _whole),
    "brightness": _enhance(ImageEnhance.Brightness, _whole),
    "sharpness": _enhance(ImageEnhance.Sharpness, _each),
    "shear_x": lambda clip, strength, sign: _affine(clip, ((1, 0.3 * strength * sign, 0), (0, 1, 0))),
    "shear_y": lambda clip, strength, sign: _affine(clip, ((1, 0, 0), (0.3 * strength * sign, 1, 0))),
    "translate_x": lambda clip, strength, sign: _affine(clip, ((1, 0, 0.45 * strength * sign * clip.shape[2]), (0, 1, 0))),
    "translate_y": lambda clip, strength, sign: _affine(clip, ((1, 0, 0), (0, 1, 0.45 * strength * sign * clip.shape[1]))),
}
_NAMES = tuple(OPERATIONS)
