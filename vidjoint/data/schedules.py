"""Which examples each step takes: streams of batches of one clip shape, and the order in which steps read them.

`mixed` has one stream per clip shape, with the tasks of that shape drawn in proportion to their sizes, and reads all of them in every step (CoVeR
4.1). The others have one per task: `round_robin` reads them in turn (IV-ViT 5.3), the rest are PolyViT's (Likhosherstov et al. 2021, 3.3). Everything
is random-access: what step i takes is a function of (config, seed, i) alone.
"""

import math
import sys
import threading
import zlib
from dataclasses import dataclass
from fractions import Fraction

import grain
import numpy as np
from ml_collections import ConfigDict

from vidjoint.data.decode import DecodeError
from vidjoint.data.examples import training_clip
from vidjoint.data.tasks import Task, union_size
from vidjoint.errors import UserError

MAX_SUBSTITUTES = 100  # files that are tried in place of an undecodable one before its row is masked


def steps_per_epoch(config: ConfigDict, tasks: dict[str, Task]) -> float:
    """Steps that show as many examples as one epoch has (`union_size`), whichever they are: only `mixed` shows each set in proportion to its size.

    Where batches of tasks differ in size, a step counts as the mean over the schedule's steps (for `uniform`, over the tasks).
    """
    if config.schedule == "mixed":
        return union_size(config, tasks) / config.batch_size
    sizes = _batch_sizes(config, tasks)
    if config.schedule == "accumulated":
        return union_size(config, tasks) / sum(sizes)
    weights = _step_weights(config, tasks) if config.schedule in ("task_by_task", "weighted") else [1] * len(tasks)
    return union_size(config, tasks) * sum(weights) / sum(weight * size for weight, size in zip(weights, sizes, strict=True))


@dataclass(frozen=True)
class Stream:
    """Batches of one clip shape, cut from one endless sequence in which the tasks alternate."""

    tasks: tuple[Task, ...]
    batch_size: int  # examples per batch, over all processes
    weights: tuple[int, ...]  # of sum(weights) consecutive examples, so many are of each task
    examples: tuple[grain.MapDataset, ...]  # the endless sequence of each task, as rows of batches
    orders: tuple["_Passes", ...]  # the same, as numbers of examples

    @property
    def name(self) -> str:
        return "+".join(task.name for task in self.tasks)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.tasks[0].clip.shape

    @property
    def label_shape(self) -> tuple[int, ...]:
        """() or, where a task is multilabel, (K,) with room for the most labels of any example."""
        return max(task.train.label_shape for task in self.tasks)

    def __getitem__(self, i: int) -> dict:
        """Example i of the endless sequence, decoded."""
        task, position = self._place(i)
        row = self.examples[task][position]
        return row | {"label": _filled_up(row["label"], self.label_shape)}

    def drawn(self, i: int) -> tuple[Task, int]:
        """The task of example i, and its number in the task's training set; where that can't be decoded, another stands for it."""
        task, position = self._place(i)
        return self.tasks[task], self.orders[task][position]

    def _place(self, i: int) -> tuple[int, int]:
        before, after = _counts(i, self.weights), _counts(i + 1, self.weights)
        task = next(t for t in range(len(before)) if before[t] < after[t])
        return task, before[task]


# Schedules: (config, tasks, total_steps) -> streams, and which of them each step reads (int[n], then from the start again; None: all in every step)


def _mixed(config: ConfigDict, tasks: dict[str, Task], total_steps: int) -> tuple[list[Stream], None]:
    """One stream per clip shape, read side by side; batch_size is shared out in proportion to the examples behind each."""
    groups: dict[tuple, list[Task]] = {}
    for task in tasks.values():
        groups.setdefault(task.clip.shape, []).append(task)
    if config.batch_size < len(groups):
        raise UserError(f"batch_size={config.batch_size}, but the tasks have {len(groups)} clip shapes and each needs a row: enlarge it")
    sizes = _largest_remainder([union_size(config, {task.name: task for task in group}) for group in groups.values()], config.batch_size)
    return [_stream(config, group, size) for group, size in zip(groups.values(), sizes, strict=True)], None


