"""Several processes on this machine (CPU, gloo) are one run: same parameters, same results, and they end together with one line."""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import tiny
from vidjoint.checkpoints import load_params
from vidjoint.errors import UserError
from vidjoint.machine import processes
from vidjoint.metrics import read_events

ROOT = Path(__file__).parents[2]
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
    config.model.mixer = "none"
    config.eval.update(views="1x1")
    return config
""")
    return folder / "config.py"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def forked(experiment):
    """The process that forks all others."""
    environment = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "VIDJOINT_CACHE": str(experiment.parent / "cache")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # each of them traces, but few compile
    command = [sys.executable, "tests/forked.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes) as forked:
        try:
            yield forked
        finally:
            forked.kill()


def jobs(experiment: Path, workdir: Path, count: int, devices: int, *arguments: str) -> list[dict]:
    """What `count` processes are started with."""
    argv = [f"--config={experiment}", f"--workdir={workdir}", f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}", *arguments]
    return [{"argv": [*argv, f"--process_id={i}"], "devices": devices, "log": f"{workdir}.log.{i}"} for i in range(count)]


@contextlib.contextmanager
def started(forked: subprocess.Popen, jobs: list[dict]):
    """Process ids, and a function that waits for the statuses; those that still run in the end, or after LIMIT, are killed."""
    forked.stdin.write(json.dumps(jobs) + "\n")
    forked.stdin.flush()
    ids, statuses = json.loads(forked.stdout.readline()), []

    def kill() -> None:
        for number in ids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def wait() -> list[int]:
        statuses.extend(json.loads(forked.stdout.readline()))
        return statuses

    timer = threading.Timer(LIMIT, kill)
    timer.start()
    try:
        yield ids, wait
    finally:
        timer.cancel()
        if not statuses:
            kill()
            wait()


def errors(workdir: Path, number: int) -> str:
    return Path(f"{workdir}.log.{number}.err").read_text()


def told(said: str) -> str:
    """What is left without gloo's lines, whose pieces its threads mix."""
    return re.sub(r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |\d+|\s", "", said)


def newest(workdir: Path) -> int:
    """The newest step that is saved, 0 if there is none."""
    return max((int(file.name) for file in (workdir / "checkpoints").glob("*") if file.name.isdigit()), default=0)


def wait_for(condition, what: str) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def test_processes_make_the_run_of_one(experiment, forked, tmp_path):
    """With the same collectives to the last bit. Process 0 alone writes and speaks, and its results are those of one process."""
    one, two, four = (tmp_path / name for name in ("one", "two", "four"))
    split = ("--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.mesh.tensor=4")  # both of the two read all rows
    together = [*jobs(experiment, one, 1, 4), *jobs(experiment, two, 2, 2, *split), *jobs(experiment, four, 4, 1)]
    with started(forked, together) as (_, statuses):
        assert statuses() == [0] * 7, errors(one, 0) + errors(two, 0) + errors(four, 0)
    (step, expected), (_, tensor), (_, rows) = map(load_params, (one, two, four))
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, expected, rows)
    for tree in (expected, tensor):  # AdamW moves the biases of keys, whose gradient is zero, by rounding errors
        bias = tree["params"]["blocks"]["0"]["attn"]["qkv"]["bias"]
        bias[len(bias) // 3 : 2 * len(bias) // 3] = 0
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-6), expected, tensor)
    for folder, count in ((two, 2), (four, 4)):
        for name in ("results.json", "config.json", "predictions_stills.csv") if folder == four else ("results.json",):
            assert (folder / name).read_bytes() == (one / name).read_bytes()
        for name in ("confusion.csv", "per_class.csv"):
            assert (folder / "eval" / "stills" / name).read_bytes() == (one / "eval" / "stills" / name).read_bytes()
        assert [event["step"] for event in read_events(folder / "metrics.jsonl")] == [1, 2, 3, 4, 4]
        assert len(list((folder / "tensorboard").iterdir())) == 1
        for i in range(1, count):
            said = Path(f"{folder}.log.{i}.out").read_text() + errors(folder, i)
            assert told(said) == ""
    assert json.loads((one / "results.json").read_text())["tasks"]["stills"]["n"] == 13


