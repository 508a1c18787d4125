"""One update and one evaluation, as pure functions: `train_step(state, batches) -> state, metrics` and `eval_step(params, pixels) -> scores`."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vidjoint import optim
from vidjoint.losses import cross_entropy, sigmoid_cross_entropy, weighted_loss
from vidjoint.mixup import mix
from vidjoint.models.build import Model


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a checkpoint holds. `params` are the trained ones; the frozen ones have neither gradient nor optimiser state."""

    step: jax.Array  # int32[], updates made; also the data position
    params: dict
    frozen: dict
    opt_state: Any
    ema: dict  # moving average of `params`; {} when off

    @property
    def eval_params(self) -> dict:
        """The full parameters to evaluate with: the moving average if there is one."""
        return optim.join(self.ema or self.params, self.frozen)


def init_state(config, params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0 from the full parameters; jit-able."""
    trained, frozen = optim.split_frozen(params, config.optim.freeze)
    ema = jax.tree.map(jnp.copy, trained) if config.optim.ema else {}
    return TrainState(jnp.zeros((), jnp.int32), trained, frozen, optimizer.init(trained), ema)


def multilabel_tasks(config) -> frozenset[str]:
    """Names of the tasks whose examples have any number of labels."""
    return frozenset(name for name, task in config.tasks.items() if task.multilabel)


def make_train_step(config, model: Model, optimizer: optax.GradientTransformation) -> Callable:
    """Returns `train_step(state, batches)` for a tuple of batches (see `data.mixture`): one weighted loss over all of them, one update.

    All randomness (mixup, stochastic depth, dropout) derives from (seed, step). Metrics: `loss`, `grad_norm`, and for each task `NAME/loss`, the pair
    (summed cross-entropy, number of examples), so that means over several steps are exact; and `skipped`, 1.0 for a step whose loss or gradient norm
    is not finite: it changes nothing but `state.step` and what counts steps in the optimiser (schedule, tasks' turns); it is left out of the sum that
    optim.per_task=accumulated makes of a round.

    A batch's labels are int32[B], or int32[B, K] filled up by -1 where it has room for several labels of an example; a task that is not multilabel
    has its label in column 0. The loss of a multilabel task is `losses.sigmoid_cross_entropy`, without label smoothing.
    """
    if config.model.scan:  # blocks of which other parts are frozen are not in one loop: through frozen ones nothing is differentiated
        frozen = optim.split_frozen(model.abstract(), config.optim.freeze)[1].get("blocks", {})
        names = (optim.names(frozen.get(str(i), {})) for i in range(model.spec.depth))
        model = dataclasses.replace(model, kinds=tuple(map(tuple, names)))
    tasks = sorted(config.tasks)
    weights = {name: config.tasks[name].loss_weight for name in tasks}

    def mixed(batch: dict, key: jax.Array) -> dict:
        """The batch with its pixels mixed, each example's `other` label and the share of its `own`; as it was if mixing is off."""
        if not (config.loss.mixup or config.loss.cutmix):
            return batch
        pixels, partner, own = mix(key, batch["pixels"], batch["task"], batch["mask"], config.loss.mixup, config.loss.cutmix)
        return batch | {"pixels": pixels, "other": batch["label"][partner], "own": own}

    def sums(params: dict, batch: dict, noise: jax.Array) -> dict:
        """Summed cross-entropy and number of examples of each task in one batch."""
        logits = model.logits(params, batch["pixels"], noise)

        def cross_entropies(name: str, label: jax.Array) -> jax.Array:
            label = label.reshape(label.shape[0], -1)  # [B, K]
            if config.tasks[name].multilabel:
                return sigmoid_cross_entropy(logits[name], label)
            return cross_entropy(logits[name], label[:, 0], config.loss.label_smoothing)

        result = {}
        for index, name in enumerate(tasks):
            mine = batch["mask"] & (batch["task"] == index)
            losses = cross_entropies(name, batch["label"])
            if "own" in batch:
                losses = batch["own"] * losses + (1 - batch["own"]) * cross_entropies(name, batch["other"])
            result[name] = jnp.where(mine, losses, 0).sum(), mine.sum()
        return result

    def loss(trained: dict, frozen: dict, batches: tuple, noises: list, counts: dict | None):
        """The weighted loss, and `sums` over all batches. `counts`: the tasks' numbers of examples, where these batches are part of larger ones."""
        params = optim.join(trained, frozen)
        parts = [sums(params, batch, noise) for batch, noise in zip(batches, noises, strict=True)]
        per_task = {name: tuple(sum(values) for values in zip(*(part[name] for part in parts), strict=True)) for name in tasks}
        whole = {name: (per_task[name][0], counts[name]) for name in tasks} if counts else per_task
        return weighted_loss(whole, weights, config.loss.reduction), per_task

    loss_and_gradients = jax.value_and_grad(loss, has_aux=True)

    def in_parts(state: TrainState, batches: tuple, noises: list):
        """`loss_and_gradients` by `accumulate` parts of the batches, one after the other, so that only one part's activations exist at a time.

        Part p has the rows p, p + accumulate, ...: some of each device's, whatever the mesh.
        """
        masks = [[(batch["task"] == index) & batch["mask"] for batch in batches] for index in range(len(tasks))]
        counts = {name: sum(mask.sum() for mask in mine) for name, mine in zip(tasks, masks, strict=True)}
        parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, config.accumulate, *x.shape[1:]), 1, 0), batches)

        def part(numbered: tuple):
            number, batches = numbered
            return loss_and_gradients(state.params, state.frozen, batches, [jax.random.fold_in(noise, number) for noise in noises], counts)

        numbered = jnp.arange(config.accumulate), parts
        shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], numbered))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(lambda total, numbered: (jax.tree.map(jnp.add, total, part(numbered)), None), zeros, numbered)[0]

    def train_step(state: TrainState, batches: tuple) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        keys = [jax.random.fold_in(key, i) for i in range(len(batches))]
        batches = tuple(mixed(batch, jax.random.fold_in(key, 1)) for batch, key in zip(batches, keys, strict=True))
        noises = [jax.random.fold_in(key, 0) for key in keys]
        if config.accumulate > 1:
            (value, per_task), gradients = in_parts(state, batches, noises)
        else:
            (value, per_task), gradients = loss_and_gradients(state.params, state.frozen, batches, noises, None)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        if config.optim.per_task in ("cumulative_ref", "accumulated"):  # a sum of gradients would stay what it is
            gradients = optim.select(finite, gradients, optax.tree.zeros_like(gradients))
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, finite=finite)
        changes = finite | (config.optim.per_task == "accumulated")  # its round's other gradients are not lost
        params = optim.select(changes, optax.apply_updates(state.params, updates), state.params)
        ema = {}
        if config.optim.ema:
            ema = optim.ema_update(state.ema, params, config.optim.ema, state.step, optim.steps_per_update(config))
            ema = optim.select(changes, ema, state.ema)
        metrics = {"loss": value, "grad_norm": norm, "skipped": 1 - finite.astype(jnp.float32)}
        metrics |= {f"{name}/loss": sum_and_count for name, sum_and_count in per_task.items()}
        return TrainState(state.step + 1, params, state.frozen, opt_state, ema), metrics

    return train_step


def probabilities(logits: jax.Array, multilabel: bool) -> jax.Array:
    """Class probabilities of logits [..., C]: softmax, or for a task of many labels the sigmoid of each class."""
    return jax.nn.sigmoid(logits) if multilabel else jax.nn.softmax(logits)


def make_eval_step(model: Model, average: str, multilabel: frozenset[str] = frozenset()) -> Callable:
    """Returns `eval_step(params, pixels uint8[B, V, T, H, W, 3], task, reverse)` -> class scores float32[B, C], averaged over the V views.

    `average` is "softmax" (scores are probabilities; those of tasks named in `multilabel` are sigmoids) or "logits"; `task` and `reverse` (frames
    last to first, CoVeR table 2) are static.
    """

    def eval_step(params: dict, pixels: jax.Array, task: str, reverse: bool = False) -> jax.Array:
        batch, views = pixels.shape[:2]
        pixels = pixels[:, :, ::-1] if reverse else pixels
        logits = model.logits(params, pixels.reshape(-1, *pixels.shape[2:]))[task]
        scores = probabilities(logits, task in multilabel) if average == "softmax" else logits
        return scores.reshape(batch, views, -1).mean(axis=1)

    return eval_step
