"""The embedded dataset: whole, reproducible, and such that only the order of frames tells a motion."""

import csv
import itertools
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from PIL import Image

from vidjoint.data import demo
from vidjoint.errors import UserError

CLIPS = {"appearance": {"train": 20, "test": 10}, "motion": {"train": 48, "test": 16}}
OPPOSITE = {"left": "right", "up": "down", "towards": "away", "clockwise": "counter-clockwise"}
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo.write_demo(folder, CLIPS)
    return folder


@pytest.fixture(scope="module")
def digits():
    return demo.load_digits()[1]


def read_list(file: Path) -> list[tuple[Path, int]]:
    with file.open() as lines:
        return [(file.parent / path, int(label)) for path, label in csv.reader(lines, delimiter=" ")]


def decode(file: Path) -> tuple[np.ndarray, list[av.VideoFrame]]:
    """Returns one channel of the RGB pictures, uint8[T, H, W], and the frames as decoded."""
    with av.open(str(file)) as container:
        container.streams.video[0].thread_type = "NONE"
        frames = list(container.decode(video=0))
    convert = VideoReformatter()
    return np.stack([convert.reformat(f, format="rgb24").to_ndarray()[..., 0] for f in frames]), frames


def eight(frames: np.ndarray) -> np.ndarray:
    """Returns the frames in the middle of 8 equal segments."""
    return frames[((np.arange(8) + 0.5) * len(frames) / 8).astype(int)]


@pytest.mark.parametrize("task", ["appearance", "motion"])
def test_lists_name_every_clip_once_with_its_label(folder, task):
    names = (folder / task / "labels.txt").read_text().split()
    assert tuple(names) == demo.LABELS[task]
    listed = []
    for split, count in CLIPS[task].items():
        rows = read_list(folder / task / f"{split}.csv")
        assert len(rows) == count
        assert np.bincount([label for _, label in rows], minlength=len(names)).tolist() == [count // len(names)] * len(names)
        assert all(path.stem.split("_", 2)[2] == names[label] and path.name.startswith(split) for path, label in rows)
        listed += [path for path, _ in rows]
    assert sorted(listed) == sorted((folder / task).glob("*.mp4"))


def test_stills_are_the_digits_of_their_folder(folder, digits):
    images = demo.load_digits()[0]
    for split, numbers in demo.split_digits().items():
        files = list((folder / "digits" / split).glob("*/*.png"))
        assert sorted(int(f.stem) for f in files) == numbers.tolist()
        assert all(digits[int(f.stem)] == int(f.parent.name) for f in files)
        still = np.asarray(Image.open(files[0]), float)
        assert still.shape == (32, 32) and still.max() > 200
        assert np.corrcoef(still.reshape(8, 4, 8, 4).mean((1, 3)).ravel(), images[int(files[0].stem)].ravel())[0, 1] > 0.97


def test_train_and_test_share_no_digit(digits):
    splits = demo.split_digits()
    assert len(splits["train"]) == 1437 and len(splits["test"]) == 360
    assert np.array_equal(np.sort(np.concatenate(list(splits.values()))), np.arange(1797))
    for task, counts in demo.CLIPS.items():
        for split, count in counts.items():
            used = [demo.plan_clip(task, split, i, digits, splits)[0] for i in range(0, count, 3)]
            assert set(used) <= set(splits[split].tolist())


def test_appearance_shows_its_label_whole_and_upright(digits):
    splits = demo.split_digits()
    for i in range(200):
        n, states = demo.plan_clip("appearance", "train", i, digits, splits)
        assert digits[n] == i % 10
        x, y, size, angle = states.T
        half = demo.SIZES[0] * (demo.SIZES[1] / demo.SIZES[0]) ** size / 2
        assert (np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y)) >= half).all()
        assert np.abs((angle + 0.5) % 1 - 0.5).max() < 0.16


def test_clips_are_the_same_bytes_every_time(folder, tmp_path):
    demo.write_demo(tmp_path, {"motion": {"test": 8, "train": 16}})
    again = sorted((tmp_path / "motion").glob("*.mp4"))
    assert len(again) == 24
    assert all(f.read_bytes() == (folder / "motion" / f.name).read_bytes() for f in again)


def test_the_recipe_of_demo_1_has_not_changed(digits):
    n, states = demo.plan_clip("motion", "train", 5, digits, demo.split_digits())
    assert demo.VERSION == "demo-1"
    assert (n, len(states)) == (326, 20)
    np.testing.assert_allclose(states[0], [0.10529886, 0.65116906, 0.43781550, 0.77914200], atol=1e-7)
    np.testing.assert_allclose(states[-1, 2], 0.63871933, atol=1e-7)


