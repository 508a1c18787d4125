"""Runs that are killed, stopped, moved and robbed of their disk go on as if nothing had been; and what the user sees.

Without `--full` there are three interruptions of one run; with it, 30, and all the others that docs/reliability.md has.
"""

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.faults import runs
from vidjoint.checkpoints import load_params
from vidjoint.machine import processes
from vidjoint.metrics import read_events

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interruptions")
    runs.write_experiment(folder)
    return folder


@pytest.fixture(scope="module")
def forking(folder):
    with runs.forking(folder / "cache") as forking:
        yield forking


def straight(forking, folder: Path, steps: int, **machines) -> Path:
    """A run that is left alone."""
    workdir = folder / f"straight{steps}.{'.'.join(map(str, machines.values()))}"
    if not workdir.exists():
        with forking.start(f"{folder}/config.py:{steps}", workdir, **machines) as run:
            assert set(run.wait()) == {0}, run.said()
    return workdir


def interrupt(run: runs.Run, kind: str, rng: random.Random, step: int) -> None:
    """Lets the run come to a step, then interrupts it: at once, by a signal that it may answer, in a save, or before it has made a step."""
    process = rng.randrange(len(run.ids))
    if kind == "at the start":
        time.sleep(rng.uniform(0, 4))
        run.send(signal.SIGKILL, process)
        return
    assert run.until_step(step), run.said()
    if kind == "in a save":
        assert run.until(lambda: runs.saving(run.workdir), "a save"), run.said()
        time.sleep(rng.uniform(0, 0.02))
    else:
        time.sleep(rng.uniform(0, 0.05))
    run.send({"terminated": signal.SIGTERM, "Ctrl-C": signal.SIGINT}.get(kind, signal.SIGKILL), process)


