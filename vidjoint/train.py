"""The training loop: next batches -> step -> log -> evaluate -> save; and what is set up before it."""

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from vidjoint import evaluate, metrics, optim, plots, sharding, step, validate
from vidjoint.checkpoints import Checkpoints
from vidjoint.data.mixture import Mixture
from vidjoint.data.schedules import steps_per_epoch
from vidjoint.data.tasks import Task, open_tasks, union_size
from vidjoint.errors import UserError
from vidjoint.models.build import Model, build, count_parameters
from vidjoint.run_folder import RunFolder
from vidjoint.weights.init_from import Plan, plan
from vidjoint.weights.pretrained import adopt, open_weights

MEMORY_ADVICE = "lower batch_size, set model.remat=block, or share the parameters out by mesh.fsdp"
BATCHES = {  # the schedules in words, before what they take of each task
    "mixed": "in every step",
    "round_robin": "in turn",
    "alternating": "in turn",
    "task_by_task": "one after the other",
    "uniform": "one of these per step, drawn evenly",
    "weighted": "in a drawn order",
    "accumulated": "in every step, gradients summed",
}
IN_FLIGHT = 2  # steps that may wait on the device; more would only hold their batches in its memory

log = logging.getLogger(__name__)


class Stopped(Exception):
    """A signal ended the run after a save."""

    exit_status = 75  # of the command: start it again to go on (EX_TEMPFAIL)

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step} and saved; the same command goes on from there")
        self.step = step


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
    no_weights, weights = [], None
    if config.init_from and not resumes:
        try:
            weights = open_weights(config.init_from)
            config = adopt(config, weights.config)
        except UserError as error:
            no_weights = [f"init_from: {line}" for line in error.lines]
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
    start = weights and plan(weights, model.abstract(), model.spec, labels, config.init_allow)
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
    except RuntimeError as error:
        raise UserError(f"JAX finds no device ({str(error).splitlines()[0]}): install JAX for this hardware, or set JAX_PLATFORMS=cpu") from error
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
    if folder.has_checkpoint:
        config = adopt(config, folder.config)
    setup = prepare(config, resumes=folder.has_checkpoint)
    config = setup.config
    labels = {name: task.labels for name, task in setup.tasks.items()}
    folder.check(config, labels, force_config)
    if jax.process_index() == 0:
        folder.write(config, labels)
        if setup.start:
            metrics.write_whole(folder.path / "init_from.txt", setup.start.table().encode())
    evaluator = evaluate.Evaluator(config, setup.model, setup.tasks, setup.mesh)
    with Checkpoints(folder.path, config.keep_checkpoints) as checkpoints, StopSignal() as stop, sharding.memory_errors(MEMORY_ADVICE):
        start = checkpoints.latest()
        state = initial_state(setup) if start is None else checkpoints.restore(setup.abstract_state)
        setup = dataclasses.replace(setup, start=None)  # frees the weights that were read
        start = start or 0
        print_summary(setup, state, start, folder.path)
        with Log(folder.path, start, setup.total_steps) as events:
            state = run_steps(setup, state, start, evaluator, checkpoints, events, stop)
            end = max(start, setup.total_steps)
            stop.when_saved(end)
            results = evaluator.run(state.eval_params, validate.views(config.eval.views), config.eval.reversed)
            if end > start or not folder.results.exists():  # a run that was finished before has its last event
                events.write(end, evaluate.as_events(results))
    content = evaluate.as_json(results, end)
    if jax.process_index() == 0:
        metrics.write_whole(folder.results, (json.dumps(content, indent=2) + "\n").encode())
        evaluate.write_reports(results, folder.path)
        plots.learning_curves_png(folder.path / "curves.png", metrics.read_events(folder.path / "metrics.jsonl"))
    return content


def run_steps(
    setup: Setup, state: step.TrainState, start: int, evaluator: evaluate.Evaluator, checkpoints: Checkpoints, events: "Log", stop: "StopSignal"
) -> step.TrainState:
    """Makes updates start + 1 to total_steps; the last one is saved. Raises Stopped if a signal came."""
    config, in_flight = setup.config, collections.deque()
    with contextlib.closing(setup.mixture.iterate(start)) as batches:
        for done in range(start + 1, setup.total_steps + 1):
            began = time.perf_counter()
            arrays = tuple(sharding.put_batch(batch, setup.mesh) for batch in next(batches))
            device_idle = not in_flight or in_flight[-1].is_ready()
            waited = time.perf_counter() - began if device_idle else 0.0
            state, values = setup.train_step(state, arrays)
            in_flight.append(values["loss"])
            if len(in_flight) > IN_FLIGHT:
                in_flight.popleft().block_until_ready()
            events.step(values, waited, setup.mixture.examples(done - 1))

            last, stops = done == setup.total_steps, stop.asked_anywhere(done % config.log_every == 0)
            evaluates = config.eval_every and (done % config.eval_every == 0 or last)
            saves = done % config.checkpoint_every == 0 or evaluates or last or stops
            if done % config.log_every == 0 or saves:
                events.take(done, float(setup.schedule(done - 1)))
            score = None
            if evaluates:
                quick = evaluator.run(state.eval_params, (1, 1), reverse=False)
                score = evaluate.mean_score(quick)
                if not last:  # the last evaluation follows with all views
                    events.write(done, evaluate.as_events(quick))
            if saves:
                checkpoints.save(done, state, score)
            if stops:
                checkpoints.wait()
                raise Stopped(done)
    return state


