"""The fast way to a picture's pixels, measured against the plain one: decode whole, resize whole, cut, mirror."""

import functools
import io

import numpy as np
import pytest
from PIL import Image

from vidjoint.config import task_config
from vidjoint.data.image import read_image
from vidjoint.data.transforms import train_geometry


@functools.cache
def photograph(width: int, height: int) -> bytes:
    """A JPEG with structure of all sizes and some noise."""
    rng = np.random.default_rng(0)
    layers = [rng.integers(0, 256, (max(2, height // cell), max(2, width // cell), 3), np.uint8) for cell in (200, 50, 12)]
    big = [np.asarray(Image.fromarray(layer).resize((width, height), Image.Resampling.BICUBIC), np.float32) for layer in layers]
    pixels = sum(share * layer for share, layer in zip((0.5, 0.3, 0.2), big, strict=True)) + rng.normal(0, 4, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.mark.parametrize(
    "size, mean, most",
    [((500, 375), 0.1, 3), ((1600, 1200), 1.0, 16)],  # levels of 0..255; the second is decoded at a fraction of its size
    ids=["small", "large"],
)
@pytest.mark.parametrize("crop", ["short_side", "area", "none"])
def test_equals_the_plain_way(size, mean, most, crop):
    data, task = photograph(*size), task_config(crop=crop, media="image", short_side=(256, 320), area=(0.2, 1.0))
    plain = Image.open(io.BytesIO(data)).convert("RGB")
    for seed in range(3):
        drawn = []

        def choose(height, width, seed=seed, drawn=drawn):
            drawn.append(train_geometry(height, width, task, (224, 224), np.random.default_rng(seed)))
            return drawn[0]

        pixels = read_image(data, choose)[0]
        (box,) = drawn
        expected = np.asarray(plain.resize(box.resize[::-1], Image.Resampling.BILINEAR))
        expected = expected[box.top : box.top + box.height, box.left : box.left + box.width]
        difference = np.abs(pixels.astype(int) - (expected[:, ::-1] if box.flip else expected))
        assert difference.mean() < mean and difference.max() <= most, (crop, seed, difference.mean(), difference.max())


def test_large_jpegs_are_decoded_small(monkeypatch):
    decoded, load = [], Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda self, *args, **more: decoded.append(self.size) or load(self, *args, **more))
    task = task_config(crop="short_side", media="image", short_side=(224, 224))
    read_image(photograph(1600, 1200), lambda height, width: train_geometry(height, width, task, (224, 224), np.random.default_rng(0)))
    assert decoded == [(400, 300)]
