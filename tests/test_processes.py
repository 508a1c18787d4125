"""Several processes on this machine (CPU, gloo) are one run: same parameters, same results, and they end together with one line."""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import tiny
from vidjoint import processes
from vidjoint.checkpoints import load_params
from vidjoint.errors import UserError
from vidjoint.metrics import read_events

ROOT = Path(__file__).parents[1]
LIMIT = 150  # seconds for everything that processes do

pytestmark = pytest.mark.timeout(2 * LIMIT)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    """A config file: 13 stills of 10 classes, 4 steps of 6 examples, which 4 devices don't divide."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "data").mkdir()
    tiny.write_data(folder / "data")
    (folder / "config.py").write_text(f"""
from pathlib import Path
from tests import tiny

def get_config():
    config = tiny.config_of(Path({str(folder / "data")!r}))
    del config.tasks["clips"]
    config.update(task_order=(), schedule="mixed", total_steps=4, batch_size=6, log_every=1, checkpoint_every=2)
    config.eval.update(views="1x1")
    return config
""")
    return folder / "config.py"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def started(experiment: Path, workdir: Path, count: int, devices: int, *arguments: str):
    """Process ids of `count` processes, and a function that waits for their statuses."""
    argv = [f"--config={experiment}", f"--workdir={workdir}", f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}", *arguments]
    logs = [Path(f"{workdir}.log.{number}") for number in range(count)]
    jobs = [{"argv": [*argv, f"--process_id={number}"], "devices": devices, "log": str(log)} for number, log in enumerate(logs)]
    jobs_file = Path(f"{workdir}.jobs")
    jobs_file.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VIDJOINT_CACHE": str(experiment.parent / "cache"), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "tests/forked.py", str(jobs_file)]
    forked = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    ids = json.loads(forked.stdout.readline())
    try:
        yield ids, lambda: json.loads(forked.communicate(timeout=LIMIT)[0])
    finally:
        forked.send_signal(signal.SIGTERM)  # it kills its children
        forked.wait(10)
        forked.stdout.close()


def errors(workdir: Path, number: int) -> str:
    return Path(f"{workdir}.log.{number}.err").read_text()


def run(experiment: Path, workdir: Path, count: int, devices: int, *arguments: str) -> Path:
    """Runs to the end, and returns `workdir`."""
    with started(experiment, workdir, count, devices, *arguments) as (_, statuses):
        assert statuses() == [0] * count, errors(workdir, 0)
    return workdir


def wait_for(condition, what: str) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def test_processes_make_the_run_of_one(experiment, tmp_path):
    """With the same collectives to the last bit; they do without files but those of process 0, whose results are those of one process."""
    one = run(experiment, tmp_path / "one", 1, 4)
    step, expected = load_params(one)
    for count, devices, *mesh in ((2, 2), (4, 1), (2, 2, "--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.mesh.tensor=4")):
        several = run(experiment, tmp_path / f"{count}{len(mesh)}", count, devices, *mesh)
        assert load_params(several)[0] == step == 4
        same = np.testing.assert_array_equal
        if mesh:  # other sums; and AdamW makes updates of rounding errors where gradients are zero, as those of the biases of keys
            same = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-6)  # noqa: E731
        width = 16
        bias = [(tree["params"]["blocks"]["0"]["attn"]["qkv"]["bias"]) for tree in (expected, load_params(several)[1])]
        assert bias[0].shape == (3 * width,)
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(load_params(several)[1]), strict=True):
            if mesh and "qkv/bias" in jax.tree_util.keystr(path, simple=True, separator="/"):
                x, y = np.delete(x, np.s_[width : 2 * width]), np.delete(y, np.s_[width : 2 * width])
            same(x, y)
        assert (several / "results.json").read_bytes() == (one / "results.json").read_bytes()
        if not mesh:
            for name in ("confusion.csv", "per_class.csv"):
                assert (several / "eval" / "stills" / name).read_bytes() == (one / "eval" / "stills" / name).read_bytes()
        assert [event["step"] for event in read_events(several / "metrics.jsonl")] == [event["step"] for event in read_events(one / "metrics.jsonl")]
        assert len(list((several / "tensorboard").iterdir())) == 1
        for number in range(1, count):
            said = Path(f"{several}.log.{number}.out").read_text().splitlines() + errors(several, number).splitlines()
            assert [line for line in said if "Gloo" not in line] == []
    assert json.loads((one / "results.json").read_text())["tasks"]["stills"]["n"] == 13


def test_a_lost_process_ends_the_others_and_all_go_on(experiment, tmp_path):
    workdir = tmp_path / "run"
    endless = ("--config.total_steps=100000", "--config.checkpoint_every=5")
    checkpoints = workdir / "checkpoints"

    def newest() -> int:
        return max((int(file.name) for file in checkpoints.glob("*") if file.name.isdigit()), default=0)

    for victim, signals in ((1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGTERM)):
        before = newest()
        with started(experiment, workdir, 2, 1, *endless) as (ids, statuses):
            wait_for(lambda: newest() > before, errors(workdir, 0))  # noqa: B023
            began = time.monotonic()
            os.kill(ids[victim], signals)
            ended = statuses()
            seconds = time.monotonic() - began
        said = errors(workdir, 1 - victim).splitlines()
        print(f"process {victim}, {signal.Signals(signals).name}: others ended with {ended} after {seconds:.1f} s: {said}")
        assert seconds < 60
        if signals == signal.SIGKILL:
            assert ended[victim] == -signal.SIGKILL and ended[1 - victim] == processes.LOST
            assert len(said) == 1 and said[0].startswith("error: another process of the run was lost ("), said
            assert said[0].endswith("start all of them again, the run goes on from its last checkpoint")
        else:
            assert ended == [75, 75]
            assert said[-1].endswith("and saved; the same command goes on from there")
    stopped = newest()  # another number of processes goes on
    with started(experiment, workdir, 1, 4, *endless) as (ids, statuses):
        wait_for(lambda: newest() > stopped, errors(workdir, 0))
        os.kill(ids[0], signal.SIGTERM)
        assert statuses() == [75]
    steps = [event["step"] for event in read_events(workdir / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


def test_mistakes_are_told_once(experiment, tmp_path):
    with started(experiment, tmp_path / "all", 2, 1, "--config.model.mixer=nothing") as (_, statuses):
        assert statuses() == [2, 2]
    assert errors(tmp_path / "all", 0).startswith("error: model.mixer='nothing' is unknown") and errors(tmp_path / "all", 1) == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_processes": 2}, "--coordinator and --process_id missing"),
        ({"coordinator": "here", "num_processes": 2, "process_id": 0}, "--coordinator=here: write HOST:PORT"),
        ({"coordinator": "here:1", "num_processes": 2, "process_id": 2}, "--process_id=2: from 0 to 1, for --num_processes=2"),
    ],
)
def test_arguments_that_do_not_fit(given, message):
    parser = argparse.ArgumentParser()
    processes.add_arguments(parser)
    args = parser.parse_args([f"--{name}={value}" for name, value in given.items()])
    with pytest.raises(UserError, match=message), processes.joined(args):
        pass


def test_one_process_by_itself(monkeypatch):
    """Nothing is started on a plain machine, nor in a job of one process, whose GPUs it would hide."""
    parser = argparse.ArgumentParser()
    processes.add_arguments(parser)
    for name, value in {"SLURM_JOB_ID": 1, "SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": 1, "SLURM_PROCID": 0, "SLURM_LOCALID": 0}.items():
        with processes.joined(parser.parse_args([])):
            assert not jax.distributed.is_initialized()
        monkeypatch.setenv(name, str(value))
    assert processes._cluster_size() == 1
    monkeypatch.setenv("SLURM_NTASKS", "3")
    assert processes._cluster_size() == 3
