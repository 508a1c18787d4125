"""The shared backbone: a Vision Transformer on tokens float[B, T, N, D] with a temporal mixer in every block, and one head per task."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vidjoint.models.heads import POOLS, Heads
from vidjoint.models.layers import ZEROS, Attention, Dense, Mlp, drop_path, layer_norm, resize_position, resize_time
from vidjoint.models.mixers import MIXERS


@dataclass(frozen=True)
class DividedSpec:
    image_temporal: str = "affine"


@dataclass(frozen=True)
class TokenShiftSpec:
    tokens: str = "class"
    fraction: float = 0.125
    direction: str = "next_first"


@dataclass(frozen=True)
class ViTSpec:
    """Sizes and choices of one model; the keys of `config.model` with the variant resolved (`vidjoint.models.build.spec_from_config`)."""

    width: int
    depth: int
    heads: int
    mlp_dim: int
    patch: int  # pixels
    frames: int = 8  # rows of the time table
    image_size: int = 224  # pixels; gives the grid of the position table
    mixer: str = "none"
    temporal_init: str = "zero"
    pool: str = "class_token"
    class_token: bool = True
    dtype: str = "float32"
    remat: str = "none"
    drop_path: float = 0.0
    dropout: float = 0.0
    gelu: str = "exact"
    norm_eps: float = 1e-6
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    divided: DividedSpec = DividedSpec()
    token_shift: TokenShiftSpec = TokenShiftSpec()

    @property
    def prefix(self) -> int:
        """Tokens before the patches of each frame."""
        return int(self.class_token)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches that the position table was made for."""
        return self.image_size // self.patch, self.image_size // self.patch


class Block(nnx.Module):
    """Pre-norm attention and MLP, each with a residual; the mixer's hooks lie between them."""

    def __init__(self, spec: ViTSpec, drop_rate: float, rngs: nnx.Rngs):
        self.drop_rate = drop_rate
        self.norm1 = layer_norm(spec.width, spec.norm_eps, spec.dtype, rngs)
        self.attn = Attention(spec.width, spec.heads, dtype=spec.dtype, rngs=rngs)
        self.norm2 = layer_norm(spec.width, spec.norm_eps, spec.dtype, rngs)
        self.mlp = Mlp(spec.width, spec.mlp_dim, tanh_gelu=spec.gelu == "tanh", dtype=spec.dtype, rngs=rngs)
        self.mixer = MIXERS[spec.mixer](spec, rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """float[B, T, N, D] -> float[B, T, N, D]; `key` drives stochastic depth, None turns it off."""
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        drops = [functools.partial(drop_path, rate=self.drop_rate, key=k) for k in keys]
        x = self.mixer.before_attention(x, drops[0])
        y = self.norm1(x)
        residual, q, k = self.mixer.attend(self.attn, y)
        x = self.mixer.after_attention(x + drops[1](residual), y, q, k)
        x = self.mixer.before_mlp(x)
        y = self.norm2(x)
        return self.mixer.after_mlp(x + drops[2](self.mlp(y)), y)


class PatchEmbed(nnx.Module):
    """Pixels to tokens: normalise, cut into patches, project, add class token, position and (for mixers that ask for it) time."""

    def __init__(self, spec: ViTSpec, rngs: nnx.Rngs):
        self.spec = spec
        rows, columns = spec.grid
        self.proj = Dense(3 * spec.patch**2, spec.width, dtype=spec.dtype, rngs=rngs)
        table = nnx.initializers.normal(spec.width**-0.5)  # as large as what the projection makes of the pixels, whatever the width
        self.position = nnx.Param(table(rngs.params(), (spec.prefix + rows * columns, spec.width)))
        if spec.class_token:
            self.class_token = nnx.Param(ZEROS(rngs.params(), (spec.width,)))
        if MIXERS[spec.mixer].time_table:
            init = table if spec.temporal_init == "random" else ZEROS
            self.time = nnx.Param(init(rngs.params(), (spec.frames, spec.width)))

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """uint8 or float[B, T, height, width, 3] in 0..255 -> float[B, T, N, D], N = class token + (height / patch) (width / patch).

        Raises:
          ValueError: the patch does not divide height or width.
        """
        spec, (batch, frames, height, width, _) = self.spec, pixels.shape
        if height % spec.patch or width % spec.patch:
            raise ValueError(f"frames of {height} x {width} pixels cannot be cut into patches of {spec.patch}")
        grid = height // spec.patch, width // spec.patch
        x = (pixels.astype(jnp.float32) / 255 - jnp.array(spec.mean)) / jnp.array(spec.std)
        x = self.proj(rearrange(x.astype(spec.dtype), "b t (h p) (w q) c -> b t (h w) (p q c)", p=spec.patch, q=spec.patch))
        position = resize_position(self.position[...], spec.prefix, spec.grid, grid)
        x = x + position[spec.prefix :].astype(x.dtype)
        if MIXERS[spec.mixer].time_table:
            x = x + resize_time(self.time[...], frames)[:, None].astype(x.dtype)
        if spec.class_token:
            token = (self.class_token[...] + position[0]).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (batch, frames, 1, token.size)), x], axis=2)
        return x


class ViT(nnx.Module):
    """`embed -> blocks -> norm -> pool -> heads`. Any number of frames and any resolution that the patch divides: tables are stretched to fit."""

    def __init__(self, spec: ViTSpec, classes: dict[str, int], rngs: nnx.Rngs):
        self.spec = spec
        self.embed = PatchEmbed(spec, rngs)
        rates = [spec.drop_path * i / max(spec.depth - 1, 1) for i in range(spec.depth)]
        self.blocks = nnx.List([Block(spec, rate, rngs) for rate in rates])
        self.norm = layer_norm(spec.width, spec.norm_eps, spec.dtype, rngs)
        self.heads = Heads(spec.width, classes, rngs)

    def tokens(self, pixels: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """uint8 or float[B, T, height, width, 3] in 0..255 -> float[B, T, N, D] after the last norm; `key` turns stochastic depth on."""
        x = self.embed(pixels)
        run = nnx.remat(Block.__call__) if self.spec.remat == "block" else Block.__call__
        for i, block in enumerate(self.blocks):
            x = run(block, x, None if key is None else jax.random.fold_in(key, i))
        return self.norm(x)

    def features(self, pixels: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Pooled tokens: float32[B, D]."""
        return POOLS[self.spec.pool](self.tokens(pixels, key), self.spec.prefix).astype(jnp.float32)

    def __call__(self, pixels: jax.Array, key: jax.Array | None = None) -> dict[str, jax.Array]:
        """Logits {task: float32[B, C]} of every head; with a key, stochastic depth and dropout are on."""
        features = self.features(pixels, key)
        if key is not None and self.spec.dropout:
            keep = jax.random.bernoulli(jax.random.fold_in(key, self.spec.depth), 1 - self.spec.dropout, features.shape)
            features = jnp.where(keep, features / (1 - self.spec.dropout), 0)
        return self.heads(features)
