"""launch/tpu_vm.sh against a stand-in for gcloud."""

import re
import subprocess

import pytest

from tests.launch.stand_ins import LAUNCH, ROOT, StandIns

# Commands that are meant for the VM go through `bash -n`, which looks at their syntax alone
SYNTAX = """
import subprocess
for word in sys.argv:
    if word.startswith("--command="):
        sys.exit(subprocess.run(["bash", "-n", "-c", word.removeprefix("--command=")]).returncode)
"""


@pytest.fixture
def gcloud(tmp_path):
    stand_ins = StandIns(tmp_path)
    stand_ins.add("gcloud", SYNTAX)
    return stand_ins


def on_vm(call: list[str]) -> str:
    """The command that a call runs on the hosts."""
    return next(word for word in call if word.startswith("--command=")).removeprefix("--command=")


@pytest.mark.parametrize(("kind", "version"), [("v4-8", "tpu-ubuntu2204-base"), ("v5litepod-8", "v2-alpha-tpuv5-lite"), ("v6e-8", "v2-alpha-tpuv6e")])
def test_create_asks_for_the_software_of_the_generation(gcloud, kind, version):
    assert gcloud.call("tpu_vm.sh", "create", "cover", "us-central2-b", kind, "--spot").returncode == 0
    where = ["compute", "tpus", "tpu-vm", "create", "cover", "--zone=us-central2-b"]
    assert gcloud.calls == [["gcloud", *where, f"--accelerator-type={kind}", f"--version={version}", "--spot"]]


def test_run_passes_arguments_on_unharmed(gcloud):
    """To all hosts, where machine.sh gets them as they were."""
    arguments = ["--config=configs/demo.py", "--config.optim.betas=(0.9, 0.95)", "--workdir=it's $HOME"]
    result = gcloud.call("tpu_vm.sh", "run", "cover", "zone", *arguments)
    assert result.returncode == 0, result.stderr
    (call,) = gcloud.calls
    assert "--worker=all" in call
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {on_vm(call)}"], capture_output=True, text=True).stdout.splitlines()
    assert words == ["vidjoint/launch/machine.sh", "start", *arguments]


def test_install(gcloud):
    """The clone goes to all hosts, with JAX of the version that the lock file has, and the user's own command comes last."""
    assert gcloud.call("tpu_vm.sh", "install", "cover", "zone", SETUP="sudo mount x").returncode == 0
    copy, install, setup = gcloud.calls
    assert "cover:vidjoint.tar" in copy and "--worker=all" in copy and "--worker=all" in install and on_vm(setup) == "sudo mount x"
    assert re.search(r"^jax==([\d.]+) ; python_version < ", (ROOT / "requirements.lock").read_text(), re.M)[1] in on_vm(install)


def test_status_logs_stop_and_delete(gcloud):
    for verb in ("status", "logs", "stop", "delete"):
        assert gcloud.call("tpu_vm.sh", verb, "cover", "zone").returncode == 0
    status, logs, stop, delete = gcloud.calls
    assert on_vm(status).endswith("machine.sh status") and on_vm(stop).endswith("machine.sh stop") and "--worker=0" in logs and "--quiet" in delete


# A TPU whose next state or run's status is the next line of the file `story`
STORY = """
verb = sys.argv[4]
def next_line():
    lines = open("story").read().splitlines()
    open("story", "w").write("".join(line + chr(10) for line in lines[1:]))
    return lines[0]
if verb == "describe":
    state = next_line()
    sys.exit(1) if state == "ABSENT" else print(state)
elif verb == "ssh" and "status" in sys.argv[-1]:
    print(next_line())
"""


def told(gcloud, story: list[str]) -> tuple[int, list[str]]:
    """Exit status of keep when that is how it goes, and what it did to the TPU."""
    gcloud.add("gcloud", STORY)
    (gcloud.folder / "story").write_text("".join(f"{line}\n" for line in story))
    result = gcloud.call("tpu_vm.sh", "keep", "cover", "zone", "v4-8", "--config=x.py", PAUSE="0", CREATE_OPTIONS="--spot --network=mine")
    kinds = {"install": "tar xf", "run": "machine.sh start"}
    verbs = [next((kind for kind, text in kinds.items() if text in " ".join(call)), call[4]) for call in gcloud.calls]
    return result.returncode, [verb for verb in verbs if verb not in ("describe", "ssh", "scp")]


def test_keep_goes_on_after_preemptions(gcloud):
    story = ["ABSENT", "CREATING", "READY", "new", "READY", "running", "PREEMPTED", "ABSENT", "READY", "new", "READY", "76", "READY", "0"]
    assert told(gcloud, story) == (0, ["create", "install", "run", "delete", "create", "install", "run", "run"])
    created = next(call for call in gcloud.calls if call[4] == "create")
    assert created[-2:] == ["--spot", "--network=mine"]


def test_keep_ends_where_something_is_to_be_mended(gcloud):
    assert told(gcloud, ["READY", "absent", "READY", "2"]) == (2, ["run"])


@pytest.mark.parametrize("arguments", [("create", "cover"), ("explode", "cover", "zone"), ("create", "cover", "zone"), ("keep", "cover", "zone")])
def test_wrong_use_is_explained(gcloud, arguments):
    result = gcloud.call("tpu_vm.sh", *arguments)
    assert result.returncode != 0 and result.stderr.strip() and not result.stdout and not gcloud.calls


def test_machine_is_what_runs_on_the_hosts():
    assert (LAUNCH / "machine.sh").exists() and "launch/machine.sh" in (LAUNCH / "tpu_vm.sh").read_text()
