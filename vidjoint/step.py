"""One update and one evaluation, as pure functions: `train_step(state, batches) -> state, metrics` and `eval_step(params, pixels) -> scores`."""

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
    (summed cross-entropy, number of examples), so that means over several steps are exact.

    A batch's labels are int32[B], or int32[B, K] filled up by -1 where it has room for several labels of an example; a task that is not multilabel
    has its label in column 0. The loss of a multilabel task is `losses.sigmoid_cross_entropy`, without label smoothing.
    """
    tasks = sorted(config.tasks)
    weights = {name: config.tasks[name].loss_weight for name in tasks}

    def sums(params: dict, batch: dict, key: jax.Array) -> dict:
        """Summed cross-entropy and number of examples of each task in one batch."""
        pixels, partner, own = batch["pixels"], None, None
        label = batch["label"].reshape(len(pixels), -1)  # [B, K]
        if config.loss.mixup or config.loss.cutmix:
            pixels, partner, own = mix(jax.random.fold_in(key, 1), pixels, batch["task"], batch["mask"], config.loss.mixup, config.loss.cutmix)
        logits = model.logits(params, pixels, jax.random.fold_in(key, 0))

        def cross_entropies(name: str, label: jax.Array) -> jax.Array:
            if config.tasks[name].multilabel:
                return sigmoid_cross_entropy(logits[name], label)
            return cross_entropy(logits[name], label[:, 0], config.loss.label_smoothing)

        result = {}
        for index, name in enumerate(tasks):
            mine = batch["mask"] & (batch["task"] == index)
            losses = cross_entropies(name, label)
            if partner is not None:
                losses = own * losses + (1 - own) * cross_entropies(name, label[partner])
            result[name] = jnp.where(mine, losses, 0).sum(), mine.sum()
        return result

    def loss(trained: dict, frozen: dict, batches: tuple, key: jax.Array):
        params = optim.join(trained, frozen)
        parts = [sums(params, batch, jax.random.fold_in(key, i)) for i, batch in enumerate(batches)]
        per_task = {name: tuple(sum(values) for values in zip(*(part[name] for part in parts), strict=True)) for name in tasks}
        return weighted_loss(per_task, weights, config.loss.reduction), per_task

    def train_step(state: TrainState, batches: tuple) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        (value, per_task), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, state.frozen, batches, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optim.ema_update(state.ema, params, config.optim.ema, state.step, optim.steps_per_update(config)) if config.optim.ema else {}
        metrics = {"loss": value, "grad_norm": optax.tree.norm(gradients)}
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
