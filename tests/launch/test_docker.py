"""launch/docker.sh against a stand-in for docker."""

import io
import tarfile

import pytest

from tests.launch.stand_ins import StandIns


@pytest.fixture
def docker(tmp_path):
    return StandIns(tmp_path, "docker")


@pytest.mark.parametrize(("kind", "extra"), [("cpu", ""), ("gpu", "cuda12"), ("tpu", "tpu")])
def test_build_sends_the_committed_files(docker, kind, extra):
    result = docker.call("docker.sh", "build", kind)
    assert result.returncode == 0, result.stderr
    (record,) = docker.records
    assert record["argv"] == ["docker", "build", f"--build-arg=EXTRA={extra}", f"--tag=vidjoint:{kind}", "--file=launch/Dockerfile", "-"]
    with tarfile.open(fileobj=io.BytesIO(record["input"].encode("latin-1"))) as archive:
        assert {"setup.py", "requirements.lock", "vidjoint/main.py"} <= set(archive.getnames())


def test_run_mounts_folders_and_passes_arguments_on(docker, tmp_path):
    (tmp_path / "my videos").mkdir()
    docker.add("docker", "sys.exit(75)")
    result = docker.call("docker.sh", "--data=my videos", "run", "gpu", "main", "--config=configs/demo.py", "--config.optim.betas=(0.9, 0.95)")
    assert result.returncode == 75  # what the command in the container says
    (call,) = docker.calls
    assert call[:2] == ["docker", "run"] and "--gpus=all" in call and "--init" in call
    assert f"--volume={tmp_path}/my videos:/data:ro" in call and f"--volume={tmp_path}/runs:/runs" in call and (tmp_path / "runs").is_dir()
    assert call[-4:] == ["vidjoint:gpu", "vidjoint.main", "--config=configs/demo.py", "--config.optim.betas=(0.9, 0.95)"]


def test_wrong_use(docker):
    for arguments in (("build", "fpga"), ("run", "cpu"), ("fly",)):
        result = docker.call("docker.sh", *arguments)
        assert result.returncode == 2 and "launch/docker.sh" in result.stderr
    assert not docker.calls
