"""From tokens to predictions: pooling, then one linear classifier per task."""

import jax
import jax.numpy as jnp
from flax import nnx

from vidjoint.models.layers import Dense


def pool_class_token(tokens: jax.Array, prefix: int) -> jax.Array:
    """Mean of the frames' class tokens (late fusion; IV-ViT eq. 5): float[B, T, N, D] -> float[B, D]."""
    return tokens[:, :, 0].mean(axis=1)


def pool_average(tokens: jax.Array, prefix: int) -> jax.Array:
    """Mean of all patches of all frames: float[B, T, N, D] -> float[B, D]."""
    return tokens[:, :, prefix:].mean(axis=(1, 2))


POOLS = {"class_token": pool_class_token, "average": pool_average}


class Heads(nnx.Module):
    """One classifier per task, by name (CoVeR 3.3). All of them see every example: the loss picks the one that belongs to its task."""

    def __init__(self, width: int, classes: dict[str, int], rngs: nnx.Rngs):
        self.tasks = tuple(classes)
        for task, count in classes.items():
            setattr(self, task, Dense(width, count, dtype=jnp.float32, rngs=rngs, kernel_init=nnx.initializers.truncated_normal(0.02)))

    def __call__(self, features: jax.Array) -> dict[str, jax.Array]:
        """float[B, D] -> {task: logits float32[B, C of the task]}."""
        return {task: getattr(self, task)(features.astype(jnp.float32)) for task in self.tasks}
