"""The papers' findings in miniature: arms differ in what is asked, the command trains them once, its verdict is that of the figures."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vidjoint import findings, validate
from vidjoint.config import difference, parse
from vidjoint.errors import UserError
from vidjoint.findings import FINDINGS, Finding
from vidjoint.main import main
from vidjoint.reporting import predictions

ROOT = Path(__file__).parents[1]
ARMS = [(name, arm) for name, finding in FINDINGS.items() for arm in (*finding.arms, *filter(None, [finding.stage]))]
DIFFER = {  # keys in which arms may differ from the first one: the question
    "datasets": {"tasks.appearance", "tasks.digits", "tasks.motion"},
    "image_weight": {"tasks.digits.loss_weight"},
    "transfer": {"init_from", "optim.freeze"},
    "joint": {"model.embed", "tasks.appearance", "tasks.digits", "tasks.motion", "total_steps"},  # as many steps of each task
    "polyvit": {"model.mixer", "model.embed", "model.tubelet"},
    "motion_block": {"model.motion.block"},
    "class_attention": {"model.depth", "model.class_attention.blocks", "model.class_token", "model.pool"},
    "top_heavy": {"model.mixer", "model.mixer_blocks"},
    "am_flow": {"model.am_flow.flow", "model.am_flow.adapter", "init_from", "optim.freeze"},
}
TINY = ("total_steps=2", "total_epochs=0.0", "model.width=16", "model.depth=1", "model.mlp_dim=16", "model.frames=2", "optim.warmup_steps=0")
TINY = [
    f"--config.{change}"
    for change in (*TINY, "batch_size=4", "data.isolate=none", "data.threads=2", "eval.reversed=False", "eval.batch_size=80", "log_to=()")
]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def config_of(name, arm):
    return parse([f"--config=configs/findings.py:{name},{arm}"])[0]


@pytest.mark.parametrize(("name", "arm"), ARMS)
def test_every_arm_can_run(name, arm):
    config = config_of(name, arm)
    assert validate.check(config) == [] and config.eval_every == 0
    assert arm == FINDINGS[name].stage or set(config.tasks) == set(FINDINGS[name].sets) & set(config.tasks)
    assert {task.source for task in config.tasks.values()} == {"demo"}


@pytest.mark.parametrize("name", FINDINGS)
def test_arms_differ_in_what_is_asked_alone(name):
    finding = FINDINGS[name]
    first, *others = (config_of(name, arm) for arm in finding.arms)
    changed = {line.partition(": ")[0] for other in others for line in difference(first, other)}
    assert changed == DIFFER[name]
    assert all(difference(first, other) for other in others) and set(first.tasks) == set(finding.sets)
    assert bool(finding.stage) == any(config.init_from for config in (first, *others))
    if finding.stage:
        assert not config_of(name, finding.stage).init_from and first.init_from == f"runs/findings_{name}_{finding.stage}"
    for arm, published in finding.arms.items():
        assert set(published) <= set(config_of(name, arm).tasks) and all(0 < figure < 100 for figure in published.values())


@pytest.mark.parametrize("name", FINDINGS)
def test_words_are_those_of_the_experiments(name):
    """Of configs/findings.py: the same findings and arms, the same first one."""
    with pytest.raises(UserError) as wrong:
        config_of(name, "absent")
    assert set(str(wrong.value).partition("choose from ")[2].removesuffix(", comma-separated").split(" | ")) == {a for n, a in ARMS if n == name}
    assert not difference(config_of(name, ""), config_of(name, next(iter(FINDINGS[name].arms))))
    with pytest.raises(UserError, match=" | ".join(FINDINGS).replace("|", r"\|")):
        config_of("absent", "")


@pytest.mark.parametrize("name", ["joint", "datasets"])
def test_arms_see_as_much_of_each_task(name):
    for arm in FINDINGS[name].arms:
        config = config_of(name, arm)
        assert (config.total_steps / len(config.tasks), config.total_epochs) == ((300, 0) if name == "joint" else (0, 8))
        assert {task.sample_weight for task in config.tasks.values()} == {1.0}


# The command


@pytest.fixture
def few_arms(monkeypatch):
    """Findings with fewer arms."""
    monkeypatch.setitem(FINDINGS, "motion_block", replace(FINDINGS["motion_block"], arms={"m2": {"motion": 80.2}, "m1": {"motion": 78.6}}))
    monkeypatch.setitem(FINDINGS, "transfer", replace(FINDINGS["transfer"], arms={"frozen": {"motion": 19.5}}))


@pytest.fixture
def began(monkeypatch):
    """The runs that were begun, as ARM_SEED: the first one in a process of its own, others in this one; those of seed 1 are copies of seed 0's."""
    names, own_process = [], findings.train

    def train(argv):
        folder = Path(argv[-1].removeprefix("--workdir="))
        names.append(folder.name)
        if names == ["m2_0"]:
            return own_process(argv)
        if folder.exists() or folder.name.endswith("_1"):  # what the run would leave, without its time
            if folder.exists():
                (folder / "aside.csv").rename(folder / "predictions_motion.csv")
            else:
                shutil.copytree(f"{str(folder)[:-2]}_0", folder)
            return 0
        with contextlib.redirect_stdout(sys.stderr):
            return main(argv)

    monkeypatch.setattr(findings, "train", train)
    return names


