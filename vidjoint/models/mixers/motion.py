"""Motion self-attention (MEViT, Li and Zhuang 2022): attention over time that also sees a patch's neighbours, where its object may have moved to."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from vidjoint.models.mixers.base import Drop, Grid
from vidjoint.models.mixers.spacetime import TemporalBranch
from vidjoint.models.spec import ViTSpec


class Motion(TemporalBranch):
    """MEViT eq. 8: a patch attends to the M x M block of patches that it lies in, in all frames; then (eq. 6) to all patches of its frame.

    Parameters are those of `divided`, which it equals at M = 1; with one block over the whole grid the branch is joint attention. The paper's
    equation counts the class token among the keys; here, as in TimeSformer's code, it stays out (MEViT's final model has none at this stage). The
    default order is that of the equations, `order="space_time"` that of the summary and fig. 2. At T = 1 a patch attends within its block of the
    image; with M = 1 that is divided attention's affine map.
    """

    def __init__(self, spec: ViTSpec, index: int, rngs: nnx.Rngs):
        super().__init__(spec, index, rngs, fc=spec.motion.temporal_fc)
        self.settings = spec.motion
        self.apart = self.settings.order == "time_space" or not self.active

    def before_attention(self, x: jax.Array, drop: Drop, grid: Grid | None) -> jax.Array:
        return self.move(x, drop, grid) if self.settings.order == "time_space" else x

    def before_mlp(self, x: jax.Array, drop: Drop, grid: Grid | None) -> jax.Array:
        return self.move(x, drop, grid) if self.settings.order == "space_time" else x

    def move(self, x: jax.Array, drop: Drop, grid: Grid) -> jax.Array:
        """float[B, T, N, D] with patches on `grid` -> the same after motion self-attention and its residual."""
        if not self.active:
            return x
        blocks, mask = to_blocks(x[:, :, self.prefix :], grid, self.settings.block)
        patches = from_blocks(blocks + self.temporal_residual(blocks, drop, mask), grid, self.settings.block)
        return jnp.concatenate([x[:, :, : self.prefix], patches], axis=2)


def to_blocks(patches: jax.Array, grid: Grid, side: int) -> tuple[jax.Array, np.ndarray | None]:
    """Cuts float[B, T, rows x columns, D] into sequences float[B, blocks, T M M, D], blocks of `side` = M from the top left corner.

    Where M does not divide the grid, the last blocks reach over its edge: also gives bool[blocks, T M M], False for places beyond, else None.
    """
    frames, (height, width) = patches.shape[1], _block(grid, side)
    below, right = (-size % block for size, block in zip(grid, (height, width), strict=True))
    places = rearrange(patches, "b t (r c) d -> b t r c d", r=grid[0])
    mask = None
    if below or right:
        places = jnp.pad(places, ((0, 0), (0, 0), (0, below), (0, right), (0, 0)))
        real = np.pad(np.ones(grid, bool), ((0, below), (0, right)))
        mask = np.tile(rearrange(real, "(i h) (j w) -> (i j) (h w)", h=height, w=width), frames)
    return rearrange(places, "b t (i h) (j w) d -> b (i j) (t h w) d", h=height, w=width), mask


def from_blocks(blocks: jax.Array, grid: Grid, side: int) -> jax.Array:
    """Undoes `to_blocks`: float[B, blocks, T M M, D] -> float[B, T, rows x columns, D]."""
    (rows, columns), (height, width) = grid, _block(grid, side)
    down = -(-rows // height)
    places = rearrange(blocks, "b (i j) (t h w) d -> b t (i h) (j w) d", i=down, h=height, w=width)
    return rearrange(places[:, :, :rows, :columns], "b t r c d -> b t (r c) d")


def _block(grid: Grid, side: int) -> Grid:
    """Rows and columns of a block: not more than there are."""
    return min(side, grid[0]), min(side, grid[1])
