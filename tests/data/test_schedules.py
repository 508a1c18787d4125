"""PolyViT's schedules: which task each step reads, in what numbers, and that it hangs on the config, the seed and the step alone."""

from collections import Counter
from contextlib import closing
from itertools import islice, pairwise

import numpy as np
import pytest

from tests import tiny
from tests.data.sets import NUMBER, SIZES, configure, mixed, same
from vidjoint.data.mixture import Mixture
from vidjoint.data.schedules import SCHEDULES, steps_per_epoch
from vidjoint.data.tasks import open_tasks
from vidjoint.errors import UserError
from vidjoint.running.summary import batches

NAMES = sorted(SIZES)  # moves 13, stills 20, turns 8


def configured(root, schedule, total_steps=30, **changes):
    return configure(root, *SIZES, schedule=schedule, total_steps=total_steps, **changes)


def order(mix, steps):
    """The name of each step's only task."""
    plans = [mix.plan(step) for step in range(steps)]
    assert all(len(plan) == 1 for plan in plans)
    return [mix.streams[plan[0][0]].name for plan in plans]


# Which task, how often


def test_the_plan_is_what_the_batches_hold(root, undecoded):
    mix = mixed(configured(root, "weighted"))
    assert [{int(task) for task in mix.step(step)[0]["task"]} for step in range(30)] == [{NUMBER[name]} for name in order(mix, 30)]


def test_alternating_is_round_robin(root):
    first, second = (mixed(configured(root, schedule, task_order=("turns", "moves", "stills"))) for schedule in ("alternating", "round_robin"))
    assert order(first, 7) == order(second, 7) == ["turns", "moves", "stills"] * 2 + ["turns"]


def test_task_by_task_is_all_steps_of_one_and_then_of_the_next(root):
    own = {"tasks.moves.steps": 10, "tasks.stills.steps": 50, "tasks.turns.steps": 40}
    mix = mixed(configured(root, "task_by_task", total_steps=10, task_order=("turns", "moves", "stills"), **own))
    assert order(mix, 10) == ["turns"] * 4 + ["moves"] + ["stills"] * 5
    mix = mixed(configured(root, "task_by_task", total_steps=41))  # without: 13, 20 and 8 examples
    assert order(mix, 41) == ["moves"] * 13 + ["stills"] * 20 + ["turns"] * 8


def test_weighted_has_exact_counts_in_a_drawn_order(root):
    own = {"tasks.moves.steps": 1, "tasks.stills.steps": 600, "tasks.turns.steps": 300}
    drawn = order(mixed(configured(root, "weighted", total_steps=901, **own)), 901)
    assert Counter(drawn) == {"moves": 1, "stills": 600, "turns": 300}
    assert drawn != sorted(drawn) and 150 < drawn[:450].count("stills") < 450  # no long stretch of one task
    assert drawn != order(mixed(configured(root, "weighted", total_steps=901, seed=1, **own)), 901)
    drawn = order(mixed(configured(root, "weighted", total_steps=61, **{"tasks.moves.sample_weight": 1.0, "tasks.turns.sample_weight": 3.5})), 61)
    assert Counter(drawn) == {"moves": 13, "stills": 20, "turns": 28}
    assert Counter(order(mixed(configured(root, "weighted", total_steps=7)), 7)) == {"moves": 2, "stills": 4, "turns": 1}  # 2.2, 3.4, 1.4


def test_uniform_draws_evenly_and_a_longer_run_begins_alike(root):
    drawn = order(mixed(configured(root, "uniform", total_steps=3000)), 3000)
    counts = Counter(drawn)
    assert all(abs(counts[name] - 1000) < 4 * (3000 * 1 / 3 * 2 / 3) ** 0.5 for name in NAMES)
    pairs = Counter(pairwise(drawn))  # independent of the step before
    assert len(pairs) == 9 and all(abs(count - 2999 / 9) < 4 * (2999 / 9) ** 0.5 for count in pairs.values())
    assert order(mixed(configured(root, "uniform", total_steps=500)), 500) == drawn[:500]
    assert order(mixed(configured(root, "uniform", total_steps=500, seed=3)), 500) != drawn[:500]


def test_accumulated_takes_a_batch_of_each_task(root, undecoded):
    mix = mixed(configured(root, "accumulated", batch_size=8, **{"tasks.turns.batch_size": 5}))
    for step in range(3):
        batches = mix.step(step)
        assert [set(batch["task"]) for batch in batches] == [{0}, {1}, {2}]
        assert [len(batch["task"]) for batch in batches] == [3, 3, 5]  # 8 are 3, 3 and 2
        assert mix.examples(step) == 11


def test_a_task_may_have_a_batch_size_of_its_own(root, undecoded):
    mix = mixed(configured(root, "weighted", **{"tasks.stills.batch_size": 9, "tasks.turns.batch_size": 2}))
    sizes = {"moves": 6, "stills": 9, "turns": 2}
    for step, name in enumerate(order(mix, 30)):
        assert len(mix.step(step)[0]["label"]) == mix.examples(step) == sizes[name]


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "mixed"])
def test_a_stream_goes_on_where_its_last_step_left_it(root, undecoded, schedule):
    """Positions of each stream are 0, 1, 2, ... over the whole run and beyond its end, so that no example is skipped or repeated in a pass."""
    mix = mixed(configured(root, schedule, total_steps=20))
    seen = {s: [] for s in range(3)}
    for step in range(70):
        for s, position in mix.plan(step):
            seen[s].append(position)
    assert all(positions == list(range(len(positions))) for positions in seen.values()) and all(seen.values())
    labels = [int(label) for step in range(20) for batch in mix.step(step) if batch["task"][0] == 1 for label in batch["label"]]
    assert sorted(labels[:20]) == list(range(20))  # stills


