"""Evaluation counts every example once, on any devices and batches, averages the views, and says what it found in the words of the contract."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vidjoint import evaluate
from vidjoint.data.examples import views
from vidjoint.data.tasks import open_tasks
from vidjoint.evaluate import Evaluator, TaskResult
from vidjoint.metrics import calibration
from vidjoint.reporting import predictions
from vidjoint.sharding import make_mesh

PARAMS = {
    "clips": 0.1 * np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32),
    "stills": 0.1 * np.random.default_rng(2).normal(size=(1, 10)).astype(np.float32),
}


class Brightness:
    """A model that is compiled at once: logits are a weighted sum of the frames' mean brightness, so order, views and examples all matter."""

    def logits(self, params, pixels, key=None):
        return {
            task: pixels.astype(jnp.float32).mean(axis=(2, 3, 4)) @ weights for task, weights in params.items() if len(weights) == pixels.shape[1]
        }


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return tiny.make_run(tmp_path_factory)


@pytest.fixture(scope="module")
def config(run):
    return tiny.config_of(run / "data")


@pytest.fixture(scope="module")
def tasks(config):
    return open_tasks(config)


def evaluator_of(config, tasks, devices=1, batch_size=4, average="softmax"):
    config = config.copy_and_resolve_references()
    config.eval.update(batch_size=batch_size, average=average)
    return Evaluator(config, Brightness(), tasks, make_mesh(config.mesh, jax.devices()[:devices]))


def softmax(x):
    odds = np.exp(x - x.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


def expected(task, temporal, spatial, average="softmax", reverse=False):
    """Scores float32[n, C] in NumPy, one example and one view at a time."""
    scores = []
    for i in range(len(task.val)):
        clips = views(task.val[i], task.clip, temporal, spatial)[:, :: -1 if reverse else 1]
        logits = np.stack([clip.mean(axis=(1, 2, 3)) @ PARAMS[task.name] for clip in clips])
        scores.append(softmax(logits).mean(axis=0) if average == "softmax" else logits.mean(axis=0))
    return np.array(scores)


# Every example once


@pytest.mark.parametrize("devices, batch_size", [(1, 1), (1, 4), (1, 11), (1, 100), (8, 1), (8, 13), (8, 64)])
def test_every_example_counts_once_on_any_devices_and_batches(config, tasks, devices, batch_size):
    results = evaluator_of(config, tasks, devices, batch_size).run(PARAMS, (1, 1), reverse=True)
    assert list(results) == ["clips", "stills"]
    for name, result in results.items():
        source = tasks[name].val
        assert result.index.tolist() == list(range(len(source))) and result.source is source
        assert result.label.tolist() == [source[i]["label"] for i in range(len(source))] and len(source) == tiny.VALIDATION[name]
        np.testing.assert_allclose(result.scores, expected(tasks[name], 1, 1), atol=1e-5)
        assert result.undecodable == 0 and result.labels == {"clips": tiny.CLIPS, "stills": tiny.STILLS}[name]
    np.testing.assert_allclose(results["clips"].reversed_scores, expected(tasks["clips"], 1, 1, reverse=True), atol=1e-5)
    assert np.abs(results["clips"].reversed_scores - results["clips"].scores).max() > 0.01
    assert results["stills"].reversed_scores is None  # a still has no order


@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_views_are_averaged(config, tasks, average):
    results = evaluator_of(config, tasks, 8, average=average).run(PARAMS, (2, 3), reverse=True)
    clips = results["clips"]
    np.testing.assert_allclose(clips.scores, expected(tasks["clips"], 2, 3, average), atol=1e-5)
    np.testing.assert_allclose(clips.reversed_scores, expected(tasks["clips"], 2, 3, average, reverse=True), atol=1e-5)
    np.testing.assert_allclose(results["stills"].scores, expected(tasks["stills"], 1, 3, average), atol=1e-5)
    assert np.abs(clips.scores - expected(tasks["clips"], 1, 1, average)).max() > 1e-3  # one view would be another answer


def test_tasks_without_a_validation_split_are_passed_over(config, tasks):
    without = {**tasks, "stills": open_tasks(config, ("train",))["stills"]}
    assert list(evaluator_of(config, without).run(PARAMS, (1, 1), reverse=False)) == ["clips"]


def test_files_that_cannot_be_decoded_are_left_out_and_named_once(config, tmp_path, caplog):
    for i in range(4):
        tiny.write_clip(tmp_path / f"{i}.mp4", i)
    (tmp_path / "2.mp4").write_bytes(b"no video")
    (tmp_path / "list.csv").write_text("".join(f"{i}.mp4 {i}\n" for i in range(4)))
    config = config.copy_and_resolve_references()
    del config.tasks["stills"]
    config.tasks.clips.update(train=str(tmp_path / "list.csv"), val=str(tmp_path / "list.csv"), root=str(tmp_path))
    evaluator = evaluator_of(config, open_tasks(config))
    with caplog.at_level(logging.WARNING, "vidjoint"):
        for _ in range(2):
            result = evaluator.run(PARAMS, (1, 1), reverse=False)["clips"]
    assert result.label.tolist() == result.index.tolist() == [0, 1, 3] and result.undecodable == 1 and result.summary()["undecodable"] == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"clips: not evaluated: {tmp_path / '2.mp4'}: no video, or damaged at its head: Invalid data found when processing input"
    ]


