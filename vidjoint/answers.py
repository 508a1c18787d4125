"""A model's answers as JSON lines that a later run goes on with, as a table for people, and what failed in the end."""

import contextlib
import json
import os
import unicodedata
from collections.abc import Iterable

from vidjoint.data.files import SHOWN
from vidjoint.errors import UserError, printable

MOST_LABEL = 28  # characters of a class name in the table
MOST_PATH = 60  # columns that are kept for a path; longer ones push the rest of their line
MOST_REASONS = 20  # kinds of faults that are listed
SAME = 0.02  # largest difference of two scores of one model, on different devices


class AnswerFile:
    """One JSON object per line, written through at once. A regular file that is there already is gone on with.

    Lines that say "error" are taken out, for these files are tried again; so is a last line that was cut off. All other lines stay.

    Attributes:
      answered: (path, start, end, task) of the answers in it.
      sample: one of them, to be made again and compared: `check`. None if there is none.
    """

    def __init__(self, name: str, paths: Iterable[str], opened: contextlib.ExitStack):
        """Reads what is there for any of `paths`, and opens the file for the time of `opened`.

        Raises:
          UserError: it holds other things, or can't be read or written.
        """
        self.name, self.answered, self.sample = name, set(), None
        with self._user_errors():
            lines = []
            if os.path.isfile(name):  # a pipe has no lines to go on with, and reading it would never end
                with open(name, encoding="utf-8", errors="surrogateescape") as file:
                    lines = self._kept(file.read().split("\n"), set(paths))
                if lines is not None:
                    with open(f"{name}.part", "w", encoding="utf-8", errors="surrogateescape") as part:
                        part.writelines(f"{line}\n" for line in lines)
                        part.flush()
                        os.fsync(part.fileno())
                    os.replace(f"{name}.part", name)
            self._file = opened.enter_context(open(name, "a", encoding="utf-8"))

    def _kept(self, lines: list[str], paths: set[str]) -> list[str] | None:
        """The lines that stay; None: all of them."""
        kept = []
        for number, line in enumerate(lines, 1):
            try:
                answer = json.loads(line) if line else None
            except ValueError:
                answer = None if number == len(lines) else False
            if answer is None and number == len(lines):
                continue
            if not (isinstance(answer, dict) and "path" in answer and ("error" in answer or answer.keys() >= {"task", "labels", "scores"})):
                raise UserError(f"--json={self.name}: line {number} is no answer of predict: name another file")
            if answer["path"] in paths:
                if "error" in answer:
                    continue
                self.answered.add(key_of(answer))
                self.sample = self.sample or answer
            kept.append(line)
        return None if kept == lines[:-1] and not lines[-1] else kept

    def check(self, again: dict) -> None:
        """Compares `sample` with the answer to the same question now. Raises UserError if another one was asked then."""
        then = self.sample
        differs = ""
        if then.get("task") != again.get("task") or len(then["labels"]) != len(again.get("labels", ())):
            differs = (
                f"{len(then['labels'])} labels of task {then['task']}, where there would be {len(again.get('labels', ()))} of {again.get('task')}"
            )
        else:
            scores = dict(zip(again["labels"], again["scores"], strict=True))
            # A label at the end of the list may change places with one that is left out
            if any(abs(scores.get(label, score) - score) > SAME for label, score in zip(then["labels"], then["scores"], strict=True)):
                differs = "other scores than this model gives"
        if differs:
            raise UserError(f"--json={self.name} holds answers to another question: for {then['path']}, {differs}. Name another file, or remove it")

    def write(self, answer: dict) -> None:
        """Adds a line, unless the file has it."""
        if "error" in answer or key_of(answer) not in self.answered:
            with self._user_errors():
                print(json.dumps(answer), file=self._file, flush=True)

    @contextlib.contextmanager
    def _user_errors(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"--json={self.name} can't be written ({error.strerror})") from None
        except UnicodeError:
            raise UserError(f"--json={self.name} is no text: name another file") from None


def key_of(answer: dict) -> tuple:
    return answer["path"], answer.get("start", 0.0), answer.get("end"), answer["task"]


