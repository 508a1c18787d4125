"""The training loop: next batches -> step -> log -> evaluate -> save; and what is set up before it."""

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from vidjoint import config as config_module
from vidjoint import evaluate, metrics, optim, report, sharding, step, validate
from vidjoint.checkpoints import Checkpoints
from vidjoint.data.mixture import Mixture
from vidjoint.data.schedules import steps_per_epoch
from vidjoint.data.tasks import Task, open_tasks, union_size
from vidjoint.errors import UserError
from vidjoint.models.build import Model, build
from vidjoint.output_files import write_whole
from vidjoint.reporting import plots
from vidjoint.run_folder import RunFolder
from vidjoint.running import summary
from vidjoint.running.anomalies import BadSteps, Spikes
from vidjoint.running.in_flight import InFlight, Step
from vidjoint.running.stopping import Stopped, StopSignal, Waiting
from vidjoint.weights.init_from import Plan, plan
from vidjoint.weights.pretrained import adopt, open_weights

MEMORY_ADVICE = "lower batch_size, set model.remat=block, or share the parameters out by mesh.fsdp"
PROGRESS = "{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"  # within 80 columns
NO_DEVICE = (RuntimeError, AssertionError)  # what JAX raises where it finds none
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ENODEV, errno.ESTALE, errno.EACCES, errno.EPERM)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """Everything a run needs besides its state; what can be wrong with a config has been found."""

    config: ConfigDict  # complete: with the settings that come with pretrained weights
    tasks: dict[str, Task]
    mesh: jax.sharding.Mesh
    mixture: Mixture
    model: Model
    total_steps: int
    schedule: Callable  # update number -> learning rate
    start: Plan | None  # what the model takes over of `config.init_from`
    abstract_state: step.TrainState  # shapes, dtypes and shardings
    init: Callable  # random key -> TrainState
    train_step: Callable  # (state, tuple of batches on the devices) -> (state, metrics); donates the state


def prepare(config: ConfigDict, resumes: bool = False) -> Setup:
    """Opens the data, builds the model and the jitted step.

    Args:
      resumes: the state will come from a checkpoint, so `init_from` need not exist any more.

    Raises:
      UserError: everything the user can put right, reported together.
    """
    no_weights, weights, parts = [], None, []
    if config.init_from and not resumes:
        try:
            weights = open_weights(config.init_from)
            config = adopt(config, weights.config)
            parts = [(pattern, open_weights(path)) for pattern, _, path in (part.partition("=") for part in config.init_parts)]
        except UserError as error:
            no_weights = [f"{'init_parts' if weights else 'init_from'}: {line}" for line in error.lines]
    problems = validate.check(config)
    config_is_sound, tasks_are_sound = not problems, not any(line.startswith("tasks.") for line in problems)

    def attempt(function, *args):
        """What the function returns; or None, and its problems join the others."""
        try:
            return function(*args)
        except UserError as error:
            problems.extend(error.lines)

    tasks = attempt(open_tasks, config) if tasks_are_sound else None
    mesh = attempt(open_devices, config)
    if config_is_sound and mesh and config.optim.freeze:
        parameters = build(config.model, {name: max(task.classes, 1) for name, task in config.tasks.items()}).abstract()
        attempt(optim.split_frozen, parameters, config.optim.freeze)
    problems += no_weights
    if problems:
        raise UserError(*problems)
    for task in tasks.values():
        for source in filter(None, (task.train, task.val)):
            for line in source.warnings if jax.process_index() == 0 else ():
                log.warning("%s: %s", task.name, line)

    per_epoch = steps_per_epoch(config, tasks)
    total_steps = config.total_steps or round(config.total_epochs * per_epoch)
    if total_steps < 1:
        size = union_size(config, tasks) / per_epoch
        raise UserError(f"total_epochs={config.total_epochs} is less than one step: one epoch has {per_epoch:.2f} steps of {size:g} examples")
    if unused := total_steps % optim.steps_per_update(config):
        log.warning("optim.per_task=accumulated updates once per round of %d steps: %d at the end will change nothing", len(tasks), unused)
    schedule = optim.make_schedule(config.optim, total_steps, per_epoch)
    optimizer = optim.make_optimizer(config.optim, schedule, len(tasks))
    model = build(config.model, {name: len(task.labels) for name, task in tasks.items()})
    labels = {name: task.labels for name, task in tasks.items()}
    start = weights and plan(weights, model.abstract(), model.spec, labels, config.init_allow, config.init_heads, parts)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    mixture = Mixture(config, tasks, total_steps, functools.partial(sharding.local_rows, mesh=mesh), shards)

    abstract, init, train_step = sharded_step(config, model, optimizer, mesh)
    return Setup(config, tasks, mesh, mixture, model, total_steps, schedule, start, abstract, init, train_step)


