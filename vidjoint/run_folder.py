"""The folder of a run: `config.json`, `labels/TASK.txt`, `init_from.txt`, `about.json`, `checkpoints/`, `metrics.jsonl`, `results.json`, `eval/`,
`predictions_TASK.csv`, `report.html` and pictures.

A folder of imported or exported weights is the same with one file, `weights.safetensors`, in place of the checkpoints. This module knows names, not
arrays.
"""

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from vidjoint import config as config_module
from vidjoint.errors import UserError
from vidjoint.output_files import write_whole

# Keys that may change between the start of a run and its continuation: they don't say what is computed, only where, how fast and what is looked at
HARMLESS = re.compile(
    r"eval\..*|eval_every|log_every|log_to|checkpoint_every|keep_checkpoints|data\.(threads|workers|prefetch|max_bad_share|isolate|decode_.*)"
    r"|mesh\..*|data_root|init_(from|heads|parts|allow)|model\.(remat|attention)|max_skipped|tasks\.\w+\.allow_outside"
)


LOCK = "lock"  # file of a run's folder

log = logging.getLogger(__name__)


class RunFolder:
    """What a run keeps on disk besides its checkpoints."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @functools.cached_property
    def config(self) -> ConfigDict:
        """The run's config. Raises UserError if this is no folder of a run."""
        file = self.path / "config.json"
        if not file.is_file():
            raise UserError(f"{self.path} is no folder of a run, for it has no config.json: give the --workdir of a training run")
        return config_module.load(file)

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """Class names of each task, in alphabetical order of the tasks. Raises UserError if they can't be read."""
        try:
            return {task: tuple(self.label_file(task).read_text(encoding="utf-8").split("\n")[:-1]) for task in sorted(self.config.tasks)}
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: its class names can't be read ({error}): copy the folder again, with labels/") from error

    @property
    def results(self) -> Path:
        """Results of the last evaluation; written when a run is done."""
        return self.path / "results.json"

    @property
    def about(self) -> Path:
        """What was said before the first step: data, model, memory, devices, versions."""
        return self.path / "about.json"

    @property
    def report(self) -> Path:
        """The run on one page; written when it is done."""
        return self.path / "report.html"

    def label_file(self, task: str) -> Path:
        """The file with one class name per line, in the order of the head's outputs."""
        return self.path / "labels" / f"{task}.txt"

    @property
    def weights(self) -> Path:
        """The parameters of a folder that no run has made, or that an export has."""
        return self.path / "weights.safetensors"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a run to go on with."""
        return any(child.name.isdigit() for child in (self.path / "checkpoints").glob("*"))

    @property
    def examples(self) -> dict[str, int]:
        """Size of each task's training set when the run was last started; {} if that is not known."""
        try:
            return {task: int(data["train"]) for task, data in json.loads(self.about.read_bytes())["data"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out for the time of the block; the system lifts the lock when this process ends, however it ends.

        Raises:
          UserError: another run is in the folder, or the folder can't be written.
        """
        self._refuse_weights()
        file = self.path / LOCK
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise self._unwritable(error) from error
        os.register_at_fork(after_in_child=functools.partial(_close_copy, descriptor, os.fstat(descriptor)))  # the lock must not outlive this process
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
                    raise UserError(
                        f"{self.path}: another run is in this folder ({owner}): wait for its end, or give another --workdir. If that machine is gone "
                        f"for good, delete {file}"
                    ) from None
                log.warning("%s can't be locked (%s): see that no other run uses the folder", file, error.strerror)
            with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def _refuse_weights(self) -> None:
        if self.weights.exists():
            raise UserError(f"{self.path} holds weights, not a run: give another --workdir, and init_from={self.path} to start from them")

    def check(self, config: ConfigDict, labels: dict[str, tuple[str, ...]], force: bool = False, examples: dict[str, int] | None = None) -> None:
        """Returns if what is here may go on with this config: there is no checkpoint yet, or it was started with settings that compute the same.

        With `force`, other settings may go on too. `examples` are the sizes of the training sets: another one has other examples at each step.

        Raises:
          UserError: there is one with other settings; lists the differences. Or this is a folder of weights.
        """
        self._refuse_weights()
        if force or not self.has_checkpoint:
            return
        changed = [line for line in config_module.difference(self.config, config) if not HARMLESS.fullmatch(line.partition(":")[0])]
        changed += [f"class names of {task}" for task in labels if task in self.config.tasks and self.labels[task] != labels[task]]
        sizes = self.examples
        changed += [f"examples of {task}: {sizes[task]} -> {size}" for task, size in (examples or {}).items() if sizes.get(task, size) != size]
        if changed:
            raise UserError(
                f"{self.path} holds a run with other settings: give another --workdir, or --force_config to go on with the new ones:",
                *(f"  {line}" for line in changed),
            )

    def write(self, config: ConfigDict, labels: dict[str, tuple[str, ...]]) -> None:
        """Writes config and labels, each file whole or not at all. Raises UserError if the folder can't be written."""
        try:
            (self.path / "labels").mkdir(parents=True, exist_ok=True)
            for task, names in labels.items():
                write_whole(self.label_file(task), "".join(f"{name}\n" for name in names).encode())
            write_whole(self.path / "config.json", config_module.as_json(config).encode())
        except OSError as error:
            raise self._unwritable(error) from error
        self.__dict__.pop("config", None)

    def _unwritable(self, error: OSError) -> UserError:
        reason = "Not a directory" if self.path.is_file() else error.strerror
        return UserError(f"{self.path} can't be written ({reason}): give another --workdir")


def _close_copy(descriptor: int, opened: os.stat_result) -> None:
    """Closes a descriptor in a process that was forked, if it still is the same file."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(descriptor), opened):
            os.close(descriptor)
