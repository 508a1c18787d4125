"""The predict command: the same scores as evaluation, one line for every file, whatever it is, and no traceback."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import vidjoint
from tests import tiny
from vidjoint import predict
from vidjoint.data.tasks import open_tasks
from vidjoint.evaluate import Evaluator
from vidjoint.sharding import make_mesh

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return tiny.make_run(tmp_path_factory)


@pytest.fixture(scope="module", autouse=True)
def loaded(run):
    """All calls of the command share one model, so that it is compiled once."""
    model = vidjoint.load(run)
    with pytest.MonkeyPatch.context() as patch:
        original = predict.Classifier
        patch.setattr(predict, "Classifier", lambda folder, *args: model if (folder, *args) == (str(run), None, None) else original(folder, *args))
        yield model


@pytest.fixture
def command(run, capsys):
    """Runs the command; returns its exit status, lines on standard output and on standard error."""

    def call(*arguments, workdir=run):
        try:
            status = predict.main([f"--workdir={workdir}", *map(str, arguments)])
        except SystemExit as exit:  # argparse
            status = exit.code
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return call


def table_of(lines):
    """The lines of the table without its header."""
    assert lines[0].startswith("file")
    return lines[1:]


def failures_in(errors):
    """How many files failed, and the lines that say why."""
    assert "clips/s" in errors[0] or "could not be read" in errors[0]
    at = next((i for i, line in enumerate(errors) if "could not be read" in line), len(errors))
    return errors[at:]


def answers_in(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_predictions_are_those_of_evaluation(run, command, loaded, tmp_path):
    """Scores, not only accuracy: of every class for every file of a split, videos with 2 x 3 views and stills with 3."""
    tasks = open_tasks(loaded.config)
    mesh = make_mesh(loaded.config.mesh, jax.devices()[:1])
    results = Evaluator(loaded.config, loaded.model, tasks, mesh).run(loaded.params, (2, 3), reverse=False)
    for name, labels in (("clips", tiny.CLIPS), ("stills", tiny.STILLS)):
        files = [tasks[name].val.name(i) for i in range(len(tasks[name].val))]
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        status, lines, errors = command(f"--task={name}", "--topk=99", f"--json={tmp_path / 'out.jsonl'}", "--", *files)
        assert status == 0 and not failures_in(errors) and len(table_of(lines)) == len(files)
        answers = answers_in(tmp_path / "out.jsonl")
        assert [answer["path"] for answer in answers] == files
        for answer, scores in zip(answers, results[name].scores, strict=True):
            assert list(answer) == ["path", "task", "labels", "scores"] and answer["task"] == name
            np.testing.assert_allclose([answer["scores"][answer["labels"].index(label)] for label in labels], scores, atol=2e-6)
        right = [answer["labels"][0] == labels[label] for answer, label in zip(answers, results[name].label, strict=True)]
        assert np.mean(right) == results[name].summary()["top1"]


def test_every_file_has_its_line(run, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip = run / "data/clips/00.mp4"
    for name in ("-dash.mp4", "--json.mp4", "a b's.mp4", "folder/x.mp4"):
        Path(name).parent.mkdir(exist_ok=True)
        shutil.copy(clip, name)
    Path("text.mp4").write_text("no video")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save("folder/still.png")
    names = ["-dash.mp4", "absent.mp4", "--json.mp4", "text.mp4", "a b's.mp4", "folder", "/dev/zero", "http://example.org/x.mp4"]
    status, lines, errors = command("--topk=2", "--json=out.jsonl", "--task=clips", "--", *names)
    assert status == 1 and failures_in(errors) == [
        "4 of 9 could not be read:",
        f"  2  No such file or directory: absent.mp4, {names[-1]}",
        "  1  no video, or damaged at its head: Invalid data found when processing input: text.mp4",
        "  1  not a file: /dev/zero",
    ]
    paths = ["-dash.mp4", "absent.mp4", "--json.mp4", "text.mp4", "a b's.mp4", "folder/still.png", "folder/x.mp4", "/dev/zero", names[-1]]
    answers = answers_in(tmp_path / "out.jsonl")
    assert [answer["path"] for answer in answers] == paths and len(table_of(lines)) == len(paths)
    for answer, line in zip(answers, table_of(lines), strict=True):
        if "error" in answer:
            assert list(answer) == ["path", "error"] and line.split(maxsplit=1)[0] == answer["path"] and line.endswith(f"error: {answer['error']}")
        else:
            (first, second), (high, low) = answer["labels"], answer["scores"]
            said = " ".join(line.split())
            assert said == f"{answer['path']} {first} {100 * high:.1f} % {second} {100 * low:.1f} %"
    assert [answer.get("error", "") for answer in answers][1::2] == [
        "No such file or directory",
        "no video, or damaged at its head: Invalid data found when processing input",
        "",
        "not a file",
    ]
    same = [answers[i]["scores"] for i in (0, 2, 4, 6)]
    np.testing.assert_allclose(same, same[:1] * 4, atol=2e-6)


def test_json_on_standard_output_is_alone_there(run, command, tmp_path):
    for name in ("été.mp4", os.fsdecode(b"\xff.mp4")):
        os.symlink(run / "data/clips/00.mp4", tmp_path / name)
    status, lines, errors = command("--json=-", tmp_path)
    assert status == 0 and len(errors) == 1 and {json.loads(line)["path"] for line in lines} == {f"{tmp_path}/été.mp4", f"{tmp_path}/\udcff.mp4"}
    assert all(line.isascii() for line in lines)
    status, lines, errors = command(tmp_path)  # and people see something, too
    assert status == 0 and len(table_of(lines)) == 2 and any("udcff" in line for line in lines)


def test_windows(run, command, tmp_path):
    clip, still = run / "data/clips/00.mp4", run / "data/stills/val/0/0.png"
    out = tmp_path / "out.jsonl"
    arguments = (clip, still, tmp_path / "absent.mp4", "--window=0.5", "--stride=0.25", f"--json={out}", "--task=clips")
    status, lines, errors = command(*arguments)
    assert status == 1 and failures_in(errors)[0] == "1 of 3 could not be read:"
    answers = answers_in(out)
    assert [(answer.get("start"), answer.get("end")) for answer in answers] == [(0, 0.5), (0.25, 0.75), (0.5, 1), (None, None), (None, None)]
    assert [Path(answer["path"]).name for answer in answers] == ["00.mp4"] * 3 + ["0.png", "absent.mp4"]
    assert table_of(lines)[1].split()[:2] == [str(clip), "0.25-0.75"] and table_of(lines)[3].startswith(str(still))
    whole = out.read_text().splitlines(keepends=True)
    out.write_text("".join(whole[:1] + whole[2:]))  # a window is missing
    status, lines, _ = command(*arguments)
    assert status == 1 and len(table_of(lines)) == 2  # one window less than in the file has to be made, the still and the absent file
    assert {(a.get("start"), a["path"]) for a in answers_in(out)} == {(a.get("start"), a["path"]) for a in answers}
    assert len(answers_in(out)) == len(answers)


def test_the_tasks_of_a_file_stand_below_each_other(run, command):
    status, lines, _ = command(run / "data/clips/00.mp4", run / "data/stills/val/0/0.png", "--task=all", "--topk=1")
    assert status == 0 and lines[0].split() == ["file", "task", "1."]
    assert [line.split()[1] for line in table_of(lines)] == ["clips", "stills"] * 2
    status, lines, _ = command(run / "data/clips/00.mp4", run / "data/stills/val/0/0.png", "--topk=1")
    assert [line.split()[1] for line in table_of(lines)] == ["clips", "stills"]
    status, lines, _ = command(run / "data/clips/00.mp4", "--task=stills", "--task=clips")
    assert [line.split()[1] for line in table_of(lines)] == ["stills", "clips"]


def test_started_again_it_goes_on(run, command, tmp_path):
    """Whatever a kill leaves: lines that are whole stay as they are, a last one that is not goes, and so do errors."""
    out, clips = tmp_path / "out.jsonl", sorted((run / "data/clips").glob("*.mp4"))[:5]
    late = tmp_path / "late.mp4"
    files = [*clips[:2], late, *clips[2:]]
    assert command(*files, f"--json={out}")[0] == 1
    whole = out.read_text().splitlines(keepends=True)
    shutil.copy(clips[0], late)  # a file that could not be read, and now can
    out.write_text("".join(whole[:4]) + whole[4][:30])
    status, lines, errors = command(*files, f"--json={out}")
    assert status == 0 and errors[0].startswith("3 answered before") and len(table_of(lines)) == 3
    again = out.read_text().splitlines(keepends=True)
    assert again[:3] == whole[:2] + whole[3:4]
    assert [json.loads(line)["path"] for line in again[3:]] == [str(late), *map(str, clips[3:])] and '"error"' not in "".join(again)
    status, lines, _ = command(*files, f"--json={out}")
    assert status == 0 and out.read_text() == "".join(again) and not table_of(lines)
    more = next((run / "data/stills/val").rglob("*.png"))
    assert command(more, f"--json={out}")[0] == 0 and out.read_text().startswith("".join(again))  # other files: added


def test_answers_to_other_questions_are_not_mixed(run, command, tmp_path):
    out, clip = tmp_path / "out.jsonl", run / "data/clips/00.mp4"
    assert command(clip, f"--json={out}", "--topk=2")[0] == 0
    (line,) = out.read_text().splitlines()
    scores = json.loads(line) | {"scores": [0.9, 0.1]}
    for text, arguments, fault in (
        (line, ["--topk=3"], "2 labels of task clips, where there would be 3"),
        (line, ["--topk=2", "--step=10"], "other scores than this model gives"),
        (json.dumps(scores), ["--topk=2"], "other scores than this model gives"),
        ("my notes\n", ["--topk=2"], "line 1 is no answer of predict"),
        ('{"a": 1}\n' + line, ["--topk=2"], "line 1 is no answer of predict"),
    ):
        out.write_text(text + "\n")
        status, _, errors = command(clip, f"--json={out}", *arguments)
        assert status == 2 and len(errors) == 1 and fault in errors[0]
        assert out.read_text() == text + "\n"
    out.write_bytes(b"\xff\xfe\n")
    assert command(clip, f"--json={out}")[0] == 2


def test_annotated_copies(run, command, tmp_path):
    clip, still = run / "data/clips/01.mp4", run / "data/stills/val/0/0.png"
    status, _, errors = command(clip, still, "--topk=2", f"--annotate={tmp_path / 'new'}")
    assert status == 0 and "2 annotated" in errors[1]
    made = sorted(path.relative_to(tmp_path / "new") for path in (tmp_path / "new").rglob("*.*"))
    assert made == [Path("clips/01.mp4"), Path("stills/val/0/0.png")]
    status, _, errors = command(clip, f"--annotate={clip.parent}")
    assert status == 2 and "would write over" in errors[0]
    with Image.open(tmp_path / "new/stills/val/0/0.png") as picture:
        assert picture.size == (150, 120)  # enlarged from 50 x 40


def test_timelines(run, command, tmp_path):
    clip, other = run / "data/clips/01.mp4", run / "data/clips/00.mp4"
    status, _, errors = command(clip, other, "--window=0.5", "--topk=2", f"--timeline={tmp_path / 'all.csv'}")
    assert status == 0
    rows = list(csv.DictReader((tmp_path / "all.csv").read_text().splitlines()))
    halves = (("0.0", "0.5"), ("0.5", "1.0"))
    assert [(row["path"], row["start"], row["end"]) for row in rows] == [(str(path), *half) for path in (clip, other) for half in halves]
    assert set(rows[0]) == {"path", "start", "end", "task", "label_1", "score_1", "label_2", "score_2"} and rows[0]["label_1"] in tiny.CLIPS
    status, _, errors = command(clip, other, "--window=0.25", f"--timeline={tmp_path / 'both'}")
    assert status == 0 and "2 timelines" in errors[1]
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["00.mp4.csv", "00.mp4.png", "01.mp4.csv", "01.mp4.png"]
    with Image.open(tmp_path / "both/00.mp4.png") as picture:
        assert np.asarray(picture).std() > 10


def test_ten_thousand_files_take_no_more_memory(run, command, loaded, tmp_path, monkeypatch):
    """Names alone are held: of the clips never more than a few, whatever waits behind them. (Nothing is decoded here.)"""
    alive = most = 0

    class Row:
        def __init__(self, number, window):
            nonlocal alive, most
            self.number, self.window, self.kind, self.kinds, self.pixels, self.error = number, window, 0, 1, None, "no video"
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    def fake(pieces, *args):
        return (Row(i, piece.windows[0]) for i, piece in enumerate(pieces))

    monkeypatch.setattr("vidjoint.classifier.decoded", fake)
    out = tmp_path / "out.jsonl"
    status, lines, errors = command(*(f"{i}.mp4" for i in range(10_000)), f"--json={out}")
    assert status == 1 and most < 50 and len(table_of(lines)) == 10_000 == len(out.read_text().splitlines())
    assert errors == ["10000 of 10000 could not be read:", "  10000  no video: 0.mp4, 1.mp4, 2.mp4, 3.mp4, 4.mp4 and 9995 more"]


def test_mistakes_are_one_line_each(run, command, tmp_path):
    clip = run / "data/clips/00.mp4"
    cases = {
        (clip, "--task=cups"): "there is no task 'cups': task must be one of clips, stills",
        (clip, "--topk=0"): "--topk=0",
        (clip, "--window=0"): "--window=0",
        (clip, "--window=nan"): "--window=nan",
        (clip, "--window=1", "--stride=-1"): "--stride=-1",
        (clip, "--stride=1"): "--stride needs --window",
        (clip, "--timeline=x.csv"): "--timeline needs --window",
        (clip, run / "data/clips/01.mp4", "--window=1", "--timeline=x.png"): "one picture and there are 2 files",
        (clip, "--window=1", "--timeline=x.jpg"): "--timeline=x.jpg: name a .csv or .png file, or a folder",
        (clip, "--threads=-1"): "--threads=-1",
        (f"{tmp_path}/*.avi",): "there are no images or videos in",
        (clip, "--step=7"): "no checkpoint of step 7; there are 10, 20",
        (clip, "--step=x"): "--step=x",
        (clip, "--batch_size=-4"): "--batch_size=-4",
        (clip, f"--json={tmp_path}/absent/out"): "can't be written (No such file or directory)",
        (tmp_path,): f"no images or videos in {tmp_path}",
    }
    for arguments, line in cases.items():
        status, lines, errors = command(*arguments)
        assert status == 2 and not lines and len(errors) == 1, (arguments, errors)
        assert errors[0].startswith("error: ") and line in errors[0]
    status, _, errors = command(clip, workdir=tmp_path)
    assert status == 2 and len(errors) == 1 and "config.json" in errors[0]
    assert command()[0] == 2  # argparse: no files


def test_files_that_break_decoders(run, shared_data, tmp_path):
    """From the shell: every file gets labels or one clear line, soon, in less than 2 GiB."""
    measured = "import re, sys; from vidjoint.predict import main; status = main(); "
    measured += "print(status, re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1], file=sys.stderr)"
    folder = shared_data / "nasty_video"
    command = [sys.executable, "-c", measured, f"--workdir={run}", "--task=clips", f"--json={tmp_path / 'out.jsonl'}", str(folder)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    answers = answers_in(tmp_path / "out.jsonl")
    listed = [line.split("\t")[0] for line in (folder / "MANIFEST.tsv").read_text().splitlines()[1:]]
    assert [answer["path"] for answer in answers] == sorted(str(folder / name) for name in listed)
    assert len(table_of(ran.stdout.splitlines())) == len(answers) and "Traceback" not in ran.stdout + ran.stderr
    errors = [answer["error"] for answer in answers if "error" in answer]
    assert 0 < len(errors) < 20 and all(error and "\n" not in error for error in errors)
    *said, measured = ran.stderr.splitlines()
    assert failures_in(said)[0] == f"{len(errors)} of {len(answers)} could not be read:"
    status, peak = map(int, measured.split())
    assert status == 1 and peak < 2 * 2**20  # KiB