def disturbed(forking, config: str, workdir: Path, steps: int, count: int, seed: int, **machines) -> dict[str, int]:
    """Interrupts a run so often, then lets it end. Returns how often each thing has happened."""
    rng = random.Random(seed)
    kinds = ["killed", "terminated", "in a save", "killed", "in a save", "terminated", "Ctrl-C", "at the start"]
    counts = dict.fromkeys([*kinds, "half a checkpoint left behind", "steps lost"], 0)
    for i in range(count):
        kind = kinds[i % len(kinds)] if i < len(kinds) else rng.choice(kinds)
        with forking.start(config, workdir, **machines) as run:
            interrupt(run, kind, rng, (i + 1) * steps // (count + 2) + rng.randrange(-3, 3))
            statuses = run.wait()
            signalled = {-signal.SIGKILL} if kind not in ("terminated", "Ctrl-C") else {75}
            assert set(statuses) <= signalled | ({processes.LOST} if len(statuses) > 1 else set()), (kind, statuses, run.said())
            for process in range(len(statuses)):
                assert not any("Traceback" in line for line in run.said(process)), run.said(process)
        whole = runs.check_checkpoints(workdir)
        counts[kind] += 1
        counts["half a checkpoint left behind"] += runs.saving(workdir)
        if kind not in ("at the start",) and statuses[0] != 75:
            lost = runs.last_step(workdir) - max(whole, default=0)
            assert lost <= 2 * 7 + 1, "more than since the last save, or the one that was under way"
            counts["steps lost"] += lost
    with forking.start(config, workdir, **machines) as run:
        assert set(run.wait()) == {0}, run.said()
    assert not runs.saving(workdir)
    return counts


def test_a_run_that_is_interrupted_again_and_again_ends_bit_equal(forking, folder, full):
    count = 30 if full else 3
    steps = 40 * count
    expected = straight(forking, folder, steps)
    counts = disturbed(forking, f"{folder}/config.py:{steps}", folder / "broken", steps, count, seed=1)
    print(f"{count} interruptions of a run of {steps} steps: {counts}")
    runs.assert_same_run(folder / "broken", expected)
    log = (folder / "broken/metrics.jsonl").read_bytes()
    (folder / "broken/curves.png").unlink()
    with forking.start(f"{folder}/config.py:{steps}", folder / "broken", "--config.log_every=3") as run:  # nothing is left to do but the reports
        assert run.wait() == [0], run.said()
    assert (folder / "broken/metrics.jsonl").read_bytes() == log and (folder / "broken/curves.png").exists()


def test_a_run_of_two_processes_too(forking, folder, full):
    """Whichever of the two is hit, both end, and both go on."""
    if not full:
        pytest.skip("with --full: 32 starts of a run; tests/machine/test_processes.py has three")
    count = 30
    steps = 40 * count
    machines = dict(processes=2, devices=1)
    expected = straight(forking, folder, steps, **machines)
    counts = disturbed(forking, f"{folder}/config.py:{steps}", folder / "broken2", steps, count, seed=2, **machines)
    print(f"{count} interruptions of a run of {steps} steps in two processes: {counts}")
    runs.assert_same_run(folder / "broken2", expected)


def test_a_run_moves_between_devices_processes_and_workers(forking, folder, full):
    """4 devices and 4 workers, then 2 processes without workers, then 1 process with 2 devices: the same examples at every step, the same losses."""
    if not full:
        pytest.skip("with --full: four starts of a run")
    steps = 60
    (folder / "examples.csv").unlink(missing_ok=True)
    expected = straight(forking, folder, steps, processes=1, devices=4)
    alone = runs.examples(folder)
    workdir = folder / "moved"
    moves = [
        (dict(processes=1, devices=4), ["--config.data.workers=4"]),
        (dict(processes=2, devices=1), []),
        (dict(processes=1, devices=2), []),
    ]
    for i, (machines, arguments) in enumerate(moves):
        with forking.start(f"{folder}/config.py:{steps}", workdir, *arguments, **machines) as run:
            if i + 1 < len(moves):
                assert run.until_step((i + 1) * steps // len(moves)), run.said()
                run.send(signal.SIGTERM)
            assert set(run.wait()) == {75 if i + 1 < len(moves) else 0}, run.said()
    moved = runs.examples(folder)
    assert {place for place in alone if int(place[0]) <= steps} <= moved.keys()
    assert {place: checksum for place, checksum in moved.items() if place in alone} == {place: alone[place] for place in alone if place in moved}
    losses = [[event["train/loss"] for event in read_events(path / "metrics.jsonl") if "train/loss" in event] for path in (workdir, expected)]
    assert len(losses[0]) == len(losses[1]) == steps
    difference = np.abs(np.subtract(*losses)).max()
    print(f"moved twice within {steps} steps: {len(alone)} rows were the same, the losses differ by at most {difference:.1e}")
    assert difference <= 1e-5


def test_the_second_run_in_a_folder_is_refused(forking, folder, full):
    """While the first goes on; when that is killed, nothing is in the way."""
    if not full:
        pytest.skip("with --full: three starts of a run; tests/test_train.py has the lock by itself")
    config, workdir = f"{folder}/config.py:10000", folder / "twice"
    with runs.forking(folder / "cache") as other, forking.start(config, workdir) as first:
        assert first.until_step(3), first.said()
        with other.start(config, workdir) as second:
            assert second.wait() == [2]
            (line,) = second.said()
        assert line.startswith(f"error: {workdir}: another run is in this folder (process {first.ids[0]} on ")
        before = runs.last_step(workdir)
        assert first.until_step(before + 2), "the first run goes on"
        first.send(signal.SIGKILL)
        assert first.wait() == [-signal.SIGKILL]
        with other.start(config, workdir) as third:
            assert third.until_step(before + 3)
            third.send(signal.SIGTERM)
            assert third.wait() == [75]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own, of 1500 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_ends_the_run_with_one_line_and_room_lets_it_go_on(forking, folder, full, small_disk):
    """Full in a save; then when only the log is written; then from the start."""
    if not full:
        pytest.skip("with --full: six starts of a run")
    config, workdir = f"{folder}/config.py:100", small_disk / "run"
    with forking.start(config, workdir, "--config.keep_checkpoints=50") as run:
        assert run.wait() == [2], run.said()
        line = _only(run.said())
    assert line.startswith(f"error: {workdir}") and "No space left on device" in line and "the same command goes on" in line
    whole = runs.check_checkpoints(workdir)
    assert len(whole) > 1 and load_params(workdir)[0] == whole[-1]
    print(f"a full disk: {line}; checkpoints {whole} are whole")
    shutil.rmtree(next((workdir / "checkpoints").glob("*tmp*")), ignore_errors=True)
    shutil.rmtree(workdir / "checkpoints" / str(whole[0]))
    before = runs.last_step(workdir)
    with forking.start(config, workdir, "--config.checkpoint_every=1000") as run:
        assert run.until_step(before + 2), run.said()
        _fill(small_disk / "filling")
        assert run.wait() == [2], run.said()
        line = _only(run.said())
    assert line == f"error: {workdir}: No space left on device: mend that, and the same command goes on from the last checkpoint"
    assert load_params(workdir)[0] == whole[-1]
    with forking.start(config, workdir) as run:
        assert run.wait() == [2], run.said()
        line = _only(run.said())
    assert line == f"error: {workdir} can't be written (No space left on device): give another --workdir"
    assert load_params(workdir)[0] == whole[-1]
    (small_disk / "filling").unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    with forking.start(config, workdir) as run:
        assert run.wait() == [0], run.said()
    runs.assert_same_run(workdir, straight(forking, folder, 100))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with forking.start(config, workdir) as run:
        assert run.wait() == [2], run.said()
        line = _only(run.said())
    assert line == f"error: {workdir} can't be written (Read-only file system): give another --workdir"
    assert load_params(workdir)[0] == 100


def _only(lines: list[str]) -> str:
    assert len(lines) == 1, lines
    return lines[0]


def _fill(file: Path) -> None:
    with open(file, "wb", buffering=0) as filling:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    filling.write(bytes(size))
            except OSError:
                pass


def test_a_data_root_that_goes_ends_the_run_with_the_files_named(forking, folder, full, tmp_path):
    """And when it is back, the run goes on as if it had never gone."""
    if not full:
        pytest.skip("with --full: three starts of a run")
    data, away = folder / "data", folder / "away"
    config, workdir = f"{folder}/config.py:100", tmp_path / "run"
    with forking.start(config, workdir) as run:
        assert run.until_step(20), run.said()
        data.rename(away)
        try:
            assert run.wait() == [2]
            said = run.said()
        finally:
            away.rename(data)
    errors = [line for line in said if line.startswith("error")]
    print(f"a data root that goes: {said}")
    either = [f"error: {task}: none of these is there any more: is the disk still mounted?" for task in ("clips", "stills")]  # whose turn it was
    assert errors[-1] in either, said
    assert not any("Traceback" in line for line in said), said
    assert runs.check_checkpoints(workdir)
    with forking.start(config, workdir) as run:
        assert run.wait() == [0], run.said()
    runs.assert_same_run(workdir, straight(forking, folder, 100))
