"""Names what is in images and videos, with a trained model.

python -m vidjoint.predict --workdir=DIR VIDEO_OR_IMAGE... [--task=NAME] [--topk=K] [--window=S --stride=S] [--json=FILE]
"""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from vidjoint.classifier import Classifier
from vidjoint.data.prediction import Window
from vidjoint.data.sources import EXTENSIONS
from vidjoint.data.video import DecodeError, Video
from vidjoint.errors import UserError, command


def list_files(names: list[str]) -> list[str]:
    """Files as given; a folder stands for the images and videos in it, at any depth."""
    known = EXTENSIONS["video"] | EXTENSIONS["image"]
    files = []
    for name in names:
        path = Path(name)
        files += sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in known and p.is_file()) if path.is_dir() else [name]
    return files


def cut_windows(path: str, length: float, stride: float, max_pixels: int) -> list[Window]:
    """Windows of `length` seconds every `stride` seconds over a video; the whole file if it is shorter, an image, or can't be read."""
    try:
        with Video(path, max_pixels) as video:
            duration = video.info.duration
    except (DecodeError, OSError):
        return [Window(path)]
    windows, start = [], 0.0
    while start + length <= duration + 1e-6:
        windows.append(Window(path, start, start + length))
        start = len(windows) * stride
    return windows or [Window(path)]


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vidjoint.predict",
        description=__doc__.partition("\n")[0],
        epilog="Exit status: 0 if every file could be read, 1 if some could not (each is named), 2 if nothing could be done.",
    )
    parser.add_argument("files", nargs="+", metavar="VIDEO_OR_IMAGE", help="files, or folders of files")
    parser.add_argument("--workdir", required=True, help="folder of a training run")
    parser.add_argument("--task", help="whose classes to name (default: the only task, or else the only video task)")
    parser.add_argument("--topk", type=int, default=5, help="how many labels per file (default: 5)")
    parser.add_argument("--window", type=float, metavar="S", help="predict for every S seconds of a video instead of for all of it")
    parser.add_argument("--stride", type=float, metavar="S", help="seconds from one window to the next (default: the window's length)")
    parser.add_argument("--step", help="checkpoint to use: a number or best (default: the newest)")
    parser.add_argument("--json", metavar="FILE", help="write one JSON object per line to FILE (- for standard output)")
    args = parser.parse_args(argv)
    if args.topk < 1 or (args.window or 1) <= 0 or (args.stride or 1) <= 0:
        raise UserError("--topk must be at least 1, --window and --stride above 0 seconds")
    files = list_files(args.files)
    if not files:
        raise UserError(f"there are no images or videos in {', '.join(args.files)}")
    classifier = Classifier(args.workdir, int(args.step) if (args.step or "").isdigit() else args.step)
    videos = classifier.video_tasks
    task = classifier.check_task(args.task or (videos[0] if len(videos) == 1 else None))
    windows = [Window(file) for file in files]
    if args.window:
        windows = [w for file in files for w in cut_windows(file, args.window, args.stride or args.window, classifier.config.data.max_pixels)]

    lines = sys.stdout if args.json == "-" else open(args.json, "w", encoding="utf-8") if args.json else None
    failed = 0
    for answer in tqdm(classifier.iter_predict(windows, task, args.topk), total=len(windows), unit="clip", disable=None, delay=2):
        failed += "error" in answer
        if lines:
            print(json.dumps(answer, ensure_ascii=False), file=lines, flush=True)
        if lines is not sys.stdout:
            tqdm.write(_line(answer))
    if lines not in (None, sys.stdout):
        lines.close()
    if failed:
        print(f"{failed} of {len(windows)} could not be read", file=sys.stderr)
    return 1 if failed else 0


def _line(answer: dict) -> str:
    part = f" {answer['start']:.2f}-{answer['end']:.2f} s" if "end" in answer else ""
    if "error" in answer:
        return f"{answer['path']}{part}: error: {answer['error']}"
    labels = ", ".join(f"{label} {100 * score:.1f} %" for label, score in zip(answer["labels"], answer["scores"], strict=True))
    return f"{answer['path']}{part}: {labels}"


if __name__ == "__main__":
    sys.exit(main())
