"""The embedded dataset: real handwritten digits, still (PNG) and moving (H.264), written to disk once and then read like any user's files.

A moving digit's state is four numbers that each live on a circle: x, y, size and angle. A motion turns one of them at constant speed, from a
uniformly random state. So a single frame, even one whose place in the clip is known, says nothing about the motion, and a clip played backwards is a
clip of the opposite motion, drawn from the same distribution. The digits are those of scikit-learn (8 x 8, 0..16; UCI Optical Recognition of Digits).
"""

import os
import shutil
import time
import uuid
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from vidjoint.errors import UserError

VERSION = "demo-1"  # the folder's name: a change of anything below that changes a file needs a new one
SEED = 1
SIDE = 32  # pixels, clips and stills
FPS = 25
FRAMES = (16, 20)  # shortest and longest clip
SIZES = (0.3, 0.8)  # smallest and largest digit, as a share of the picture's side
TEST_DIGITS = 360  # of 1797
CLIPS = {"appearance": {"train": 1200, "test": 300}, "motion": {"train": 1200, "test": 320}}

X, Y, SIZE, ANGLE = range(4)
MOTIONS = {  # name -> the circle that turns, and its sense; opposites stand side by side
    "left": (X, -1), "right": (X, 1), "up": (Y, -1), "down": (Y, 1),
    "towards": (SIZE, 1), "away": (SIZE, -1), "clockwise": (ANGLE, 1), "counter-clockwise": (ANGLE, -1),
}  # fmt: skip
LABELS = {"appearance": tuple("0123456789"), "motion": tuple(MOTIONS)}
# Share of its circle that a motion passes through in one clip. Of 8 evenly spaced frames, neighbours lie at most 1.1 / 7 = 0.16 turns apart,
# and twice that if each is drawn at random from its eighth; half a turn would be ambiguous. Angles turn less: a 0 looks the same upside down.
TRAVEL = {X: (0.6, 1.1), Y: (0.6, 1.1), SIZE: (0.6, 1.0), ANGLE: (0.4, 0.7)}


def demo_folder(root: str = "") -> Path:
    """Returns the dataset's folder, `root/demo-1`, and writes it first if it isn't there (20 to 30 s on one core, 20 MB).

    A folder of that name is always whole: it is written beside and then renamed. Processes that start together each write one, and the first wins.

    Args:
      root: where the folder lies. "": $VIDJOINT_CACHE, or else ~/.cache/vidjoint.

    Raises:
      UserError: `root` cannot be written.
    """
    parent = Path(root or os.environ.get("VIDJOINT_CACHE") or "~/.cache/vidjoint").expanduser()
    folder = parent / VERSION
    if folder.is_dir():
        return folder
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in parent.glob(f".{VERSION}-*"):  # of processes that were killed
            if time.time() - leftover.stat().st_mtime > 3600:
                shutil.rmtree(leftover, ignore_errors=True)
        beside = parent / f".{VERSION}-{uuid.uuid4().hex}"
        beside.mkdir()
        try:
            write_demo(beside, CLIPS)
            try:
                beside.rename(folder)
            except OSError:  # which error says "already there" differs between systems
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write the demo dataset to {folder}: {error.strerror or error}. "
                        "Set VIDJOINT_CACHE to a folder that can be written, with 40 MB free.") from error  # fmt: skip
    return folder


