"""Losses and gradients that are not finite: skipped, counted, and after too many in a row written out for `vidjoint.replay`; losses that jump."""

import contextlib
import json
import math
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import tiny
from tests.faults import runs
from vidjoint import replay
from vidjoint.checkpoints import load_params
from vidjoint.data.mixture import Mixture
from vidjoint.errors import UserError
from vidjoint.metrics import read_events
from vidjoint.running.anomalies import BadSteps, Spikes
from vidjoint.running.in_flight import MOST_ON_CPU, DeviceClock, InFlight, Step
from vidjoint.train import train


def test_spikes():
    rng = np.random.default_rng(0)
    spikes = Spikes()
    losses = 2 + 0.1 * rng.standard_normal(400)
    assert not any(spikes.is_one(("a",), loss) for loss in losses)
    assert not spikes.is_one(("a", "b"), 50.0)  # other tasks
    assert spikes.is_one(("a",), 3.5) and not spikes.is_one(("a",), 2.2)
    assert not [spikes.is_one(("a",), 5.0) for _ in range(100)][-1], "a loss that stays up is none any more"
    flat = Spikes()
    assert not any(flat.is_one((), 1.0) for _ in range(100))
    assert not flat.is_one((), 1.05) and flat.is_one((), 1.5)
    early = Spikes()
    assert not any(early.is_one((), loss) for loss in [1.0] * (Spikes.STEPS - 1) + [100.0])


def test_spikes_follow_their_definition():
    """Against a plain computation of the weighted mean and variance."""
    rng = np.random.default_rng(1)
    losses = list(rng.gamma(2.0, 1.0, 300))
    spikes, weights, found = Spikes(), np.zeros(0), []
    kept: list[float] = []
    for loss in losses:
        mean = (weights * kept).sum() if kept else 0.0
        deviation = np.sqrt((weights * (np.array(kept) - mean) ** 2).sum()) if kept else 0.0
        limit = mean + 6 * max(deviation, 0.01 * abs(mean))
        expected = len(kept) >= 50 and loss > limit
        found.append(expected)
        assert spikes.is_one((), loss) == expected
        kept.append(min(loss, limit) if expected else loss)
        new = 1 / min(len(kept), 50)
        weights = np.append(weights * (1 - new), new)


def steps(skipped: str) -> list[Step]:
    return [Step(i, {"skipped": jax.numpy.float32(mark == "x"), "loss": 0, "grad_norm": 0}, ()) for i, mark in enumerate(skipped, 1)]


@pytest.mark.parametrize(
    ("skipped", "most", "stops"),
    [("..xx.xx...", 3, None), ("..xxx.....", 3, 5), ("x.........", 1, 1), ("xxxxxxxxxx", 0, None), ("xx.xxx....", 3, 6)],
)
def test_only_so_many_in_a_row_are_too_many(skipped, most, stops):
    """Which is noticed before the next step starts, on CPUs, or when all are waited for."""
    bad = BadSteps(most)
    with contextlib.closing(InFlight()) as in_flight:
        for step in steps(skipped):
            if bad.are_too_many(in_flight.make_room()):
                break
            in_flight.add(step)
    assert (step.number if stops else None) == (stops and stops + MOST_ON_CPU)
    bad = BadSteps(most)
    with contextlib.closing(InFlight()) as in_flight:
        for step in steps(skipped[:stops]):
            in_flight.add(step)
        assert len(list(in_flight)) == len(skipped[:stops])
        assert bad.are_too_many(in_flight.wait()) == bool(stops) and not list(in_flight)


def test_the_device_is_idle_from_the_end_of_its_newest_step():
    class Answer:
        """The result of a step that ends when it is told to."""

        def __init__(self, error=None):
            self._event, self._error = threading.Event(), error

        def end(self) -> None:
            self._event.set()

        def block_until_ready(self) -> None:
            self._event.wait()
            if self._error:
                raise self._error

    with contextlib.closing(DeviceClock()) as clock:
        assert clock.idle_for() == math.inf
        answers = [Answer(), Answer(ValueError("the step failed"))]
        for answer in answers:
            clock.add(answer)
        time.sleep(0.02)
        assert clock.idle_for() == 0
        answers[0].end()
        time.sleep(0.02)
        assert clock.idle_for() == 0  # the second runs
        before = time.perf_counter()
        answers[1].end()
        while not clock.idle_for():
            time.sleep(0.001)
        assert clock.idle_for() <= time.perf_counter() - before
        time.sleep(0.03)
        assert 0.03 <= clock.idle_for() <= time.perf_counter() - before
        clock.add(Answer())
        assert clock.idle_for() == 0
        clock.PATIENCE = 0.05  # it hangs
    assert clock._thread.is_alive()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("numbers")
    tiny.write_data(folder)
    return folder


def config_of(data: Path, **changes):
    """Stills alone; a batch of 8 for the eight devices."""
    config = tiny.config_of(data)
    del config.tasks["clips"]
    config.update(task_order=(), schedule="mixed", total_steps=40, batch_size=8, checkpoint_every=4, log_every=2, **changes)
    config.model.mixer = "none"
    config.optim.lr = 1e-3
    config.data.isolate = "none"
    return config


