"""Where the events of a run go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow (`config.log_to`).

The last two are libraries of others that talk to a server: each has a thread of its own, so that a slow or absent server costs a warning, never the
run. A run that goes on is the same run there, and no event is sent twice: both are kept in `WORKDIR/NAME_run.json`.
"""

import importlib
import importlib.util
import json
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Iterable
from pathlib import Path

START = 90  # seconds that a run waits for a server before its first step
END = 60  # seconds that it waits at its end for events to be sent

log = logging.getLogger(__name__)


def check(names: Iterable[str]) -> list[str]:
    """What is wrong with `config.log_to`, one line each: unknown names, and packages that are not installed."""
    problems = []
    for name in names:
        if name not in TRACKERS:
            problems.append(f"log_to has {name!r}, which is unknown: choose from {', '.join(TRACKERS)}, as in log_to=('tensorboard','wandb')")
        elif not _installed(name):
            problems.append(f"log_to has {name!r}, whose package is not installed: pip install {name}")
    return problems


def _installed(name: str) -> bool:
    spec = importlib.util.find_spec({"tensorboard": "tensorboardX"}.get(name, name))
    return spec is not None and spec.origin is not None  # without an origin it is a folder of that name, such as wandb leaves where it ran


def open_all(names: Iterable[str], workdir: Path, resume_step: int | None, settings: dict) -> list:
    """Opens trackers: each has `write(step, {name: number})` and `close(ended)`, `ended` telling a run that is done from one that was stopped.

    Args:
      names: `config.log_to`.
      resume_step: step the run goes on from; None or 0 starts a new one.
      settings: the config as one flat dict; a tracker shows it with the run.
    """
    return [TRACKERS[name](workdir, resume_step, settings) for name in dict.fromkeys(names)]


class TensorBoard:
    """Event files in `workdir/tensorboard`; every event is in its file before `write` returns.

    tensorboardX's own SummaryWriter writes in a thread, which a full disk ends, and with it, sooner or later, the run hangs.
    """

    def __init__(self, workdir: Path, resume_step: int | None, settings: dict):
        from tensorboardX.event_file_writer import EventsWriter  # imports PyTorch where that is installed, which takes seconds
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        (workdir / "tensorboard").mkdir(exist_ok=True)
        self._writer = EventsWriter(str(workdir / "tensorboard" / "events"))
        if resume_step is not None:  # TensorBoard hides what earlier files have from this step on
            self._write(step=resume_step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        self._writer.flush()

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._write(step=step, summary=self._summary(value=[self._summary.Value(tag=name, simple_value=value)]))
        self._writer.flush()

    def _write(self, **event) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), **event))

    def close(self, ended: bool) -> None:
        self._writer.close()


class Remote:
    """A tracker behind a server. Subclasses say how to `_open` a run, `_send` an event, and `_finish`; these run in one thread, in this order."""

    name: str  # of its package, and in `config.log_to`

    def __init__(self, workdir: Path, resume_step: int | None, settings: dict):
        self._state, self._queue, self._failed = workdir / f"{self.name}_run.json", queue.SimpleQueue(), False
        self._run: dict = {"id": None, "step": -1, "names": []}  # its id there, the last step sent, and what was sent of it
        opened = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(workdir, bool(resume_step), settings, opened), name=self.name, daemon=True)
        self._thread.start()
        if not opened.wait(START):
            self._warn(f"no answer within {START} s")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._queue.put((step, values))

    def close(self, ended: bool) -> None:
        self._queue.put(ended)
        self._thread.join(END)
        if self._thread.is_alive():
            self._warn(f"the last events were not taken within {END} s")

    def _work(self, workdir: Path, resumes: bool, settings: dict, opened: threading.Event) -> None:
        try:
            if resumes and self._state.exists():
                self._run |= json.loads(self._state.read_text())
            self._library = importlib.import_module(self.name)
            self._run["id"] = self._open(workdir, self._run["id"], settings)
            self._keep()
        except Exception as error:
            self._warn(error)
            return
        finally:
            opened.set()
        while not isinstance(item := self._queue.get(), bool):
            self._attempt(self._send_new, *item)
        self._attempt(self._finish, item)

    def _send_new(self, step: int, values: dict[str, float]) -> None:
        sent = self._run["names"] if step == self._run["step"] else ()
        values = {name: value for name, value in values.items() if name not in sent}
        if step >= self._run["step"] and values:
            self._send(step, values)
            self._run |= {"step": step, "names": [*sent, *values]}
            self._keep()

    def _keep(self) -> None:
        part = self._state.with_suffix(".part")
        part.write_text(json.dumps(self._run))
        os.replace(part, self._state)

    def _attempt(self, function, *args) -> None:
        try:
            function(*args)
        except Exception as error:
            self._warn(error)

    def _warn(self, problem: Exception | str) -> None:
        if not self._failed:
            reason = " ".join(str(problem).split())[:200] or type(problem).__name__
            log.warning("log_to %s: %s; the run goes on, and metrics.jsonl has every event", self.name, reason)
        self._failed = True


class WeightsAndBiases(Remote):
    """A run of wandb, named like the workdir, in the project of WANDB_PROJECT or vidjoint; wandb's other variables (WANDB_MODE=offline) hold too."""

    name = "wandb"

    def _open(self, workdir: Path, identity: str | None, settings: dict) -> str:
        identity = identity or secrets.token_hex(8)
        project = os.environ.get("WANDB_PROJECT", "vidjoint")
        quiet = self._library.Settings(console="off")  # it would take progress bars for output
        arguments = dict(id=identity, project=project, name=workdir.resolve().name, dir=str(workdir), config=settings, settings=quiet)
        self._live = self._library.init(resume="allow", **arguments)
        return identity

    def _send(self, step: int, values: dict[str, float]) -> None:
        self._live.log(values, step=step)

    def _finish(self, ended: bool) -> None:
        self._live.finish(exit_code=0 if ended else 1)


class MLflow(Remote):
    """A run of MLflow, named like the workdir, in the experiment of MLFLOW_EXPERIMENT_NAME or vidjoint, where MLFLOW_TRACKING_URI says."""

    name = "mlflow"

    def _open(self, workdir: Path, identity: str | None, settings: dict) -> str:
        self._client = self._library.MlflowClient()
        if identity:
            self._client.update_run(identity, status="RUNNING")
            self._identity = identity
            return identity
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "vidjoint")
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._identity = self._client.create_run(number, run_name=workdir.resolve().name).info.run_id
        parameters = [self._library.entities.Param(key, str(value)[:500]) for key, value in settings.items()]
        for start in range(0, len(parameters), 100):  # as many as it takes at once
            self._client.log_batch(self._identity, params=parameters[start : start + 100])
        return self._identity

    def _send(self, step: int, values: dict[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self._identity, metrics=[self._library.entities.Metric(name, value, now, step) for name, value in values.items()])

    def _finish(self, ended: bool) -> None:
        self._client.set_terminated(self._identity, "FINISHED" if ended else "KILLED")


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}
