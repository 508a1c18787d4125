"""Copies of files with their labels drawn on them, made beside the prediction that goes on."""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from vidjoint.data.decode import DecodeError
from vidjoint.data.files import has_extension
from vidjoint.drawing.labels import Line, Span, annotate_image, annotate_video
from vidjoint.errors import UserError

WAITING = 4  # copies that are being made or wait for it


class Copies:
    """Use it as a context manager; `add` a file's answers, and `close` it before asking for `notes`."""

    def __init__(self, folder: str, files: list[str]):
        """Raises UserError if `folder` can't be used, or would lose a file that is to be read."""
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--annotate={folder} can't be a folder ({error.strerror}): name another") from None
        if not os.access(self.folder, os.W_OK):
            raise UserError(f"--annotate={folder} can't be written: name another folder")
        folders = {os.path.dirname(os.path.abspath(file)) for file in files}
        self._common = os.path.commonpath(folders) if folders else "/"
        sources = {os.path.realpath(file) for file in files}
        for file in files:
            if os.path.realpath(self._target(file)) in sources:
                raise UserError(f"--annotate={folder} would write over {file}: name another folder")
        self.made, self.mute = 0, []
        self._waiting: deque[tuple[str, Future]] = deque()
        self._pool = ThreadPoolExecutor(1, "annotate")

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)

    def misses(self, path: str) -> bool:
        return not self._target(path).exists()

    def add(self, path: str, answers: list, classifier) -> list[str]:
        """Starts the copy of a file from its pairs (`Answer`, its dict). Returns faults of the copies finished meanwhile, one line each."""
        spans: dict[tuple, list[Line]] = {}
        several = len({answer.task for answer, _ in answers}) > 1
        for answer, line in answers:
            lines = spans.setdefault((answer.window.start, answer.window.end), [])
            lines += [Line(label, score, answer.task if several else "") for label, score in zip(line["labels"], line["scores"], strict=True)]
        found = [Span(*times, tuple(_best_first(lines))) for times, lines in spans.items()]
        self._waiting.append((path, self._pool.submit(self._make, path, found, classifier.config.data.max_pixels)))
        return self._collect(WAITING)

    def close(self) -> list[str]:
        """Waits for all copies. Returns faults, one line each."""
        return self._collect(0)

    def notes(self) -> list[str]:
        lines = [f"{self.made} annotated in {self.folder}"]
        return lines + ([f"{len(self.mute)} without their sound, which MP4 can't hold as it is"] if self.mute else [])

    def _collect(self, most: int) -> list[str]:
        faults = []
        while len(self._waiting) > most:
            path, future = self._waiting.popleft()
            try:
                self.mute += [path] if future.result() else []
                self.made += 1
            except DecodeError as error:
                faults.append((path, f"not annotated: {error}"))
        return faults

    def _make(self, path: str, spans: list[Span], max_pixels: int) -> bool:
        target = self._target(path)
        try:
            if target.suffix == ".mp4":
                return annotate_video(path, target, spans, max_pixels)
            annotate_image(path, target, spans[0].lines, max_pixels)
        except OSError as error:
            raise UserError(f"--annotate: {target} can't be written ({error.strerror})") from None
        return False

    def _target(self, path: str) -> Path:
        """Below the folder as the file lies below the folder that all have in common."""
        inside = Path(os.path.relpath(os.path.abspath(path), self._common))
        if has_extension(path, "image") and not has_extension(path, "video"):
            lossless = inside.suffix.lower() in (".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
            ending, own = (".png", (".png",)) if lossless else (".jpg", (".jpg", ".jpeg"))
        else:
            ending, own = ".mp4", (".mp4",)
        return self.folder / (inside.with_suffix(ending) if inside.suffix.lower() in own else inside.with_name(inside.name + ending))


def _best_first(lines: list[Line]) -> list[Line]:
    """One task's labels after each other; of several tasks first the best of each."""
    tasks = list(dict.fromkeys(line.task for line in lines))
    ranks = {task: [line for line in lines if line.task == task] for task in tasks}
    shown = 3 if len(tasks) == 1 else 2
    return [line for task in tasks for line in ranks[task][: shown if len(tasks) > 1 else None]]
