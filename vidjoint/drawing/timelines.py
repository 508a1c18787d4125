"""The timelines of the videos of one prediction: where they go, as CSV or PNG."""

import csv
import os
from pathlib import Path

import numpy as np

from vidjoint.data.decode import DecodeError
from vidjoint.drawing.timeline import csv_row, header, timeline_png, write_csv
from vidjoint.errors import UserError


class Timelines:
    """Use it as a context manager; `add` a video's answers, in order."""

    def __init__(self, out: str, files: list[str], topk: int):
        """`out` is a .csv of all videos, a .png of one, or a folder that gets both for each. Raises UserError if it can't be written."""
        self.out, self.topk, self.kind = Path(out), topk, Path(out).suffix.lower()
        self.made, self._csv = 0, None
        if self.kind in (".jpg", ".jpeg", ".gif", ".pdf", ".svg", ".mp4", ".json"):
            raise UserError(f"--timeline={out}: name a .csv or .png file, or a folder")
        if self.kind == ".png" and len(files) != 1:
            raise UserError(f"--timeline={out} is one picture and there are {len(files)} files: name a folder, which gets one for each")
        folder = self.out if self.kind not in (".csv", ".png") else self.out.parent
        try:
            if folder is self.out:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--timeline={out} can't be a folder ({error.strerror}): name another, or a .csv or .png file") from None
        if not os.access(folder, os.W_OK) or (folder is not self.out and self.out.is_dir()):
            raise UserError(f"--timeline={out} can't be written: name a file in a folder that exists and is yours")
        folders = {os.path.dirname(os.path.abspath(file)) for file in files}
        self._common = os.path.commonpath(folders) if folders else "/"

    def __enter__(self):
        if self.kind == ".csv":
            self._csv = open(self.out, "w", newline="", encoding="utf-8", errors="surrogateescape")
            csv.writer(self._csv).writerow(header(self.topk))
        return self

    def __exit__(self, *_) -> None:
        if self._csv:
            self._csv.close()

    def misses(self, path: str) -> bool:
        return True  # it needs all answers of a video, also those that are written down already

    def add(self, path: str, answers: list, classifier) -> list:
        """Writes a video's part from its pairs (`Answer`, its dict). Returns (path, fault) where it can't be drawn."""
        if self._csv:
            csv.writer(self._csv).writerows(csv_row(line) for _, line in answers)
            self._csv.flush()
            self.made += 1
            return []
        if answers[0][0].window.end is None and self.kind != ".png":
            return []  # an image, or a video shorter than a window
        target = self.out
        if self.kind != ".png":
            target = self.out / os.path.relpath(os.path.abspath(path), self._common)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_csv(target.with_name(target.name + ".csv"), self.topk, [line for _, line in answers])
            target = target.with_name(target.name + ".png")
        tasks = dict.fromkeys(answer.task for answer, _ in answers)
        windows = dict.fromkeys((answer.window.start, answer.window.end) for answer, _ in answers if answer.window.end is not None)
        if not windows:
            raise UserError(f"{path} is an image or shorter than a window: there is no timeline to draw")
        of_task = {task: {(a.window.start, a.window.end): a.scores for a, _ in answers if a.task == task} for task in tasks}
        whole = [times for times in windows if all(times in scores for scores in of_task.values())]
        scores = {task: np.stack([found[times] for times in whole]) for task, found in of_task.items()}
        try:
            timeline_png(target, path, classifier.config.data.max_pixels, np.array(whole), scores, classifier.labels)
        except DecodeError as error:
            return [(path, f"no timeline: {error}")]
        self.made += 1
        return []

    def close(self) -> list:
        return []

    def notes(self) -> list[str]:
        return [f"{self.made} timeline{'s' if self.made != 1 else ''} in {self.out}"]
