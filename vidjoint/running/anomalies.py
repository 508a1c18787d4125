"""Steps that go wrong: losses that jump, and losses or gradients that are not finite. These are skipped (`step.py`), counted, at last written out."""

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from vidjoint.checkpoints import Checkpoints
from vidjoint.data.mixture import Mixture
from vidjoint.errors import UserError
from vidjoint.output_files import write_whole
from vidjoint.running.in_flight import Step

FOLDER = "bad_step"  # in the run's folder; `vidjoint.replay` reads it


class Spikes:
    """Finds losses that jump up: by more than DEVIATIONS running standard deviations above the running mean of the steps of the same tasks.

    Both run over the last STEPS steps or so, with weights that fall off exponentially; before so many are seen nothing counts. A deviation is taken
    to be at least FLOOR of the mean. A spike enters them as no more than the threshold. They start anew when a run goes on.
    """

    DEVIATIONS, STEPS, FLOOR = 6.0, 50, 0.01

    def __init__(self):
        self._seen: dict[tuple, tuple[int, float, float]] = {}  # tasks -> steps, mean, variance

    def is_one(self, tasks: tuple[str, ...], loss: float) -> bool:
        """Takes the loss of the next step with these tasks."""
        count, mean, variance = self._seen.get(tasks, (0, 0.0, 0.0))
        limit = mean + self.DEVIATIONS * max(math.sqrt(variance), self.FLOOR * abs(mean))
        spike = count >= self.STEPS and loss > limit
        count += 1
        weight, off = 1 / min(count, self.STEPS), min(loss, limit if spike else loss) - mean
        self._seen[tasks] = count, mean + weight * off, (1 - weight) * (variance + weight * off * off)
        return spike


class BadSteps:
    """Counts skipped steps in a row."""

    def __init__(self, most: int):
        """`most` is `config.max_skipped`: so many in a row are too many; 0: any number may be."""
        self._most, self._row, self._first = most, 0, None

    def are_too_many(self, ended: Iterable[Step]) -> bool:
        """Takes the next steps that have ended. Returns whether too many in a row, up to the last of them, were skipped."""
        for step in ended:
            if not step.values["skipped"]:
                self._row, self._first = 0, None
            else:
                self._row += 1
                self._first = self._first or step
        return 0 < self._most <= self._row

    def write(self, workdir: Path, state, since: Iterable[Step], mixture: Mixture, seed: int, newest: int | None) -> UserError:
        """Writes `workdir/bad_step` for `vidjoint.replay`, and returns the error to stop with. All processes call it.

        It gets `batch.npz` (of process i > 0: `batch.I.npz`), `checkpoints/` with the present state, whose parameters are those that the row's first
        step had, and last `batch.json`.

        Args:
          state: after the newest step.
          since: steps that were started after those that were counted.
          newest: the newest checkpoint of the run.
        """
        first, row = self._first, self._row
        updates = sum(not step.values["skipped"] for step in since)  # that were made since the row was seen
        folder = workdir / FOLDER
        message = f"{row} steps in a row, from step {first.number} on, had a loss or gradient that is not finite, and changed nothing (max_skipped)"
        advice = "to go on, lower optim.lr, lengthen its warm-up or set optim.clip_norm, with --force_config"
        try:
            if jax.process_index() == 0:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("vidjoint: bad_step is there")
            with Checkpoints(folder, keep=1) as checkpoints:
                checkpoints.save(first.number - 1, state)
            _write_batches(folder, first.batches, [mixture.rows[s] for s, _ in mixture.plan(first.number - 1)])
            if jax.process_index() == 0:
                content = {
                    "step": first.number,
                    "skipped": row,
                    "updates_since": updates,
                    "loss": str(float(first.values["loss"])),
                    "grad_norm": str(float(first.values["grad_norm"])),
                    "seed": seed,
                    "newest_checkpoint": newest,
                    "processes": jax.process_count(),
                    "batches": mixture.files(first.number - 1),
                }
                write_whole(folder / "batch.json", (json.dumps(content, indent=1) + "\n").encode())
        except (OSError, UserError) as error:
            return UserError(f"{message}; {folder} could not be written ({str(error).splitlines()[0]}); {advice}")
        return UserError(f"{message}: python -m vidjoint.replay --workdir={workdir} tells where it comes from, out of {folder}; {advice}")


def _write_batches(folder: Path, batches: tuple[dict, ...], rows: list) -> None:
    arrays = {f"{i}/{name}": column for i, batch in enumerate(batches) for name, column in batch.items()}
    arrays |= {f"{i}/row": np.asarray(numbers) for i, numbers in enumerate(rows)}
    np.savez(folder / (f"batch.{jax.process_index()}.npz" if jax.process_index() else "batch.npz"), **arrays)


def read_batches(folder: Path, processes: int) -> tuple[dict[str, np.ndarray], ...]:
    """What `BadSteps.write` has written: the whole batches, of all processes.

    Raises:
      OSError, ValueError, KeyError: a file is missing or damaged.
    """
    parts = []
    for process in range(processes):
        with np.load(folder / (f"batch.{process}.npz" if process else "batch.npz"), allow_pickle=False) as file:
            parts.append(dict(file))
    batches = []
    for i in range(len({name.partition("/")[0] for name in parts[0]})):
        numbers = np.concatenate([part[f"{i}/row"] for part in parts])
        columns = {name.partition("/")[2] for name in parts[0] if name.startswith(f"{i}/")} - {"row"}
        _, order = np.unique(numbers, return_index=True)  # processes that share a tensor axis have the same rows
        batches.append({name: np.concatenate([part[f"{i}/{name}"] for part in parts])[order] for name in sorted(columns)})
    return tuple(batches)
