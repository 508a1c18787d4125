"""The predict command: the same scores as evaluation, one line for every file, whatever it is, and no traceback."""

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


def answers_in(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_predictions_are_those_of_evaluation(run, command, loaded, tmp_path):
    """Scores, not only accuracy: of every class for every file of a split, videos with 2 x 3 views and stills with 3."""
    tasks = open_tasks(loaded.config)
    mesh = make_mesh(loaded.config.mesh, jax.devices()[:1])
    results = Evaluator(loaded.config, loaded.model, tasks, mesh).run(loaded.params, (2, 3), reverse=False)
    for name, labels in (("clips", tiny.CLIPS), ("stills", tiny.STILLS)):
        files = [tasks[name].val.name(i) for i in range(len(tasks[name].val))]
        status, lines, errors = command(f"--task={name}", "--topk=99", f"--json={tmp_path / 'out.jsonl'}", "--", *files)
        assert status == 0 and not errors and len(lines) == len(files)
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
    status, lines, errors = command("--topk=2", "--json=out.jsonl", "--", *names)
    assert status == 1 and errors == ["4 of 9 could not be read"]
    paths = ["-dash.mp4", "absent.mp4", "--json.mp4", "text.mp4", "a b's.mp4", "folder/still.png", "folder/x.mp4", "/dev/zero", names[-1]]
    answers = answers_in(tmp_path / "out.jsonl")
    assert [answer["path"] for answer in answers] == paths and len(lines) == len(paths)
    for answer, line in zip(answers, lines, strict=True):
        if "error" in answer:
            assert list(answer) == ["path", "error"] and line == f"{answer['path']}: error: {answer['error']}"
        else:
            (first, second), (high, low) = answer["labels"], answer["scores"]
            assert line == f"{answer['path']}: {first} {100 * high:.1f} %, {second} {100 * low:.1f} %"
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
    assert status == 0 and not errors and {json.loads(line)["path"] for line in lines} == {f"{tmp_path}/été.mp4", f"{tmp_path}/\udcff.mp4"}
    assert all(line.isascii() for line in lines)
    status, lines, errors = command(tmp_path)  # and people see something, too
    assert status == 0 and not errors and len(lines) == 2 and any("udcff" in line for line in lines)


def test_windows(run, command, tmp_path):
    clip, still = run / "data/clips/00.mp4", run / "data/stills/val/0/0.png"
    status, lines, errors = command(clip, still, tmp_path / "absent.mp4", "--window=0.5", "--stride=0.25", f"--json={tmp_path / 'out.jsonl'}")
    assert status == 1 and errors == ["1 of 5 could not be read"]
    answers = answers_in(tmp_path / "out.jsonl")
    assert [(answer.get("start"), answer.get("end")) for answer in answers] == [(0, 0.5), (0.25, 0.75), (0.5, 1), (None, None), (None, None)]
    assert [Path(answer["path"]).name for answer in answers] == ["00.mp4"] * 3 + ["0.png", "absent.mp4"]
    assert lines[1].startswith(f"{clip} 0.25-0.75 s: ") and lines[3].startswith(f"{still}: ")


def test_mistakes_are_one_line_each(run, command, tmp_path):
    clip = run / "data/clips/00.mp4"
    cases = {
        (clip, "--task=cups"): "there is no task 'cups': task must be one of clips, stills",
        (clip, "--topk=0"): "--topk=0",
        (clip, "--window=0"): "--window=0",
        (clip, "--window=nan"): "--window=nan",
        (clip, "--window=1", "--stride=-1"): "--stride=-1",
        (clip, "--stride=1"): "--stride needs --window",
        (clip, "--step=7"): "no checkpoint of step 7; there are 10, 20",
        (clip, "--step=x"): "--step=x",
        (clip, "--batch_size=-4"): "--batch_size=-4",
        (clip, f"--json={tmp_path}/absent/out"): "can't be written (No such file or directory)",
        (tmp_path,): f"no images or videos in the folder {tmp_path}",
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
    assert len(ran.stdout.splitlines()) == len(answers) and "Traceback" not in ran.stdout + ran.stderr
    errors = [answer["error"] for answer in answers if "error" in answer]
    assert 0 < len(errors) < 20 and all(error and "\n" not in error for error in errors)
    said, measured = ran.stderr.splitlines()
    assert said == f"{len(errors)} of {len(answers)} could not be read"
    status, peak = map(int, measured.split())
    assert status == 1 and peak < 2 * 2**20  # KiB
