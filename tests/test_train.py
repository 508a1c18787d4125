"""Runs: from the command line and from Python, interrupted in every way, resumed, refused; and what they leave behind."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import tiny
from vidjoint import evaluate, metrics
from vidjoint.checkpoints import load_params
from vidjoint.config import base_config, parse
from vidjoint.data.mixture import Mixture
from vidjoint.errors import UserError
from vidjoint.main import main
from vidjoint.run_folder import RunFolder
from vidjoint.running.stopping import StopSignal, Waiting
from vidjoint.train import Log, Stopped, initial_state, prepare, train
from vidjoint.weights.pretrained import flat, open_weights, write_folder

ROOT = Path(__file__).parents[1]
EXPERIMENT = """
from vidjoint.config import base_config, task_config

def get_config():
    config = base_config()
    config.update(total_steps=100, batch_size=6, data_root=DATA, log_every=1, checkpoint_every=7, eval_every=40)
    config.model.update(variant="Ti/8", width=16, depth=1, heads=2, mlp_dim=16, frames=2, image_size=16, dtype="float32", dropout=0.1)
    config.model.update(mixer="token_shift")
    config.optim.update(lr=1e-3, warmup_steps=5, weight_decay=0.1, ema=0.9, freeze=("embed/proj/.*",))
    config.data.update(threads=2, isolate="none")
    common = dict(crop="area", randaugment_layers=1)
    clips = dict(train="clips/val.csv", val="clips/val.csv", labels="clips/labels.json", sampler="segments")
    config.tasks.update(
        clips=task_config(**clips, **common),
        stills=task_config(source="folder", media="image", train="stills/train", val="stills/val", **common),
    )
    return config
"""  # everything random that a resumed run must repeat: order of examples, clips, crops, augmentation, dropout


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    """A folder with data, an experiment's file, and the caches of commands."""
    folder = tmp_path_factory.mktemp("train")
    tiny.write_data(folder)
    (folder / "experiment.py").write_text(EXPERIMENT.replace("DATA", repr(str(folder))))
    return folder


def events(workdir: Path) -> list[dict]:
    """Of metrics.jsonl, what does not depend on the clock."""
    return [
        {key: value for key, value in event.items() if key not in ("train/examples_per_s", "train/data_wait")}
        for event in metrics.read_events(workdir / "metrics.jsonl")
    ]


def assert_bit_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()


@pytest.fixture(scope="module")
def run(experiment) -> Path:
    """A run made in Python, as in a notebook; on the eight devices of the tests."""
    config, _ = parse([f"--config={experiment}/experiment.py", "--config.total_steps=6", "--config.checkpoint_every=4", "--config.eval_every=0"])
    config.log_every = 3
    content = train(config, experiment / "run")
    assert content == json.loads((experiment / "run/results.json").read_text())
    return experiment / "run"


def test_what_a_run_leaves_behind(run):
    assert {path.name for path in run.iterdir()} >= {
        "config.json", "labels", "checkpoints", "metrics.jsonl", "tensorboard", "results.json", "curves.png", "eval", "about.json", "lock",
    }  # fmt: skip
    assert not (run / "bad_step").exists()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"4", "6"}
    for task in ("clips", "stills"):
        assert {path.name for path in (run / "eval" / task).iterdir()} == {"confusion.csv", "per_class.csv"}
    content = json.loads((run / "results.json").read_text())
    assert content["step"] == 6 and set(content["tasks"]) == {"clips", "stills"}
    for name, n in tiny.VALIDATION.items():
        assert content["tasks"][name]["n"] == n and 0 <= content["tasks"][name]["top1"] <= content["tasks"][name]["top5"] <= 1
    assert "top1_reversed" in content["tasks"]["clips"] and "top1_reversed" not in content["tasks"]["stills"]
    logged = metrics.read_events(run / "metrics.jsonl")
    assert [event["step"] for event in logged] == [3, 4, 6, 6]
    names = {"loss", "clips/loss", "stills/loss", "grad_norm", "lr", "examples_per_s", "data_wait", "skipped", "loss_spikes"}
    assert set(logged[0]) == {"step"} | {f"train/{name}" for name in names}
    assert logged[0]["train/lr"] == pytest.approx(1e-3 * 2 / 5)  # of the third update
    assert logged[-1]["val/stills/top1"] == pytest.approx(content["tasks"]["stills"]["top1"], rel=1e-5)
    assert 0 <= logged[0]["train/data_wait"] <= 1 and logged[0]["train/examples_per_s"] > 0