# What is made of the scores


def test_summary():
    scores = np.eye(6, dtype=np.float32)[[0, 1, 2, 3]] + 0.01 * np.arange(6)  # every row ranks its own class first, then 5, 4, 3, ...
    result = TaskResult(tuple("abcdef"), np.array([0, 1, 5, 0]), scores, scores[::-1])
    assert result.summary() == {"n": 4, "classes": 6, "top1": 0.5, "top5": 0.75, "top1_reversed": 0.25}
    few = TaskResult(("a", "b"), np.array([1, 1]), np.array([[0.6, 0.4], [0.1, 0.9]], np.float32), None)
    assert few.summary() == {"n": 2, "classes": 2, "top1": 0.5, "top5": 1.0}
    none = TaskResult(("a", "b"), np.zeros(0, int), np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32), 3)
    assert none.summary() == {"n": 0, "classes": 2, "top1": None, "top5": None, "top1_reversed": None, "undecodable": 3}

    results = {"x": result, "y": few}
    assert evaluate.as_json(results, 7) == {"step": 7, "tasks": {"x": result.summary(), "y": few.summary()}}
    assert evaluate.as_events(results) == {"val/x/top1": 0.5, "val/x/top5": 0.75, "val/x/top1_reversed": 0.25, "val/y/top1": 0.5, "val/y/top5": 1.0}
    assert evaluate.mean_score(results) == 0.5 and evaluate.mean_score({}) is None and evaluate.mean_score({"x": result, "z": none}) is None
    header, first, second, third = evaluate.table(evaluate.as_json({**results, "z": none}, 7)).splitlines()
    assert header.split() == ["task", "examples", "classes", "chance", "top-1", "top-5", "reversed"]
    assert first.split() == ["x", "4", "6", "16.7", "%", "50.0", "%", "75.0", "%", "25.0", "%"] and second.split()[-1] == "-"
    assert third.split() == ["z", "0", "2", "50.0", "%", "-", "-", "-"] and len({len(line) for line in (header, first, second, third)}) == 1


def test_reports(tmp_path):
    scores = np.eye(3, dtype=np.float32)[[0, 0, 1, 2]]
    results = {"x": TaskResult(("a", "b, c", "d"), np.array([0, 1, 1, 2]), scores, None)}
    results["y"] = TaskResult(("a", "b"), np.zeros(0, int), np.zeros((0, 2), np.float32), None, 1)
    evaluate.write_reports(results, tmp_path)
    assert (tmp_path / "eval/x/confusion.csv").read_text().splitlines() == ['true / predicted,a,"b, c",d', "a,1,0,0", '"b, c",1,1,0', "d,0,0,1"]
    assert [line.split(",")[-5:-2] for line in (tmp_path / "eval/x/per_class.csv").read_text().splitlines()[1:]] == [
        ["1", "1", "1.0"],
        ["2", "1", "0.5"],
        ["1", "1", "1.0"],
    ]
    for name in ("x", "y"):
        assert (tmp_path / f"confusion_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_probabilities():
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32) * 40
    one = TaskResult(("a", "b", "c"), np.array([0, 1, 2, 0]), logits, None, logits=True)
    np.testing.assert_allclose(one.probabilities, softmax(logits.astype(float)), atol=1e-6)
    several = TaskResult(("a", "b", "c"), np.array([[0], [1], [2], [0]]), logits, None, logits=True)
    np.testing.assert_allclose(several.probabilities, 1 / (1 + np.exp(-logits.astype(float))), atol=1e-6)
    assert TaskResult(("a", "b", "c"), np.array([0]), logits[:1], None).probabilities is not None


