"""One transformer block, with the hooks of a temporal mixer."""

import functools

import jax
from flax import nnx

from vidjoint.models.layers import Attention, LayerScale, Mlp, drop_path, layer_norm
from vidjoint.models.mixers import MIXERS
from vidjoint.models.mixers.base import Grid
from vidjoint.models.spec import ViTSpec


def drop_rates(spec: ViTSpec) -> tuple[float, ...]:
    """The rate of stochastic depth of each block: it rises linearly from 0."""
    return tuple(spec.drop_path * index / max(spec.depth - 1, 1) for index in range(spec.depth))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each with a residual; the mixer's hooks lie between them."""

    def __init__(self, spec: ViTSpec, index: int, rngs: nnx.Rngs):
        """`index` counts the blocks of the model from 0."""
        self.norm1 = layer_norm(spec.width, spec.norm_eps, spec.dtype, rngs)
        self.attn = Attention(spec.width, spec.heads, dtype=spec.dtype, rngs=rngs, how=spec.attention)
        self.norm2 = layer_norm(spec.width, spec.norm_eps, spec.dtype, rngs)
        self.mlp = Mlp(spec.width, spec.mlp_dim, gelu=spec.gelu, dtype=spec.dtype, rngs=rngs)
        self.mixer = MIXERS[spec.mixer](spec, index, rngs)
        self.has_scales = bool(spec.layer_scale)
        if self.has_scales:
            self.scale1, self.scale2 = (LayerScale(spec.width, spec.layer_scale) for _ in range(2))

    def attention_scale(self, residual: jax.Array) -> jax.Array:
        """LayerScale of the attention's residual, where the model has it."""
        return self.scale1(residual) if self.has_scales else residual

    def mlp_residual(self, x: jax.Array) -> jax.Array:
        """What the MLP adds to tokens float[..., D], with its LayerScale."""
        residual = self.mlp(self.norm2(x))
        return self.scale2(residual) if self.has_scales else residual

    def __call__(
        self, x: jax.Array, key: jax.Array | None, grid: Grid | None = None, rate: float | jax.Array = 0.0, first: int | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """float[B, T, N, D] -> the same, and the mixer's branch features; `key` drives stochastic depth at that rate, None turns it off.

        `grid`: rows and columns of the patches of a frame; mixer `motion` cannot do without. `first`: only so many tokens of each frame are wanted,
        which a mixer must allow (`Mixer.apart`).
        """
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        drops = [functools.partial(drop_path, rate=rate, key=k) for k in keys]
        x = self.mixer.before_attention(x, drops[0], grid)
        attention = self.attn if first is None else functools.partial(self.attn, queries=first)
        residual, q, k = self.mixer.attend(attention, self.norm1(x))
        x = x[:, :, :first]
        residual, branches = self.mixer.after_attention(self.attention_scale(residual), x, q, k)
        x = x + drops[1](residual)
        x = self.mixer.before_mlp(x, drops[0], grid)
        residual, more = self.mixer.after_mlp(self.mlp_residual(x), x)
        return x + drops[2](residual), branches + more