def test_another_config_on_the_same_folder_is_refused_with_the_difference(run, experiment, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = [
        f"--config={experiment}/experiment.py",
        f"--workdir={run}",
        "--config.checkpoint_every=4",
        "--config.eval_every=0",
        "--config.log_every=3",
    ]
    assert main([*command, "--config.optim.lr=0.01", "--config.mesh.fsdp=2"]) == 2
    assert errors(capsys) == [
        f"error: {run} holds a run with other settings: give another --workdir, or --force_config to go on with the new ones:",
        "  optim.lr: 0.001 -> 0.01",
        "  total_steps: 6 -> 100",
    ]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    about = json.loads((run / "about.json").read_text())
    about["data"]["clips"]["train"] += 1  # as if a file had gone since
    (run / "about.json").write_text(json.dumps(about))
    assert main([*command, "--config.total_steps=6"]) == 2
    assert errors(capsys)[1:] == ["  examples of clips: 12 -> 11"]
    (run / "about.json").write_bytes(before[run / "about.json"])


def test_only_a_run_that_has_saved_something_is_protected(run, tmp_path):
    stored = RunFolder(run)
    folder, other = RunFolder(tmp_path / "new"), base_config()
    folder.write(stored.config, stored.labels)
    folder.check(other, {})
    folder.write(other, {})
    assert folder.config.to_dict() == other.to_dict()
    stored.check(stored.config, stored.labels)
    config = stored.config
    config.update(data_root="/elsewhere", keep_checkpoints=9, log_every=7, checkpoint_every=7, max_skipped=3, log_to=())
    config.eval.update(views="1x1", batch_size=5)
    config.data.update(workers=3, threads=1, prefetch=9)
    config.mesh.update(data=1, fsdp=-1)
    config.model.remat = "block"
    RunFolder(run).check(config, stored.labels)
    with pytest.raises(UserError, match="class names of stills"):
        stored.check(config, stored.labels | {"stills": ("a", "b")})
    for key, value in {"eval_every": 5, "data.max_pixels": 5, "tasks.clips.flip": False}.items():
        changed = RunFolder(run).config
        part = changed
        for group in key.split(".")[:-1]:
            part = part[group]
        part[key.split(".")[-1]] = value
        if key == "eval_every":
            RunFolder(run).check(changed, stored.labels)
        else:
            with pytest.raises(UserError, match=key):
                RunFolder(run).check(changed, stored.labels)


def test_a_run_starts_from_another_one(run, experiment):
    """Parameters and average are those of the earlier run, spread over the devices like any others; the rest starts at zero."""
    changes = [
        "--config.total_steps=6",
        f"--config.init_from={run}",
        "--config.mesh.fsdp=2",
        "--config.model.mixer=divided",
        "--config.model.frames=3",
    ]
    config, _ = parse([f"--config={experiment}/experiment.py", *changes])
    setup = prepare(config)
    state = initial_state(setup)
    assert state.step == 0
    _, stored = load_params(run)
    old = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(stored["ema"])}
    for part in (state.params, state.ema):
        new = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(part)}
        assert all(np.asarray(new[name]).tobytes() == old[name].tobytes() for name in old)
        assert {name for name in new if "temporal" in name} == {name for name in new if name not in old and "time" not in name}
    assert_bit_equal(jax.device_get(state.frozen), stored["frozen"])
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(state.opt_state))
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, setup.abstract_state)


