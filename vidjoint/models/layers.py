"""The parts every block is made of: dense layers, attention, MLP, stochastic depth, and tables that stretch to another size.

Parameters are float32; `dtype` is the compute type. Softmax and layer statistics are computed in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

XAVIER = nnx.initializers.xavier_uniform()  # scaled to the width, as in ViT's own code: a fixed 0.02 leaves narrow models almost linear, and stuck
ZEROS = nnx.initializers.zeros_init()


class Dense(nnx.Linear):
    """A linear layer, float[..., D] -> float[..., E]. Inputs are flattened to two axes first: XLA's batched products are slow on CPUs."""

    def __init__(self, in_features: int, out_features: int, *, dtype, rngs: nnx.Rngs, kernel_init=XAVIER):
        super().__init__(in_features, out_features, dtype=dtype, kernel_init=kernel_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def layer_norm(width: int, eps: float, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=eps, dtype=dtype, rngs=rngs)


def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v for q float[B, N, H, d] and k, v float[B, M, H, d]; returns float[B, N, H, d].

    `mask` bool[B, M]: False for keys that no query may see; each sequence must keep one.
    """
    batch, _, heads, width = q.shape
    q, k, v = (rearrange(x, "b n h d -> (b h) n d") for x in (q, k, v))  # one batch axis: the form that every backend runs fast
    logits = jnp.einsum("bnd,bmd->bnm", q * width**-0.5, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(jnp.repeat(mask, heads, axis=0)[:, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return rearrange(jnp.einsum("bnm,bmd->bnd", weights, v), "(b h) n d -> b n h d", b=batch, h=heads)


class Attention(nnx.Module):
    """Multi-head self-attention over the last but one axis, with the projections to q, k and v fused (rows q | k | v)."""

    def __init__(self, width: int, heads: int, *, dtype, rngs: nnx.Rngs):
        self.heads = heads
        self.qkv = Dense(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = Dense(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """float[..., N, D] -> (output float[..., N, D], q and k float[..., N, H, D / H]); keys are used where `mask` bool[..., N] is True."""
        *lead, tokens, width = x.shape
        q, k, v = jnp.split(self.qkv(x).reshape(-1, tokens, 3 * self.heads, width // self.heads), 3, axis=2)
        mask = None if mask is None else jnp.broadcast_to(mask, x.shape[:-1]).reshape(-1, tokens)
        out = dot_product_attention(q, k, v, mask).reshape(*lead, tokens, width)
        return self.proj(out), q.reshape(*lead, *q.shape[1:]), k.reshape(*lead, *k.shape[1:])


class Mlp(nnx.Module):
    """Two dense layers with GELU between them (float[..., D] -> float[..., D])."""

    def __init__(self, width: int, hidden: int, *, tanh_gelu: bool, dtype, rngs: nnx.Rngs):
        self.tanh_gelu = tanh_gelu
        self.fc1 = Dense(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Dense(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=self.tanh_gelu))


def drop_path(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Stochastic depth (Huang et al. 2016): zeroes examples of a residual float[B, ...] with probability `rate`; others grow by 1 / (1 - rate)."""
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1.0 - rate), 0)


def bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """Weights float32[new_size, size] of cubic interpolation along one axis: half-pixel centres, clamped edges, no antialias, A = -0.75.

    This is torch's kernel, with which published position tables were resized; `jax.image.resize` uses A = -0.5 and antialiases.
    """
    centre = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    first = np.floor(centre).astype(int) - 1
    matrix = np.zeros((new_size, size))
    for tap in range(4):
        distance = np.abs(centre - (first + tap))
        near = (1.25 * distance - 2.25) * distance**2 + 1.0
        far = -0.75 * (((distance - 5.0) * distance + 8.0) * distance - 4.0)
        weight = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
        np.add.at(matrix, (np.arange(new_size), np.clip(first + tap, 0, size - 1)), weight)
    return matrix.astype(np.float32)


def resize_position(table: jax.Array, prefix: int, grid: tuple[int, int], new_grid: tuple[int, int]) -> jax.Array:
    """Stretches a position table float[prefix + h * w, D] to another patch grid, bicubically; the rows of class and register tokens stay."""
    if grid == new_grid:
        return table
    patches = table[prefix:].reshape(*grid, -1)
    rows, columns = (bicubic_matrix(old, new) for old, new in zip(grid, new_grid, strict=True))
    patches = jnp.einsum("ih,hwd,jw->ijd", rows, patches, columns)
    return jnp.concatenate([table[:prefix], patches.reshape(-1, table.shape[-1])])


def resize_time(table: jax.Array, frames: int) -> jax.Array:
    """Takes `frames` rows of a time table float[T, D] by nearest neighbour, as TimeSformer does: a single image gets row 0."""
    return table if len(table) == frames else table[np.arange(frames) * len(table) // frames]
