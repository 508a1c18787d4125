"""Which clips a report shows of a task, the classes that are confused most and the hardest examples, and pictures of them."""

import collections
import time

import numpy as np
from tqdm import tqdm

from vidjoint.data.decode import DecodeError
from vidjoint.data.examples import views
from vidjoint.data.tasks import Task
from vidjoint.reporting.page import Html, picture, strip, tag
from vidjoint.reporting.predictions import Predictions

HARDEST, PAIRS, PER_PAIR = 8, 6, 2  # clips, confused pairs of classes, and clips of each pair that are shown
FRAMES = 4  # of a clip's frames that are shown
SECONDS = 30.0  # that decoding them may take; what is missing then is named without a picture


class Pictures:
    """Frames of validation clips, by name, as the model sees them; each is decoded when it is asked for, as long as time is left."""

    def __init__(self, tasks: dict[str, Task], wanted: dict[str, set[str]]):
        self._tasks, self._end = tasks, time.monotonic() + SECONDS
        self._index = {task: {} for task in tasks}
        for name, task in tasks.items():
            if task.val and wanted.get(name):
                self._index[name] = {path: i for i in range(len(task.val)) if (path := task.val.name(i)) in wanted[name]}
        self._bar = tqdm(total=sum(map(len, self._index.values())), desc="report", unit=" clips", disable=None, delay=2, leave=False)

    def close(self) -> None:
        self._bar.close()

    def figure(self, task: str, path: str, caption: list) -> Html:
        """The clip of that name in a few frames, with a caption; without frames where that is not possible."""
        index = self._index.get(task, {}).get(path)
        image = Html("")
        if index is not None and time.monotonic() < self._end:
            try:
                clip = views(self._tasks[task].val[index], self._tasks[task].clip, 1, 1)[0]  # [T, H, W, 3]
                chosen = np.unique(np.linspace(0, len(clip) - 1, min(FRAMES, len(clip))).round().astype(int))
                moments = f"frames {', '.join(str(t + 1) for t in chosen)} of {len(clip)}" if len(clip) > 1 else "the picture"
                image = picture(strip(clip[chosen]), f"{moments}: {path}", "jpeg")
            except (DecodeError, OSError, MemoryError):
                pass
            self._bar.update()
        return tag("figure", image, tag("figcaption", *caption))


def wanted(found: dict[str, Predictions]) -> dict[str, set[str]]:
    """Names of the clips that the page shows."""
    result = {}
    for name, predicted in found.items():
        rows = [*hardest(predicted), *(i for _, _, rows in confused(predicted) for i in rows[:PER_PAIR])]
        result[name] = {predicted.paths[i] for i in rows}
    return result


def hardest(found: Predictions) -> list[int]:
    """Rows of the least probable true classes, worst first."""
    order = np.argsort(found.scores, kind="stable")
    return [int(i) for i in order[:HARDEST] if not np.isnan(found.scores[i]) and not found.correct[i]]


def confused(found: Predictions) -> list[tuple[str, str, list[int]]]:
    """(true class, predicted class, rows with the surest first) of the pairs that are confused most often; none in multilabel tasks."""
    pairs = collections.defaultdict(list)
    if not found.multilabel:
        for i in np.argsort(-found.confidence, kind="stable"):
            if not found.correct[i]:
                pairs[found.labels[i][0], found.top[i][0]].append(int(i))
    most = sorted(pairs.items(), key=lambda item: -len(item[1]))[:PAIRS]
    return [(*names, rows) for names, rows in most]
