"""Losses: cross-entropy per example, of one label or of many, and CoVeR's weighted sum over tasks."""

import jax
import jax.numpy as jnp

from vidjoint.errors import UserError

REDUCTIONS = ("per_task", "per_example")


def cross_entropy(logits: jax.Array, label: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Returns the cross-entropy of each example in nats, computed in float32.

    The target is 1 - smoothing + smoothing / C for the label and smoothing / C for the other classes (arXiv:1512.00567, section 7).
    A label outside 0..C-1 gives a finite value without meaning, for the caller to leave out: a batch may hold examples of other tasks,
    whose labels don't fit this head.

    Args:
      logits: float32 or bfloat16 [B, C].
      label: int32[B].
      smoothing: 0 (off) to below 1.

    Returns:
      float32[B].
    """
    logits = logits.astype(jnp.float32)
    classes = jnp.arange(logits.shape[-1], dtype=label.dtype)
    log_partition = jax.nn.logsumexp(logits, axis=-1)  # [B]
    at_label = jnp.where(classes[None, :] == label[:, None], logits, 0).sum(axis=-1)  # [B]; no gather, hence no NaN for a label out of range
    return log_partition - (1 - smoothing) * at_label - smoothing * logits.mean(axis=-1)


def sigmoid_cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Returns the loss of examples that have any number of labels: every class is a yes-or-no question with a sigmoid of its own.

    It is the mean over the C classes of their binary cross-entropies in nats, not the sum, so that it starts at ln 2 whatever C is and a task of
    many classes is no louder than others; `tasks.NAME.loss_weight` makes it so. There is no label smoothing: that shares a label out among classes
    that exclude each other. The loss is linear in the target, so mixing two examples' losses is mixing their labels.

    Args:
      logits: float32 or bfloat16 [B, C].
      label: int32[B, K], the classes of each example, in any order, filled up by -1. A number outside 0..C-1 names no class.

    Returns:
      float32[B].
    """
    logits = logits.astype(jnp.float32)
    classes = jnp.arange(logits.shape[-1], dtype=label.dtype)
    positive = (label[:, :, None] == classes).any(axis=1)  # [B, C]
    return (jax.nn.softplus(logits) - jnp.where(positive, logits, 0)).mean(axis=-1)


def weighted_loss(per_task: dict, weights: dict, reduction: str) -> jax.Array:
    """Returns the loss of one step from its sums per task.

    With w_k the weight, s_k the summed loss and n_k the number of examples of task k in the step:
      per_task: sum_k w_k * s_k / n_k over the tasks that have examples (CoVeR, arXiv:2112.07175, section 3.3.2): a task counts by its weight alone;
      per_example: sum_k w_k * s_k / sum_k n_k: it counts by its weight and its number of examples.
    A task without examples adds zero, and its gradient is zero.

    Args:
      per_task: name -> (s float32[], n float32[]).
      weights: name -> w.
      reduction: "per_task" or "per_example" (`config.loss.reduction`).

    Returns:
      float32[].

    Raises:
      UserError: unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise UserError(f"loss.reduction={reduction!r} is unknown: choose one of {', '.join(REDUCTIONS)}")
    names = sorted(per_task)  # one order of summation, whatever order the tasks came in
    sums = jnp.stack([jnp.float32(weights[name]) * per_task[name][0] for name in names])  # [tasks]
    counts = jnp.stack([jnp.asarray(per_task[name][1], jnp.float32) for name in names])
    if reduction == "per_example":
        sums, counts = sums.sum(keepdims=True), counts.sum(keepdims=True)
    present = counts > 0
    return jnp.where(present, sums / jnp.where(present, counts, 1), 0).sum()