# From (config, seed, step) alone


@pytest.mark.parametrize("schedule", ["task_by_task", "uniform", "weighted", "accumulated"])
def test_any_start_and_any_processes_give_the_same(root, undecoded, schedule):
    config = configured(root, schedule, total_steps=12, **{"tasks.moves.batch_size": 3})
    direct = [mixed(config).step(i) for i in range(15)]  # decoding runs ahead of the last step
    for start in (0, 5, 11):
        with closing(mixed(config).iterate(start)) as tuples:
            for i, batches in enumerate(islice(tuples, 15 - start), start):
                same(batches, direct[i])
    halves = [mixed(config, rows_of=tiny.share(process, 2), row_multiple=2) for process in range(2)]
    for i in (14, 3, 0):  # any order
        for whole, *parts in zip(direct[i], *(half.step(i) for half in halves), strict=True):
            joined = {key: np.concatenate([part[key] for part in parts])[: len(whole["label"])] for key in whole}
            same((joined,), (whole,))


def test_worker_processes_give_the_same(root):
    config = configured(root, "weighted", total_steps=12, **{"tasks.moves.batch_size": 3})
    direct = [mixed(config).step(i) for i in range(4, 9)]
    config.data.workers = 1
    with closing(mixed(config).iterate(4)) as tuples:
        for batches, expected in zip(islice(tuples, 5), direct, strict=True):
            same(batches, expected)


# Epochs, kinds of steps, words, errors


def test_an_epoch_is_as_many_examples_as_the_union_has(root):
    own = {"tasks.moves.batch_size": 2, "tasks.stills.batch_size": 10, "tasks.turns.batch_size": 4}
    steps = {"tasks.moves.steps": 1, "tasks.stills.steps": 2, "tasks.turns.steps": 5}
    for schedule, changes, examples in (
        ("mixed", {}, 6),
        ("round_robin", {}, 6),
        ("weighted", {}, 6),
        ("accumulated", {}, 6),
        ("round_robin", own, 16 / 3),
        ("uniform", own, 16 / 3),
        ("accumulated", own, 16),
        ("task_by_task", own | steps, (2 + 20 + 20) / 8),
        ("weighted", own, (13 * 2 + 20 * 10 + 8 * 4) / 41),
    ):
        config = configured(root, schedule, **changes)
        mix = mixed(config)
        assert mix.steps_per_epoch == steps_per_epoch(config, mix.tasks) == pytest.approx(41 / examples), schedule
    config.total_steps = 41
    assert sum(mixed(config).examples(step) for step in range(41)) == 13 * 2 + 20 * 10 + 8 * 4


def test_kinds_of_steps(root):
    assert mixed(configured(root, "mixed")).kinds() == mixed(configured(root, "accumulated")).kinds() == {0: 1.0}
    assert mixed(configured(root, "round_robin")).kinds() == {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}
    assert mixed(configured(root, "task_by_task", total_steps=41)).kinds() == {0: 13 / 41, 13: 20 / 41, 33: 8 / 41}


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("mixed", "mixed, in every step: 3 of moves+turns, 3 of stills"),
        ("round_robin", "round_robin, in turn: 6 of turns, 6 of moves, 2 of stills"),
        ("alternating", "alternating, in turn: 6 of turns, 6 of moves, 2 of stills"),
        ("task_by_task", "task_by_task, one after the other: 8 steps with 6 of turns, 13 steps with 6 of moves, 20 steps with 2 of stills"),
        ("uniform", "uniform, one of these per step, drawn evenly: 6 of moves, 2 of stills, 6 of turns"),
        ("weighted", "weighted, in a drawn order: 13 steps with 6 of moves, 20 steps with 2 of stills, 8 steps with 6 of turns"),
        ("accumulated", "accumulated, in every step, gradients summed: 2 of moves, 2 of stills, 2 of turns"),
    ],
)
def test_the_summary_says_what_steps_read(root, schedule, words):
    own = {} if schedule == "mixed" else {"tasks.stills.batch_size": 2}
    config = configured(root, schedule, total_steps=41, task_order=("turns", "moves", "stills"), **own)
    assert batches(schedule, Mixture(config, open_tasks(config), 41)) == words


def test_too_little_for_all_tasks(root):
    for schedule in ("task_by_task", "weighted"):
        with pytest.raises(UserError, match="total_steps=2, but there are 3 tasks"):
            mixed(configured(root, schedule, total_steps=2))
    with pytest.raises(UserError, match="batch_size=2 is shared out over 3 tasks"):
        mixed(configured(root, "accumulated", batch_size=2))
    own = {f"tasks.{name}.batch_size": 2 for name in NAMES}
    assert mixed(configured(root, "accumulated", batch_size=2, **own)).examples(0) == 6
