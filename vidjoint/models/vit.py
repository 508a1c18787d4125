"""The shared backbone: a Vision Transformer on tokens float[B, T, N, D] with a temporal mixer in every block, and one head per task."""

import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from vidjoint.models.block import Block, drop_rates
from vidjoint.models.embed import PatchEmbed
from vidjoint.models.heads import Heads
from vidjoint.models.layers import DENSE, layer_norm
from vidjoint.models.loop import loop, runs
from vidjoint.models.pooling import POOLS
from vidjoint.models.spec import ViTSpec

REMAT = {  # what the backward pass of a block finds stored besides the block's input
    "block": None,  # nothing
    "dots": jax.checkpoint_policies.save_from_both_policies(  # the outputs of dense layers, not the attention maps
        jax.checkpoint_policies.save_only_these_names(DENSE), jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}


class ViT(nnx.Module):
    """`embed -> blocks -> norm -> pool -> heads`. Any number of frames and any resolution that the patch divides: tables are stretched to fit."""

    def __init__(self, spec: ViTSpec, classes: dict[str, int], rngs: nnx.Rngs):
        self.spec = spec
        self.kinds: tuple | None = None  # see `build.Model`
        self.embed = PatchEmbed(spec, rngs)
        self.blocks = nnx.List([Block(spec, i, rngs) for i in range(spec.depth)])
        for block in self.blocks[1:]:
            block.mixer.share(self.blocks[0].mixer)
        self.norm = layer_norm(spec.width, spec.last_norm_eps or spec.norm_eps, spec.dtype, rngs)
        self.pool = POOLS[spec.pool](spec, rngs)
        branches = [width for block in self.blocks for width in block.mixer.branch_widths]
        self.heads = Heads((self.pool.width, *branches), classes, rngs)

    def encode(self, pixels: jax.Array, key: jax.Array | None = None, first: int | None = None) -> tuple[jax.Array, list[jax.Array]]:
        """uint8 or float[B, T, height, width, 3] in 0..255 -> tokens float[B, T, N, D] before the last norm, and the branch features of all blocks.

        `key` turns stochastic depth on. `first`: of each frame only so many tokens are returned, and the last block computes no others.
        """
        x, branches = self.embed(pixels), []
        grid = pixels.shape[2] // self.spec.patch, pixels.shape[3] // self.spec.patch
        drops = key is not None and self.spec.drop_path > 0
        keys = [jax.random.fold_in(key, i) if drops else None for i in range(self.spec.depth)]
        rates = drop_rates(self.spec)
        run, remat = Block.__call__, {}
        if self.spec.remat != "none":
            run = nnx.remat(run, static_argnums=(3, 4, 5), policy=REMAT[self.spec.remat])
            remat = {"remat": functools.partial(jax.checkpoint, policy=REMAT[self.spec.remat], prevent_cse=False)}
        stretches = runs(self.blocks, self.kinds) if self.spec.scan else [range(i, i + 1) for i in range(self.spec.depth)]
        if first is not None and len(stretches[-1]) > 1:  # the last block is unlike the others
            stretches[-1:] = stretches[-1][:-1], stretches[-1][-1:]
        for numbers in stretches:
            if len(numbers) > 1:
                each = [[values[i] for i in numbers] if drops else None for values in (keys, rates)]
                x, more = loop(lambda block, x, key, rate: block(x, key, grid, rate), [self.blocks[i] for i in numbers], x, *each, **remat)
                branches += itertools.chain(*more)
            else:
                i = numbers[0]
                x, more = run(self.blocks[i], x, keys[i], grid, rates[i], first if i == self.spec.depth - 1 else None)
                branches += more
        return x, branches

    def tokens(self, pixels: jax.Array) -> jax.Array:
        """The tokens after the last norm: float[B, T, N, D]."""
        return self.norm(self.encode(pixels)[0])

    def features(self, pixels: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """What the heads see: the pooled tokens and, after them, the branch features; float32[B, D + ...]."""
        x, branches = self.encode(pixels, key, 1 if self.pool.reads_first and self.blocks[-1].mixer.apart else None)
        key = None if key is None else jax.random.fold_in(key, self.spec.depth + 1)
        return jnp.concatenate([x.astype(jnp.float32) for x in (self.pool(x, self.norm, key), *branches)], axis=-1)

    def __call__(self, pixels: jax.Array, key: jax.Array | None = None) -> dict[str, jax.Array]:
        """Logits {task: float32[B, C]} of every head; with a key, stochastic depth and dropout are on."""
        features = self.features(pixels, key)
        if key is not None and self.spec.dropout:
            keep = jax.random.bernoulli(jax.random.fold_in(key, self.spec.depth), 1 - self.spec.dropout, features.shape)
            features = jnp.where(keep, features / (1 - self.spec.dropout), 0)
        return self.heads(features)
