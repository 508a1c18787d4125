"""Names what is in images and videos, with a trained model.

python -m vidjoint.predict --workdir=DIR VIDEO_OR_IMAGE... [--task=NAME] [--topk=K] [--window=S --stride=S] [--json=FILE]
"""

import argparse
import contextlib
import json
import math
import sys

from tqdm import tqdm

from vidjoint.classifier import Classifier, parse_step
from vidjoint.data.prediction import Window, cut_windows, list_files
from vidjoint.errors import UserError, command


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vidjoint.predict",
        usage="%(prog)s --workdir=DIR VIDEO_OR_IMAGE... [--task=NAME] [--topk=K] [--window=S --stride=S] [--json=FILE]",
        description=__doc__.partition("\n")[0],
        epilog='Each line of the JSON file is {"path", "task", "labels": [..], "scores": [..]}, best label first and scores in 0..1, or '
        '{"path", "error"}; windows also have "start" and "end" in seconds. In a multilabel task each score is the probability that its own label '
        "holds: they do not add up to 1. Put -- before names that start with a dash. "
        "Exit status: 0 if everything could be read, 1 if some files could not (each has its line), 2 if nothing could be done.",
    )
    parser.add_argument("files", nargs="+", metavar="VIDEO_OR_IMAGE", help="files, or folders: all images and videos in them, at any depth")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of a training run")
    parser.add_argument("--task", metavar="NAME", help="task whose classes to name (default: the run's only one, or else its only one of videos)")
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="how many labels per file (default: 5)")
    parser.add_argument("--window", type=float, metavar="S", help="one answer for every S seconds of a video; a shorter rest at its end is left out")
    parser.add_argument("--stride", type=float, metavar="S", help="seconds from one window's start to the next one's (default: the window's length)")
    parser.add_argument("--step", metavar="N", help="checkpoint to use, a number or best (default: the newest)")
    parser.add_argument("--batch_size", type=int, metavar="B", help="clips that go to the device at a time (default: the run's eval.batch_size)")
    parser.add_argument("--json", metavar="FILE", help="also write one JSON object per line to FILE (-: to standard output, and nothing else)")
    args = parser.parse_args(argv)
    if args.topk < 1:
        raise UserError(f"--topk={args.topk}: at least 1")
    if args.stride is not None and args.window is None:
        raise UserError("--stride needs --window: give the length of a window in seconds")
    stride = args.window if args.stride is None else args.stride
    if args.window is not None and not (0 < args.window < math.inf and 0 < stride < math.inf):
        raise UserError(f"--window={args.window:g} and --stride={stride:g} must be above 0 seconds")
    step, files = parse_step(args.step), list_files(args.files)
    with contextlib.ExitStack() as opened:
        lines = _open_json(args.json, opened)
        classifier = Classifier(args.workdir, step, args.batch_size)
        task, max_pixels = classifier.choose_task(args.task), classifier.config.data.max_pixels
        windows = (window for file in files for window in (cut_windows(file, args.window, stride, max_pixels) if args.window else [Window(file)]))
        total = None if args.window else len(files)
        failed = done = 0
        for answer in tqdm(classifier.iter_predict(windows, task, args.topk), total=total, unit=" clips", disable=None, delay=2, leave=False):
            failed, done = failed + ("error" in answer), done + 1
            if lines:
                print(json.dumps(answer), file=lines, flush=True)
            if lines is not sys.stdout:
                tqdm.write(_line(answer))
    if failed:
        print(f"{failed} of {done} could not be read", file=sys.stderr)
    return 1 if failed else 0


def _open_json(name: str | None, opened: contextlib.ExitStack):
    if name in (None, "-"):
        return name and sys.stdout
    try:
        return opened.enter_context(open(name, "w", encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--json={name} can't be written ({error.strerror})") from None


def _line(answer: dict) -> str:
    """An answer for people; what their terminal can't show becomes escapes."""
    part = f" {answer['start']:.2f}-{answer['end']:.2f} s" if "end" in answer else ""
    scores = (f"{label} {100 * score:.1f} %" for label, score in zip(answer.get("labels", ()), answer.get("scores", ()), strict=True))
    text = f"{answer['path']}{part}: {', '.join(scores) or 'error: ' + answer['error']}"
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


if __name__ == "__main__":
    sys.exit(main())
