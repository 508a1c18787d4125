"""The mixture: the same examples whatever decodes them, exact proportions, whole passes, undecodable files, bounded memory, nothing left behind."""

import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests import tiny
from tests.data.sets import NUMBER, SIZES, configure, mixed, same
from vidjoint.config import base_config, task_config
from vidjoint.data import mixture, schedules, workers
from vidjoint.data.decode import DecodeError
from vidjoint.data.mixture import Mixture, evaluation_batches
from vidjoint.data.tasks import open_tasks
from vidjoint.errors import UserError


def take(mix, count, start=0):
    with closing(mix.iterate(start)) as tuples:
        return list(islice(tuples, count))


def examples(mix, steps, start=0):
    """(task, label) of all rows that count, in order."""
    batches = [batch for step in range(start, start + steps) for batch in mix.step(step)]
    return [(int(t), int(label)) for b in batches for t, label, keep in zip(b["task"], b["label"], b["mask"], strict=True) if keep]


@pytest.fixture
def no_threads_left():
    """The test must end with the threads and child processes that it began with, but for a pool that grain keeps to free shared memory."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 30
    while left := [thread for thread in set(threading.enumerate()) - before if not re.search(r"\((worker|_handle_\w+)\)", thread.name)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
    assert not multiprocessing.active_children()


# The same examples, whatever decodes them


@pytest.mark.parametrize("schedule", ["mixed", "round_robin"])
@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (8, 4)])
def test_iterate_gives_what_step_gives_from_any_start(root, schedule, threads, prefetch, no_threads_left):
    config = configure(root, *SIZES, schedule=schedule)
    direct = [mixed(config).step(i) for i in range(6)]
    config.data.threads, config.data.prefetch = threads, prefetch
    for start in (0, 1, 4):
        for i, batches in enumerate(take(mixed(config), 6 - start, start), start):
            same(batches, direct[i])
    mix = mixed(config)
    for i in (5, 2, 5, 0):  # any order, any number of times
        same(mix.step(i), direct[i])


def test_batches_are_what_they_say(root):
    first, second = mixed(configure(root, *SIZES, batch_size=10)).step(0)
    shapes = {batch["pixels"].shape[1:]: batch for batch in (first, second)}
    assert shapes.keys() == {(1, 16, 16, 3), (3, 16, 16, 3)}
    assert len(first["label"]) + len(second["label"]) == 10
    for batch in (first, second):
        assert {key: column.dtype for key, column in batch.items()} == {"pixels": np.uint8, "label": np.int32, "task": np.int32, "mask": bool}
        assert all(len(column) == len(batch["label"]) for column in batch.values())
        assert batch["mask"].all() and (batch["pixels"].reshape(len(batch["label"]), -1).std(axis=1) > 0).all()
    assert set(shapes[1, 16, 16, 3]["task"]) == {NUMBER["stills"]}
    assert set(shapes[3, 16, 16, 3]["task"]) == {NUMBER["moves"], NUMBER["turns"]}


def test_another_seed_gives_other_examples(root):
    def stacked(seed):
        batches = [mixed(configure(root, "moves", seed=seed, batch_size=13)).step(i)[0] for i in range(2)]
        return np.concatenate([b["label"] for b in batches]), np.concatenate([b["pixels"] for b in batches])

    labels, pixels = stacked(0)
    other_labels, other_pixels = stacked(1)
    assert (labels != other_labels).any() and (pixels != other_pixels).any()
    order = np.argsort(labels, kind="stable").reshape(13, 2)
    assert all((pixels[first] != pixels[second]).any() for first, second in order)  # a file's next pass shows another clip of it


@pytest.mark.parametrize("schedule", ["mixed", "round_robin"])
def test_processes_hold_their_rows_of_the_same_batches(root, schedule):
    config = configure(root, *SIZES, schedule=schedule)  # batches of 3 and 3 rows, or 6: none is a multiple of 4
    whole = mixed(config, row_multiple=4)
    halves = [mixed(config, rows_of=tiny.share(process, 2), row_multiple=4) for process in range(2)]
    for i, (left, right) in enumerate(zip(*(take(half, 4) for half in halves), strict=True)):
        pairs = zip(left, right, strict=True)
        joined = tuple({key: np.concatenate([a[key], b[key]]) for key in a} for a, b in pairs)
        same(joined, whole.step(i))
        assert [len(batch["label"]) for batch in joined] == ([4, 4] if schedule == "mixed" else [8])
        for batch, unpadded in zip(joined, mixed(config).step(i), strict=True):  # filling is at the end, masked, zero
            rows = len(unpadded["label"])
            same(({key: column[:rows] for key, column in batch.items()},), (unpadded,))
            assert not any(column[rows:].any() for column in batch.values())


@pytest.mark.parametrize("count", [1, 4])
def test_worker_processes(root, count, no_threads_left):
    """grain's workers give the same, also while the whole job gets the signals that stop it: what to do then is the main process's decision."""
    config = configure(root, *SIZES)
    direct = [mixed(config).step(i) for i in range(3, 11)]
    config.data.workers, config.data.threads = count, 4
    with closing(mixed(config).iterate(3)) as tuples:
        for i, batches in enumerate(islice(tuples, 8)):
            same(batches, direct[i])
            if i == 3:  # each worker has given one
                children = multiprocessing.active_children()
                assert len(children) == count
                for child in children:
                    os.kill(child.pid, signal.SIGINT)
                    os.kill(child.pid, signal.SIGTERM)


def test_killed_worker_processes_are_replaced(root, caplog, no_threads_left):
    config = configure(root, *SIZES)
    direct, ended = mixed(config), "a process of data.workers=2 ended (exit code -9)"
    config.data.workers = 2
    with closing(mixed(config).iterate()) as tuples:
        for i, batches in enumerate(tuples):
            same(batches, direct.step(i))
            if i == 1:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            if told := any(ended in record.getMessage() for record in caplog.records):  # some later one: what it had decoded before is used
                break
    assert told and i > 1


def test_workers_end_with_a_killed_parent(root, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(
        textwrap.dedent(f"""
        import multiprocessing, os, signal, sys
        sys.path[:0] = {[str(Path(__file__).parents[2])]!r}
        from tests.data.sets import configure, mixed
        if __name__ == "__main__":
            tuples = mixed(configure({str(root)!r}, "moves", **{{"data.workers": 1}})).iterate()
            next(tuples)
            print(multiprocessing.active_children()[0].pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    child = int(subprocess.run([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    deadline = time.monotonic() + 60
    while is_running(child):
        assert time.monotonic() < deadline, "a worker process outlives its parent"
        time.sleep(0.02)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_too_little_shared_memory_is_found_out_before(root, monkeypatch):
    config = configure(root, "moves", batch_size=64, **{"data.workers": 2})
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    monkeypatch.setattr(workers, "SHARED_MEMORY", str(root))
    with pytest.raises(UserError, match=r"data.workers=2 may need 1 MiB .* has 1: set data.workers=0"):  # 9 x 64 x 3 x 16 x 16 x 3 bytes
        next(mixed(config).iterate())


# Schedules


def test_mixed_draws_in_proportion_to_size(root, undecoded):
    config = configure(root, *SIZES, batch_size=41)
    assert {stream.name: stream.batch_size for stream in mixed(config).streams} == {"stills": 20, "moves+turns": 21}
    config.batch_size = 8  # 8 x 20 / 41 = 3.90, 8 x 21 / 41 = 4.10
    mix = mixed(config)
    assert {stream.name: stream.batch_size for stream in mix.streams} == {"stills": 4, "moves+turns": 4}
    drawn = examples(mix, 210)  # 840 videos: 40 times 13 and 8
    assert Counter(task for task, _ in drawn) == {NUMBER["stills"]: 840, NUMBER["moves"]: 40 * 13, NUMBER["turns"]: 40 * 8}
    for stop in range(0, 840, 7):  # and everywhere on the way
        videos = [task for task, _ in drawn if task != NUMBER["stills"]][:stop]
        assert abs(videos.count(NUMBER["moves"]) - stop * 13 / 21) <= 1


def test_sample_weight_counts_as_copies(root, undecoded):
    config = configure(root, "moves", "turns", batch_size=10, **{"tasks.moves.sample_weight": 0.1, "tasks.turns.sample_weight": 2.5})
    mix = mixed(config)
    assert mix.union == pytest.approx(1.3 + 20) and mix.steps_per_epoch == pytest.approx(2.13)
    assert Counter(task for task, _ in examples(mix, 213)) == {0: 130, 1: 2000}
    config = configure(root, *SIZES, batch_size=10, **{"tasks.stills.sample_weight": 4.2})  # 84 : 21
    assert {stream.name: stream.batch_size for stream in mixed(config).streams} == {"stills": 8, "moves+turns": 2}


@pytest.mark.parametrize(
    ("weights", "total", "shares"),
    [
        ([1, 1], 3, [2, 1]),
        ([60, 25, 15], 10, [6, 3, 1]),  # 6.0, 2.5, 1.5: the first of equals
        ([41, 33, 26], 10, [4, 3, 3]),  # 4.1, 3.3, 2.6
        ([98, 1, 1], 4, [2, 1, 1]),  # nobody is left out
        ([1, 1e9, 1], 64, [1, 62, 1]),
        ([0.2, 0.1], 30, [20, 10]),
        ([5], 7, [7]),
    ],
)
def test_largest_remainder(weights, total, shares):
    assert schedules._largest_remainder(weights, total) == shares


def test_more_clip_shapes_than_rows(root):
    with pytest.raises(UserError, match="batch_size=1, but the tasks have 2 clip shapes"):
        mixed(configure(root, *SIZES, batch_size=1))


def test_round_robin_takes_turns(root, undecoded):
    config = configure(root, *SIZES, schedule="round_robin", task_order=("turns", "stills", "moves"))
    mix = mixed(config)
    tasks = [set(batch["task"]) for step in range(6) for batch in mix.step(step)]
    assert tasks == [{NUMBER[name]} for name in config.task_order] * 2
    assert [stream.batch_size for stream in mix.streams] == [6, 6, 6]
    config.task_order = ()
    assert [stream.name for stream in mixed(config).streams] == sorted(SIZES)


@pytest.mark.parametrize("schedule", ["mixed", "round_robin"])
def test_every_pass_holds_every_example_once(root, undecoded, schedule):
    drawn = examples(mixed(configure(root, *SIZES, schedule=schedule)), 60)
    for name, size in SIZES.items():
        labels = [label for task, label in drawn if task == NUMBER[name]]
        passes = [tuple(labels[i : i + size]) for i in range(0, len(labels) - size + 1, size)]
        assert len(passes) >= 4 and all(sorted(one) == list(range(size)) for one in passes)
        assert len(set(passes)) == len(passes) and sorted(passes[0]) != list(passes[0])  # each shuffled, and not alike


def test_another_task_leaves_a_tasks_own_examples_alone(root):
    def of_moves(*names):
        rows = []
        for i in range(13):
            for batch in mixed(configure(root, *names)).step(i):
                for label, task, pixels in zip(batch["label"], batch["task"], batch["pixels"], strict=True):
                    if names[task] == "moves":
                        rows.append((int(label), pixels.tobytes()))
        return rows[:20]

    alone = of_moves("moves")
    assert len(alone) == 20 and alone == of_moves("moves", "stills", "turns")


# Files that can't be decoded


@pytest.fixture
def damaged(root, tmp_path):
    """The same sets with two files of `moves` damaged, of which one follows the other."""
    for name in SIZES:
        os.symlink(root / name, tmp_path / name)
        os.symlink(root / f"{name}.csv", tmp_path / f"{name}.csv")
    (tmp_path / "moves").unlink()
    (tmp_path / "moves").mkdir()
    for i in range(SIZES["moves"]):
        content = (root / "moves" / f"{i}.mp4").read_bytes()
        (tmp_path / "moves" / f"{i}.mp4").write_bytes(b"no video" if i in (4, 5) else content)
    return tmp_path


def test_undecodable_files_are_replaced_counted_and_named_once(root, damaged, caplog):
    config = configure(damaged, "moves", "turns", **{"data.max_bad_share": 0.2})
    mix = mixed(config)
    with caplog.at_level(logging.WARNING):
        batches = take(mix, 14)
    same(batches[3], mixed(config).step(3))
    whole = mixed(configure(root, "moves", "turns"))
    replaced = 0
    for i, (batch,) in enumerate(batches):
        (other,) = whole.step(i)
        lost = (other["task"] == NUMBER["moves"]) & np.isin(other["label"], (4, 5))
        np.testing.assert_array_equal(batch["label"], np.where(lost, 6, other["label"]))  # the next that can be decoded, whichever is lost
        np.testing.assert_array_equal(batch["pixels"][~lost], other["pixels"][~lost])
        assert batch["mask"].all() and batch.keys() == other.keys()
        replaced += lost.sum()
    assert replaced >= 6
    assert {index: line.partition(":")[0] for index, line in mix.bad["moves"].items()} == {i: str(damaged / "moves" / f"{i}.mp4") for i in (4, 5)}
    assert not mix.bad["turns"]
    named = [record.getMessage() for record in caplog.records]
    assert sorted(line.partition(".mp4: ")[0] for line in named) == [f"moves: skipped {damaged}/moves/{i}" for i in (4, 5)]


def test_too_many_undecodable_files_stop_the_run(damaged, no_threads_left):
    config = configure(damaged, "moves", **{"data.max_bad_share": 0.1})  # 2 of 13 are more
    with pytest.raises(UserError) as stopped, closing(mixed(config).iterate()) as tuples:
        for _ in range(14):
            next(tuples)
    first, *files = stopped.value.lines
    assert first.startswith("moves: 2 of 13 training files can't be decoded, above data.max_bad_share=0.1")
    assert sorted(line.partition(": ")[0].strip() for line in files) == [str(damaged / "moves" / f"{i}.mp4") for i in (4, 5)]


def test_a_data_root_that_vanishes_stops_the_run(root, tmp_path, no_threads_left):
    shutil.copytree(root, tmp_path / "data")
    with pytest.raises(UserError) as stopped, closing(mixed(configure(tmp_path / "data", "moves")).iterate()) as tuples:
        for i, _ in enumerate(tuples):
            if i == 1:
                shutil.rmtree(tmp_path / "data")
            assert i < 20
    assert stopped.value.lines[-1] == "moves: none of these is there any more: is the disk still mounted?"
    assert "above data.max_bad_share=0.1: mend them" in stopped.value.lines[0] and "No such file or directory" in stopped.value.lines[1]


def test_a_row_without_a_substitute_stops_the_run(root, tmp_path, monkeypatch):
    """Before a batch with holes is trained on, however small a share of a large set they are."""
    monkeypatch.setattr(schedules, "MAX_SUBSTITUTES", 2)
    shutil.copytree(root, tmp_path / "data")
    for i in (4, 5, 6):
        (tmp_path / "data" / "moves" / f"{i}.mp4").write_bytes(b"no video")
    mix = mixed(configure(tmp_path / "data", "moves", batch_size=1, **{"data.max_bad_share": 0.9}))
    with pytest.raises(UserError, match="moves: 3 files one after another can't be decoded, so there is nothing to put in their place"):
        for step in range(13):
            mix.step(step)


def test_substitutes_have_an_end(root, monkeypatch):
    tried = []

    def clip(example, spec, rng):
        tried.append(example["name"])
        raise DecodeError("broken")

    monkeypatch.setattr(schedules, "training_clip", clip)
    monkeypatch.setattr(schedules, "MAX_SUBSTITUTES", 10)
    mix = mixed(configure(root, "moves", batch_size=1, **{"data.max_bad_share": 1.0}))
    (batch,) = mix.step(0)
    assert batch["mask"].tolist() == [False] and not batch["pixels"].any() and batch["pixels"].shape == (1, 3, 16, 16, 3)
    assert len(tried) == 11 == len(set(tried)) == len(mix.bad["moves"])
    monkeypatch.setattr(schedules, "MAX_SUBSTITUTES", 100)
    mix.step(1)
    assert len(tried) == 11 + 13  # a file is tried once


def test_damaged_members_of_a_zip(root, tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i in range(SIZES["stills"]):
            archive.write(root / "stills" / f"{i}.png", f"{i % 2}/{i:02}.png")
        offset = archive.getinfo("1/07.png").header_offset
    content = bytearray((tmp_path / "set.zip").read_bytes())
    content[offset + 100] ^= 0xFF
    (tmp_path / "set.zip").write_bytes(content)
    config = base_config()
    config.data_root, config.batch_size, config.model.image_size, config.data.threads = str(tmp_path), 20, 16, 2
    config.tasks.set = task_config(source="folder", media="image", train="set.zip", val="set.zip", short_side=(16, 16))
    tasks = open_tasks(config)
    mix = Mixture(config, tasks, 1)
    assert mix.step(0)[0]["mask"].all()
    (line,) = mix.bad["set"].values()
    assert line == f"{tmp_path}/set.zip/1/07.png: the zip is damaged here: wrong checksum"
    (batch,) = evaluation_batches(tasks["set"], config, 20, 1, 1)
    assert [tasks["set"].val.name(index) for _, index, _ in batch["bad"]] == [f"{tmp_path}/set.zip/1/07.png"] and (~batch["mask"]).sum() == 1


# Evaluation


@pytest.mark.parametrize("batch_size", [2, 4, 6, 14, 26])
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_shows_every_example_once(root, damaged, batch_size, processes, no_threads_left):
    config = configure(damaged, "moves", **{"tasks.moves.sampler": "segments"})
    task = open_tasks(config)["moves"]
    runs = [list(evaluation_batches(task, config, batch_size, 2, 3, tiny.share(p, processes))) for p in range(processes)]
    assert {len(run) for run in runs} == {math.ceil(13 / batch_size)}
    shown, bad = [], []
    for batches in zip(*runs, strict=True):
        for batch in batches:
            assert batch["pixels"].shape == (batch_size // processes, 6, 3, 16, 16, 3) and batch["pixels"].dtype == np.uint8
            assert not batch["pixels"][~batch["mask"]].any() and batch["pixels"][batch["mask"]].any(axis=(2, 3, 4, 5)).all()
            np.testing.assert_array_equal(batch["label"][batch["mask"]], batch["index"][batch["mask"]])
            assert batch["mask"].dtype == bool and batch["label"].dtype == np.int32
            shown += batch["index"][batch["mask"]].tolist()
            bad += batch["bad"]
    assert shown == [i for i in range(13) if i not in (4, 5)]  # in order, over processes too
    assert [(name, index) for name, index, _ in bad] == [("moves", 4), ("moves", 5)] and all(isinstance(reason, str) for *_, reason in bad)


def test_evaluation_is_the_same_for_any_batch_size_and_threads(root):
    config, kept = configure(root, "stills"), []
    for batch_size, threads, prefetch in ((20, 1, 1), (3, 8, 4)):
        config.data.threads, config.data.prefetch = threads, prefetch
        batches = list(evaluation_batches(open_tasks(config)["stills"], config, batch_size, 1, 3))
        kept.append(np.concatenate([batch["pixels"][batch["mask"]] for batch in batches]))
    assert kept[0].shape == (20, 3, 1, 16, 16, 3)
    np.testing.assert_array_equal(*kept)


# Threads, memory and interruptions


def settled(seen, least):
    """The number of calls, once there are `least` of them (on a busy machine threads may stand still for a while) and it has stopped rising."""
    deadline = time.monotonic() + 60
    while seen.calls < least and time.monotonic() < deadline:
        time.sleep(0.01)
    calls = -1
    while calls != seen.calls:
        calls = seen.calls
        time.sleep(0.15)
    return calls


@pytest.mark.parametrize("schedule", ["mixed", "round_robin"])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_prefetch_bounds_what_is_decoded_ahead(root, undecoded, schedule, prefetch, no_threads_left):
    config = configure(root, *SIZES, schedule=schedule, **{"data.prefetch": prefetch})
    with closing(mixed(config).iterate()) as tuples:
        for step in range(1, 4):
            next(tuples)
            wanted = 6 * (step + prefetch)
            assert settled(undecoded, wanted) == wanted


def test_evaluation_with_many_views_decodes_fewer_batches_ahead(root, monkeypatch):
    seen = SimpleNamespace(calls=0)

    def views(example, spec, temporal, spatial):
        seen.calls += 1
        return np.zeros((temporal * spatial, *spec.shape), np.uint8)

    monkeypatch.setattr(mixture, "views", views)
    config = configure(root, "moves", **{"data.threads": 1})
    task = open_tasks(config)["moves"]
    for spatial, ahead in ((1, 4), (2, 2), (3, 1)):
        seen.calls = 0
        with closing(evaluation_batches(task, config, 2, 1, spatial)) as batches:
            next(batches)
            assert settled(seen, 2 * (1 + ahead)) == 2 * (1 + ahead)


@pytest.mark.parametrize("schedule", ["mixed", "round_robin"])
def test_threads_are_those_of_the_process(root, monkeypatch, schedule):
    """data.threads threads decode at a time, all of them, however small batches are and however many streams there are."""
    now, most, lock, all_of_them = 0, 0, threading.Lock(), threading.Event()

    def clip(example, spec, rng):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        if now == 5:
            all_of_them.set()
        all_of_them.wait(10)
        time.sleep(0.01)
        with lock:
            now -= 1
        return np.zeros(spec.shape, np.uint8)

    monkeypatch.setattr(schedules, "training_clip", clip)
    take(mixed(configure(root, *SIZES, batch_size=3, schedule=schedule, **{"data.threads": 5, "data.prefetch": 1})), 8)
    assert most == 5


@pytest.mark.parametrize("error", [UserError("sampler is unknown"), ZeroDivisionError("a bug")])
def test_errors_while_decoding_reach_the_caller(root, monkeypatch, error, no_threads_left):
    def clip(example, spec, rng):
        if example["label"] == 3:
            raise error
        return np.zeros(spec.shape, np.uint8)

    monkeypatch.setattr(schedules, "training_clip", clip)
    with pytest.raises(type(error), match=str(error)):
        take(mixed(configure(root, "moves")), 4)


def test_user_errors_in_worker_processes_reach_the_caller(root, no_threads_left):
    config = configure(root, "moves", **{"data.workers": 1, "tasks.moves.sampler": "nonsense"})
    with pytest.raises(UserError) as error:
        take(mixed(config), 1)
    assert error.value.lines == ("sampler 'nonsense' is unknown; choose one of uniform, window, segments",)


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_errors_while_iterating_leave_nothing_behind(root, error, no_threads_left):
    with pytest.raises(error), closing(mixed(configure(root, *SIZES)).iterate()) as tuples:
        for i, _ in enumerate(tuples):
            if i == 2:
                raise error


def test_interruption_while_waiting_for_data(root, monkeypatch, no_threads_left):
    """Ctrl-C is not kept waiting by what is decoded ahead: here 30 rows of a second."""

    def clip(example, spec, rng):
        time.sleep(1)
        return np.zeros(spec.shape, np.uint8)

    monkeypatch.setattr(schedules, "training_clip", clip)
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            take(mixed(configure(root, "moves", **{"data.threads": 1})), 4)
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, old)
    assert time.monotonic() - began < 10