def test_predictions_say_what_was_evaluated(config, tasks, tmp_path):
    """Top-1 from the file is that of the results, also with averaged logits, files named by bytes that are no text, and ties."""
    for average in ("softmax", "logits"):
        results = evaluator_of(config, tasks, average=average).run(PARAMS, (2, 1), reverse=False)
        evaluate.write_predictions(results, tmp_path)
        assert predictions.tasks_in(tmp_path) == ["clips", "stills"]
        for name, result in results.items():
            found = predictions.read(predictions.file_of(tmp_path, name))
            assert list(found.paths) == [tasks[name].val.name(i) for i in range(len(tasks[name].val))] and not found.multilabel
            assert found.correct.mean() == result.summary()["top1"]
            in_five = [own[0] in best for own, best in zip(found.labels, found.top, strict=True)]
            assert np.mean(in_five) == result.summary()["top5"]
            expect = result.scores if average == "softmax" else softmax(result.scores)
            np.testing.assert_allclose(found.scores, expect[np.arange(len(expect)), result.label], rtol=1e-5)
            np.testing.assert_allclose(found.top_scores, -np.sort(-expect, axis=1)[:, :5], rtol=1e-5)
            assert calibration(found.confidence, found.correct)["ece"] == pytest.approx(result.details()["calibration"]["ece"], abs=1e-4)


def test_predictions_keep_odd_names_and_multilabel_rows(tmp_path):
    names, classes = ["a\udcff,b.mp4", 'line\nbreak".mp4', "x"], ("left, up", "größer", "c")
    scores = np.array([[0.5, 0.5, 0.0], [0.2, 0.2, 0.6], [np.nan] * 3], np.float32)
    predictions.write(tmp_path / "p.csv", names, np.array([1, 2, 0]), scores, classes)
    found = predictions.read(tmp_path / "p.csv")
    assert list(found.paths) == names and found.labels == (("größer",), ("c",), ("left, up",))
    assert [best[0] for best in found.top[:2]] == ["left, up", "c"] and found.correct.tolist() == [False, True, False]
    assert found.top_scores.shape == (3, 3) and np.isnan(found.confidence[2])

    predictions.write(tmp_path / "m.csv", names, np.array([[1, 0], [2, -1], [-1, -1]]), scores, classes)
    found = predictions.read(tmp_path / "m.csv")
    assert found.multilabel and found.labels == (("größer", "left, up"), ("c",), ()) and found.correct.tolist() == [True, True, False]
    assert found.scores[:2].tolist() == [0.5, 0.6] and np.isnan(found.scores[2])

    predictions.write(tmp_path / "none.csv", [], np.zeros(0, int), np.zeros((0, 3)), classes)
    assert predictions.read(tmp_path / "none.csv").top_scores.shape[0] == 0


# The command


@pytest.fixture
def command(run, capsys, monkeypatch, tmp_path):
    """Runs the command; returns its exit status, standard output and error lines."""
    monkeypatch.setenv("VIDJOINT_CACHE", str(tmp_path / "cache"))

    def call(*arguments, workdir=run):
        status = evaluate.main([f"--workdir={workdir}", *map(str, arguments)])
        captured = capsys.readouterr()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache" / "xla") or status == 2
        return status, captured.out, captured.err.splitlines()

    return call


def test_command_shows_classes_and_calibration(command, run, tmp_path):
    """One class at a time, from the predictions that it writes besides."""
    status, shown, errors = command("--per_class", f"--json={tmp_path / 'r.json'}", "--views=1x1", f"--predictions={tmp_path}")
    assert status == 0 and not errors
    for name, task in json.loads((tmp_path / "r.json").read_text())["tasks"].items():
        found = predictions.read(predictions.file_of(tmp_path, name))
        labels = [own[0] for own in found.labels]
        for row in task["per_class"]:
            own = [i for i, label in enumerate(labels) if label == row["label"]]
            assert (row["examples"], row["correct"]) == (len(own), found.correct[own].sum())
            assert f"{row['label']:<32} {len(own):>8} {100 * row['top1']:>6.1f} %" in shown
        shares = [row["top1"] for row in task["per_class"] if row["top1"] is not None]
        assert task["mean_class_top1"] == pytest.approx(np.mean(shares)) and f"mean over the classes: {100 * np.mean(shares):.1f} %" in shown
        assert task["calibration"]["ece"] == pytest.approx(calibration(found.confidence, found.correct)["ece"], abs=1e-4)
        assert f"calibration error (ECE): {100 * task['calibration']['ece']:.1f} %" in shown
    assert not list(run.glob("predictions_*"))


