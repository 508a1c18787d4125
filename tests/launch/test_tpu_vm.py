"""The script against a stand-in for gcloud that records how it was called."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "tpu_vm.sh"


def call(*arguments, path=None) -> subprocess.CompletedProcess:
    environment = os.environ | ({"PATH": f"{path}:{os.environ['PATH']}"} if path else {})
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=environment, timeout=30)


@pytest.fixture
def gcloud(tmp_path):
    """A folder with a gcloud that writes one line per argument to `calls`, then runs a command meant for the VM through `bash -n` (syntax only)."""
    stand_in = tmp_path / "gcloud"
    stand_in.write_text(
        f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" >>{tmp_path}/calls\n'
        'for a; do case $a in --command=*) bash -n -c "${a#--command=}" || exit 9;; esac; done\n'
    )
    stand_in.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(("kind", "version"), [("v4-8", "tpu-ubuntu2204-base"), ("v5litepod-8", "v2-alpha-tpuv5-lite"), ("v6e-8", "v2-alpha-tpuv6e")])
def test_create_asks_for_the_software_of_the_generation(gcloud, kind, version):
    assert call("create", "cover", "us-central2-b", kind, path=gcloud).returncode == 0
    calls = (gcloud / "calls").read_text().splitlines()
    assert calls == ["compute", "tpus", "tpu-vm", "create", "cover", "--zone=us-central2-b", f"--accelerator-type={kind}", f"--version={version}"]


def test_run_passes_arguments_on_unharmed(gcloud):
    result = call("run", "cover", "zone", "--config=configs/demo.py", "--config.optim.betas=(0.9, 0.95)", path=gcloud)
    assert result.returncode == 0, result.stderr
    command = next(line for line in (gcloud / "calls").read_text().splitlines() if line.startswith("--command="))
    assert r"--config=configs/demo.py --config.optim.betas=\(0.9\,\ 0.95\)" in command


def test_install_and_delete(gcloud):
    assert call("install", "cover", "zone", path=gcloud).returncode == 0
    assert call("delete", "cover", "zone", path=gcloud).returncode == 0
    calls = (gcloud / "calls").read_text()
    assert "cover:vidjoint.tar" in calls and "--quiet" in calls


def test_dry_run_runs_nothing(gcloud):
    result = call("--dry_run", "delete", "cover", "zone", path=gcloud)
    assert result.stdout.split() == ["gcloud", "compute", "tpus", "tpu-vm", "delete", "cover", "--zone=zone", "--quiet"]
    assert not (gcloud / "calls").exists()


@pytest.mark.parametrize("arguments", [(), ("create", "cover"), ("explode", "cover", "zone"), ("create", "cover", "zone")])
def test_wrong_use_is_explained(arguments):
    result = call(*arguments)
    assert result.returncode != 0 and result.stderr.strip() and not result.stdout