def _round_robin(config: ConfigDict, tasks: dict[str, Task], total_steps: int) -> tuple[list[Stream], np.ndarray]:
    """One step of each task in `task_order`, again and again."""
    return _one_per_task(config, _ordered(config, tasks)), np.arange(len(tasks))


def _task_by_task(config: ConfigDict, tasks: dict[str, Task], total_steps: int) -> tuple[list[Stream], np.ndarray]:
    """All steps of the first task in `task_order`, then all of the next."""
    tasks = _ordered(config, tasks)
    return _one_per_task(config, tasks), np.repeat(np.arange(len(tasks)), _steps(config, tasks, total_steps))


def _uniform(config: ConfigDict, tasks: dict[str, Task], total_steps: int) -> tuple[list[Stream], np.ndarray]:
    """Each step's task is drawn with equal probabilities; a longer run begins like a shorter one."""
    return _one_per_task(config, tasks), _order_rng(config).integers(len(tasks), size=total_steps)


def _weighted(config: ConfigDict, tasks: dict[str, Task], total_steps: int) -> tuple[list[Stream], np.ndarray]:
    """The steps of `task_by_task`, shuffled: probabilities in proportion to the tasks' steps, and exact counts."""
    return _one_per_task(config, tasks), _order_rng(config).permutation(np.repeat(np.arange(len(tasks)), _steps(config, tasks, total_steps)))


def _accumulated(config: ConfigDict, tasks: dict[str, Task], total_steps: int) -> tuple[list[Stream], None]:
    """One batch of each task in every step; the loss `per_task` makes the sum of their gradients of it."""
    return _one_per_task(config, tasks), None


SCHEDULES = {
    "mixed": _mixed,
    "round_robin": _round_robin,
    "alternating": _round_robin,
    "task_by_task": _task_by_task,
    "uniform": _uniform,
    "weighted": _weighted,
    "accumulated": _accumulated,
}


def _ordered(config: ConfigDict, tasks: dict[str, Task]) -> dict[str, Task]:
    return {name: tasks[name] for name in config.task_order or tasks}


def _order_rng(config: ConfigDict) -> np.random.Generator:
    return np.random.default_rng([config.seed, zlib.crc32(b"order of tasks")])


def _one_per_task(config: ConfigDict, tasks: dict[str, Task]) -> list[Stream]:
    return [_stream(config, [task], size) for task, size in zip(tasks.values(), _batch_sizes(config, tasks), strict=True)]


def _batch_sizes(config: ConfigDict, tasks: dict[str, Task]) -> list[int]:
    """Examples per batch of each task, where batches are of one task."""
    share = [config.batch_size] * len(tasks)
    if config.schedule == "accumulated":  # evenly; the first ones have one more
        share = [(config.batch_size + len(tasks) - 1 - i) // len(tasks) for i in range(len(tasks))]
    sizes = [config.tasks[name].batch_size or size for name, size in zip(tasks, share, strict=True)]
    if 0 in sizes:
        raise UserError(f"batch_size={config.batch_size} is shared out over {len(tasks)} tasks, and each needs a row: enlarge it, or set their own")
    return sizes


def _step_weights(config: ConfigDict, tasks: dict[str, Task]) -> list[float]:
    """What the numbers of steps of the tasks are in proportion to."""
    return [config.tasks[name].steps or union_size(config, {name: task}) for name, task in tasks.items()]


def _steps(config: ConfigDict, tasks: dict[str, Task], total_steps: int) -> list[int]:
    """Each task's share of total_steps."""
    if total_steps < len(tasks):
        raise UserError(f"total_steps={total_steps}, but there are {len(tasks)} tasks and each needs a step: train longer")
    return _largest_remainder(_step_weights(config, tasks), total_steps)


def _largest_remainder(weights: list[float], total: int) -> list[int]:
    """Shares `total` out in proportion to `weights` by largest remainder; everyone gets 1 at least, at the expense of the largest."""
    exact = [weight / sum(weights) * total for weight in weights]
    shares = [math.floor(share) for share in exact]
    for i in sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])[: total - sum(shares)]:
        shares[i] += 1
    while 0 in shares:
        shares[shares.index(max(shares))] -= 1
        shares[shares.index(0)] += 1
    return shares


