"""launch/machine.sh in a small clone, with a stand-in for Python."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.stand_ins import LAUNCH, StandIns


class Clone(StandIns):
    """A clone that has the script alone."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        (folder / "launch").mkdir()
        shutil.copy(LAUNCH / "machine.sh", folder / "launch")

    def machine(self, *arguments: str) -> subprocess.CompletedProcess:
        environment = self.environment(PYTHON=str(self.folder / "mypython"), PAUSE="0", WAIT="0")
        return subprocess.run([self.folder / "launch" / "machine.sh", *arguments], capture_output=True, text=True, env=environment, timeout=60)


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


@pytest.mark.parametrize(("statuses", "end"), [((0,), 0), ((137, 76, 0), 0), ((2,), 2), ((75,), 75), ((1,), 1), ((139, 139, 139, 139), 139)])
def test_starts_again_what_was_killed(clone, statuses, end):
    """At most --tries times; what was asked to stop, is done, or has something to be mended is left."""
    clone.add("mypython", f"sys.exit({statuses}[len(open(os.environ['CALLS']).readlines()) - 1])")
    result = clone.machine("--tries=4", "run", "--config=x.py", "--config.optim.betas=(0.9, 0.95)")
    assert result.returncode == end
    assert clone.calls == [["mypython", "-m", "vidjoint.main", "--config=x.py", "--config.optim.betas=(0.9, 0.95)"]] * len(statuses)


def test_gpus(clone):
    clone.add("mypython", "sys.exit(os.environ['CUDA_VISIBLE_DEVICES'] != '1,3')")
    assert clone.machine("--gpus=1,3", "run", "--config=x.py").returncode == 0


SAVES = """
import signal, time
def save(*_):
    time.sleep(0.3)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("step 1", flush=True)
time.sleep(60)
"""


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_in_the_background(clone):
    """start, status, a second start, stop: the run saves, and its status is what is told."""
    clone.add("mypython", SAVES)
    assert clone.machine("status").stdout == "absent\n"
    assert clone.machine("start", "--config=x.py").returncode == 0
    wait_for(lambda: "step 1" in (clone.folder / "run.log").read_text())
    assert clone.machine("status").stdout == "running\n"
    second = clone.machine("start", "--config=x.py")
    assert second.returncode == 2 and "a run already" in second.stderr
    assert clone.machine("stop").stdout == "75\n" and clone.machine("status").stdout == "75\n"
    assert len(clone.calls) == 1


@pytest.mark.parametrize("slow", [False, True])
def test_a_signal_lets_the_run_save(clone, slow):
    """Ctrl-C and SIGTERM in the foreground: passed on, and the script has the run's status. So is one that comes before the run's number is known."""
    clone.add("mypython", SAVES)
    environment = clone.environment(PYTHON=str(clone.folder / "mypython"))
    if slow:
        (clone.folder / "slow.sh").write_text('set -T; trap \'[ "$BASH_COMMAND" != "child=\\$!" ] || sleep 1\' DEBUG\n')
        environment["BASH_ENV"] = str(clone.folder / "slow.sh")
    for number in (signal.SIGTERM, signal.SIGINT):
        run = subprocess.Popen([clone.folder / "launch" / "machine.sh", "run", "--config=x.py"], env=environment, stdout=subprocess.PIPE)
        assert run.stdout.readline() == b"step 1\n"
        os.kill(run.pid, number)
        assert run.wait(30) == 75
        run.stdout.close()
