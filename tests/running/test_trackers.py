"""What is logged where: checked with stand-ins that record every call, and with the real packages where they are installed."""

import json
import sys
import threading
import time
import types

import pytest

from vidjoint import validate
from vidjoint.config import base_config
from vidjoint.metrics import MetricsWriter, read_events
from vidjoint.running import trackers

SETTINGS = {"seed": 0, "optim.lr": 0.1, "tasks.a.train": "list.csv"}


class Calls(list):
    """A stand-in's record, by which tests wait for the thread that makes them."""

    def of(self, name):
        return [call[1:] for call in self if call[0] == name]


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for wandb."""
    calls, module = Calls(), types.ModuleType("wandb")

    class Run:
        def log(self, values, step):
            if module.broken:
                raise OSError("no route to host")
            calls.append(("log", step, values))

        def finish(self, exit_code):
            calls.append(("finish", exit_code))

    def init(**arguments):
        calls.append(("init", arguments))
        return Run()

    module.init, module.Settings, module.broken = init, lambda **settings: settings, False
    module.calls = calls
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def mlflow(monkeypatch):
    """A stand-in for mlflow."""
    calls, module = Calls(), types.ModuleType("mlflow")

    class Client:
        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            calls.append(("experiment", name))
            return "7"

        def create_run(self, experiment, run_name):
            calls.append(("run", experiment, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"run{len(calls.of('run'))}"))

        def update_run(self, run, status):
            calls.append(("update", run, status))

        def log_batch(self, run, metrics=(), params=()):
            calls.append(("batch", run, list(metrics), list(params)))

        def set_terminated(self, run, status):
            calls.append(("end", run, status))

    module.MlflowClient = Client
    module.entities = types.SimpleNamespace(Metric=lambda key, value, time, step: (key, value, step), Param=lambda key, value: (key, value))
    module.calls = calls
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def log_steps(workdir, first, last, resume_step, log_to, stop=False):
    """Events as a run has them: every second step has one of training and one of validation."""
    writer = MetricsWriter(workdir, resume_step, log_to, SETTINGS)
    for step in range(first, last + 1):
        writer.write(step, {"train/loss": 1 / step, "note": "text", "bad": float("nan")})
        if step % 2 == 0:
            writer.write(step, {"val/a/top1": step / 100})
    writer.close(ended=not stop)


def test_an_interrupted_run_goes_on_and_sends_each_event_once(tmp_path, wandb, mlflow):
    log_to = ("tensorboard", "wandb", "mlflow")
    log_steps(tmp_path, 1, 4, 0, log_to, stop=True)
    log_steps(tmp_path, 3, 6, 2, log_to)  # its newest checkpoint was that of step 2
    expected = [(step, {"train/loss": pytest.approx(1 / step, rel=1e-5)}) for step in range(1, 7)]
    expected += [(step, {"val/a/top1": step / 100}) for step in (2, 4, 6)]
    expected.sort(key=lambda item: (item[0], "val/a/top1" in item[1]))
    assert wandb.calls.of("log") == expected

    first, second = (arguments for (arguments,) in wandb.calls.of("init"))
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["config"] == SETTINGS
    assert (first["project"], first["name"], first["dir"]) == ("vidjoint", tmp_path.name, str(tmp_path))
    assert wandb.calls.of("finish") == [(1,), (0,)]

    batches = mlflow.calls.of("batch")
    assert batches[0] == ("run1", [], [("seed", "0"), ("optim.lr", "0.1"), ("tasks.a.train", "list.csv")])
    assert [metrics for _, metrics, params in batches if not params] == [[(*values.items(),)[0] + (step,)] for step, values in expected]
    assert mlflow.calls.of("run") == [("7", tmp_path.name)] and mlflow.calls.of("update") == [("run1", "RUNNING")]
    assert mlflow.calls.of("end") == [("run1", "KILLED"), ("run1", "FINISHED")]
    assert json.loads((tmp_path / "wandb_run.json").read_text()) == {"id": first["id"], "step": 6, "names": ["train/loss", "val/a/top1"]}


def test_an_event_that_was_cut_off_is_sent_after_all(tmp_path, wandb):
    (tmp_path / "wandb_run.json").write_text('{"id": "mine", "step": 4, "names": ["train/loss"]}')
    log_steps(tmp_path, 3, 4, 2, ("wandb",))
    assert wandb.calls.of("log") == [(4, {"val/a/top1": 0.04})] and wandb.calls.of("init")[0][0]["id"] == "mine"


def test_a_run_from_the_start_is_a_new_one(tmp_path, wandb):
    log_steps(tmp_path, 1, 2, 0, ("wandb",))
    log_steps(tmp_path, 1, 2, 0, ("wandb",))
    assert len({arguments["id"] for (arguments,) in wandb.calls.of("init")}) == 2 and len(wandb.calls.of("log")) == 6


def test_a_tracker_that_fails_costs_one_warning(tmp_path, wandb, caplog):
    wandb.broken = True
    log_steps(tmp_path, 1, 5, 0, ("wandb",))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == "log_to wandb: no route to host; the run goes on, and metrics.jsonl has every event"
    assert len(read_events(tmp_path / "metrics.jsonl")) == 7 and wandb.calls.of("finish")


def test_a_tracker_that_cannot_start_costs_one_warning(tmp_path, wandb, mlflow, caplog, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("api_key not configured\nsecond line")

    wandb.init = mlflow.MlflowClient = fail
    log_steps(tmp_path, 1, 3, 0, ("wandb", "mlflow"))
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "log_to wandb: api_key not configured second line",
        "log_to mlflow: api_key not configured second line",
    ]
    (tmp_path / "wandb_run.json").write_text("damaged")
    log_steps(tmp_path, 3, 4, 2, ("wandb",))
    assert len(read_events(tmp_path / "metrics.jsonl")) == 6


def test_a_silent_server_does_not_hold_up_the_run(tmp_path, wandb, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "START", 0.05)
    monkeypatch.setattr(trackers, "END", 0.05)
    answers = threading.Event()
    wandb.init = lambda **_: answers.wait(20)
    began = time.monotonic()
    log_steps(tmp_path, 1, 3, 0, ("wandb",))
    assert time.monotonic() - began < 15 and len(read_events(tmp_path / "metrics.jsonl")) == 4
    answers.set()
    assert caplog.records[0].getMessage().startswith("log_to wandb: no answer within 0.05 s; the run goes on")


def test_without_tensorboard(tmp_path):
    log_steps(tmp_path, 1, 2, 0, ())
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


# Found before the first step


def problems_of(log_to):
    config = base_config()
    config.log_to = log_to
    return [line for line in validate.check(config) if line.startswith("log_to")], validate.check(config, trains=False)


def test_unknown_and_missing_packages_are_found_before_the_first_step(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "mlflow" else types.SimpleNamespace(origin="there"))
    found, without_training = problems_of(("tensorboard", "wanbd", "mlflow"))
    assert found == [
        "log_to has 'wanbd', which is unknown: choose from tensorboard, wandb, mlflow, as in log_to=('tensorboard','wandb')",
        "log_to has 'mlflow', whose package is not installed: pip install mlflow",
    ]
    assert not [line for line in without_training if line.startswith("log_to")]  # evaluating such a run needs no tracker
    assert problems_of((1,))[0] == ["log_to=(1,) must be a tuple of texts"]


def test_a_folder_of_that_name_is_no_package(monkeypatch, tmp_path):
    if trackers._installed("wandb"):
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert trackers.importlib.util.find_spec("wandb") is not None and not trackers._installed("wandb")


# The real packages


@pytest.mark.filterwarnings("default")  # of others' code
def test_real_mlflow(tmp_path, monkeypatch):
    library = pytest.importorskip("mlflow", reason="mlflow is not installed (extra mlflow)")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    log_steps(tmp_path / "run", 1, 4, 0, ("mlflow",), stop=True)
    log_steps(tmp_path / "run", 3, 6, 2, ("mlflow",))
    client = library.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("vidjoint").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run" and run.data.params["optim.lr"] == "0.1"
    history = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(history) == [(step, pytest.approx(1 / step, rel=1e-5)) for step in range(1, 7)]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "val/a/top1")] == [2, 4, 6]


@pytest.mark.filterwarnings("default")  # of others' code
def test_real_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed (extra wandb)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_steps(tmp_path, 1, 4, 0, ("wandb",), stop=True)
    log_steps(tmp_path, 3, 6, 2, ("wandb",))
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    identity = json.loads((tmp_path / "wandb_run.json").read_text())["id"]
    assert {file.stem for file in files} == {f"run-{identity}"} and all(b"train/loss" in file.read_bytes() for file in files)