def write_demo(folder: Path, clips: dict[str, dict[str, int]]) -> None:
    """Writes the dataset into an existing folder, with as many clips per task and split as `clips` says (like CLIPS; fewer are the first of more).

    `digits/{train,test}/<digit>/<number in scikit-learn's array>.png`: 32 x 32 grey stills, 1437 and 360.
    `{appearance,motion}/{train,test}_<i>_<label>.mp4` with `train.csv`, `test.csv` (lines `path label`) and `labels.txt` (one name per line).
    """
    images, digits = load_digits()
    splits = split_digits()
    for split, numbers in splits.items():
        for digit in range(10):
            (folder / "digits" / split / str(digit)).mkdir(parents=True)
        for n in numbers:
            still = Image.fromarray(images[n].astype(np.float32) * (255 / 16)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            pixels = np.clip(np.rint(np.asarray(still)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "digits" / split / str(digits[n]) / f"{n:04d}.png")

    jobs = []
    for task, counts in clips.items():
        (folder / task).mkdir()
        (folder / task / "labels.txt").write_text("".join(f"{name}\n" for name in LABELS[task]))
        for split, count in counts.items():
            lines = []
            for i in range(count):
                label = i % len(LABELS[task])
                name = f"{split}_{i:04d}_{LABELS[task][label]}.mp4"
                lines.append(f"{name} {label}\n")
                jobs.append((folder / task / name, task, split, i))
            (folder / task / f"{split}.csv").write_text("".join(lines))

    progress = tqdm(jobs, f"writing the demo dataset ({VERSION})", unit=" clips", delay=2, disable=None)  # None: only on a terminal
    for file, task, split, i in progress:
        n, states = plan_clip(task, split, i, digits, splits)
        write_video(file, draw(images[n], states))


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns the 1797 pictures float64[1797, 8, 8] (0..16) and which digits they show, int64[1797]."""
    from sklearn.datasets import load_digits  # takes a second, and is needed only once

    bunch = load_digits()
    return bunch.images, bunch.target


def split_digits() -> dict[str, np.ndarray]:
    """Returns the numbers of the pictures in each split, sorted: train int64[1437] and test int64[360]."""
    order = np.random.default_rng(SEED).permutation(1797)
    return {"train": np.sort(order[TEST_DIGITS:]), "test": np.sort(order[:TEST_DIGITS])}


def plan_clip(task: str, split: str, i: int, digits: np.ndarray, splits: dict[str, np.ndarray]) -> tuple[int, np.ndarray]:
    """Decides clip `i` of a split: which picture moves (its number), and how, as states float64[T, 4] (see `turn`).

    motion: any digit from any state, a long turn of the label's kind. appearance: the label's digit whole, about upright and near the middle, a short
    turn of any kind, so that the order of its frames says nothing about the label.
    """
    rng = np.random.default_rng((SEED, list(LABELS).index(task), list(splits).index(split), i))
    frames = int(rng.integers(FRAMES[0], FRAMES[1] + 1))
    numbers = splits[split]
    if task == "motion":
        motion = list(MOTIONS)[i % len(MOTIONS)]
        n = rng.choice(numbers)
        start = rng.random(4)
        travel = rng.uniform(*TRAVEL[MOTIONS[motion][0]])
        return int(n), turn(start, motion, travel, frames)
    numbers = numbers[digits[numbers] == i % 10]
    motion = rng.choice(list(MOTIONS))
    axis, sense = MOTIONS[motion]
    travel = rng.uniform(0.15, 0.25)
    start = rng.uniform((0.47, 0.47, 0.7, -0.03), (0.53, 0.53, 0.85, 0.03))
    start[axis] -= sense * travel / 2
    return int(numbers[i // 10 % len(numbers)]), turn(start, motion, travel, frames)


def turn(start: np.ndarray, motion: str, travel: float, frames: int) -> np.ndarray:
    """Returns the states float64[T, 4] of a moving digit: places 0..1 on the circles of x and y (of its middle), log size and clockwise angle.

    The circle that `motion` names turns by `travel` from the first frame to the last; the others keep their `start`, float64[4].
    """
    axis, sense = MOTIONS[motion]
    states = np.tile(np.asarray(start, float), (frames, 1))
    states[:, axis] += sense * travel * np.linspace(0, 1, frames)
    return states % 1


def draw(picture: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Draws a digit, float[8, 8] in 0..16, in each of the states float[T, 4], white on black and wrapped around the edges: uint8[T, 32, 32].

    The picture gets a black margin and is enlarged 16 times (bicubic), once; each pixel then looks up the nearest of the enlarged ones.
    """
    fine = 16
    margin = np.pad(picture, 1).astype(np.float32) * (255 / 16)
    large = np.asarray(Image.fromarray(margin).resize((10 * fine, 10 * fine), Image.Resampling.BICUBIC))
    large = np.clip(np.rint(large), 0, 255).astype(np.uint8)

    x, y, size, angle = (c[:, None, None].astype(np.float32) for c in states.T)  # [T, 1, 1]
    centre = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE
    right = (centre[None, None, :] - x + 0.5) % 1 - 0.5  # [T, 1, W], from the digit's middle to the pixel, the shorter way round
    down = (centre[None, :, None] - y + 0.5) % 1 - 0.5  # [T, H, 1]
    scale = 8 * fine / (SIZES[0] * (SIZES[1] / SIZES[0]) ** size)  # enlarged pixels per side
    cos, sin = scale * np.cos(2 * np.pi * angle), scale * np.sin(2 * np.pi * angle)
    column = (cos * right + sin * down + 5 * fine).astype(np.int32).clip(0, 10 * fine - 1)  # [T, H, W]
    row = (cos * down - sin * right + 5 * fine).astype(np.int32).clip(0, 10 * fine - 1)
    return large[row, column]


def write_video(file: Path, frames: np.ndarray) -> None:
    """Writes grey frames uint8[T, H, W] (H, W even) as an H.264 file with B-frames and a keyframe every 12 frames: the same bytes every time.

    So one thread, and no macroblock-tree rate control: with it, x264 wrote a few files in a hundred differently from run to run (measured here).

    Black goes to luma 1, below video black (16), and white to video white (235). Decoders clip what lies below 16, and with it the faint ghosts of
    other frames that compression leaves on the background: from those, a random forest told the motion by one frame in 27 % of clips, not in 12.5 %.
    """
    height, width = frames.shape[1:]
    planes = np.full((len(frames), height * 3 // 2, width), 128, np.uint8)  # yuv420p: luma, then both chroma planes, here colourless
    planes[:, :height] = np.rint(1 + frames * (234 / 255))
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "17", "mbtree": "0"})
        stream.height, stream.width = height, width
        stream.pix_fmt, stream.gop_size, stream.thread_count = "yuv420p", 12, 1
        for frame in planes:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="yuv420p")))
        container.mux(stream.encode())