class Log:
    """The progress and the events of a run: means over the steps since the last event, rate, and share of time that the device waited for data.

    On a terminal there is a progress bar, elsewhere a line per event.
    """

    def __init__(self, workdir: Path, start: int, total_steps: int):
        self._total_steps, self._means = total_steps, metrics.Summary()
        self._bar = tqdm(total=total_steps, initial=start, unit="step", disable=None if jax.process_index() == 0 else True, dynamic_ncols=True)
        self._writer = metrics.MetricsWriter(workdir, start) if jax.process_index() == 0 else None
        self._compiled = False
        self._restart_clock()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_):
        self._bar.close()
        if self._writer:
            self._writer.close()

    def step(self, values: dict, waited: float, examples: int) -> None:
        """Counts one step of so many examples; doesn't wait for the device."""
        self._means.add({f"train/{name}": value for name, value in values.items()})
        self._waited, self._examples = self._waited + waited, self._examples + examples
        self._bar.update()
        if not self._compiled:  # the time of the first step says nothing about the next ones
            self._compiled = True
            self._restart_clock()

    def take(self, done: int, learning_rate: float) -> None:
        """Writes the means since the last event. Raises UserError if the loss is not finite any more."""
        event = self._means.take()
        loss, seconds = event["train/loss"], time.perf_counter() - self._began
        event["train/lr"] = learning_rate
        progress = f"loss {loss:.4f}"
        if self._examples:
            event |= {"train/examples_per_s": self._examples / seconds, "train/data_wait": min(self._waited / seconds, 1.0)}
            progress += f", {event['train/examples_per_s']:.0f} examples/s, data wait {event['train/data_wait']:.0%}"
        self.write(done, event)
        self._bar.set_postfix_str(progress)
        if self._bar.disable:
            self._say(f"step {done} of {self._total_steps}: {progress}")
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} by step {done}, and training can't recover: lower optim.lr, lengthen its warm-up, or set optim.clip_norm"
            )

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


class StopSignal:
    """Turns SIGTERM and the first Ctrl-C into a request to stop after the current step; a second Ctrl-C stops at once."""

    def __enter__(self) -> "StopSignal":
        self._asked, self._saved, self._old = False, None, {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._old[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread, as in a notebook's executor: signals go to whoever owns it
                break
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def asked_anywhere(self, may_wait: bool) -> bool:
        """Whether to stop. In a run of several processes, all of them get the same answer; they ask each other only if all of them `may_wait`."""
        if jax.process_count() == 1:
            return self._asked
        return may_wait and bool(multihost_utils.process_allgather(np.array(self._asked)).any())

    def when_saved(self, step: int) -> None:
        """From now on all is saved, and a signal raises Stopped(step) on the spot."""
        self._saved = step

    def _ask(self, number, frame):
        if self._saved is not None:
            raise Stopped(self._saved)
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        log.warning("%s: saving after this step and stopping", signal.Signals(number).name)


def print_summary(setup: Setup, state: step.TrainState, start: int, folder: Path) -> None:
    """What is about to happen, for a check at a glance."""
    if jax.process_index():
        return
    config, mixture = setup.config, setup.mixture
    print(f"{'task':<20} {'train':>9} {'val':>8} {'classes':>8}  {'clip':<18} {'weight':>6}")
    for name, task in setup.tasks.items():
        clip = "x".join(map(str, task.clip.shape[:3]))
        val = len(task.val) if task.val else 0
        print(f"{name:<20} {len(task.train):>9} {val:>8} {len(task.labels):>8}  {clip:<18} {config.tasks[name].loss_weight:>6g}")
    shares = [f"{stream.batch_size} of {stream.name}" for stream in mixture.streams]
    if config.schedule in ("task_by_task", "weighted"):
        shares = [f"{steps} steps with {share}" for steps, share in zip(mixture.steps_of, shares, strict=True)]
    print(f"batches    {config.schedule}, {BATCHES[config.schedule]}: {', '.join(shares)}")
    trained, frozen = count_parameters(state.params), count_parameters(state.frozen)
    spec = setup.model.spec
    sizes = f"{config.model.variant} width {spec.width}, {spec.depth} blocks, mixer {spec.mixer}"
    print(f"model      {sizes}: {trained:,} parameters trained, {frozen:,} frozen")
    mesh = " x ".join(f"{name} {size}" for name, size in setup.mesh.shape.items())
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    print(f"devices    {jax.device_count()} {jax.devices()[0].device_kind} ({mesh}){processes}")
    print(f"steps      {start} -> {setup.total_steps} ({mixture.steps_per_epoch:.1f} per epoch of {mixture.union:.0f} examples)")
    print(f"results    {folder}", flush=True)
