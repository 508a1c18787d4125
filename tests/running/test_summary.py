"""What a run says before its first step: counts, shares and sizes are those of what it will do."""

import json

import jax
import numpy as np
import optax
import pytest

from tests import tiny
from vidjoint import optim, sharding, step
from vidjoint.data.mixture import Mixture
from vidjoint.data.tasks import open_tasks
from vidjoint.models.build import build
from vidjoint.running import summary


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("summary")
    tiny.write_data(folder)
    return folder


def drawn(mixture, steps):
    """Share of each task in the rows of the first steps, counted."""
    names = [stream.drawn(i)[0].name for k in range(steps) for s, at in mixture.plan(k) for stream in [mixture.streams[s]]
             for i in range(at * stream.batch_size, (at + 1) * stream.batch_size)]  # fmt: skip
    return {name: names.count(name) / len(names) for name in mixture.tasks}


@pytest.mark.parametrize("schedule", ["mixed", "round_robin", "task_by_task", "weighted", "accumulated"])
@pytest.mark.parametrize("same_shape", [True, False])
def test_shares_are_those_of_the_examples_drawn(data, schedule, same_shape):
    config = tiny.config_of(data)
    config.update(schedule=schedule, total_steps=40)
    config.tasks.clips.sample_weight = 3.0
    if same_shape:
        config.tasks.clips.update(frames=1, image_size=(16, 16))
    mixture = Mixture(config, open_tasks(config), 40)
    told, counted = summary.task_shares(mixture), drawn(mixture, 40)
    assert told == pytest.approx(counted, abs=0.01) and sum(told.values()) == pytest.approx(1)


def test_the_summary(data):
    config = tiny.config_of(data)
    config.optim.update(freeze=("embed/.*",), ema=0.9)
    tasks = open_tasks(config)
    model = build(config.model, {name: len(task.labels) for name, task in tasks.items()})
    optimizer = optim.make_optimizer(config.optim, optax.constant_schedule(1e-3), len(tasks))
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 1}, jax.devices()[:2])
    init = lambda key: step.init_state(config, model.init(key), optimizer)  # noqa: E731
    shardings = sharding.tree_sharding(jax.eval_shape(init, jax.random.key(0)), mesh)
    state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    about = summary.describe(config, tasks, Mixture(config, tasks, 20), model, state, mesh)
    json.dumps(about)

    trained, frozen = (sum(x.size for x in jax.tree.leaves(part)) for part in (state.params, state.frozen))
    assert (about["model"]["trained"], about["model"]["frozen"]) == (trained, frozen) and frozen
    assert about["model"]["view"] == [4, 16, 24] and about["model"]["macs_per_view"] > 10_000
    assert {name: (task["train"], task["val"], task["classes"]) for name, task in about["data"].items()} == {
        "clips": (11, 11, 8),
        "stills": (13, 13, 10),
    }
    sizes = about["memory_per_device"]
    for name, part in (("parameters", (state.params, state.frozen)), ("optimiser", state.opt_state), ("moving average", state.ema)):
        whole = sum(x.nbytes for x in jax.tree.leaves(part))
        assert whole / 2 <= sizes[name] < 0.75 * whole  # what fsdp does not divide is on both
    assert sizes["parameters"] == sum(x.addressable_data(0).nbytes for x in jax.tree.leaves((state.params, state.frozen)))

    text = summary.text(about, 5, 20, data, ("tensorboard", "wandb"))
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in text.splitlines() if not line.startswith(" ")}
    assert lines["stills"].split() == ["13", "13", "10", "1x16x16", "50.0", "%", "1"] and lines["steps"].startswith("5 -> 20 (1.0 per epoch")
    assert f"{trained:,} parameters trained, {frozen:,} frozen" in lines["model"] and lines["devices"].startswith(f"{jax.device_count()} cpu")
    assert "time" not in lines  # a short run
    assert lines["results"] == f"{data}; events also to tensorboard, wandb" and "batches" in lines and "per device" in lines["memory"]


def test_a_long_run_on_cpus_is_announced(monkeypatch):
    """8 of 16 clips cost 1 TMAC each and 8 pictures an eighth: 9 x 6 TFLOP a step."""
    monkeypatch.setattr(summary, "cores", lambda: 10)
    tasks = {"clips": {"share": 0.5, "clip": [8, 32, 32]}, "stills": {"share": 0.5, "clip": [1, 32, 32]}}
    about = {"data": tasks, "model": {"view": [8, 32, 32], "macs_per_view": 1e12}, "epoch": {"steps": 4.0, "examples": 64}}
    seconds = summary.cpu_seconds(about, 100)
    assert seconds == pytest.approx(100 * 9 * 6e12 / (10 * summary.CORE))
    assert [summary.in_time(s) for s in (seconds, 7300, 500_000)] == ["5 hours", "2 hours", "6 days"]
    assert summary.in_time(6000) == "100 minutes"


def test_units():
    texts = [summary.in_units(number) for number in (0, 999, 1000, 12_345_678, 5.87e12, np.int64(2_000_000_000))]
    assert texts == ["0 ", "999 ", "1.0 k", "12.3 M", "5.9 T", "2.0 G"]


def test_one_step_is_no_steps(data):
    config = tiny.config_of(data)
    config.update(schedule="task_by_task", total_steps=3)
    config.tasks.clips.steps, config.tasks.stills.steps = 1, 2
    assert summary.batches("task_by_task", Mixture(config, open_tasks(config), 3)) == (
        "task_by_task, one after the other: 2 steps with 24 of stills, 1 step with 24 of clips"
    )