def sharded_step(config: ConfigDict, model: Model, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> tuple:
    """Returns (abstract_state, init, train_step) of a run on this mesh, as `Setup` has them. The mesh's devices need not be there."""

    def fresh(key: jax.Array) -> step.TrainState:
        return step.init_state(config, model.init(key), optimizer)

    abstract = jax.eval_shape(fresh, jax.random.key(0))
    shardings = sharding.tree_sharding(abstract, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    train_step = jax.jit(
        step.make_train_step(config, model, optimizer),
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )
    return abstract, jax.jit(fresh, out_shardings=shardings), train_step


def open_devices(config: ConfigDict) -> jax.sharding.Mesh:
    """All devices in the mesh of `config.mesh`. Raises UserError if they don't fit or JAX finds none."""
    try:
        devices = jax.devices()
    except NO_DEVICE as error:
        reason = str(error).partition("\n")[0] or "it doesn't say why"
        raise UserError(f"JAX finds no device ({reason}): install JAX for this hardware, or set JAX_PLATFORMS=cpu") from error
    return sharding.make_mesh(config.mesh, devices)


def initial_state(setup: Setup) -> step.TrainState:
    """The state at step 0: fresh, or with the parameters of `config.init_from`."""
    state = setup.init(jax.random.key(setup.config.seed))
    if setup.start is None:
        return state
    for line in setup.start.summary():
        log.info("%s", line)
    params = setup.start.apply(optim.join(state.params, state.frozen))
    trained, frozen = optim.split_frozen(params, setup.config.optim.freeze)
    ema = jax.tree.map(jnp.copy, trained) if setup.config.optim.ema else {}  # the step donates both
    loaded = step.TrainState(state.step, trained, frozen, state.opt_state, ema)
    return jax.tree.map(lambda x, abstract: jax.device_put(x, abstract.sharding), loaded, setup.abstract_state)


def train(config: ConfigDict, workdir: str | Path, force_config: bool = False) -> dict:
    """Trains (or goes on with what `workdir` holds), evaluates, writes reports, and returns the content of `results.json`.

    Raises:
      UserError: something to put right; nothing that was saved is lost.
      Stopped: SIGTERM or Ctrl-C came; the state is saved.
    """
    folder = RunFolder(Path(workdir).expanduser())
    with contextlib.ExitStack() as opened:
        stop = opened.enter_context(StopSignal())
        there = folder.path.exists()
        if there:
            opened.enter_context(_locked(folder))
        if folder.has_checkpoint:
            config = _begun_as(adopt(config, folder.config), folder)
        setup = prepare(config, resumes=folder.has_checkpoint)
        config = setup.config
        labels = {name: task.labels for name, task in setup.tasks.items()}
        folder.check(config, labels, force_config, {name: len(task.train) for name, task in setup.tasks.items()})
        if not there:  # not made before it is known that the run can start
            opened.enter_context(_locked(folder))
        with _disk_errors(folder):
            return _train(setup, folder, labels, stop)


def _begun_as(config: ConfigDict, folder: RunFolder) -> ConfigDict:
    """A run that goes on does not read what it began from again, whatever is asked for now: its own entries stay, and a line says so."""
    begun, config = folder.config, config.copy_and_resolve_references()
    for key in ("init_from", "init_heads", "init_parts"):
        if config[key] != begun[key] and jax.process_index() == 0:
            told = "%s=%s is not read: the run in %s began with %r and goes on; to begin anew give another --workdir"
            log.warning(told, key, config[key], folder.path, begun[key])
        config[key] = begun[key]
    return config


def _train(setup: Setup, folder: RunFolder, labels: dict[str, tuple[str, ...]], stop: StopSignal) -> dict:
    config = setup.config
    if jax.process_index() == 0:
        folder.write(config, labels)
        if setup.start:
            write_whole(folder.path / "init_from.txt", setup.start.table().encode())
    evaluator = evaluate.Evaluator(config, setup.model, setup.tasks, setup.mesh)
    with Checkpoints(folder.path, config.keep_checkpoints) as checkpoints, sharding.memory_errors(MEMORY_ADVICE):
        start = checkpoints.latest()
        state = initial_state(setup) if start is None else checkpoints.restore(setup.abstract_state)
        setup = dataclasses.replace(setup, start=None)  # frees the weights that were read
        start = start or 0
        stop.when_saved(start)
        if jax.process_index() == 0:
            about = summary.describe(config, setup.tasks, setup.mixture, setup.model, state, setup.mesh)
            write_whole(folder.about, (json.dumps(about, indent=2) + "\n").encode())
            print(summary.text(about, start, setup.total_steps, folder.path, config.log_to), flush=True)
        with Log(folder.path, start, setup.total_steps, config) as events:
            state = run_steps(setup, state, start, evaluator, checkpoints, events, stop, folder.path)
            end = max(start, setup.total_steps)
            stop.when_saved(end)
            results = evaluator.run(state.eval_params, validate.views(config.eval.views), config.eval.reversed)
            if end > start or not folder.results.exists():  # a run that was finished before has its last event
                events.write(end, evaluate.as_events(results))
    content = evaluate.as_json(results, end)
    if jax.process_index() == 0:
        write_whole(folder.results, (json.dumps(content, indent=2) + "\n").encode())
        evaluate.write_reports(results, folder.path)
        plots.learning_curves_png(folder.path / "curves.png", metrics.read_events(folder.path / "metrics.jsonl"))
        report.write_if_possible(folder, setup.tasks)
    return content


def _locked(folder: RunFolder) -> contextlib.AbstractContextManager:
    """Process 0 locks the folder for all processes of the run."""
    try:
        return contextlib.nullcontext() if jax.process_index() else folder.locked()
    except NO_DEVICE:  # `prepare` says so, with all else that is wrong
        return contextlib.nullcontext()


@contextlib.contextmanager
def _disk_errors(folder: RunFolder):
    """A disk that is full, read-only or gone ends a run with one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = error.filename or folder.path
        raise UserError(f"{where}: {error.strerror}: mend that, and the same command goes on from the last checkpoint") from error


def run_steps(
    setup: Setup,
    state: step.TrainState,
    start: int,
    evaluator: evaluate.Evaluator,
    checkpoints: Checkpoints,
    events: "Log",
    stop: StopSignal,
    workdir: Path,
) -> step.TrainState:
    """Makes updates start + 1 to total_steps; the last one is saved.

    Raises:
      Stopped: a signal came; all is saved.
      UserError: too many steps in a row were not finite.
    """
    config, in_flight, bad_steps = setup.config, InFlight(), BadSteps(setup.config.max_skipped)

    def due(done: int, every: int) -> bool:
        return bool(every) and done % every == 0

    def save_and_stop(done: int) -> None:
        if events.steps:
            events.take(done, float(setup.schedule(done - 1)))
        checkpoints.save(done, state)
        checkpoints.wait()
        raise Stopped(done)

    def stop_over_bad_steps(done: int) -> None:
        if events.steps:
            events.take(done, float(setup.schedule(done - 1)))
        raise bad_steps.write(workdir, state, in_flight, setup.mixture, config.seed, checkpoints.latest())

    def score_of(done: int) -> float | None:
        """Evaluates with one view, and writes that down unless the last evaluation follows, with all views."""
        quick = evaluator.run(state.eval_params, (1, 1), reverse=False, give_up=stop.asked_anywhere)
        if done < setup.total_steps:
            events.write(done, evaluate.as_events(quick))
        return evaluate.mean_score(quick)

    with contextlib.closing(in_flight), contextlib.closing(setup.mixture.iterate(start)) as tuples:
        if 0 < start < setup.total_steps and due(start, config.eval_every) and not checkpoints.has_metric(start):  # a signal came in between
            with contextlib.suppress(evaluate.Abandoned):
                score_of(start)
        for done in range(start + 1, setup.total_steps + 1):
            began = time.perf_counter()
            try:
                with stop.while_waiting():
                    batches = next(tuples)
            except Waiting:
                save_and_stop(done - 1)
            arrays = tuple(sharding.put_batch(batch, setup.mesh) for batch in batches)
            waited = min(in_flight.idle_for(), time.perf_counter() - began)
            if bad_steps.are_too_many(in_flight.make_room()):  # only now, so that the next batch comes while the device is busy
                stop_over_bad_steps(done - 1)
            state, values = setup.train_step(state, arrays)
            stop.when_saved(None)
            in_flight.add(Step(done, values, batches))
            events.step(values, waited, setup.mixture.examples(done - 1))

            last, stops = done == setup.total_steps, stop.asked_anywhere()
            evaluates = config.eval_every and (due(done, config.eval_every) or last)
            saves = due(done, config.checkpoint_every) or evaluates or last or stops
            if due(done, config.log_every) or saves:
                events.take(done, float(setup.schedule(done - 1)))
                if bad_steps.are_too_many(in_flight.wait()):
                    stop_over_bad_steps(done)
            score = None
            if evaluates and not stops:
                try:
                    score = score_of(done)
                except evaluate.Abandoned:
                    stops = True
            if stops:
                save_and_stop(done)
            if saves:
                checkpoints.save(done, state, score)
    return state


class Log:
    """The progress and the events of a run: means over the steps since the last event, rate, and share of time that the device waited for data.

    On a terminal there is a progress bar, elsewhere a line per event.
    """

    def __init__(self, workdir: Path, start: int, total_steps: int, config: ConfigDict | None = None):
        self._total_steps, self._means, self._spikes = total_steps, metrics.Summary(), Spikes()
        silent = None if jax.process_index() == 0 else True  # None: where there is no terminal
        self._bar = tqdm(total=total_steps, initial=start, disable=silent, dynamic_ncols=True, bar_format=PROGRESS)
        self._writer = None
        if jax.process_index() == 0:
            told = () if config is None else (config.log_to, config_module.flat(config.to_dict()))
            self._writer = metrics.MetricsWriter(workdir, start, *told)
        self._compiled = False
        self._restart_clock()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind, *_):
        self._bar.close()
        if self._writer:
            with contextlib.suppress(OSError) if kind else contextlib.nullcontext():  # the first error is the one to show
                self._writer.close(ended=kind is None)

    @property
    def steps(self) -> int:
        """Steps since the last event."""
        return len(self._means)

    def step(self, values: dict, waited: float, examples: int) -> None:
        """Counts one step of so many examples; doesn't wait for the device."""
        self._means.add({f"train/{name}": value for name, value in values.items()})
        self._waited, self._examples = self._waited + waited, self._examples + examples
        self._bar.update()
        if not self._compiled:  # the time of the first step says nothing about the next ones
            self._compiled = True
            self._bar.unpause()
            self._restart_clock()

    def take(self, done: int, learning_rate: float) -> None:
        """Writes the means since the last event, over the steps that were not skipped, and how many were skipped or had a spike in their loss."""
        counts = {"train/loss_spikes": 0, "train/skipped": 0}

        def is_good(values: dict) -> bool:
            if values.pop("train/skipped"):
                counts["train/skipped"] += 1
                return False
            tasks = tuple(name for name, value in values.items() if isinstance(value, tuple) and value[1])
            counts["train/loss_spikes"] += self._spikes.is_one(tasks, float(values["train/loss"]))
            return True

        event = self._means.take(is_good) | counts | {"train/lr": learning_rate}
        seconds = time.perf_counter() - self._began
        progress = f"loss {event['train/loss']:.4f}" if "train/loss" in event else "no finite loss"
        if skipped := counts["train/skipped"]:
            progress += f", {skipped} steps skipped"
        if self._examples:
            event |= {"train/examples_per_s": self._examples / seconds, "train/data_wait": min(self._waited / seconds, 1.0)}
            progress += f", {event['train/examples_per_s']:.0f} examples/s, data wait {event['train/data_wait']:.0%}"
        self.write(done, event)
        self._bar.set_postfix_str(progress)
        if self._bar.disable:
            self._say(f"step {done} of {self._total_steps}: {progress}")

    def write(self, done: int, event: dict) -> None:
        """Writes an event; the time it took to come about is not counted to the next steps."""
        if self._writer:
            self._writer.write(done, event)
        top1 = {name.split("/")[1]: f"{100 * value:.1f} %" for name, value in event.items() if name.endswith("/top1") and value is not None}
        top1 |= {name.split("/")[1]: f"{100 * value:.1f} % mAP" for name, value in event.items() if name.endswith("/map") and value is not None}
        if top1:
            self._say(f"step {done}: validation top-1 " + ", ".join(f"{name} {value}" for name, value in top1.items()))
        self._restart_clock()

    def _say(self, line: str) -> None:
        if self._writer:
            self._bar.write(line)
            sys.stdout.flush()

    def _restart_clock(self) -> None:
        self._began, self._waited, self._examples = time.perf_counter(), 0.0, 0
