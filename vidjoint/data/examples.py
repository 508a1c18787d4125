"""One example to pixels: which frames, which crop, decode, augment. Training and evaluation differ only here."""

from dataclasses import dataclass, replace

import numpy as np
from ml_collections import ConfigDict

from vidjoint.data import clips, transforms
from vidjoint.data.video import Video, read_image


@dataclass(frozen=True)
class ClipSpec:
    """How files of one task become clips."""

    settings: ConfigDict  # the task's config: sampler, crop, flip, ...
    frames: int  # T; 1 for images
    size: tuple[int, int]  # height, width in pixels
    max_pixels: int  # width x height above which a file is refused

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.frames, *self.size, 3)


def training_clip(example: dict, spec: ClipSpec, rng: np.random.Generator) -> np.ndarray:
    """Decodes `example` (see `sources`) to an augmented clip uint8[T, height, width, 3]; a pure function of the file and `rng`.

    Raises:
      DecodeError: the file can't be read.
    """

    def choose(height, width):
        return transforms.train_geometry(height, width, spec.settings, spec.size, rng)

    if "image" in example:
        clip = read_image(example["image"], choose, spec.max_pixels)
    else:
        with Video(example["video"], spec.max_pixels) as video:
            times = clips.train_times(video.info, spec.frames, spec.settings, rng)
            clip = video.read(times, choose(video.info.height, video.info.width))
    return transforms.augment(clip, spec.settings, rng)


def views(example: dict, spec: ClipSpec, temporal: int, spatial: int, part: tuple[float, float] | None = None) -> np.ndarray:
    """Decodes `example` to its evaluation views uint8[V, T, height, width, 3], V = temporal x spatial.

    An image has one frame, so its temporal views are equal. `part` restricts a video to the seconds from its first to its second number.

    Raises:
      DecodeError: the file can't be read.
    """

    def whole(height, width):  # all crops are of one resized picture, so it is decoded once
        resize = transforms.view_geometry(height, width, spec.settings, spec.size, 0, spatial).resize
        return transforms.Geometry(resize, 0, 0, *resize)

    def crops(clip, height, width):
        for view in range(spatial):
            box = transforms.view_geometry(height, width, spec.settings, spec.size, view, spatial)
            yield clip[:, box.top : box.top + box.height, box.left : box.left + box.width]

    if "image" in example:
        size = []

        def choose(height, width):
            size[:] = height, width
            return whole(height, width)

        clip = read_image(example["image"], choose, spec.max_pixels)
        return np.stack(list(crops(clip, *size)) * temporal)
    result = []
    with Video(example["video"], spec.max_pixels) as video:
        size, (start, end) = (video.info.height, video.info.width), part or (0.0, video.info.duration)
        info = replace(video.info, duration=end - start)
        for view in range(temporal):
            clip = video.read(start + clips.view_times(info, spec.frames, spec.settings, view, temporal), whole(*size))
            result += crops(clip, *size)
    return np.stack(result)
