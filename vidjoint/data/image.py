"""Image files to pixels: upright, resized and cropped. Whatever is wrong with a file is a DecodeError."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vidjoint.data.decode import INTERPOLATIONS, MAX_PIXELS, DecodeError, copy, one_line_reasons, open_file
from vidjoint.data.transforms import Geometry

# What Image.open may recognise. Not on the list: formats that start other programs (EPS) or that hold no photographs.
Image.init()
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` is the limit here, and what is above it is said in one line
IMAGE_FORMATS = [name for name in ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000") if name in Image.OPEN]
EXIF_ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)  # orientations in which width and height change places
UPRIGHT = {  # EXIF orientation -> what brings the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def describe_image(file: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> tuple[str, bool, int, int]:
    """Returns a picture's format (JPEG, PNG, ..), whether it stands upright as it is stored, and its upright width and height in pixels.

    Raises:
      DecodeError: it is no picture, or has more than `max_pixels` pixels.
    """
    with _open_image(file, max_pixels) as (image, orientation):
        size = image.size[::-1] if orientation in SIDEWAYS else image.size
        return image.format, orientation not in UPRIGHT, *size


def read_image(
    file: str | Path | bytes, choose: Callable[[int, int], Geometry], max_pixels: int = MAX_PIXELS, interpolation: str = "bilinear"
) -> np.ndarray:
    """Returns a picture as uint8[1, height, width, 3] RGB: upright by its EXIF orientation, resized and cropped in one, alpha dropped.

    Args:
      file: a local file, or one held in memory. Of an animation the first frame counts.
      choose: gives the geometry for a picture of (height, width) pixels.
      interpolation: how it is resized, one of INTERPOLATIONS.

    Raises:
      DecodeError: it is no picture, or damaged, or has more than `max_pixels` pixels (refused before decoding).
    """
    with _open_image(file, max_pixels) as (image, orientation):
        sideways = orientation in SIDEWAYS
        geometry = choose(*(image.size if sideways else image.size[::-1]))
        height, width = geometry.resize
        with one_line_reasons():
            image.draft("RGB", (height, width) if sideways else (width, height))  # JPEG: decode at 1/2, 1/4 or 1/8, not below what is wanted
            # 16 bits a pixel: keep the upper ones, where convert() would clip
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise DecodeError("its pixels are numbers of 32 bits, whose range nothing tells: convert it to 8 or 16 bits")
            picture = image.convert("RGB")
            if orientation in UPRIGHT:
                picture = picture.transpose(UPRIGHT[orientation])
            down, right = picture.height / height, picture.width / width  # pixels of the source per resized pixel
            left, top = geometry.left * right, geometry.top * down
            box = (left, top, min(left + geometry.width * right, picture.width), min(top + geometry.height * down, picture.height))  # min: rounding
            pixels = np.asarray(picture.resize((geometry.width, geometry.height), INTERPOLATIONS[interpolation], box=box))
    picture = np.empty((1, *pixels.shape), np.uint8)
    copy(pixels[:, ::-1] if geometry.flip else pixels, picture[0])
    return picture


@contextlib.contextmanager
def _open_image(file: str | Path | bytes, max_pixels: int) -> Iterator[tuple[Image.Image, int]]:
    """A picture whose pixels have not been decoded yet (but for TIFF), and its EXIF orientation."""
    with contextlib.ExitStack() as opened:
        with one_line_reasons():
            image = opened.enter_context(Image.open(opened.enter_context(open_file(file)), formats=IMAGE_FORMATS))
            if image.width * image.height > max_pixels:
                raise DecodeError(f"its {image.width} x {image.height} pixels are more than the {max_pixels} allowed (data.max_pixels)")
            if image.format == "TIFF":
                image.load()  # Pillow turns it upright then, and takes the note of it away
            orientation = 1
            with contextlib.suppress(Exception):  # a broken EXIF block is no reason to refuse the picture
                orientation = image.getexif().get(EXIF_ORIENTATION, 1)
        yield image, orientation