def call(capfd, *arguments):
    status = findings.main([str(argument) for argument in arguments])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def test_a_finding_from_start_to_end(tmp_path, few_arms, began, capfd):
    """Finished runs are not repeated, an unfinished one is; a second seed joins; the JSON is what is printed."""
    arguments = ["motion_block", f"--workdir={tmp_path}", f"--json={tmp_path / 'f.json'}", "--seeds=1", *TINY]
    status, shown, told = call(capfd, *arguments)
    assert status == 0, told
    folder = tmp_path / "motion_block"
    assert began == ["m2_0", "m1_0"] == sorted((path.name for path in folder.iterdir()), reverse=True)
    assert "run 1 of 2: motion_block, m2, seed 0" in told and "run 2 of 2: motion_block, m1, seed 0" in told
    result = json.loads((tmp_path / "f.json").read_text())
    for arm in ("m2", "m1"):
        own = json.loads((folder / f"{arm}_0" / "results.json").read_text())["tasks"]["motion"]["top1"]
        assert result["arms"][arm]["motion"]["top1"] == [own] and f"| {arm}  | motion | {100 * own:.1f}" in shown
    assert shown.splitlines()[0].startswith("motion_block: how large") and shown.splitlines()[-1] == f"motion_block: {result['verdict']}"

    began.clear()
    assert call(capfd, *arguments)[:2] == (0, shown) and not began
    (folder / "m1_0" / "predictions_motion.csv").rename(folder / "m1_0" / "aside.csv")
    status, again, told = call(capfd, *arguments)
    assert (status, again, began) == (0, shown, ["m1_0"]) and "run 2 of 2" in told
    status, again, told = call(capfd, *arguments, "--seeds=2")
    assert status == 0 and "2 seeds" in again and " ± 0.0 " in again and began == ["m1_0", "m2_1", "m1_1"], told


def test_a_first_stage_comes_first(tmp_path, few_arms, began, capfd):
    status, shown, told = call(capfd, "transfer", f"--workdir={tmp_path}", "--seeds=1", *TINY)
    assert status == 0 and began == ["source_0", "frozen_0"], told
    assert [line.split("|")[1].strip() for line in shown.splitlines() if line.startswith("| ")] == ["arm", "frozen"]
    assert shown.endswith("transfer: the paper has no figures to compare with\n")
    used = (tmp_path / "transfer" / "frozen_0" / "init_from.txt").read_text().splitlines()
    assert len([line for line in used if line.startswith("loaded")]) > 20 and any(line.startswith("unused") and "digits" in line for line in used)


def test_every_run_has_its_seed_and_starts_from_its_first_stage(tmp_path):
    runs = findings.plan("transfer", 2, tmp_path, [])
    assert [(run.arm, run.seed) for run in runs] == [(arm, seed) for seed in (0, 1) for arm in ("source", "full", "frozen", "scratch")]
    for run in runs:
        config, _ = parse([word for word in run.argv if not word.startswith("--workdir")])
        source = str(tmp_path / "transfer" / f"source_{run.seed}")
        assert (config.seed, config.init_from) == (run.seed, source if run.arm in ("full", "frozen") else "")
        assert run.argv[-1] == f"--workdir={tmp_path / 'transfer' / f'{run.arm}_{run.seed}'}"


