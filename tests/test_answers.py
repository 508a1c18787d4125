"""The table of answers and the list of failures, as people see them."""

import contextlib
import json
import os

import pytest

from vidjoint.answers import AnswerFile, Failures, Table, encodable
from vidjoint.errors import UserError

LABELS = {"motion": ("left", "right"), "scenes": ("a kitchen with a very long name, seen from above", "été", "厨房")}
ANSWERS = [
    {"path": "a.mp4", "task": "motion", "labels": ["left", "right"], "scores": [0.987, 0.013]},
    {"path": "a.mp4", "task": "scenes", "labels": [LABELS["scenes"][0], "厨房"], "scores": [1.0, 0.0]},
    {"path": "longer/b.mp4", "error": "no video"},
]


def test_a_pipe_is_written_to_and_never_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)  # with it, opening the pipe does not wait
    for name in (str(tmp_path / "pipe"), "/dev/null"):
        with contextlib.ExitStack() as opened:
            file = AnswerFile(name, ["a.mp4"], opened)
            assert not file.answered and file.sample is None
            file.write(ANSWERS[0])
    assert os.read(reader, 1000).decode() == json.dumps(ANSWERS[0]) + "\n"
    os.close(reader)
    with contextlib.ExitStack() as opened, pytest.raises(UserError, match="can't be written"):
        AnswerFile(str(tmp_path), [], opened)


def lines_of(table):
    return [table.header(), *(line for answer in ANSWERS for line in table.lines(answer))]


def test_columns_stand_below_each_other():
    table = Table(["a.mp4", "longer/b.mp4"], LABELS, 2, windows=False)
    assert lines_of(table) == [
        "file          task    1.                                    2.",
        "a.mp4         motion  left                          98.7 %  right                          1.3 %",
        "a.mp4         scenes  a kitchen wit…een from above 100.0 %  厨房                           0.0 %",
        "longer/b.mp4          error: no video",
    ]


def test_labels_stand_below_each_other_in_a_narrow_terminal():
    table = Table(["a.mp4", "longer/b.mp4"], LABELS, 2, windows=True, columns=80)
    assert lines_of(table) == [
        "file          seconds            task    label",
        "a.mp4                            motion  left                          98.7 %",
        "                                         right                          1.3 %",
        "                                 scenes  a kitchen wit…een from above 100.0 %",
        "                                         厨房                           0.0 %",
        "longer/b.mp4                             error: no video",
    ]


def test_names_cannot_act_on_a_terminal():
    table = Table(["x"], {"motion": LABELS["motion"]}, 1, windows=False)
    (line,) = table.lines({"path": "\x1b[2J\n.mp4", "error": "gone"})
    assert line.startswith("\\x1b[2J\\n.mp4")
    assert encodable("é\udcff", "ascii") == "\\xe9\\udcff"


def test_failures_are_grouped_by_reason():
    failures = Failures()
    assert failures.lines(7) == []
    for i in range(12):
        failures.add(f"{i}.mp4", "no video")
    failures.add("x.mp4", "damaged")
    failures.add("x.mp4", "damaged")  # two windows of one file
    assert failures.lines(20) == [
        "13 of 20 could not be read:",
        "  12  no video: 0.mp4, 1.mp4, 2.mp4, 3.mp4, 4.mp4 and 7 more",
        "   1  damaged: x.mp4",
    ]
    for i in range(100):
        failures.add(f"{i}", f"reason {i}")
    assert len(failures.lines(200)) < 30