def test_a_run_that_goes_on_keeps_what_it_began_from(run, experiment, caplog):
    """It reads no weights again: saying so is better than a record of weights that it never saw."""
    config, _ = parse([f"--config={experiment}/experiment.py", "--config.total_steps=6", "--config.checkpoint_every=4", "--config.eval_every=0"])
    config.log_every, config.init_from = 3, "/gone"
    train(config, run)
    assert RunFolder(run).config.init_from == ""
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING and "init_from" in record.message]
    assert line == f"init_from=/gone is not read: the run in {run} began with '' and goes on; to begin anew give another --workdir"


def test_a_run_starts_from_parts_of_others(run, experiment, tmp_path):
    """The parameters of init_parts take the place of those of init_from; a path that isn't there is told by the key's name."""
    start = [f"--config={experiment}/experiment.py", f"--config.init_from={run}", "--config.total_steps=6"]
    folder = tmp_path / "others"
    weights = open_weights(run)
    write_folder(dataclasses.replace(weights, params={name: array + 1 for name, array in weights.params.items()}), folder)
    whole, mixed = (initial_state(prepare(parse([*start, *more])[0])) for more in ([], [f"--config.init_parts=('embed/.*={folder}',)"]))
    for name, array in flat(mixed.params | mixed.frozen).items():
        np.testing.assert_array_equal(array, flat(whole.params | whole.frozen)[name] + name.startswith("embed/"), err_msg=name)
    with pytest.raises(UserError, match="init_parts: /gone does not exist"):
        prepare(parse([*start, "--config.init_parts=('embed/.*=/gone',)"])[0])


def test_init_from_need_not_exist_any_more_when_a_run_resumes(experiment):
    config, _ = parse([f"--config={experiment}/experiment.py", "--config.init_from=/gone"])
    with pytest.raises(UserError, match="init_from: /gone does not exist"):
        prepare(config)
    prepare(config, resumes=True)


def errors(capsys) -> list[str]:
    """What a command has said, but for warnings about the data."""
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return [line for line in err.splitlines() if not line.startswith("WARNING")]


def lines_of(capsys, *argv) -> list[str]:
    assert main(list(argv)) == 2
    return errors(capsys)


