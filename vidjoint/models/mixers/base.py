"""What a temporal mixer may do inside a block. The base class is the frame-wise ViT itself: frames never meet before pooling."""

from collections.abc import Callable

import jax
from flax import nnx

from vidjoint.models.spec import ViTSpec

Drop = Callable[[jax.Array], jax.Array]  # stochastic depth of this block, for a residual float[B, ...]
Branches = tuple[jax.Array, ...]
Grid = tuple[int, int]


class Mixer(nnx.Module):
    """Mixer `none`: every frame by itself (late fusion; IV-ViT 3.2). At T = 1 this is the plain ViT.

    A block calls the hooks in the order of the methods below, always with tokens float[B, T, N, D]: `prefix` tokens (class token, registers), then
    patches.
    """

    time_table = False  # whether the patches get a learned embedding of their frame
    apart = True  # whether tokens don't meet after the attention, so that a last block can leave out those that nobody reads
    branch_widths: tuple[int, ...] = ()  # widths of the feature vectors that this block gives to the heads besides the tokens

    def __init__(self, spec: ViTSpec, index: int, rngs: nnx.Rngs):
        """`index` counts the blocks from 0."""
        self.prefix = spec.prefix
        self.active = spec.mixes(index)  # in other blocks frames don't talk

    def share(self, first: "Mixer") -> None:
        """Takes from the mixer of block 0 what all blocks have in common; that block's name stands before its parameters."""

    def before_attention(self, x: jax.Array, drop: Drop, grid: Grid | None) -> jax.Array:
        """`grid`: rows and columns of the patches of a frame; None only where the caller of a block has none to give."""
        return x

    def attend(self, attention: Callable, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Runs the block's attention on normalised tokens; returns the residual float[B, T, N, D] with q and k float[..., H, D / H]."""
        return attention(y)

    def after_attention(self, residual: jax.Array, x: jax.Array, q: jax.Array, k: jax.Array) -> tuple[jax.Array, Branches]:
        """The residual that is added to the tokens `x`, and branch features float[B, branch_widths[0]]; `q`, `k` are what `attend` gave."""
        return residual, ()

    def before_mlp(self, x: jax.Array, drop: Drop, grid: Grid | None) -> jax.Array:
        return x

    def after_mlp(self, residual: jax.Array, x: jax.Array) -> tuple[jax.Array, Branches]:
        """Likewise for the residual of the MLP."""
        return residual, ()
