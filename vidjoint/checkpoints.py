"""Saving and restoring runs with orbax: the newest checkpoints and the best one, in `workdir/checkpoints/STEP`.

A step's folder appears under its name only when it is whole, with the checksums of its files in it: orbax and tensorstore have none for the arrays.
So a run that is killed while it saves goes on from the checkpoint before, and so does one whose newest checkpoint was damaged since; that one is set
aside as `STEP.damaged`. Nothing else in the project imports orbax.
"""

import contextlib
import json
import logging
import math
import re
import sys
from pathlib import Path
from typing import Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from vidjoint import checksums
from vidjoint.errors import UserError

FOLDER = "checkpoints"
PARTS = ("params", "frozen", "ema")  # what `load_params` returns of a state
ITEM = "default"  # orbax's name for the only item of a step

# What orbax logs is for its own developers; all its errors reach the user as exceptions.
logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname.replace("\\", "/"))

log = logging.getLogger(__name__)


def _mute_abandoned_work() -> None:
    """Mutes what asyncio reports of work that orbax abandons.

    When one array cannot be read or written, it abandons all others. Each of those would then print a traceback, from another thread and at any
    later time.
    """
    hook = sys.unraisablehook

    def report(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    def worth_logging(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not ("exception was never retrieved" in text and re.search("orbax|tensorstore|OCDBT|zarr", text))

    sys.unraisablehook = report
    logging.getLogger("asyncio").addFilter(worth_logging)


_mute_abandoned_work()


class Checkpoints:
    """The checkpoints of one run: the newest `keep` of them, and besides them the best by metric (of equals the newest).

    Use it as a context manager, or call `close()`. In a run of several processes all of them make the same calls.
    """

    def __init__(self, workdir: str | Path, keep: int):
        """Opens (or starts) `workdir/checkpoints` and removes what an interrupted save left there.

        Damaged checkpoints are named in a warning and set aside. The files of the newest one are looked at, of the one before if that is damaged, and
        so on.

        Raises:
          UserError: the folder cannot be used, or holds none but damaged checkpoints.
        """
        if keep < 1:
            raise UserError(f"keep_checkpoints is {keep}: at least 1 is needed to resume")
        self.folder, self._saving = Path(workdir).absolute() / FOLDER, None
        if jax.process_index() == 0:
            _set_aside_damaged(self.folder)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("vidjoint: checkpoints are looked at")
        best = BestN(get_metric_fn=_metric, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=_metric,
            preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_sums),
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except Exception as error:
            raise _unusable(self.folder, error) from error

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

    def has_metric(self, step: int) -> bool:
        """Whether the checkpoint of `step` was saved with a metric."""
        return bool(_metrics(self.folder, step))

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
            self._saving = step
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics, force=True)
        except Exception as error:
            raise self._failed(error) from error

    def restore(self, abstract_state, step: int | None = None):
        """Returns the state saved at `step` (None: the newest), with the tree, the dtypes and the shardings of `abstract_state`.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings (or of arrays). They may be those of another mesh than the saved one.

        Raises:
          UserError: there is no such checkpoint, it can't be read, or it holds other parameters than `abstract_state`.
        """
        self.wait()
        return _read(self.folder, _choose(self.folder, step), abstract_state)

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

    def _write_sums(self) -> None:
        """orbax calls it in process 0, in the thread that saves, when all files of the step are whole and its folder has yet to get its name."""
        (folder,) = self.folder.glob(f"{self._saving}.*tmp*")
        checksums.write(folder)

    def _failed(self, error: Exception) -> UserError:
        reason, advice = _reason(error), "mend that, and the same command goes on from there"
        return UserError(f"{self.folder}: a checkpoint could not be saved ({reason}); the earlier ones are whole: {advice}")


def load_params(workdir: str | Path, step: int | str | None = None) -> tuple[int, dict[str, dict]]:
    """Reads the parameters of a run without knowing its optimiser, mesh or devices; nothing is written.

    Args:
      workdir: the run's folder.
      step: a number, "best" (by the metric that was saved with it) or None, the newest that is whole.

    Returns:
      The step, and {"params": ..., "frozen": ..., "ema": ...}: nested dicts of numpy arrays, {} for a part that the run did not have.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    folder = Path(workdir).absolute() / FOLDER
    if step is None and _steps(folder):
        step, damaged = _newest_whole(folder)
        for bad, reason in damaged.items():
            log.warning("%s: this checkpoint is damaged (%s): step %d is used in its place", folder / str(bad), reason, step)
    else:
        step = _best(folder) if step == "best" else _choose(folder, step)
        if reason := _damage(folder, step):
            raise _damaged(folder, step, reason)
    saved = _metadata(folder, step)
    wanted = {part: saved[part] for part in PARTS if saved.get(part)}
    return step, {part: {} for part in PARTS} | _read(folder, step, jax.tree.map(lambda x: np.empty((), x.dtype), wanted), partial=True)


# Which steps there are, and whether they are whole


def _steps(folder: Path) -> list[int]:
    """The saved steps, ascending."""
    return sorted(int(child.name) for child in folder.glob("*") if child.name.isdecimal())


def _choose(folder: Path, step: int | None) -> int:
    """`step`, or the newest if it is None. Raises UserError if it is not among those saved."""
    steps = _steps(folder)
    if not steps:
        raise UserError(f"{folder}: no checkpoints there; give the --workdir of a run that has saved one")
    if step is not None and step not in steps:
        raise UserError(f"{folder}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def _best(folder: Path) -> int:
    """The step with the highest metric, of equals the newest. Raises UserError if none has one."""
    scores = [(_metric(metrics), step) for step in _steps(folder) if (metrics := _metrics(folder, step))]
    if not scores:
        _choose(folder, None)
        raise UserError(f"{folder}: no best checkpoint, for the run has not evaluated any; take the newest, or set eval_every")
    return max(scores)[1]


def _metric(metrics: dict[str, float]) -> float:
    return metrics["metric"]


def _metrics(folder: Path, step: int) -> dict[str, float] | None:
    """What was saved as the metric of a step; {} if nothing was, None if that can't be read."""
    file = folder / str(step) / "metrics" / "metrics"
    try:
        return {"metric": float(json.loads(file.read_bytes())["metric"])} if file.exists() else {}
    except (ValueError, KeyError, TypeError, OSError):
        return None


def _set_aside_damaged(folder: Path) -> None:
    """Renames damaged checkpoints, if they are newer than the newest whole one or could not even be listed. Raises UserError if none is whole."""
    steps = _steps(folder)
    if not steps:
        return
    newest, damaged = _newest_whole(folder)
    damaged |= {step: "its metric can't be read" for step in steps if step < newest and _metrics(folder, step) is None}
    for step, reason in damaged.items():
        aside = folder / f"{step}.damaged"
        while aside.exists():
            aside = aside.with_name(f"{aside.name}.again")
        log.warning("%s: this checkpoint is damaged (%s): set aside as %s, and step %d is used", folder / str(step), reason, aside.name, newest)
        try:
            (folder / str(step)).rename(aside)
        except OSError as error:
            raise _unusable(folder, error) from error


def _newest_whole(folder: Path) -> tuple[int, dict[int, str]]:
    """Returns the newest step that is whole, and what is wrong with each one after it. Raises UserError if there is none."""
    damaged = {}
    for step in reversed(_steps(folder)):
        reason = _damage(folder, step)
        if reason is None:
            return step, damaged
        damaged[step] = reason
    raise UserError(
        f"{folder}: none of the checkpoints is whole: put back a copy of one, or start anew in another folder:",
        *(f"  {step}: {reason}" for step, reason in damaged.items()),
    )


def _damage(folder: Path, step: int) -> str | None:
    """What is wrong with the files of a checkpoint; None if they are those that were written. Reads all of them."""
    if _metrics(folder, step) is None:
        return "its metric can't be read"
    try:
        return checksums.damage(folder / str(step))
    except FileNotFoundError:  # saved by a version without checksums
        try:
            return _metadata(folder, step) and None
        except UserError as error:
            return f"{ITEM}: {_reason(error.__cause__ or error)}"


# Reading


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
    """An orbax reader whose errors say that the checkpoint is damaged."""
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            yield reader
    except Exception as error:
        raise _damaged(folder, step, _reason(error)) from error


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


def _unusable(folder: Path, error: Exception) -> UserError:
    return UserError(f"{folder}: cannot be used for checkpoints ({_reason(error)}); mend it or give another --workdir")


def _reason(error: Exception) -> str:
    """First line of an error, without what tensorstore appends for its developers; of an error of the system, what it says."""
    text = str(error).strip() or type(error).__name__
    if system := re.search(r": ([^:]+) \[os_error_code=", text):
        return system[1]
    return text.splitlines()[0].split(". See full")[0][:200]