def test_arms_without_a_first_stage_start_from_what_is_asked(tmp_path):
    for run in findings.plan("datasets", 1, tmp_path, ["--config.init_from=runs/other"]):
        assert parse([word for word in run.argv if not word.startswith("--workdir")])[0].init_from == "runs/other"


def test_a_run_that_was_evaluated_otherwise_is_not_finished(tmp_path):
    run, *_ = findings.plan("motion_block", 1, tmp_path, [])
    run.folder.write(run.config, {"motion": ("up", "down")})
    (run.folder.path / "checkpoints" / "450").mkdir(parents=True)
    run.folder.results.write_text("{}")
    predictions.write(predictions.file_of(run.folder.path, "motion"), ["/0.mp4"], np.zeros(1, int), np.eye(2)[:1], ("up", "down"))
    for change, finished in (("eval.batch_size=3", True), ("eval.views=1x3", False), ("eval.average=logits", False)):
        assert findings.plan("motion_block", 1, tmp_path, [f"--config.{change}"])[0].is_finished == finished


def test_a_run_that_ends_early_ends_the_command(tmp_path, few_arms, monkeypatch, capfd):
    for status, expected in ((75, 75), (1, 2), (-9, 2)):
        monkeypatch.setattr(findings, "train", lambda argv, status=status: status)
        ended, shown, told = call(capfd, "motion_block", f"--workdir={tmp_path}")
        assert ended == expected and not shown and ("error: " in told) == (expected == 2)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("ends", "status"), [("exit 75", 75), ("exit 0", 75), ("trap - TERM; kill $$", 75)])
def test_sigterm_reaches_the_run_and_ends_the_command(ends, status, early, tmp_path, monkeypatch):
    """In place of Python a program that waits for it, and ends as a run does: stopped, just done, or not yet ready to stop in order."""
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntrap '{ends}' TERM\necho $$ > {tmp_path}/began\nwhile :; do sleep 0.05; done\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))

    def interrupt():
        while not (tmp_path / "began").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C is left to the run
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    if early:  # before Popen returns
        start = subprocess.Popen
        monkeypatch.setattr(subprocess, "Popen", lambda *command, **options: (start(*command, **options), interrupt())[0])
        assert findings.train([]) == status
    else:
        with ThreadPoolExecutor() as pool:
            other = pool.submit(interrupt)
            assert findings.train([]) == status
            other.result()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["motion_blocks"], "there is no finding motion_blocks: choose from datasets, image_weight"),
        (["transfer", "--seeds=0"], "--seeds=0 must be at least 1"),
        (["transfer", "--seed=2"], "unknown argument --seed=2"),
        (["transfer", "--config.seed=2"], "set --seeds=N"),
        (["am_flow", "--config.init_from=runs/other"], "the arms of am_flow start from its own first stage, images, or from scratch"),
        (["transfer", "--config.total_stepz=2"], "there is no key total_stepz"),
        (["motion_block", "--config.model.heads=5"], "model.heads=5 does not divide"),
        (["motion_block", "--config.model.motion.block=2"], "m1, m4: the same as m2 with these settings: leave out"),
        (["transfer", "--json=/absent/file.json"], "--json=/absent/file.json can't be written"),
        (["transfer", "--workdir=README.md"], "--workdir=README.md is not a folder"),
    ],
)
def test_what_the_user_gets_wrong_is_told_first(arguments, words, capfd, monkeypatch):
    monkeypatch.setattr(findings, "train", None)
    status, shown, told = call(capfd, *arguments)
    assert status == 2 and not shown and words in told and "Traceback" not in told
    assert len(told.splitlines()) <= 3