def _stream(config: ConfigDict, tasks: list[Task], batch_size: int) -> Stream:
    sizes = [len(task.train) * Fraction(str(config.tasks[task.name].sample_weight)) for task in tasks]
    unit = Fraction(math.gcd(*(size.numerator for size in sizes)), math.lcm(*(size.denominator for size in sizes)))
    seeds = [int(np.random.SeedSequence([config.seed, zlib.crc32(task.name.encode())]).generate_state(1)[0]) for task in tasks]
    orders = [_Passes(len(task.train), seed) for task, seed in zip(tasks, seeds, strict=True)]  # which know nothing of other tasks
    loads = zip(orders, seeds, tasks, strict=True)
    examples = [grain.MapDataset.source(order).seed(seed).random_map(_LoadClip(task)) for order, seed, task in loads]
    return Stream(tuple(tasks), batch_size, tuple(int(size / unit) for size in sizes), tuple(examples), tuple(orders))


class _Passes:
    """Position -> number of an example, without end: every pass over `size` examples is a new permutation.

    Holds two passes, 4 bytes an example. (grain's own shuffle holds nothing, but takes milliseconds per example of a set of a hundred: it walks a
    permutation of 2^16 numbers until one is in the set.)
    """

    def __init__(self, size: int, seed: int):
        self._size, self._seed = size, seed
        self._orders: dict[int, np.ndarray] = {}  # pass -> int32[size]
        self._lock = threading.Lock()

    def __reduce__(self):
        return _Passes, (self._size, self._seed)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, i: int) -> int:
        number, position = divmod(int(i), self._size)
        return int(self._order(number)[position])

    def _order(self, number: int) -> np.ndarray:
        with self._lock:
            if number not in self._orders:
                order = np.arange(self._size, dtype=np.int32)
                np.random.default_rng([self._seed, number]).shuffle(order)
                self._orders = {**dict(list(self._orders.items())[-1:]), number: order}
            return self._orders[number]


def _counts(n: int, weights: tuple[int, ...]) -> list[int]:
    """How many of the first n members of an endless sequence are of each kind.

    Kind 1 gets its share of n, rounded up, kind 2 its share of the others, and so on: exact after every sum(weights), evenly spread between.
    """
    counts, total = [], sum(weights)
    for weight in weights:
        others = n * (total - weight) // total
        counts.append(n - others)
        n, total = others, total - weight
    return counts


def _filled_up(label: int | np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A label, or several, as int32[shape]; what is left is -1."""
    result = np.full(shape, -1, np.int32)
    result.reshape(-1)[: np.size(label)] = label
    return result


class _LoadClip(grain.transforms.RandomMap):
    """Index of a training example -> row. A file that can't be decoded is replaced by the one after it, with the same draws.

    Where all that are tried fail, the row is masked, and its last failure has the number of no file, -1.
    """

    def __init__(self, task: Task):
        self.task = task

    def random_map(self, index: int, rng: np.random.Generator) -> dict:
        task, bad, draws = self.task, [], rng.bit_generator.state
        for substitute in range(min(MAX_SUBSTITUTES + 1, len(task.train))):
            source_index = (int(index) + substitute) % len(task.train)
            try:
                example = task.train[source_index]
                pixels = training_clip(example, task.clip, rng)
            except DecodeError as error:
                bad.append((task.name, source_index, str(error)))
                rng.bit_generator.state = draws  # however far it came
                continue
            return {"pixels": pixels, "label": example["label"], "task": task.index, "mask": True, "bad": bad}
        bad.append((task.name, -1, f"{len(bad)} files one after another"))
        return {"pixels": None, "label": 0, "task": task.index, "mask": False, "bad": bad}
