"""Saving and restoring runs with orbax: the newest checkpoints and the best one, in `workdir/checkpoints/STEP`.

A step's folder appears under its name only when it is whole, so a run that is killed while it saves goes on from the checkpoint before. Nothing else
in the project imports orbax.
"""

import contextlib
import logging
import math
import sys
from pathlib import Path
from typing import Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from vidjoint.errors import UserError

FOLDER = "checkpoints"
PARTS = ("params", "frozen", "ema")  # what `load_params` returns of a state
ITEM = "default"  # orbax's name for the only item of a step

# What orbax logs is for its own developers; all its errors reach the user as exceptions.
logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname.replace("\\", "/"))


class Checkpoints:
    """The checkpoints of one run: the newest `keep` of them, and besides them the best by metric (of equals the newest).

    Use it as a context manager, or call `close()`. In a run of several processes all of them make the same calls.
    """

    def __init__(self, workdir: str | Path, keep: int):
        """Opens (or starts) `workdir/checkpoints` and removes what an interrupted save left there.

        Raises:
          UserError: the folder cannot be used.
        """
        if keep < 1:
            raise UserError(f"keep_checkpoints is {keep}: at least 1 is needed to resume")
        self.folder = Path(workdir).absolute() / FOLDER
        best = BestN(get_metric_fn=_metric, n=1, keep_checkpoints_without_metrics=False)
        self._manager = _open(self.folder, preservation_policy=AnyPreservationPolicy([LatestN(keep), best]), cleanup_tmp_directories=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, *_):
        try:
            self.close()
        except UserError:
            if kind is None:  # otherwise the first error is the one to show
                raise

    def latest(self) -> int | None:
        """The newest step that is saved whole, None if there is none. Waits for a save that is under way."""
        self.wait()
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the highest metric, None if no checkpoint has one. Waits for a save that is under way."""
        self.wait()
        return self._manager.best_step()

    def save(self, step: int, state, metric: float | None = None) -> None:
        """Starts saving `state`, any pytree of jax arrays, and returns as soon as its arrays may be donated; an earlier save is waited for.

        Args:
          step: a step that is saved already is left as it is.
          metric: higher is better; a checkpoint with None (or NaN) is never the best one.

        Raises:
          UserError: this save could not be started, or the one before it not be finished (disk full).
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        metrics = None if metric is None or not math.isfinite(metric) else {"metric": float(metric)}
        try:
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics, force=True)
        except Exception as error:
            raise self._failed(error) from error

    def restore(self, abstract_state, step: int | None = None):
        """Returns the state saved at `step` (None: the newest), with the tree, the dtypes and the shardings of `abstract_state`.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings (or of arrays). They may be those of another mesh than the saved one.

        Raises:
          UserError: there is no such checkpoint, it is damaged, or it holds other parameters than `abstract_state`.
        """
        self.wait()
        return _read(self.folder, _choose(self.folder, self._manager.all_steps(), step, self._manager.latest_step()), abstract_state)

    def wait(self) -> None:
        """Returns when no save is under way. Raises UserError if the last one failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Waits for the save under way and frees orbax's threads. Raises UserError if that save failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _failed(self, error: Exception) -> UserError:
        return UserError(f"{self.folder}: a checkpoint could not be saved ({_reason(error)}); the earlier ones are whole")


def load_params(workdir: str | Path, step: int | str | None = None) -> tuple[int, dict[str, dict]]:
    """Reads the parameters of a run without knowing its optimiser, mesh or devices; nothing is written.

    Args:
      workdir: the run's folder.
      step: a number, "best" (by the metric that was saved with it) or None, the newest.

    Returns:
      The step, and {"params": ..., "frozen": ..., "ema": ...}: nested dicts of numpy arrays, {} for a part that the run did not have.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    folder = Path(workdir).absolute() / FOLDER
    if not folder.is_dir():
        raise UserError(f"{folder}: no checkpoints there; give the --workdir of a run that has saved one")
    with _open(folder, read_only=True, create=False) as manager:
        if step == "best" and manager.latest_step() is not None:
            step = manager.best_step()
            if step is None:
                raise UserError(f"{folder}: no best checkpoint, for the run has not evaluated any; take the newest, or set eval_every")
        step = _choose(folder, manager.all_steps(), step, manager.latest_step())
    saved = _metadata(folder, step)
    wanted = {part: saved[part] for part in PARTS if saved.get(part)}
    return step, {part: {} for part in PARTS} | _read(folder, step, jax.tree.map(lambda x: np.empty((), x.dtype), wanted), partial=True)