def test_a_foreign_folder_is_refused_before_anything_runs(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(findings, "train", None)
    other, _ = parse(["--config=configs/demo.py"])
    folder = findings.RunFolder(tmp_path / "motion_block" / "m4_0")
    folder.write(other, {})
    (folder.path / "checkpoints" / "5").mkdir(parents=True)
    status, shown, told = call(capfd, "motion_block", f"--workdir={tmp_path}")
    assert status == 2 and not shown and f"{folder.path} holds a run with other settings" in told and "model.mixer: 'token_shift' -> 'motion'" in told
    assert list((tmp_path / "motion_block").iterdir()) == [folder.path]
    monkeypatch.chdir(tmp_path)
    status, _, told = call(capfd, "motion_block")
    assert status == 2 and "there is no configs/findings.py here" in told


def test_the_list(capfd):
    for arguments in ((), ("--list",)):
        status, shown, _ = call(capfd, *arguments)
        assert status == 0 and [line.split()[0] for line in shown.splitlines()] == list(FINDINGS)


# The verdict


def results(monkeypatch, folder, published, right, seeds=1):
    """What is measured where so many of 200 examples are right: `right[arm]` is a number for each seed, counted from example 0 on."""
    monkeypatch.setitem(
        FINDINGS, "fake", Finding("nobody, table 1", "what?", {"motion": "K400"}, {arm: {"motion": v} for arm, v in published.items()})
    )
    runs = []
    for arm in published:
        for seed, count in enumerate(right[arm]):
            run = findings.RunFolder(folder / f"{arm}_{seed}")
            run.path.mkdir(parents=True)
            scores = np.eye(2)[(np.arange(200) >= count).astype(int)]
            predictions.write(predictions.file_of(run.path, "motion"), [f"/{i}.mp4" for i in range(200)], np.zeros(200, int), scores, ("up", "down"))
            runs.append(findings.Run(arm, seed, run, [], config_of("motion_block", "m2")))
    return findings.measured("fake", runs)


@pytest.mark.parametrize(
    ("right", "verdict"),
    [
        ({"a": [160], "b": [120]}, "the paper's order holds"),
        ({"a": [120], "b": [160]}, "the paper's order does not hold: b (motion) the other way; 0 of 1 comparisons as there"),
        ({"a": [121], "b": [120]}, "within the spread of seeds and examples; 0 of 1 comparisons clear, and as there"),
        ({"a": [160, 158], "b": [120, 150]}, "the paper's order holds"),
        ({"a": [160, 150], "b": [120, 152]}, "within the spread of seeds and examples; 0 of 1 comparisons clear, and as there"),  # seeds disagree
    ],
)
def test_the_verdict_is_that_of_the_figures(right, verdict, tmp_path, monkeypatch):
    result = results(monkeypatch, tmp_path, {"a": 80.0, "b": 70.0}, right)
    assert result["verdict"] == verdict
    row = result["arms"]["b"]["motion"]
    assert row["mean"] == pytest.approx(np.mean(right["b"]) / 200) and row["difference"] == pytest.approx(row["mean"] - np.mean(right["a"]) / 200)
    assert row["interval"][0] <= row["difference"] <= row["interval"][1]
    assert row["spread"] == (pytest.approx(np.std(right["b"], ddof=1) / 200) if len(right["b"]) > 1 else None)


def test_several_comparisons_and_ties(tmp_path, monkeypatch):
    result = results(monkeypatch, tmp_path, {"a": 80.0, "b": 80.1, "c": 85.0, "d": 60.0}, {"a": [100], "b": [50], "c": [150], "d": [99]})
    verdicts = {arm: tasks["motion"]["verdict"] for arm, tasks in result["arms"].items()}
    assert verdicts == {"a": None, "b": None, "c": "as there", "d": "unclear"}
    assert result["verdict"] == "within the spread of seeds and examples; 1 of 2 comparisons clear, and as there"
    lines = findings.table(result).splitlines()
    assert lines[0] == "fake: what? (nobody, table 1; 1 seed)" and lines[3].startswith("|--") and len({len(line) for line in lines[2:8]}) == 1
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:8]]
    assert cells[0] == ["a", "motion", "50.0", "-", "-", "80.0 (K400)", "-", "-"]
    assert cells[2][:4] == ["c", "motion", "75.0", "+25.0"] and cells[2][5:] == ["85.0 (K400)", "+5.0", "as there"]
