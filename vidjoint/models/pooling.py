"""From the tokens of all frames to one feature vector per clip. A pool is a module that takes the tokens and the model's last norm."""

from collections.abc import Callable

import jax
from flax import nnx

from vidjoint.models.spec import ViTSpec


class ClassToken(nnx.Module):
    """Mean of the frames' class tokens (late fusion; IV-ViT eq. 5)."""

    def __init__(self, spec: ViTSpec, rngs: nnx.Rngs):
        self.prefix = spec.prefix

    def __call__(self, x: jax.Array, norm: Callable, key: jax.Array | None) -> jax.Array:
        """Tokens float[B, T, N, D] before the last norm -> float[B, D]; `key` turns stochastic depth on where there is any."""
        return norm(x[:, :, 0]).mean(axis=1)


class Average(ClassToken):
    """Mean of all patches of all frames."""

    def __call__(self, x: jax.Array, norm: Callable, key: jax.Array | None) -> jax.Array:
        return norm(x[:, :, self.prefix :]).mean(axis=(1, 2))


class FrameMean(ClassToken):
    """Mean over the frames before the last norm, then the class token: with mixer `none`, TimeSformer's space-only attention."""

    def __call__(self, x: jax.Array, norm: Callable, key: jax.Array | None) -> jax.Array:
        return norm(x[:, :, 0].mean(axis=1))


class LastFrame(ClassToken):
    """The class token of the last frame (AM Flow's image branch)."""

    def __call__(self, x: jax.Array, norm: Callable, key: jax.Array | None) -> jax.Array:
        return norm(x[:, -1, 0])


POOLS = {"class_token": ClassToken, "average": Average, "frame_mean": FrameMean, "last_frame": LastFrame}
NEED_CLASS_TOKEN = ("class_token", "frame_mean", "last_frame")