def test_a_lost_process_ends_the_others_and_all_go_on(experiment, forked, tmp_path):
    workdir = tmp_path / "run"
    endless = ("--config.total_steps=100000", "--config.checkpoint_every=5")
    for victim, signals in ((1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGTERM)):
        before = newest(workdir)
        with started(forked, jobs(experiment, workdir, 2, 1, *endless)) as (ids, statuses):
            wait_for(lambda: newest(workdir) > before, errors(workdir, 0))  # noqa: B023
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
    stopped = newest(workdir)  # another number of processes goes on
    with started(forked, jobs(experiment, workdir, 1, 2, *endless)) as (ids, statuses):
        wait_for(lambda: newest(workdir) > stopped, errors(workdir, 0))
        os.kill(ids[0], signal.SIGTERM)
        assert statuses() == [75]
    steps = [event["step"] for event in read_events(workdir / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.timeout(100 * LIMIT)
def test_a_process_killed_inside_a_save(experiment, forked, tmp_path, full):
    """Both of two processes save after every step, so that orbax's barriers are where the other one waits. It ends with one line, and all go on."""
    workdir, draw = tmp_path / "run", random.Random(0)
    often = ("--config.total_steps=100000", "--config.checkpoint_every=1")
    for turn in range(20 if full else 1):
        victim, before = turn % 2, newest(workdir)
        with started(forked, jobs(experiment, workdir, 2, 1, *often)) as (ids, statuses):
            wait_for(lambda: newest(workdir) > before, errors(workdir, 0))  # noqa: B023
            wait_for(lambda: any((workdir / "checkpoints").glob("*tmp*")), errors(workdir, 0))
            time.sleep(draw.choice((0, 0, draw.uniform(0, 0.3))))
            inside = [file.name for file in (workdir / "checkpoints").glob("*tmp*")]
            began = time.monotonic()
            os.kill(ids[victim], signal.SIGKILL)
            ended = statuses()
            seconds = time.monotonic() - began
        said = errors(workdir, 1 - victim).splitlines()
        print(f"turn {turn}: process {victim} killed in {inside}: others ended with {ended} after {seconds:.1f} s: {said}")
        assert seconds < 60
        assert ended[victim] == -signal.SIGKILL and ended[1 - victim] == processes.LOST, said
        assert len(said) == 1 and said[0].startswith("error: another process of the run was lost ("), said
    steps = [event["step"] for event in read_events(workdir / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and steps[-1] >= newest(workdir) > 0


def test_mistakes_are_told_once(experiment, forked, tmp_path):
    with started(forked, jobs(experiment, tmp_path / "all", 2, 1, "--config.model.mixer=nothing")) as (_, statuses):
        assert statuses() == [2, 2]
    assert errors(tmp_path / "all", 0).startswith("error: model.mixer='nothing' is unknown") and errors(tmp_path / "all", 1) == ""
    two = jobs(experiment, tmp_path / "one", 2, 1)
    two[1]["argv"].append("--config.model.mixer=nothing")
    with started(forked, two) as (_, statuses):
        assert statuses() == [2, 2]
    assert errors(tmp_path / "one", 0).startswith("process 1 ended: model.mixer='nothing' is unknown")
    assert errors(tmp_path / "one", 1).startswith("error: model.mixer='nothing' is unknown")


def slurm_jobs(experiment: Path, workdir: Path, **more) -> list[dict]:
    """Two processes that know each other by what Slurm tells them, as `srun --ntasks=2` would start them on one node."""
    for number in random.sample(range(1, 4096), 100):  # the coordinator's port follows from the job's number
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", 65535 - 4095 + number))
            break
    told = {"SLURM_JOB_ID": number, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 2}
    own = [told | {"SLURM_PROCID": i, "SLURM_LOCALID": i} for i in range(2)]
    argv = [f"--config={experiment}", f"--workdir={workdir}"]
    logs = [f"{workdir}.log.{i}" for i in range(2)]
    return [
        {"argv": argv, "devices": 1, "log": log, "environment": {name: str(value) for name, value in variables.items()}, **more}
        for log, variables in zip(logs, own, strict=True)
    ]


PRIVATE = ["jax._src.clusters", "jax._src.distributed"]  # what vidjoint.machine.processes asks of JAX by names that it may change


def test_slurm_is_enough_and_so_is_what_jax_does_by_itself(experiment, forked, tmp_path):
    """A run without --coordinator; and one more with a JAX in which the private names that vidjoint.machine.processes likes to use are gone."""
    slurm, bare = tmp_path / "slurm", tmp_path / "bare"
    with started(forked, slurm_jobs(experiment, slurm) + slurm_jobs(experiment, bare, hidden=PRIVATE)) as (_, statuses):
        assert statuses() == [0] * 4, errors(slurm, 0) + errors(bare, 0)
    for folder in (slurm, bare):
        assert json.loads((folder / "results.json").read_text())["tasks"]["stills"]["n"] == 13
        assert [event["step"] for event in read_events(folder / "metrics.jsonl")] == [1, 2, 3, 4, 4]
        said = Path(f"{folder}.log.1.out").read_text() + errors(folder, 1)
        assert told(said) == ""  # process 0 speaks for both


def test_without_the_private_names_a_lost_process_still_ends_the_others(experiment, forked, tmp_path, full):
    if not full:
        pytest.skip("needs --full: two more runs")
    for victim in range(2):
        workdir = tmp_path / str(victim)
        endless = jobs(experiment, workdir, 2, 1, "--config.total_steps=100000", "--config.checkpoint_every=5")
        with started(forked, [job | {"hidden": PRIVATE} for job in endless]) as (ids, statuses):
            wait_for(lambda: newest(workdir) > 0, errors(workdir, 0))  # noqa: B023
            began = time.monotonic()
            os.kill(ids[victim], signal.SIGKILL)
            ended = statuses()
        assert time.monotonic() - began < 60 and ended[1 - victim] == processes.LOST
        said = errors(workdir, 1 - victim).splitlines()
        assert len(said) == 1 and said[0].startswith("error: another process of the run was lost ("), said


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
    for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name)
    for name in PRIVATE:
        monkeypatch.setitem(sys.modules, name, None)
    assert processes._cluster_size() is None and processes._key_value_store() is None

    def finds_nothing(*_, **__):  # in the words of JAX, which asks whether it has been used before it looks
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", finds_nothing)
    with processes.joined(parser.parse_args([])):
        assert not jax.distributed.is_initialized()
