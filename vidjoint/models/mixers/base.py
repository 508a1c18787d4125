"""What a temporal mixer may do inside a block. The base class is the frame-wise ViT itself: frames never meet before pooling."""

from collections.abc import Callable

import jax
from flax import nnx

Drop = Callable[[jax.Array], jax.Array]  # stochastic depth of this block, for a residual float[B, ...]


class Mixer(nnx.Module):
    """Mixer `none`: every frame by itself (late fusion; IV-ViT 3.2). At T = 1 this is the plain ViT.

    A block calls the hooks in the order of the methods below, always with tokens float[B, T, N, D]: `prefix` class tokens (0 or 1), then patches.
    """

    time_table = False  # whether the patches get a learned embedding of their frame

    def __init__(self, spec, rngs: nnx.Rngs):
        """`spec` is a `vidjoint.models.vit.ViTSpec`."""
        self.prefix = spec.prefix

    def before_attention(self, x: jax.Array, drop: Drop) -> jax.Array:
        return x

    def attend(self, attention: Callable, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Runs the block's attention on normalised tokens; returns the residual float[B, T, N, D] with q and k."""
        return attention(y)

    def after_attention(self, x: jax.Array, y: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
        """`x` after the residual was added; `y`, `q`, `k` are what `attend` took and gave."""
        return x

    def before_mlp(self, x: jax.Array) -> jax.Array:
        return x

    def after_mlp(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """`x` after the MLP's residual was added; `y` is the MLP's normalised input."""
        return x
