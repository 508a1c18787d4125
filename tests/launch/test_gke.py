"""launch/gke.py against a stand-in for kubectl, and the mesh of several slices that such a run makes."""

import jax
import pytest
import yaml

from tests.launch.stand_ins import StandIns
from vidjoint import sharding
from vidjoint.errors import UserError

ARGUMENTS = ("--", "--config=configs/cover_jft.py", "--config.optim.betas=(0.9, 0.95)", '--workdir=/mnt/data/runs/$HOME "x"')


@pytest.fixture
def kubectl(tmp_path):
    return StandIns(tmp_path, "kubectl")


def test_start_applies_a_jobset(kubectl):
    """As many pods as hosts in each slice, and every argument as it was written, whatever signs it has."""
    options = ("--image=repo/vidjoint:tpu", "--accelerator=tpu-v5p-slice", "--topology=2x2x4", "--slices=3", "--claim=data:/mnt/data", "--spot")
    result = kubectl.call("gke.py", "start", "cover", *options, *ARGUMENTS)
    assert result.returncode == 0, result.stderr
    (record,) = kubectl.records
    assert record["argv"] == ["kubectl", "apply", "--filename=-"]
    jobset = yaml.safe_load(record["input"])
    assert jobset["kind"] == "JobSet" and jobset["metadata"]["name"] == "cover"
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert slices["replicas"] == 3 and job["parallelism"] == job["completions"] == 4 and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == ["vidjoint.main", *ARGUMENTS[1:]] and container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert container["volumeMounts"] == [{"name": "claim", "mountPath": "/mnt/data"}]
    assert pod["volumes"] == [{"name": "claim", "persistentVolumeClaim": {"claimName": "data"}}]


def test_a_mistake_ends_it_and_a_loss_starts_it_again(kubectl):
    kubectl.call("gke.py", "start", "cover", "--image=i", "--restarts=7", *ARGUMENTS)
    spec = yaml.safe_load(kubectl.records[0]["input"])["spec"]
    (rule,) = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2] and rule["onExitCodes"]["containerName"] == "vidjoint"
    assert spec["failurePolicy"]["maxRestarts"] == 7 and spec["failurePolicy"]["rules"][0]["action"] == "FailJobSet"


def test_other_verbs(kubectl):
    for verb in ("status", "logs", "stop"):
        assert kubectl.call("gke.py", verb, "cover").returncode == 0
    calls = [" ".join(call) for call in kubectl.calls]
    assert calls[0] == "kubectl get jobset cover" and calls[-1] == "kubectl delete jobset cover"
    kubectl.add("kubectl", "sys.exit(1)")
    assert kubectl.call("gke.py", "stop", "cover").returncode == 1


def test_mistakes_are_told_together(kubectl):
    result = kubectl.call("gke.py", "start", "Cover_1", "--topology=3x", "--slices=0", "--claim=data")
    assert result.returncode == 2 and not kubectl.calls and not result.stdout
    told = result.stderr.splitlines()
    assert len(told) == 6 and all(line.startswith("error: ") for line in told)


class Chip:
    """A TPU device as JAX describes it: the i-th of slices with 2 x 2 chips."""

    platform, device_kind, core_on_chip = "tpu", "TPU v5 lite", 0

    def __init__(self, i: int):
        self.id, self.slice_index, self.process_index, self.coords = i, i // 4, i // 4, [i % 2, i // 2 % 2, 0]


def test_batches_are_split_over_slices_and_all_else_inside_of_them():
    chips = [Chip(i) for i in range(8)]
    for sizes in (dict(data=-1, fsdp=2, tensor=1), dict(data=-1, fsdp=1, tensor=4), dict(data=8, fsdp=1, tensor=1)):
        mesh = sharding.make_mesh(sizes, chips)
        assert isinstance(mesh, jax.sharding.Mesh) and mesh.size == 8
        rows = mesh.devices.reshape(2, -1)
        assert all(len({chip.slice_index for chip in row}) == 1 for row in rows) and rows[0, 0].slice_index != rows[1, 0].slice_index
    with pytest.raises(UserError, match="no multiple of the 2 TPU slices"):
        sharding.make_mesh(dict(data=1, fsdp=-1, tensor=1), chips)