def test_files_are_ordinary_h264_and_hold_what_was_drawn(folder, digits):
    images, splits = demo.load_digits()[0], demo.split_digits()
    for i in range(8):
        n, states = demo.plan_clip("motion", "test", i, digits, splits)
        seen, frames = decode(folder / "motion" / f"test_{i:04d}_{demo.LABELS['motion'][i]}.mp4")
        assert seen.shape == (len(states), 32, 32) and 16 <= len(seen) <= 20
        assert frames[0].format.name == "yuv420p"
        assert sum(f.key_frame for f in frames) == 2 and any(f.pict_type == PictureType.B for f in frames)
        assert np.diff([f.time for f in frames]) == pytest.approx(1 / 25)
        drawn = demo.draw(images[n], states)
        assert np.abs(seen.astype(int) - drawn).mean() < 4
        assert np.corrcoef(seen.ravel(), drawn.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("motion", demo.MOTIONS)
def test_a_motion_played_backwards_is_its_opposite(motion):
    rng = np.random.default_rng(0)
    picture = demo.load_digits()[0][7]
    forward = demo.turn(rng.random(4), motion, 0.83, 17)
    other = demo.turn(forward[-1], OPPOSITE[motion], 0.83, 17)
    apart = (forward[::-1] - other + 0.5) % 1 - 0.5
    np.testing.assert_allclose(apart, 0, atol=1e-12)
    assert demo.MOTIONS[motion][0] == demo.MOTIONS[OPPOSITE[motion]][0]  # so travel has the same range
    same = demo.draw(picture, forward)[::-1] == demo.draw(picture, other)
    assert same.mean() > 0.999  # a look-up on the border of two enlarged pixels may round the other way


def test_the_state_of_any_frame_is_uniform_for_every_motion(digits):
    """Kolmogorov-Smirnov distance to the uniform distribution, 300 clips per motion; 2.3 / sqrt(n) is passed with p = 5e-5 under uniformity."""
    splits = demo.split_digits()
    plans = [demo.plan_clip("motion", "train", i, digits, splits)[1] for i in range(8 * 300)]
    assert len({len(p) for p in plans}) == 5
    for label in range(8):
        for place in (0, 0.3, 1):
            states = np.sort([p[int(place * (len(p) - 1))] for p in plans[label::8]], axis=0)  # [300, 4]
            distance = np.abs(states - (np.arange(300)[:, None] + 0.5) / 300).max(0)
            assert (distance < 2.3 / np.sqrt(300)).all(), (demo.LABELS["motion"][label], place, distance)


def test_no_ghosts_of_other_frames_on_the_background(folder, digits):
    """What compression leaves of neighbouring frames would tell the motion from a single one."""
    images, splits = demo.load_digits()[0], demo.split_digits()
    ghosts, pixels = 0, 0
    for i in range(24):
        n, states = demo.plan_clip("motion", "train", i, digits, splits)
        seen, _ = decode(folder / "motion" / f"train_{i:04d}_{demo.LABELS['motion'][i % 8]}.mp4")
        black = demo.draw(images[n], states) == 0
        ghosts += (seen[black] > 0).sum()
        pixels += black.sum()
    assert ghosts / pixels < 0.002


def flow(clip: np.ndarray) -> np.ndarray:
    """How well motion right, down, outwards and clockwise explains what changes in float[T, H, W]: correlations float[4], median over pairs."""
    side = clip.shape[1]
    places = np.arange(side) + 0.5
    found = []
    for a, b in itertools.pairwise(clip):
        mean, change = (a + b) / 2, b - a
        right, down = ((np.roll(mean, -1, axis) - np.roll(mean, 1, axis)) / 2 for axis in (1, 0))
        x, y = (np.angle(mean.sum(axis) @ np.exp(2j * np.pi * places / side)) / (2 * np.pi) * side for axis in (0, 1))
        x, y = (places - x + side / 2) % side - side / 2, ((places - y + side / 2) % side - side / 2)[:, None]
        for pattern in (right, down, x * right + y * down, x * down - y * right):
            found.append(-(change * pattern).sum() / np.sqrt((change**2).sum() * (pattern**2).sum()))
    return np.median(np.reshape(found, (-1, 4)), axis=0)


def test_eight_frames_show_the_motion_and_reversed_the_opposite(folder):
    names = list(demo.MOTIONS)
    right, opposite = 0, 0
    clips = read_list(folder / "motion" / "train.csv")
    for file, label in clips:
        frames = eight(decode(file)[0]).astype(float)
        for order, wanted in ((1, names[label]), (-1, OPPOSITE[names[label]])):
            strength = flow(frames[::order])
            axis = int(np.abs(strength).argmax())
            hit = demo.MOTIONS[wanted] == (axis, np.sign(strength[axis]))
            right, opposite = right + (hit and order == 1), opposite + (hit and order == -1)
    assert right >= 0.95 * len(clips) and opposite >= 0.95 * len(clips)


def fake_write(folder, clips):
    assert clips is demo.CLIPS
    (folder / "whole").write_text("yes")


def test_written_once_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "write_demo", fake_write)
    monkeypatch.setenv("VIDJOINT_CACHE", str(tmp_path / "new" / "cache"))
    folder = demo.demo_folder()
    assert folder == tmp_path / "new" / "cache" / "demo-1" and (folder / "whole").exists()
    monkeypatch.setattr(demo, "write_demo", None)  # a second writing would raise
    assert demo.demo_folder() == folder == demo.demo_folder(str(folder.parent))


def test_failure_leaves_nothing_behind_and_says_what_to_do(tmp_path, monkeypatch):
    def full(folder, clips):
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "write_demo", full)
    with pytest.raises(UserError, match=r"No space left.*VIDJOINT_CACHE"):
        demo.demo_folder(str(tmp_path))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="VIDJOINT_CACHE"):
        demo.demo_folder(str(tmp_path / "file"))


def test_two_processes_at_once_end_with_one_whole_folder(tmp_path):
    racer = f"""
import time
from pathlib import Path
from vidjoint.data import demo
def write(folder, clips):
    end = time.time() + 60
    while len(list(Path({str(tmp_path)!r}).glob(".demo-1-*/begun"))) < 2 and time.time() < end:  # both are at it before either ends
        (folder / "begun").touch()
        time.sleep(0.01)
    time.sleep(0.1)
    (folder / "whole").write_text("yes")
demo.write_demo = write
folder = demo.demo_folder({str(tmp_path)!r})
assert (folder / "whole").read_text() == "yes"
"""
    racers = [subprocess.Popen([sys.executable, "-c", racer], cwd=Path(__file__).parents[2]) for _ in range(2)]
    assert [r.wait(90) for r in racers] == [0, 0]
    assert [f.name for f in tmp_path.iterdir()] == ["demo-1"]