class Table:
    """Answers in columns: file, seconds (of windows), task (of several), and the best labels with their scores in percent.

    Where a line would be wider than the terminal, the labels stand below each other.
    """

    def __init__(self, paths: list[str], labels: dict[str, tuple[str, ...]], topk: int, windows: bool, columns: int | None = None):
        """`labels` of the tasks that can occur; `columns` of the terminal, None without one."""
        self.widths = [min(MOST_PATH, max(map(_width, paths), default=0))]
        self.titles = ["file"]
        if windows:
            self.widths.append(17)
            self.titles.append("seconds")
        self.several = len(labels) > 1
        if self.several:
            self.widths.append(max(map(_width, labels)))
            self.titles.append("task")
        self.widths = [max(width, len(title)) for width, title in zip(self.widths, self.titles, strict=True)]
        self.count = min(topk, max(map(len, labels.values()), default=0))
        self.label = max((_width(_short(name)) for names in labels.values() for name in names), default=0)
        self.tall = columns is not None and sum(self.widths) + 2 * len(self.widths) + self.count * (self.label + 10) - 2 > columns
        self._last = None

    def header(self) -> str:
        labels = [] if self.tall else [_pad(f"{i + 1}.", self.label + 8) for i in range(self.count)]
        return "  ".join([*map(_pad, self.titles, self.widths), *(labels or ["label"])]).rstrip()

    def lines(self, answer: dict) -> list[str]:
        """The lines of one answer; a file's name stands on the first line of its answers."""
        place = (answer["path"], answer.get("start"))
        cells = ["" if self._last == place and self.tall else printable(answer["path"])]
        if "seconds" in self.titles:
            cells.append(f"{answer['start']:.2f}-{answer['end']:.2f}" if "end" in answer else "")
        if self.several:
            cells.append(answer.get("task", ""))
        self._last = place
        if "error" in answer:
            return ["  ".join([*map(_pad, cells, self.widths), f"error: {answer['error']}"])]
        labels = [_pad(_short(label), self.label) + f" {100 * score:5.1f} %" for label, score in zip(answer["labels"], answer["scores"], strict=True)]
        if not self.tall:
            return ["  ".join([*map(_pad, cells, self.widths), *labels])]
        rest = ["  ".join([*(" " * width for width in self.widths), label]) for label in labels[1:]]
        return ["  ".join([*map(_pad, cells, self.widths), labels[0]]), *rest]


class Failures:
    """Files that could not be read, by reason; keeps a few names of each."""

    def __init__(self):
        self.files = 0
        self._reasons: dict[str, tuple[list[int], list[str]]] = {}
        self._last = None

    def add(self, path: str, reason: str) -> None:
        self.files += path != self._last  # windows of one file follow each other
        reason = reason if reason in self._reasons or len(self._reasons) < MOST_REASONS else "other reasons"
        count, names = self._reasons.setdefault(reason, ([0], []))
        if not names or names[-1] != path:
            count[0] += 1
            if len(names) < SHOWN:
                names.append(path)
        self._last = path

    def lines(self, files: int) -> list[str]:
        """A line with their number, of so many files in all, and one for each reason, the most frequent first."""
        ranked = sorted(self._reasons.items(), key=lambda item: -item[1][0][0])
        width = max((len(str(count[0])) for _, (count, _) in ranked), default=0)
        lines = [f"{self.files} of {files} could not be read:"] if ranked else []
        for reason, (count, names) in ranked:
            more = f" and {count[0] - len(names)} more" if count[0] > len(names) else ""
            lines.append(f"  {count[0]:>{width}}  {reason}: {', '.join(map(printable, names))}{more}")
        return lines


def encodable(text: str, encoding: str | None) -> str:
    """What a terminal can't show becomes escapes."""
    return text.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")


def _short(label: str) -> str:
    half = MOST_LABEL // 2
    return label if len(label) <= MOST_LABEL else f"{label[: half - 1].rstrip()}…{label[-half:].lstrip()}"


def _width(text: str) -> int:
    """Columns on a terminal: many East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _width(text))
