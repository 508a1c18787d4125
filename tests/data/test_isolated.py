"""Calls in child processes: what they return and raise, and that nothing a child does reaches the caller but as a line."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.data.sets import configure, mixed, same
from tests.faults import hostile
from vidjoint.data import examples, isolated
from vidjoint.data.decode import DecodeError
from vidjoint.data.demo import write_video
from vidjoint.data.isolated import Limits
from vidjoint.errors import UserError

LIMITS = Limits(seconds=30.0, memory=1 << 30)


def call(function, *args, limits=LIMITS):
    return isolated.call(limits, "x.mp4", function, *args)


def test_values_and_errors_come_back():
    clip = np.random.default_rng(0).integers(0, 256, (4, 50, 60, 3), np.uint8)
    for value in (clip, clip[:, ::-1], np.zeros((0, 3)), {"a": [clip, None]}, "text", np.zeros(3_000_000, np.uint8)):
        np.testing.assert_equal(call(hostile.echo, value), value)
    assert call(hostile.echo, clip).flags.writeable
    with pytest.raises(DecodeError, match="no video"):
        call(hostile.refuse)
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        call(hostile.fail)
    assert "in fail" in caught.value.__notes__[0]
    with pytest.raises(UserError):
        call(_user_error)
    assert call(hostile.echo, 1) == 1


def _user_error():
    raise UserError("a", "b")


def test_many_threads_have_a_child_each():
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda i: call(hostile.echo, i), range(50))) == list(range(50))
    assert len(isolated._idle) <= 4


def test_a_crash_is_the_files_second_time(tmp_path, caplog):
    np.testing.assert_array_equal(call(hostile.crash_once, str(tmp_path / "mark")), np.arange(10))
    (record,) = caplog.records
    assert record.getMessage() == "x.mp4: the process that decoded it ended (SIGSEGV); trying once more in a new one"
    with pytest.raises(DecodeError, match=r"^it kills the process that decodes it \(SIGSEGV\)$"):
        call(hostile.crash)


@pytest.mark.parametrize("function", [hostile.hang, hostile.spin])
def test_time_is_bounded(function):
    call(hostile.echo, 0)
    start = time.monotonic()
    with pytest.raises(DecodeError, match=r"^not decoded within 0.3 s \(data.decode_seconds\)$"):
        call(function, limits=Limits(0.3, 1 << 30))
    assert time.monotonic() - start < 30
    assert call(hostile.echo, 1) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds address space")
def test_memory_is_bounded():
    with pytest.raises(DecodeError, match="more memory than allowed"):
        call(hostile.eat, limits=Limits(60.0, 600 << 20))
    assert call(hostile.address_space) < 400 << 20  # in a new process


def test_a_child_that_cannot_start_is_told(monkeypatch):
    isolated.close()
    monkeypatch.setattr(isolated, "CODE", "raise SystemExit(3)")
    with pytest.raises(UserError, match=r"^a decoding process does not start \(exit status 3\): mend that, or set data.isolate=none$"):
        call(hostile.echo, 1)


def test_a_child_that_is_killed_while_idle_is_replaced():
    call(hostile.echo, 0)
    for child in isolated._idle:
        child._process.kill()
        child._process.wait()
    assert call(hostile.echo, 2) == 2


def test_children_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal, sys, threading, time
        sys.path[:0] = {[str(Path(__file__).parents[2])]!r}
        from tests.faults import hostile
        from vidjoint.data import isolated
        limits = isolated.Limits(1.0, 1 << 30)
        isolated.call(limits, "x", hostile.echo, 0)
        print(isolated._idle[0]._process.pid, flush=True)
        threading.Thread(target=isolated.call, args=(limits, "x", hostile.spin), daemon=True).start()
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    child = int(subprocess.run([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "it spins on without a parent"
        time.sleep(0.1)


def test_a_forked_process_has_children_of_its_own():
    code = """
import os
from tests.faults import hostile
from vidjoint.data import isolated
isolated.call(isolated.Limits(60.0, 1 << 30), "x", hostile.echo, 0)
pid = os.fork()
if pid == 0:
    os._exit(len(isolated._idle))
