"""The parts every block is made of: dense layers, attention, MLP and stochastic depth.

Parameters are float32; `dtype` is the compute type. Softmax and layer statistics are computed in float32.
"""

import functools

import jax
import jax.numpy as jnp
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


GELUS = {
    "exact": functools.partial(jax.nn.gelu, approximate=False),  # timm, Hugging Face's ViT, DINOv2, TimeSformer
    "tanh": functools.partial(jax.nn.gelu, approximate=True),  # Flax: the ViT of Google, big_vision, ViViT
    "quick": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP
}


class Mlp(nnx.Module):
    """Two dense layers with GELU between them (float[..., D] -> float[..., D]); `gelu` is one of GELUS."""

    def __init__(self, width: int, hidden: int, *, gelu: str, dtype, rngs: nnx.Rngs):
        self.gelu = gelu
        self.fc1 = Dense(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Dense(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(GELUS[self.gelu](self.fc1(x)))


class LayerScale(nnx.Module):
    """A factor for each channel of a residual (CaiT; DINOv2): float[..., D] -> the same."""

    def __init__(self, width: int, value: float):
        self.gamma = nnx.Param(jnp.full(width, value))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.gamma[...].astype(x.dtype)


def drop_path(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Stochastic depth (Huang et al. 2016): zeroes examples of a residual float[B, ...] with probability `rate`; others grow by 1 / (1 - rate)."""
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1.0 - rate), 0)
