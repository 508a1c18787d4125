"""Names what is in images and videos, with a trained model.

python -m vidjoint.predict --workdir=DIR FILE... [--task=NAME] [--topk=K] [--window=S --stride=S] [--json=FILE] [--annotate=DIR] [--timeline=OUT]
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

from vidjoint.machine import host_memory

if __name__ == "__main__":
    host_memory.keep()  # as vidjoint.main does

from tqdm import tqdm

from vidjoint import sharding
from vidjoint.answers import AnswerFile, Failures, Table, encodable
from vidjoint.classifier import Classifier, Pace, parse_step
from vidjoint.data.prediction import Piece, Window, cut_windows, list_files, whole_files
from vidjoint.data.tasks import clip_spec
from vidjoint.data.workers import cores
from vidjoint.drawing.annotated import Copies
from vidjoint.drawing.timelines import Timelines
from vidjoint.errors import Paragraphs, UserError, command

BOUNDS = {"decode-bound": "clips", "compute-bound": "model", "bound by drawing": "drawing"}  # what it is called where most time is spent so
EPILOG = """
FILE may be a folder (all images and videos in it, at any depth) or a pattern: quote it, as in 'clips/**/*.mp4', and it is not your shell that
expands it. Put -- before names that start with a dash.

Each line of the JSON file is {"path", "task", "labels": [..], "scores": [..]}, best label first and scores in 0..1, or {"path", "error"};
windows also have "start" and "end" in seconds. In a multilabel task each score is the probability that its own label holds: they do not add up
to 1. Lines are written as the answers come. Started again with the same arguments, the command goes on: files that FILE has answers for are left
out; those in error are tried again (their lines go), and so is one whose line was cut off. A file with other content is not touched.

--annotate writes a copy of each file with its labels drawn on it. Videos: MP4 (H.264), upright, with their own size (less than 120 pixels:
enlarged) and frame times, and with their sound where MP4 can hold it as it is. Pictures: PNG or JPEG. With windows the labels change over time.

Exit status: 0 if everything could be read, 1 if some files could not (the last lines say which, and why), 2 if nothing could be done.
"""


@command
def main(argv: list[str]) -> int:
    args = _parse(argv)
    if args.topk < 1:
        raise UserError(f"--topk={args.topk}: at least 1")
    if args.threads < 0:
        raise UserError(f"--threads={args.threads}: at least 1, or 0 for one per core")
    if args.window is None and (args.stride is not None or args.timeline):
        raise UserError(f"{'--timeline' if args.stride is None else '--stride'} needs --window: give the length of a window in seconds")
    args.stride = args.window if args.stride is None else args.stride
    if args.window is not None and not (0 < args.window < math.inf and 0 < args.stride < math.inf):
        raise UserError(f"--window={args.window:g} and --stride={args.stride:g} must be above 0 seconds")
    step, files = parse_step(args.step), list_files(args.files)
    copies = Copies(args.annotate, files) if args.annotate else None
    timelines = Timelines(args.timeline, files, args.topk) if args.timeline else None
    sharding.keep_compiled()
    with contextlib.ExitStack() as opened:
        answered = AnswerFile(args.json, files, opened) if args.json not in (None, "-") else None
        classifier = Classifier(args.workdir, step, args.batch_size)
        tasks = classifier.choose_tasks(args.task)
        args.threads = args.threads or cores()
        if answered and answered.sample:
            answered.check(_again(classifier, answered.sample, args.topk))
        return _Run(args, classifier, tasks, files, answered, [sink for sink in (copies, timelines) if sink]).run(opened)


def _again(classifier: Classifier, sample: dict, topk: int) -> dict:
    """The answer to the same question, as this model gives it; the old one if its file can't be read any more."""
    piece = Piece((Window(sample["path"], sample.get("start", 0.0), sample.get("end")),))
    if sample["task"] not in classifier.labels:
        return {"task": "no such name"}
    answer = next(classifier.iter_predict([piece], sample["task"], topk))
    return sample if "error" in answer else answer