print(os.waitpid(pid, 0)[1], len(isolated._idle))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.split() == ["0", "1"], done.stderr


def test_pixels_are_those_of_threads(root):
    direct = [mixed(configure(root, "moves", "stills", **{"data.isolate": "none"})).step(i) for i in range(3)]
    for isolate in ("video", "all"):
        for i, batches in enumerate(direct):
            same(mixed(configure(root, "moves", "stills", **{"data.isolate": isolate})).step(i), batches)


def test_a_substitute_has_the_draws_of_what_it_replaces(root, tmp_path):
    """However far a file was read before it failed: here one that needs too many frames, which shows only after its clip has been chosen."""
    shutil.copytree(root / "moves", tmp_path / "moves")
    shutil.copy(root / "moves.csv", tmp_path)
    write_video(tmp_path / "moves" / "4.mp4", np.random.default_rng(0).integers(0, 256, (60, 20, 24), np.uint8))
    steps = {}
    for isolate in ("none", "video"):
        mix = mixed(configure(tmp_path, "moves", **{"data.isolate": isolate, "data.max_frames": 10}))
        steps[isolate] = [mix.step(i) for i in range(3)]
        assert ["data.max_frames" in line for line in mix.bad["moves"].values()] == [True]
    for ours, theirs in zip(*steps.values(), strict=True):
        same(ours, theirs)


def test_relative_paths_are_those_of_the_caller(root, monkeypatch):
    config = configure(root, "moves")
    first = mixed(config).step(0)
    monkeypatch.chdir(root)
    config.data_root = ""
    same(mixed(config).step(0), first)
    assert examples._sent({"video": "a.mp4", "name": "n"}) == {"video": str(root / "a.mp4")}


def test_what_harms_the_decoder_is_replaced_as_what_cannot_be_decoded(root, tmp_path, monkeypatch):
    """Three files that crash, hang or eat memory, against the same files without a picture: equal to the bit."""
    for name in ("moves", "moves.csv"):
        os.symlink(root / name, tmp_path / name)
    (tmp_path / "moves").unlink()
    (tmp_path / "moves").mkdir()
    for file in (root / "moves").iterdir():
        (tmp_path / "moves" / file.name).write_bytes(b"no video" if file.name in hostile.HARM else file.read_bytes())
    plain = mixed(configure(tmp_path, "moves", **{"data.max_bad_share": 0.5}))
    expected = [plain.step(i) for i in range(2)]  # 12 of 13
    assert len(plain.bad["moves"]) == 3
    monkeypatch.setattr(examples, "_training_clip", hostile.training_clip)
    changes = {"data.max_bad_share": 0.5, "data.decode_seconds": 1.5, "data.decode_memory": 600, "data.threads": 3}
    harmed = mixed(configure(root, "moves", **changes))
    for i, batches in enumerate(expected):
        same(harmed.step(i), batches)
    reasons = {line.rpartition("/")[2].partition(": ")[0]: line.partition(": ")[2] for line in harmed.bad["moves"].values()}
    for name, reason in {"4.mp4": "SIGSEGV", "5.mp4": "data.decode_seconds", "7.mp4": "data.decode_memory"}.items():
        assert reason in reasons[name]


def test_a_killed_decoder_changes_nothing(root):
    """Killed at any moment, by whoever lacks memory: the same batches."""
    config = configure(root, "moves", **{"data.threads": 2})
    expected = [mixed(config).step(i) for i in range(4)]
    stop = threading.Event()

    def kill():
        for _ in range(4):
            if stop.wait(0.5):
                break
            for child in list(_children())[:1]:
                os.kill(child, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        mix = mixed(config)
        for _ in range(3):
            for i, batches in enumerate(expected):
                same(mix.step(i), batches)
    finally:
        stop.set()
        killer.join()
    assert not mix.bad["moves"]


def _children():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"isolated" in Path(f"/proc/{pid}/cmdline").read_bytes():
                yield int(pid)
        except OSError:
            pass