def test_command_writes_what_it_shows(command, run, tmp_path):
    status, shown, errors = command("--reversed", f"--json={tmp_path / 'results.json'}", "--views=1x2")
    assert status == 0 and not errors
    content = json.loads((tmp_path / "results.json").read_text())
    assert list(content) == ["step", "tasks"] and content["step"] == 20 and list(content["tasks"]) == ["clips", "stills"]
    assert list(content["tasks"]["clips"]) == ["n", "classes", "top1", "top5", "top1_reversed"]
    assert list(content["tasks"]["stills"]) == ["n", "classes", "top1", "top5"]
    assert (content["tasks"]["clips"]["n"], content["tasks"]["clips"]["classes"]) == (11, 8)
    assert (content["tasks"]["stills"]["n"], content["tasks"]["stills"]["classes"]) == (13, 10)
    assert shown == f"step 20, 1x2 views\n{evaluate.table(content)}\n"
    assert not (run / "results.json").exists()  # the run's own results are the run's to write


@pytest.mark.parametrize("kind", ["numbers", "names"])
def test_command_reads_a_list_of_the_user(command, run, tmp_path, kind):
    """The same clips, labelled in either way, with what a list gets wrong most easily: names with commas, numbers and accents in them."""
    lines = []
    for i in range(tiny.VALIDATION["clips"]):
        label = i % len(tiny.CLIPS)
        lines.append(f"clips/{i:02d}.mp4 {label}\n" if kind == "numbers" else f'clips/{i:02d}.mp4,"{tiny.CLIPS[label]}"\n')
    (tmp_path / "mine.csv").write_text("".join(lines), encoding="utf-8")
    arguments = ("--task=clips", f"--data={tmp_path / 'mine.csv'}", f"--root={run / 'data'}", "--views=1x1", "--step=best")
    status, _, errors = command(*arguments, f"--json={tmp_path / 'mine.json'}")
    assert status == 0, errors
    content = json.loads((tmp_path / "mine.json").read_text())
    assert content["step"] == 10 and list(content["tasks"]) == ["clips"] and content["tasks"]["clips"]["n"] == 11
    reference = tmp_path.parent / "reference.json"
    if not reference.exists():
        assert command("--task=clips", "--views=1x1", "--step=10", f"--json={reference}", "--batch_size=3")[0] == 0
    assert content == json.loads(reference.read_text())


def test_mistakes_are_one_line_each(command, run, tmp_path):
    (tmp_path / "bad.csv").write_text("00.mp4,mice\n01.mp4,5 left\nabsent.mp4,5 left\n")
    (tmp_path / "numbers.csv").write_text("00.mp4 0\n01.mp4 8\n")
    clips = f"--root={run / 'data/clips'}"
    cases = {
        ("--task=cups",): ["error: there is no task 'cups': task must be one of clips, stills"],
        ("--views=3",): ["error: --views=3: write temporal x spatial views, as in 1x3"],
        ("--data=x.csv",): ["error: --data needs --task: say which of the run's heads its labels are for"],
        ("--root=x",): ["error: --root is where the paths of --data start: give --data too (if the run's own data has moved, --data_root)"],
        ("--step=7",): [f"error: {run}/checkpoints: no checkpoint of step 7; there are 10, 20"],
        ("--step=last",): ["error: --step=last: write the number of a checkpoint, or best"],
        ("--batch_size=0",): ["error: --batch_size=0: at least 1"],
        (f"--predictions={tmp_path}/absent",): [f"error: --predictions={tmp_path}/absent is not a folder: make it, or name another"],
        (f"--json={tmp_path}/absent/x.json",): [
            f"error: --json={tmp_path}/absent/x.json can't be written: name a file in a folder that exists and is yours"
        ],
        ("--task=clips", f"--data={tmp_path}/absent.csv"): [f"{tmp_path}/absent.csv does not exist"],
        ("--task=clips", f"--data={tmp_path}/bad.csv", clips): ["class 'mice' is not among the 8 known ones", "absent.mp4"],
        ("--task=clips", f"--data={tmp_path}/numbers.csv", clips): ["8 is not in 0..7"],
        ("--task=stills", "--data_root=/absent"): ["/absent"],
    }
    for arguments, lines in cases.items():
        status, shown, errors = command(*arguments)
        assert status == 2 and not shown, arguments
        assert len(errors) == len(lines), errors
        for error, line in zip(errors, lines, strict=True):
            assert error.startswith("error: ") and line in error
    status, _, errors = command(workdir=tmp_path)
    assert status == 2 and len(errors) == 1 and "holds neither a run" in errors[0]


def test_temporal_views_that_would_be_equal_are_refused(command, run):
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"segments"', '"uniform"').replace('"2x3"', '"1x3"'))
    status, _, errors = command("--task=clips", "--views=2x1")
    (run / "config.json").write_text(text)
    assert status == 2 and len(errors) == 1 and "2 temporal views" in errors[0]