def test_everything_that_is_missing_is_listed_at_once(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    lines = lines_of(capsys, "--config=configs/cover_jft.py", f"--workdir={tmp_path}/run", f"--config.data_root={tmp_path}")
    for name, path in {"k400": "kinetics400/train.csv", "ssv2": "something-v2/labels/validation.json", "mit": "moments/trainingSet.csv"}.items():
        assert any(line.startswith(f"error: task {name}, ") and f"{tmp_path}/{path} does not exist" in line for line in lines)
    assert any(f"{tmp_path}/imagenet/train does not exist" in line for line in lines)
    assert lines[-1].startswith("error: init_from: checkpoints/vit_l16_jft does not exist: give the folder of a run, or weights")
    assert len(lines) == len(set(lines)) == 15 and not (tmp_path / "run").exists()


def test_mistakes_of_all_kinds_are_listed_together(capsys, experiment, tmp_path):
    lines = lines_of(
        capsys,
        f"--config={experiment}/experiment.py",
        f"--workdir={tmp_path}/run",
        "--config.optim.name=adm",
        "--config.model.mixer=mixed",
        "--config.tasks.clips.train=nothing.csv",
        "--config.mesh.data=5",
        "--config.init_from=nowhere",
    )
    starts = (
        "model.mixer='mixed' is unknown",
        "optim.name='adm' is unknown",
        "task clips, train: ",
        "mesh.data=5, mesh.fsdp=1, ",
        "init_from: nowhere does not exist",
    )
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(f"error: {start}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "error: --config is missing: name an experiment, as in --config=configs/demo.py"),
        (["--config=none.py"], "error: --config=none.py: there is no such file"),
        (["--config=configs/demo.py", "--workdir="], "error: --workdir= is empty (a variable that is not set?): name a folder, or leave it out"),
        (["--config.seed=1", "--workdir=x"], "error: --config is missing: name an experiment, as in --config=configs/demo.py"),
        (["EXPERIMENT", "--config.optim.lrr=1"], "error: --config.optim.lrr=1: there is no key optim.lrr; the nearest is optim.lr"),
        (["EXPERIMENT", "--config.total_steps=many"], "error: --config.total_steps=many: total_steps takes a whole number; it is 100 now"),
        (["EXPERIMENT", "--wrkdir=x"], "error: unknown argument --wrkdir=x: see --help"),
        (["EXPERIMENT", "--config.optim.freeze=heads"], "error: optim.freeze: 'heads' matches no parameter"),
        (
            ["EXPERIMENT", "--config.total_steps=0", "--config.total_epochs=0.1"],
            "error: total_epochs=0.1 is less than one step: one epoch has 4.00 steps of 6 examples",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(capsys, experiment, tmp_path, monkeypatch, argv, line):
    monkeypatch.chdir(tmp_path)
    (told,) = lines_of(capsys, *(f"--config={experiment}/experiment.py" if word == "EXPERIMENT" else word for word in argv))
    assert told.startswith(line)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(capsys, experiment, tmp_path):
    (tmp_path / "file").write_text("")
    (line,) = lines_of(capsys, f"--config={experiment}/experiment.py", f"--workdir={tmp_path}/file")
    assert line == f"error: {tmp_path}/file can't be written (Not a directory): give another --workdir"


def test_help_names_every_argument(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for word in (
        "--config FILE[:ARGUMENT]",
        "--workdir DIR",
        "--config.KEY VALUE",
        "--force_config",
        "0 done; 2 ",
        "75 stopped by SIGTERM or Ctrl-C",
        "config.py",
    ):
        assert word in text


def test_signals_are_held_back_until_the_step_is_done_and_then_not():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:  # what is raised in a callback of the garbage collector is lost, with a traceback

        def _xla_gc_callback():
            signal.raise_signal(signal.SIGTERM)

        _xla_gc_callback()
        assert stop.asked_anywhere()
        with pytest.raises(Stopped):
            stop.when_saved(0)
    with StopSignal() as stop, pytest.raises(Stopped, match="before the first step"):  # nothing is lost yet
        os.kill(os.getpid(), signal.SIGTERM)
    with StopSignal() as stop:
        stop.when_saved(None)
        assert not stop.asked_anywhere()
        with stop.while_waiting():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked_anywhere()
        with pytest.raises(Waiting), stop.while_waiting():
            pytest.fail("there is nothing to wait for")
        with pytest.raises(KeyboardInterrupt):  # whoever presses Ctrl-C now means it
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped, match="step 4"):
            stop.when_saved(4)
    with StopSignal() as stop:
        stop.when_saved(None)
        with pytest.raises(Waiting), stop.while_waiting():
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked_anywhere()
    with StopSignal() as stop:
        stop.when_saved(5)
        with pytest.raises(Stopped, match="step 5"):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_runs_outside_the_main_thread_leave_signals_alone():
    seen = []

    def enter():
        with StopSignal() as stop:
            seen.append(stop.asked_anywhere())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.fixture(scope="module")
def prepared(experiment):
    """A run of six steps with evaluations after the fourth and the last; compiled once for several tests."""
    config, _ = parse([f"--config={experiment}/experiment.py", "--config.total_steps=6", "--config.eval_every=4", "--config.log_every=2"])
    with config.tasks.unlocked():
        del config.tasks["clips"]
    return prepare(config)


@pytest.fixture
def evaluations(prepared, monkeypatch) -> list:
    """The views of the evaluations that `train` has started, of which the first is interrupted by SIGTERM; they find nothing."""
    started = []

    def run(self, params, views, reverse, give_up=lambda: False):
        started.append(views)
        if len(started) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if give_up():
            raise evaluate.Abandoned
        return {}

    monkeypatch.setattr(evaluate.Evaluator, "run", run)
    monkeypatch.setattr("vidjoint.train.prepare", lambda config, resumes: prepared)
    return started


def test_an_evaluation_is_given_up_for_the_save_and_made_up_for_later(prepared, evaluations, tmp_path):
    with pytest.raises(Stopped, match="stopped after step 4 and saved"):
        train(prepared.config, tmp_path)
    assert load_params(tmp_path)[0] == 4 and len(evaluations) == 1
    train(prepared.config, tmp_path)
    assert len(evaluations) == 1 + 3  # that of step 4, the quick one of step 6, and the last
    assert [event["step"] for event in events(tmp_path)] == [2, 4, 4, 6, 6]


def test_a_run_that_waits_for_data_is_saved_at_once(prepared, evaluations, tmp_path, monkeypatch):
    """Storage that hangs must not cost the grace time."""
    iterate = Mixture.iterate

    def hanging(self, start):
        for step, batches in enumerate(iterate(self, start), start + 1):
            if step == 4:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
                time.sleep(100)
            yield batches

    monkeypatch.setattr(Mixture, "iterate", hanging)
    began = time.monotonic()
    with pytest.raises(Stopped, match="stopped after step 3 and saved"):
        train(prepared.config, tmp_path)
    assert time.monotonic() - began < 90 and load_params(tmp_path)[0] == 3
    assert [event["step"] for event in events(tmp_path)] == [2, 3]


def test_an_evaluation_asks_before_each_batch(experiment, tmp_path):
    config, _ = parse([f"--config={experiment}/experiment.py"])
    setup = prepare(config)
    with pytest.raises(evaluate.Abandoned):
        evaluate.Evaluator(setup.config, setup.model, setup.tasks, setup.mesh).run({}, (1, 1), False, give_up=lambda: True)


def test_two_runs_do_not_share_a_folder(run, tmp_path):
    """The lock is of the process, so a copy of it, left behind by one that is gone, or forked from one, keeps nobody out."""
    folder = RunFolder(tmp_path)
    (tmp_path / "lock").write_text("process 1 on another machine\n")
    with folder.locked():
        told = f"{tmp_path}: another run is in this folder \\(process {os.getpid()} on .*\\): wait for its end, or give another --workdir"
        with pytest.raises(UserError, match=told), RunFolder(tmp_path).locked():
            pass
        child = subprocess.Popen(["sleep", "100"])
    try:
        with folder.locked():
            pass
    finally:
        child.kill()
        child.wait()


def test_a_forked_process_does_not_hold_the_lock(tmp_path):
    code = """
import os, sys, time
from vidjoint.run_folder import RunFolder
with RunFolder(sys.argv[1]).locked():
    if os.fork() == 0:
        print("the fork goes on", flush=True)
    time.sleep(100)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout.readline() == b"the fork goes on\n"
        with pytest.raises(UserError), RunFolder(tmp_path).locked():
            pass
        process.kill()
        process.wait()
        with RunFolder(tmp_path).locked():
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def test_the_log_counts_skipped_steps_and_spikes(tmp_path, capsys):
    with Log(tmp_path, 10, 20) as log:
        for loss, skipped in ((2.5, 0), (np.nan, 1), (1.5, 0)):
            log.step({"loss": np.float32(loss), "skipped": np.float32(skipped), "a/loss": (np.float32(loss), 2)}, 0.0, 8)
        log.take(13, 0.1)
        log.step({"loss": np.float32(np.inf), "skipped": np.float32(1)}, 0.0, 8)
        log.take(14, 0.1)
    first, second = metrics.read_events(tmp_path / "metrics.jsonl")
    assert (first["train/loss"], first["train/a/loss"], first["train/skipped"], first["train/loss_spikes"]) == (2.0, 1.0, 1, 0)
    assert "train/loss" not in second and second["train/skipped"] == 1
    lines = capsys.readouterr().out.splitlines()  # a line per event where there is no terminal
    assert lines[0].startswith("step 13 of 20: loss 2.0000, 1 steps skipped, ")
    assert lines[1].startswith("step 14 of 20: no finite loss, 1 steps skipped, ")
