"""launch/slurm.sh against stand-ins for sbatch, srun and scontrol."""

import os
import signal
import subprocess
import time

import pytest

from tests.launch.stand_ins import LAUNCH, ROOT, StandIns


@pytest.fixture
def slurm(tmp_path):
    return StandIns(tmp_path, "sbatch", "srun", "scontrol")


def test_submits_itself(slurm):
    """With time to save before the limit; the user's options come after ours, so that they win."""
    result = slurm.call("slurm.sh", "--nodes=2", "--signal=TERM@300", "--", "--config=configs/demo.py", "--config.optim.betas=(0.9, 0.95)")
    assert result.returncode == 0, result.stderr
    (call,) = slurm.calls
    script = call.index(str(LAUNCH / "slurm.sh"))
    options = call[1:script]
    assert {"--requeue", "--open-mode=append", f"--chdir={ROOT}", "--nodes=2"} <= set(options)
    assert options.index("--signal=TERM@300") > options.index("--signal=TERM@120")
    assert call[script + 1 :] == ["--in_job", "--config=configs/demo.py", "--config.optim.betas=(0.9, 0.95)"]


@pytest.mark.parametrize(
    ("status", "restarts", "again"), [(0, 0, False), (75, 0, True), (76, 3, True), (2, 0, False), (1, 0, False), (137, 0, False), (75, 100, False)]
)
def test_the_job_queues_itself_again(slurm, status, restarts, again):
    """After a stop that saved and after a lost process; not when it is done, at the user's mistake, or for ever."""
    slurm.add("srun", f"sys.exit({status})")
    result = slurm.call("slurm.sh", "--in_job", "--config=x.py", SLURM_JOB_ID="17", SLURM_RESTART_COUNT=str(restarts), PYTHON="mypython")
    assert result.returncode == status
    assert slurm.calls[0] == ["srun", "--kill-on-bad-exit=0", "--gpu-bind=none", "mypython", "-m", "vidjoint.main", "--config=x.py"]
    assert slurm.calls[1:] == ([["scontrol", "requeue", "17"]] if again else [])


def test_a_cancelled_job_stays_so(slurm):
    """scancel sends SIGTERM to the batch shell as well; the tasks save and end with 75."""
    slurm.add("srun", "import time\ntime.sleep(1.5)\nsys.exit(75)")
    job = subprocess.Popen([LAUNCH / "slurm.sh", "--in_job", "--config=x.py"], env=slurm.environment(SLURM_JOB_ID="17"), cwd=slurm.folder)
    while not slurm.calls:
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(30) == 75 and len(slurm.calls) == 1
