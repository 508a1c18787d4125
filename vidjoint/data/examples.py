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
    interpolation: str = "bilinear"  # how pictures are scaled: one of video.INTERPOLATIONS

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
        clip = read_image(example["image"], choose, spec.max_pixels, spec.interpolation)
    else:
        with Video(example["video"], spec.max_pixels) as video:
            times = clips.train_times(video.info, spec.frames, spec.settings, rng)
            clip = video.read(times, choose(video.info.height, video.info.width), spec.interpolation)
    return transforms.augment(clip, spec.settings, rng)


def views(example: dict, spec: ClipSpec, temporal: int, spatial: int, part: tuple[float, float] | None = None) -> np.ndarray:
    """Decodes `example` to its evaluation views uint8[V, T, height, width, 3], V = temporal x spatial, the spatial ones of a moment side by side.

    Each file is decoded once for all its views. An image has one frame, so its temporal views are equal. `part` restricts a video to the seconds from
    its first to its second number.

    Raises:
      DecodeError: the file can't be read.
    """
    boxes = []

    def choose(height, width):
        boxes[:] = [transforms.view_geometry(height, width, spec.settings, spec.size, view, spatial) for view in range(spatial)]
        return _hull(boxes)

    if "image" in example:
        moments = [read_image(example["image"], choose, spec.max_pixels, spec.interpolation)] * temporal
    else:
        with Video(example["video"], spec.max_pixels) as video:
            start, end = part or (0.0, video.info.duration)
            info = replace(video.info, duration=end - start)
            times = [start + clips.view_times(info, spec.frames, spec.settings, view, temporal) for view in range(temporal)]
            clip = video.read(np.concatenate(times), choose(video.info.height, video.info.width), spec.interpolation)
        moments = np.split(clip, temporal)
    hull = _hull(boxes)
    return np.stack([_cut(clip, box, hull) for clip in moments for box in boxes])


def _hull(boxes: list[transforms.Geometry]) -> transforms.Geometry:
    """The smallest crop that holds several crops of one resized picture."""
    top, left = min(box.top for box in boxes), min(box.left for box in boxes)
    bottom, right = max(box.top + box.height for box in boxes), max(box.left + box.width for box in boxes)
    return transforms.Geometry(boxes[0].resize, top, left, bottom - top, right - left)


def _cut(clip: np.ndarray, box: transforms.Geometry, hull: transforms.Geometry) -> np.ndarray:
    top, left = box.top - hull.top, box.left - hull.left
    return clip[:, top : top + box.height, left : left + box.width]