class _Run:
    """One pass over the files."""

    def __init__(
        self, args: argparse.Namespace, classifier: Classifier, tasks: tuple | None, files: list[str], answered: AnswerFile | None, sinks: list
    ):
        self.args, self.classifier, self.tasks, self.files, self.answered, self.sinks = args, classifier, tasks, files, answered, sinks
        self.skipped = 0
        self.failures = Failures()

    def run(self, opened: contextlib.ExitStack) -> int:
        args, pace, began = self.args, Pace(), time.perf_counter()
        shown = {task: names for task, names in self.classifier.labels.items() if any(task in self.tasks_of(path) for path in self.files)}
        columns = os.get_terminal_size().columns if sys.stdout.isatty() else None
        table = Table(self.files, shown, args.topk, args.window is not None, columns)
        for sink in self.sinks:
            opened.enter_context(sink)
        if args.json != "-":
            tqdm.write(encodable(table.header(), sys.stdout.encoding))
        total = None if args.window else len(self.files)
        bar = opened.enter_context(tqdm(total=total, unit=" files" if total else " windows", disable=None, delay=2, leave=False))
        place, held = None, []
        for answer in self.classifier.answers(self.pieces(), self.tasks, pace, args.threads):
            line = {"path": answer.window.path, **answer.window.times(), **self.classifier.top(answer, args.topk)}
            if (answer.window.path, answer.window.start) != place:
                place = answer.window.path, answer.window.start
                bar.update()
            if "error" in line:
                self.failures.add(line["path"], line["error"])
            if args.json == "-":
                print(json.dumps(line), flush=True)
            else:
                tqdm.write("\n".join(encodable(text, sys.stdout.encoding) for text in table.lines(line)))
            if self.answered:
                self.answered.write(line)
            if self.sinks:
                if held and held[0][0].window.path != answer.window.path:
                    self._draw(held, pace)
                    held = []
                held.append((answer, line))
        self._draw(held, pace, last=True)
        bar.close()
        for text in self.summary(pace, time.perf_counter() - began):
            print(encodable(text, sys.stderr.encoding), file=sys.stderr)
        return 1 if self.failures.files else 0

    def tasks_of(self, path: str) -> tuple[str, ...]:
        return self.classifier.tasks_for(path, self.tasks)

    def pieces(self) -> Iterator[Piece]:
        """What there is to be answered, file by file."""
        for path in self.files:
            if self.args.window is None:
                pieces: Iterable[Piece] = whole_files([path])
            else:
                clip = clip_spec(self.classifier.config, self.tasks_of(path)[0])
                pieces = cut_windows(path, self.args.window, self.args.stride, clip, self.classifier.windows_at_a_time(self.args.threads))
            if self.answered is None or any(sink.misses(path) for sink in self.sinks):
                yield from pieces
                continue
            for piece in pieces:
                new = tuple(window for window in piece.windows if not self._is_answered(window))
                self.skipped += len(piece.windows) - len(new)
                if piece.film is not None:
                    yield piece  # its decoder has to pass by anyway
                elif new:
                    yield replace(piece, windows=new)

    def _is_answered(self, window: Window) -> bool:
        return all((window.path, window.start, window.end, task) in self.answered.answered for task in self.tasks_of(window.path))

    def _draw(self, held: list, pace: Pace, last: bool = False) -> None:
        """Hands all answers of a file on; after the `last` file waits for what is still being drawn."""
        began = time.perf_counter()
        good = [pair for pair in held if not pair[0].error]
        for sink in self.sinks:
            faults = sink.add(good[0][0].window.path, good, self.classifier) if good else []
            for path, reason in [*faults, *(sink.close() if last else [])]:
                self.failures.add(path, reason)
        pace.spent("drawing", began)

    def summary(self, pace: Pace, seconds: float) -> list[str]:
        """How fast it was and what held it up, and what failed."""
        lines = []
        if self.skipped:
            lines.append(f"{self.skipped} answered before, in {self.args.json}")
        if pace.clips:
            spent = pace.seconds
            working = max(seconds - spent["compiling"], 1e-9)
            started = f" after {spent['compiling']:.1f} s of compiling" if spent["compiling"] >= 0.1 else ""
            bound = max(BOUNDS, key=lambda bound: spent[BOUNDS[bound]])
            shares = (
                f"{100 * spent['clips'] / working:.0f} % of the time spent waiting for clips, {100 * spent['model'] / working:.0f} % for the model"
            )
            lines.append(f"{pace.clips} clips in {working:.1f} s{started}: {pace.clips / working:.1f} clips/s, {bound} ({shares})")
        return [*lines, *(note for sink in self.sinks for note in sink.notes()), *self.failures.lines(len(self.files))]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vidjoint.predict",
        usage="%(prog)s --workdir=DIR FILE... [--task=NAME] [--topk=K] [--window=S --stride=S] [--json=FILE] [--annotate=DIR] [--timeline=OUT]",
        description=__doc__.partition("\n")[0],
        epilog=EPILOG,
        formatter_class=Paragraphs,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="images, videos, folders of them, patterns")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of a training run, or of imported or exported weights")
    parser.add_argument(
        "--task",
        action="append",
        metavar="NAME",
        help="task whose classes to name, may be repeated; all: each of them (default: the tasks of videos for "
        "videos, those of images for images, all where the run has none of the kind)",
    )
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="how many labels per file and task (default: 5)")
    parser.add_argument("--window", type=float, metavar="S", help="one answer for every S seconds of a video; a shorter rest at its end is left out")
    parser.add_argument("--stride", type=float, metavar="S", help="seconds from one window's start to the next one's (default: the window's length)")
    parser.add_argument("--json", metavar="FILE", help="add one JSON object per line to FILE (-: to standard output, and nothing else there)")
    parser.add_argument("--annotate", metavar="DIR", help="write copies with the labels drawn on them into DIR")
    parser.add_argument(
        "--timeline",
        metavar="OUT",
        help="with --window: what a video shows when, as FILE.csv (all videos), FILE.png (one video: thumbnails, bands, "
        "curves), or both for each video in the folder OUT",
    )
    parser.add_argument("--step", metavar="N", help="checkpoint to use, a number or best (default: the newest)")
    parser.add_argument("--batch_size", type=int, metavar="B", help="clips that go to the device at a time (default: the run's eval.batch_size)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="threads that decode (default: one per core)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
