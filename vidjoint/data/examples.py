"""One example to pixels: which frames, which crop, decode, augment. Training and evaluation differ only here."""

import contextlib
import functools
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from ml_collections import ConfigDict

from vidjoint.data import clips, isolated, transforms
from vidjoint.data.image import read_image
from vidjoint.data.video import MAX_FRAMES, Video, VideoInfo


@dataclass(frozen=True)
class ClipSpec:
    """How files of one task become clips."""

    settings: ConfigDict  # the task's config: sampler, crop, flip, ...
    frames: int  # T; 1 for images
    size: tuple[int, int]  # height, width in pixels
    max_pixels: int  # width x height above which a file is refused
    interpolation: str = "bilinear"  # how pictures are scaled: one of video.INTERPOLATIONS
    max_frames: int = MAX_FRAMES  # frames decoded for one clip above which a file is refused
    limits: isolated.Limits | None = None  # of the child processes that decode; None: the calling thread does

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.frames, *self.size, 3)

    @functools.cached_property
    def packed(self) -> bytes:
        """As a child process gets it, to decode itself."""
        return pickle.dumps(replace(self, limits=None))


def training_clip(example: dict, spec: ClipSpec, rng: np.random.Generator) -> np.ndarray:
    """Decodes `example` (see `sources`) to an augmented clip uint8[T, height, width, 3]; a pure function of the file and `rng`.

    Raises:
      DecodeError: the file can't be read.
    """
    if spec.limits:
        return isolated.call(spec.limits, _name(example), _training_clip, _sent(example), spec.packed, rng.bit_generator.state)

    def choose(height, width):
        return transforms.train_geometry(height, width, spec.settings, spec.size, rng)

    if "image" in example:
        clip = read_image(example["image"], choose, spec.max_pixels, spec.interpolation)
    else:
        with Video(example["video"], spec.max_pixels, spec.max_frames) as video:
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
    return view_parts(example, spec, temporal, spatial, [part])[0]


def view_parts(
    example: dict, spec: ClipSpec, temporal: int, spatial: int, parts: Sequence[tuple[float, float] | None], opened: Video | None = None
) -> np.ndarray:
    """The views of several parts of one example, uint8[parts, V, T, height, width, 3]: what they share of a video is decoded once.

    `opened` is the video, where it is open already; it then stays so.
    """
    if spec.limits:
        limits = replace(spec.limits, seconds=spec.limits.seconds * min(len(parts), 4))
        return isolated.call(limits, _name(example), _view_parts, _sent(example), spec.packed, temporal, spatial, parts)
    boxes = []

    def choose(height, width):
        boxes[:] = [transforms.view_geometry(height, width, spec.settings, spec.size, view, spatial) for view in range(spatial)]
        return _hull(boxes)

    if "image" in example:
        moments = [read_image(example["image"], choose, spec.max_pixels, spec.interpolation)] * (temporal * len(parts))
    else:
        times = []
        with contextlib.nullcontext(opened) if opened else Video(example["video"], spec.max_pixels, spec.max_frames) as video:
            for part in parts:
                start, end = part or (0.0, video.info.duration)
                info = replace(video.info, duration=end - start)
                times += [start + clips.view_times(info, spec.frames, spec.settings, view, temporal) for view in range(temporal)]
            clip = video.read(np.concatenate(times), choose(video.info.height, video.info.width), spec.interpolation)
        moments = np.split(clip, temporal * len(parts))
    hull = _hull(boxes)
    pixels = np.stack([_cut(clip, box, hull) for clip in moments for box in boxes])
    return pixels.reshape(len(parts), -1, *pixels.shape[1:])


def describe(path: str, spec: ClipSpec) -> tuple[VideoInfo, bool]:
    """What a video says of itself, and whether its decoder can jump.

    Raises:
      DecodeError: the file can't be read.
    """
    if spec.limits:
        return isolated.call(spec.limits, path, describe, os.path.abspath(path), replace(spec, limits=None))
    with Video(path, spec.max_pixels) as video:
        return video.info, video.seekable


def _name(example: dict) -> str:
    return str(example.get("name") or next(content for key, content in example.items() if key in ("image", "video")))


def _sent(example: dict) -> dict:
    """What a child needs of an example. Its current folder may be another."""
    return {key: os.path.abspath(content) if isinstance(content, str) else content for key, content in example.items() if key in ("image", "video")}


# In a child process


_unpacked = functools.lru_cache(maxsize=64)(pickle.loads)


def _training_clip(example: dict, spec: bytes, state: dict) -> np.ndarray:
    rng = np.random.Generator(getattr(np.random, state["bit_generator"])(0))
    rng.bit_generator.state = state
    return training_clip(example, _unpacked(spec), rng)


def _view_parts(example: dict, spec: bytes, *args) -> np.ndarray:
    return view_parts(example, _unpacked(spec), *args)


def _hull(boxes: list[transforms.Geometry]) -> transforms.Geometry:
    """The smallest crop that holds several crops of one resized picture."""
    top, left = min(box.top for box in boxes), min(box.left for box in boxes)
    bottom, right = max(box.top + box.height for box in boxes), max(box.left + box.width for box in boxes)
    return transforms.Geometry(boxes[0].resize, top, left, bottom - top, right - left)


def _cut(clip: np.ndarray, box: transforms.Geometry, hull: transforms.Geometry) -> np.ndarray:
    top, left = box.top - hull.top, box.left - hull.left
    return clip[:, top : top + box.height, left : left + box.width]
