"""From features to predictions: one linear classifier per task."""

import jax
import jax.numpy as jnp
from flax import nnx

from vidjoint.models.layers import Dense


class Heads(nnx.Module):
    """One classifier per task, by name (CoVeR 3.3). All of them see every example: the loss picks the one that belongs to its task.

    Where the features are those of several branches side by side, the logits are the mean of the branches' logits (AM Flow, classification head):
    one product with all their kernels stacked, over the number of branches. The bias stands for the mean of theirs.
    """

    def __init__(self, widths: tuple[int, ...], classes: dict[str, int], rngs: nnx.Rngs):
        self.tasks, self.branches = tuple(classes), len(widths)
        for task, count in classes.items():
            setattr(self, task, Dense(sum(widths), count, dtype=jnp.float32, rngs=rngs, kernel_init=nnx.initializers.truncated_normal(0.02)))

    def __call__(self, features: jax.Array) -> dict[str, jax.Array]:
        """float[B, sum of widths] -> {task: logits float32[B, C of the task]}."""
        features = features.astype(jnp.float32) / self.branches
        return {task: getattr(self, task)(features) for task in self.tasks}