def test_a_batch_that_is_not_finite_is_skipped_and_too_many_stop_the_run_for_replay(data, tmp_path, monkeypatch, capsys):
    """From step 9 on, the first example of each batch becomes a huge number on the device: its loss overflows."""
    poisoned = {6, *range(9, 40)}
    original = Mixture.iterate

    def iterate(self, start):
        for step, batches in enumerate(original(self, start), start + 1):
            for batch in batches:
                batch["pixels"] = batch["pixels"].astype(np.float32)
                if step in poisoned:
                    batch["pixels"][3] = np.inf
            yield batches

    monkeypatch.setattr(Mixture, "iterate", iterate)
    with pytest.raises(UserError) as caught:
        train(config_of(data, max_skipped=4), tmp_path)
    (line,) = caught.value.lines
    assert line.startswith("4 steps in a row, from step 9 on, had a loss or gradient that is not finite, and changed nothing (max_skipped): ")
    assert f"python -m vidjoint.replay --workdir={tmp_path} tells where it comes from, out of {tmp_path}/bad_step; " in line
    logged = read_events(tmp_path / "metrics.jsonl")
    assert [(event["step"], event["train/skipped"]) for event in logged] == [(2, 0), (4, 0), (6, 1), (8, 0), (10, 2), (12, 2)]
    assert load_params(tmp_path)[0] == 8
    for tree in (load_params(tmp_path, 8)[1], load_params(tmp_path / "bad_step")[1]):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree))
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "bad_step")[1]["params"], load_params(tmp_path, 8)[1]["params"])
    about = json.loads((tmp_path / "bad_step/batch.json").read_text())
    assert (about["step"], about["skipped"], about["seed"], about["newest_checkpoint"], about["updates_since"]) == (9, 4, 0, 8, 0)
    with np.load(tmp_path / "bad_step/batch.npz") as stored:
        assert stored["0/pixels"].shape == (8, 1, 16, 16, 3) and np.isinf(stored["0/pixels"][3]).all()
        labels = [list(stored["0/label"][i : i + 1]) for i in range(8)]
    names = tiny.STILLS
    for i, example in enumerate(about["batches"][0]):
        assert (example["row"], example["task"], example["label"]) == (i, "stills", [names[c] for c in labels[i]])
        assert Path(example["file"]).parent.name == example["label"][0] and Path(example["file"]).is_file()

    capsys.readouterr()
    assert replay.main([f"--workdir={tmp_path}", f"--json={tmp_path}/replay.json"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("step 9, seed 0: loss nan, gradient norm nan; 4 steps in a row were skipped")
    assert out[1] == "parameters: all are finite"
    bad = next(line for line in out if " nan " in line and "stills" in line)
    assert bad.split()[:2] == ["0", "3"] and about["batches"][0][3]["file"] in bad
    assert any(line.startswith("batch 0, row 3: not finite first in the forward pass, embed/proj (vidjoint/models/") for line in out)
    result = json.loads((tmp_path / "replay.json").read_text())
    assert [example["finite"] for example in result["examples"]].count(False) == 1 and not result["finite"]
    assert any("embed/proj/kernel" in name for name in result["gradients"])


def test_two_processes_write_a_bad_step_together(tmp_path, full, capsys):
    """Each its own rows; and one process repeats it."""
    if not full:
        pytest.skip("with --full: two processes")
    config = runs.write_experiment(tmp_path)
    text = config.read_text()
    config.write_text(
        text.replace(
            "    return config",
            """
    from vidjoint.data.mixture import Mixture
    original = Mixture.iterate

    def iterate(self, start):
        for step, batches in enumerate(original(self, start), start + 1):
            for batch in batches:
                batch["pixels"] = batch["pixels"].astype("float32")
                for k, row in enumerate(self.rows[1]) if step >= 9 and batch is batches[1] else ():
                    batch["pixels"][k] = float("inf") if row == 4 else batch["pixels"][k]
            yield batches

    Mixture.iterate = iterate
    config.loss.mixup = 0.0
    config.max_skipped = 3
    return config""",
        )
    )
    with runs.forking(tmp_path / "cache") as forking, forking.start(f"{config}:100", tmp_path / "run", processes=2) as run:
        assert run.wait() == [2, 2]
        (line,) = run.said(0)
        assert line.startswith("error: 3 steps in a row, from step 9 on, had a loss or gradient that is not finite") and run.said(1) == []
    assert {path.name for path in (tmp_path / "run/bad_step").iterdir()} == {"batch.npz", "batch.1.npz", "batch.json", "checkpoints"}
    assert replay.main([f"--workdir={tmp_path}/run", f"--json={tmp_path}/replay.json"]) == 1
    result = json.loads((tmp_path / "replay.json").read_text())
    assert [(example["batch"], example["row"]) for example in result["examples"] if not example["finite"]] == [(1, 4)]
