"""Which moments of a video make a clip. All times are in seconds from the first displayed frame; D is the video's duration, T the number of frames.

uniform (CoVeR 4.1): T evenly spaced frames over the whole video, t_i = (i + u) D/T. Training: one u ~ U[0, 1) for the whole clip; test: u = 1/2.
window (IV-ViT 5.3): T evenly spaced frames, t_i = s + (i + u) L/T, of a window of L = min(window_seconds, D). Training: s ~ U[0, D - L], u = 1/2.
  Test view v of V: s = (D - L) v / (V - 1), in the middle for V = 1, and u = (v + 1/2) / V, so that views of a short video (D = L) differ too.
segments (TSN, Something-Something): one frame in each of T equal segments, t_i = (i + u_i) D/T. Training: each u_i ~ U[0, 1) by itself;
  test view v of V: all u_i = (v + 1/2) / V, the middle for V = 1.
"""

import numpy as np
from ml_collections import ConfigDict

from vidjoint.data.video import VideoInfo
from vidjoint.errors import UserError

SAMPLERS = ("uniform", "window", "segments")


def train_times(info: VideoInfo, frames: int, task: ConfigDict, rng: np.random.Generator) -> np.ndarray:
    """Draws the times of a training clip, float64[T], rising, in [0, duration).

    Raises:
      UserError: task.sampler is none of SAMPLERS.
    """
    _check_sampler(task)
    if task.sampler == "segments":
        return _spread(0.0, info.duration, frames, rng.random(frames))
    if task.sampler == "window":
        length = min(task.window_seconds, info.duration)
        return _spread(rng.uniform(0.0, info.duration - length), length, frames, 0.5)
    return _spread(0.0, info.duration, frames, rng.random())


def view_times(info: VideoInfo, frames: int, task: ConfigDict, view: int, views: int) -> np.ndarray:
    """Returns the times of temporal view `view` of `views`, float64[T], rising, in [0, duration); always the same ones.

    Raises:
      UserError: task.sampler is none of SAMPLERS, or has fewer than `views` views (see `check_views`).
    """
    if problems := check_views(task, views):
        raise UserError(*problems)
    if not 0 <= view < views:
        raise ValueError(f"view {view} of {views}")
    phase = (view + 0.5) / views
    if task.sampler == "window":
        length = min(task.window_seconds, info.duration)
        start = (info.duration - length) * (view / (views - 1) if views > 1 else 0.5)
        return _spread(start, length, frames, phase)
    return _spread(0.0, info.duration, frames, phase)


def check_views(task: ConfigDict, views: int) -> list[str]:
    """Says why `views` temporal views of this task's sampler would not be that many different clips, one line each; [] if they are."""
    _check_sampler(task)
    if views < 1:
        return [f"eval.views asks for {views} temporal views; the least is 1"]
    if views > 1 and task.media == "video" and task.sampler == "uniform":
        return [f"eval.views asks for {views} temporal views, but sampler 'uniform' has only one, the whole video; use 1, or segments or window"]
    return []


def _spread(start: float, length: float, frames: int, phase: float | np.ndarray) -> np.ndarray:
    """The point `phase` (0 to 1) of each of `frames` equal parts of a stretch of time."""
    return start + (np.arange(frames) + phase) * (length / frames)


def _check_sampler(task: ConfigDict) -> None:
    if task.sampler not in SAMPLERS:
        raise UserError(f"sampler {task.sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
