"""Runs of the command in processes that may be killed, and what they leave; for tests/faults."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import jax
import numpy as np

from tests import tiny
from vidjoint import checksums, metrics
from vidjoint.checkpoints import load_params
from vidjoint.data.mixture import Mixture
from vidjoint.metrics import read_events

ROOT = Path(__file__).parents[2]
LIMIT = 400  # seconds for one start of a run, on a machine that is busy
CLOCK = ("train/examples_per_s", "train/data_wait")  # of an event, what depends on time
SINCE_START = ("train/loss_spikes",)  # and on when the run was started

# Everything random that a resumed run must repeat: order of examples, clips, crops, augmentation, mixup, dropout. Writes which examples steps have
EXPERIMENT = """
from pathlib import Path

from tests import tiny
from tests.faults.runs import record_examples


def get_config(steps):
    record_examples(Path({folder!r}))
    config = tiny.config_of(Path({folder!r}) / "data")
    config.update(task_order=(), schedule="mixed", total_steps=int(steps), batch_size=8, log_every=1, checkpoint_every=7, keep_checkpoints=3)
    config.model.update(mixer="token_shift", dropout=0.1, frames=2, image_size=16)
    config.optim.update(lr=1e-3, warmup_steps=5, ema=0.9)
    config.loss.mixup = 0.2
    config.eval.views = "1x1"
    config.data.update(isolate="none", threads=2)
    for task, weight in (("clips", 1), ("stills", 3)):
        config.tasks[task].update(crop="area", randaugment_layers=1, image_size=(16, 16), sample_weight=weight)
    return config
"""


def write_experiment(folder: Path) -> Path:
    """Data, and a config file that takes the number of steps as its argument."""
    (folder / "data").mkdir()
    tiny.write_data(folder / "data")
    (folder / "config.py").write_text(EXPERIMENT.format(folder=str(folder)))
    return folder / "config.py"


def record_examples(folder: Path) -> None:
    """Has every run of this process append lines `step, batch, row, checksum` of its examples to `folder/examples.csv`, and log all digits."""
    original = Mixture.iterate

    def iterate(self, start=0):
        for step, batches in enumerate(original(self, start), start + 1):
            lines = [
                f"{step},{i},{row},{zlib.crc32(batch['pixels'][k].tobytes() + batch['label'][k].tobytes() + batch['task'][k].tobytes())}\n"
                for i, (batch, (stream, _)) in enumerate(zip(batches, self.plan(step - 1), strict=True))
                for k, row in enumerate(self.rows[stream])
                if batch["mask"][k]
            ]
            with open(folder / "examples.csv", "a") as file:
                file.write("".join(lines))
            yield batches

    rounded = metrics.rounded
    Mixture.iterate = iterate
    metrics.rounded = lambda value: float(value) if isinstance(rounded(value), float) else rounded(value)


def examples(folder: Path) -> dict[tuple[str, ...], str]:
    """(step, batch, row) -> checksum, as recorded since the last call; a row that was taken more than once must have been the same."""
    file, found = folder / "examples.csv", {}
    for *place, checksum in (line.split(",") for line in file.read_text().splitlines()):
        assert found.setdefault(tuple(place), checksum) == checksum, f"step, batch, row {place} differed from itself"
    file.unlink()
    return found


@contextlib.contextmanager
def forking(cache: Path):
    """The process that forks all others after the imports, which take longer than a tiny run."""
    environment = {
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "VIDJOINT_CACHE": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "tests/forked.py"], cwd=ROOT, env=os.environ | environment, **pipes) as process:
        try:
            yield Forking(process, cache.parent)
        finally:
            process.kill()


class Forking:
    """Starts runs."""

    def __init__(self, process: subprocess.Popen, logs: Path):
        self._process, self._logs = process, logs

    @contextlib.contextmanager
    def start(self, config: str, workdir: Path, *arguments: str, processes: int = 1, devices: int = 1):
        """A `Run`; what still runs in the end, or after LIMIT seconds, is killed."""
        argv = [f"--config={config}", f"--workdir={workdir}", *arguments]
        several = [f"--coordinator=127.0.0.1:{_free_port()}", f"--num_processes={processes}"] if processes > 1 else []
        ranks = [[*argv, *several, *([f"--process_id={i}"] if several else [])] for i in range(processes)]
        log = self._logs / f"{workdir.name}.{self._process.pid}.log"
        jobs = [{"argv": rank, "devices": devices, "log": f"{log}.{i}"} for i, rank in enumerate(ranks)]
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()
        run = Run(json.loads(self._process.stdout.readline()), workdir, log, self._process.stdout)
        timer = threading.Timer(LIMIT, run.kill)
        timer.start()
        try:
            yield run
        finally:
            timer.cancel()
            if run.statuses is None:
                run.kill()
                run.wait()


class Run:
    """One start of a run, in one process or several."""

    def __init__(self, ids: list[int], workdir: Path, log: Path, answers):
        self.ids, self.workdir, self.statuses, self._log, self._answers = ids, workdir, None, log, answers

    def send(self, number: int, process: int = 0) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.ids[process], number)

    def kill(self) -> None:
        for process in range(len(self.ids)):
            self.send(signal.SIGKILL, process)

    def wait(self) -> list[int]:
        """Exit statuses, negative for signals."""
        self.statuses = json.loads(self._answers.readline())
        return self.statuses

    def alive(self) -> bool:
        """Whether process 0 has not ended."""
        try:
            return Path(f"/proc/{self.ids[0]}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def said(self, process: int = 0) -> list[str]:
        """Standard error, but for warnings about the data."""
        lines = Path(f"{self._log}.{process}.err").read_text().splitlines()
        return [line for line in lines if not line.startswith("WARNING: clips: 11 of 11") and not line.startswith("WARNING: stills")]

    def until(self, condition, what: str) -> bool:
        """Waits for a condition; False if the run ended before."""
        end = time.monotonic() + LIMIT
        while not condition():
            if not self.alive():
                return False
            assert time.monotonic() < end, f"{what}: {self.said()}"
            time.sleep(0.001)
        return True

    def until_step(self, step: int) -> bool:
        return self.until(lambda: last_step(self.workdir) >= step, f"step {step}")


def last_step(workdir: Path) -> int:
    """Of the newest event, 0 if there is none."""
    try:
        with open(workdir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            lines = [line for line in file.read().splitlines(keepends=True) if line.startswith(b'{"step"') and line.endswith(b"\n")]
        return json.loads(lines[-1])["step"] if lines else 0
    except FileNotFoundError:
        return 0


def saving(workdir: Path) -> bool:
    """Whether a save is under way, or was when the run was killed."""
    return any((workdir / "checkpoints").glob("*tmp*"))


def check_checkpoints(workdir: Path) -> list[int]:
    """The steps that can be gone on from, all of which must be whole."""
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]
    for step in sorted(steps)[-2:]:  # an older one may have been on its way out
        assert checksums.damage(workdir / "checkpoints" / str(step)) is None
    assert not list((workdir / "checkpoints").glob("*damaged*"))
    return sorted(steps)


def events(workdir: Path) -> list[dict]:
    """Of metrics.jsonl, what must be the same in every run."""
    return [{key: value for key, value in event.items() if key not in CLOCK + SINCE_START} for event in read_events(workdir / "metrics.jsonl")]


def assert_same_run(broken: Path, straight: Path) -> None:
    """Bit-equal parameters, events and results."""
    (a, found), (b, expected) = load_params(broken), load_params(straight)
    assert a == b and jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert events(broken) == events(straight)
    assert (broken / "results.json").read_bytes() == (straight / "results.json").read_bytes()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
