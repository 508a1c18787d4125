"""Times against the formulas of the papers, worked out by hand."""

import numpy as np
import pytest

from vidjoint.config import task_config
from vidjoint.data.clips import SAMPLERS, check_views, train_times, view_times
from vidjoint.data.video import VideoInfo
from vidjoint.errors import UserError


def video(duration: float) -> VideoInfo:
    return VideoInfo(width=340, height=256, duration=duration, fps=30.0, frames=round(30 * duration))


def test_uniform_view_is_centred_and_spans_the_video():
    np.testing.assert_allclose(view_times(video(8.0), 4, task_config(sampler="uniform"), 0, 1), [1, 3, 5, 7])
    np.testing.assert_allclose(view_times(video(8.0), 1, task_config(sampler="uniform"), 0, 1), [4])


def test_uniform_training_shifts_the_whole_clip():
    rng = np.random.default_rng(0)
    clips = np.stack([train_times(video(8.0), 4, task_config(sampler="uniform"), rng) for _ in range(500)])
    np.testing.assert_allclose(np.diff(clips), 2.0)
    assert clips[:, 0].min() >= 0 and clips[:, 0].max() < 2
    assert clips[:, 0].mean() == pytest.approx(1.0, abs=0.1) and clips[:, 0].std() == pytest.approx(2 / 12**0.5, abs=0.05)


def test_window_views_are_spread_evenly():
    task = task_config(sampler="window", window_seconds=2.0)
    np.testing.assert_allclose(view_times(video(10.0), 4, task, 0, 1), [4.25, 4.75, 5.25, 5.75])  # window 4..6
    np.testing.assert_allclose(view_times(video(10.0), 2, task, 0, 3), [1 / 6, 7 / 6])  # window 0..2, phase 1/6
    np.testing.assert_allclose(view_times(video(10.0), 2, task, 1, 3), [4.5, 5.5])
    np.testing.assert_allclose(view_times(video(10.0), 2, task, 2, 3), [8 + 5 / 6, 9 + 5 / 6])


def test_window_training_starts_anywhere():
    task, rng = task_config(sampler="window", window_seconds=2.0), np.random.default_rng(0)
    clips = np.stack([train_times(video(10.0), 4, task, rng) for _ in range(500)])
    np.testing.assert_allclose(np.diff(clips), 0.5)
    starts = clips[:, 0] - 0.25
    assert starts.min() >= 0 and starts.max() <= 8
    assert starts.mean() == pytest.approx(4, abs=0.4) and starts.std() == pytest.approx(8 / 12**0.5, abs=0.2)


def test_short_videos_are_taken_whole():
    task = task_config(sampler="window", window_seconds=2.67)
    np.testing.assert_allclose(view_times(video(1.0), 4, task, 0, 1), [0.125, 0.375, 0.625, 0.875])
    np.testing.assert_allclose(train_times(video(1.0), 4, task, np.random.default_rng(0)), [0.125, 0.375, 0.625, 0.875])


def test_segment_views_take_different_points_of_each_segment():
    task = task_config(sampler="segments")
    np.testing.assert_allclose(view_times(video(8.0), 4, task, 0, 1), [1, 3, 5, 7])
    np.testing.assert_allclose(view_times(video(8.0), 4, task, 0, 2), [0.5, 2.5, 4.5, 6.5])
    np.testing.assert_allclose(view_times(video(8.0), 4, task, 1, 2), [1.5, 3.5, 5.5, 7.5])


def test_segment_training_draws_each_segment_by_itself():
    rng = np.random.default_rng(0)
    clips = np.stack([train_times(video(8.0), 4, task_config(sampler="segments"), rng) for _ in range(500)])
    offsets = clips - [0, 2, 4, 6]
    assert offsets.min() >= 0 and offsets.max() < 2
    assert np.abs(np.corrcoef(offsets.T) - np.eye(4)).max() < 0.15
    np.testing.assert_allclose(offsets.mean(0), 1.0, atol=0.1)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("duration", [0.04, 2.67, 2.68, 3600.0])
def test_times_lie_in_the_video_and_rise(sampler, duration):
    task, rng = task_config(sampler=sampler), np.random.default_rng(0)
    clips = [train_times(video(duration), 16, task, rng) for _ in range(20)]
    clips += [view_times(video(duration), 16, task, v, n) for n in (1, 2, 3, 10) if not check_views(task, n) for v in range(n)]
    for times in clips:
        assert times.shape == (16,) and times.min() >= 0 and times.max() < duration and np.all(np.diff(times) > 0)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("duration", [1.0, 2.67, 2.68, 10.0])
def test_views_differ_or_are_refused(sampler, duration):
    task = task_config(sampler=sampler)
    if problems := check_views(task, 4):
        assert sampler == "uniform" and len(problems) == 1 and "segments" in problems[0]
        with pytest.raises(UserError):
            view_times(video(duration), 8, task, 0, 4)
        return
    views = np.stack([view_times(video(duration), 8, task, v, 4) for v in range(4)])
    shares = np.diff(views, axis=0) / (min(duration, 2.67 if sampler == "window" else duration) / 8)  # of the gap between frames
    assert shares.min() > 0.2  # a quarter of the gap, less rounding: later views are later at every frame


def test_views_are_repeatable_and_training_follows_its_generator():
    for sampler in SAMPLERS:
        task = task_config(sampler=sampler)
        assert np.array_equal(view_times(video(9.0), 8, task, 0, 1), view_times(video(9.0), 8, task, 0, 1))
        first, second, other = (train_times(video(9.0), 8, task, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert np.array_equal(first, second) and not np.array_equal(first, other)


def test_unknown_sampler_and_impossible_views():
    info, task = video(9.0), task_config(sampler="dense")
    for ask in (lambda: train_times(info, 8, task, np.random.default_rng(0)), lambda: view_times(info, 8, task, 0, 1), lambda: check_views(task, 1)):
        with pytest.raises(UserError, match="dense"):
            ask()
    assert check_views(task_config(), 0) and not check_views(task_config(), 1)
    assert not check_views(task_config(media="image"), 4)  # an image has one temporal view whatever is asked
    with pytest.raises(ValueError):
        view_times(info, 8, task_config(), 1, 1)