def _open(folder: Path, **options) -> ocp.CheckpointManager:
    try:
        return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(best_fn=_metric, **options))
    except Exception as error:  # not to be written to, or a damaged metrics file
        raise UserError(f"{folder}: cannot be used for checkpoints ({_reason(error)}); mend it or give another --workdir") from error


def _metric(metrics: dict[str, float]) -> float:
    return metrics["metric"]


def _choose(folder: Path, steps, step: int | str | None, default: int | None) -> int:
    """The step to read: `step` if given, else `default`. Raises UserError if it is not among the saved `steps`."""
    if not steps:
        raise UserError(f"{folder}: no checkpoints there; give the --workdir of a run that has saved one")
    if step is not None and step not in steps:
        raise UserError(f"{folder}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    return default if step is None else step


def _metadata(folder: Path, step: int) -> dict:
    """Tree of what is saved at `step`, with `.shape` and `.dtype` at its leaves. Raises UserError if it is damaged."""
    with _reader(folder, step) as reader:
        saved = reader.metadata(folder / str(step) / ITEM).item_metadata
    if saved is None:
        raise _damaged(folder, step, "its list of arrays is missing")
    return saved.tree


def _read(folder: Path, step: int, target, partial: bool = False):
    """Reads what `target` names at `step`: jax arrays for leaves that have a sharding, numpy arrays for the others.

    Unless `partial`, the checkpoint must hold exactly the arrays of `target`.
    """
    if not partial:
        problems = _differences(_metadata(folder, step), target)
        if problems:
            raise UserError(f"{folder / str(step)}: saved by another model or optimiser; give a new --workdir, or the old config", *problems)
    args = ocp.args.PyTreeRestore(item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=partial)
    with _reader(folder, step) as reader:
        return reader.restore(folder / str(step) / ITEM, args=args)


@contextlib.contextmanager
def _reader(folder: Path, step: int):
    """An orbax reader whose errors say that the checkpoint is damaged.

    When one array cannot be read, orbax abandons the reads of all others. Each of those would then print a traceback, from another thread and at any
    later time; so after an error (only) the reports that asyncio makes of abandoned work stay muted.
    """
    log, hook = logging.getLogger("asyncio"), sys.unraisablehook

    def report(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    def worth_logging(record: logging.LogRecord) -> bool:
        return "exception was never retrieved" not in record.getMessage()

    sys.unraisablehook = report
    log.addFilter(worth_logging)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            yield reader
    except Exception as error:
        raise _damaged(folder, step, _reason(error)) from error
    sys.unraisablehook = hook
    log.removeFilter(worth_logging)


def _differences(saved, wanted, most: int = 10) -> list[str]:
    """One line for each array that one tree has and the other lacks, or that differs in shape or dtype: parameters first, at most `most` of them."""
    saved, wanted = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(x.dtype).name}{list(x.shape)}"
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (saved, wanted)
    )
    lines = [
        f"  {name}: saved {saved.get(name, 'not at all')}, wanted {wanted.get(name, 'not at all')}"
        for name in sorted(saved.keys() | wanted.keys(), key=lambda name: (not name.startswith(("params/", "frozen/")), name))
        if saved.get(name) != wanted.get(name)
    ]
    return lines[:most] + [f"  and {len(lines) - most} more"] * (len(lines) > most)


def _damaged(folder: Path, step: int, reason: str) -> UserError:
    return UserError(f"{folder / str(step)}: this checkpoint is damaged ({reason}); delete the folder to use another step")


def _reason(error: Exception) -> str:
    """First line of an error, without what tensorstore appends for its developers."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].split(". See full")[0][:200]
