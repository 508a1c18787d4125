"""Temporal processing units (AM Flow, fig. 2): from the bottleneck embeddings of all frames to one feature vector per clip.

Any number of frames works; one frame (an image) is a sequence of one. Sequences are float32, products are computed in the model's type.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from vidjoint.models.adapters import TORCH_UNIFORM
from vidjoint.models.layers import Dense, dot_product_attention, layer_norm, product
from vidjoint.models.spec import AMFlowSpec, ViTSpec

SMALL = nnx.initializers.normal(0.01)  # TCN's


def linear_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """phi(q) (sum phi(k) v^T) / (phi(q) sum phi(k)) with phi = elu + 1 (Katharopoulos et al. 2020, eq. 5), for float[S, N, H, d]; no N x N map."""
    dtype = v.dtype
    q, k, v = jax.nn.elu(q.astype(jnp.float32)) + 1, jax.nn.elu(k.astype(jnp.float32)) + 1, v.astype(jnp.float32)
    total = jnp.einsum("snhd,shd->snh", q, k.sum(axis=1)) + 1e-6
    return (jnp.einsum("snhd,shde->snhe", q, jnp.einsum("snhd,snhe->shde", k, v)) / total[..., None]).astype(dtype)


class EncoderLayer(nnx.Module):
    """A transformer encoder's layer with the norm after each residual and ReLU (Vaswani et al. 2017); `attend` as `dot_product_attention`."""

    def __init__(self, width: int, heads: int, hidden: int, attend: Callable, dtype, rngs: nnx.Rngs):
        self.heads, self.attend = heads, attend
        self.qkv = Dense(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = Dense(width, width, dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(width, 1e-5, jnp.float32, rngs)
        self.fc1 = Dense(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Dense(hidden, width, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, 1e-5, jnp.float32, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32[S, N, W] -> the same, for S sequences of N."""
        q, k, v = jnp.split(rearrange(self.qkv(x), "s n (h d) -> s n h d", h=3 * self.heads), 3, axis=2)
        x = self.norm1(x + self.proj(rearrange(self.attend(q, k, v), "s n h d -> s n (h d)")))
        return self.norm2(x + self.fc2(jax.nn.relu(self.fc1(x))))


def sinusoidal(frames: int, width: int) -> np.ndarray:
    """Table float32[T, W] of the times 0..T-1: sines, then cosines, of wavelengths from 2 pi to 10000 x 2 pi (Vaswani et al. 2017, 3.5)."""
    angles = np.arange(frames)[:, None] / 10000 ** (np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :width].astype(np.float32)


class TransformerUnit(nnx.Module):
    """Transformer encoder. The paper gives no embedding of time; sinusoids have no parameters and serve any length."""

    def __init__(self, settings: AMFlowSpec, dtype, rngs: nnx.Rngs):
        self.width = settings.bottleneck
        layer = (self.width, settings.tpu_heads, settings.tpu_mlp, dot_product_attention, dtype, rngs)
        self.layers = nnx.List([EncoderLayer(*layer) for _ in range(settings.tpu_layers)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32[S, T, r] -> float32[S, T, W]."""
        x = x + sinusoidal(x.shape[1], self.width)
        for layer in self.layers:
            x = layer(x)
        return x


class CausalConv(nnx.Module):
    """y_t = W_0 x_(t - dilation) + W_1 x_t + b, zeros before the first frame; each output's weights are a direction times a length (weight norm)."""

    def __init__(self, inputs: int, width: int, dilation: int, dtype, rngs: nnx.Rngs):
        self.dilation, self.dtype = dilation, dtype
        self.kernel = nnx.Param(SMALL(rngs.params(), (2 * inputs, width)))  # rows of W_0, then of W_1
        self.scale = nnx.Param(jnp.linalg.norm(self.kernel[...], axis=0))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        past = jnp.pad(x, ((0, 0), (self.dilation, 0), (0, 0)))[:, : x.shape[1]]
        kernel = self.kernel[...] * (self.scale[...] / jnp.linalg.norm(self.kernel[...], axis=0))
        pair = jnp.concatenate([past, x], axis=-1).astype(self.dtype)
        return product(pair, kernel.astype(self.dtype)).astype(jnp.float32) + self.bias[...]


class TemporalBlock(nnx.Module):
    """Residual block of two dilated causal convolutions (Bai et al. 2018, fig. 1b), without its dropout."""

    def __init__(self, inputs: int, width: int, dilation: int, dtype, rngs: nnx.Rngs):
        self.conv1 = CausalConv(inputs, width, dilation, dtype, rngs)
        self.conv2 = CausalConv(width, width, dilation, dtype, rngs)
        self.project = inputs != width
        if self.project:
            self.residual = Dense(inputs, width, dtype=dtype, rngs=rngs, kernel_init=SMALL)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(x))))
        return jax.nn.relu(y + (self.residual(x) if self.project else x))


class TCNUnit(nnx.Module):
    """Temporal convolutional network: block i has dilation 2^i, so L blocks see 2^(L + 1) - 1 frames."""

    def __init__(self, settings: AMFlowSpec, dtype, rngs: nnx.Rngs):
        self.width = settings.tpu_width
        inputs = [settings.bottleneck] + [self.width] * (settings.tpu_layers - 1)
        self.blocks = nnx.List([TemporalBlock(n, self.width, 2**i, dtype, rngs) for i, n in enumerate(inputs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x


class LSTMUnit(nnx.Module):
    """Stacked LSTMs; their states start at zero."""

    def __init__(self, settings: AMFlowSpec, dtype, rngs: nnx.Rngs):
        self.width = settings.tpu_width
        inputs = [settings.bottleneck] + [self.width] * (settings.tpu_layers - 1)
        start = dict(kernel_init=TORCH_UNIFORM, recurrent_kernel_init=TORCH_UNIFORM)
        self.cells = nnx.List([nnx.OptimizedLSTMCell(n, self.width, dtype=dtype, rngs=rngs, **start) for n in inputs])

    def __call__(self, x: jax.Array) -> jax.Array:
        zeros = jnp.zeros((x.shape[0], self.width))  # not len(x): the batch may be symbolic (vidjoint.export)
        x = rearrange(x, "s t w -> t s w")
        for cell in self.cells:  # nnx.RNN carries the weights through its scan, and so keeps one copy of them for every frame
            _, x = jax.lax.scan(lambda state, frame, cell=cell: cell(state, frame), (zeros, zeros), x)
        return rearrange(x, "t s w -> s t w")


UNITS = {"transformer": TransformerUnit, "tcn": TCNUnit, "lstm": LSTMUnit}


class TPU(nnx.Module):
    """A unit over time, with the mean over tokens before it or (`tpu_sequence="tokens"`) after it, and its states squeezed to one."""

    def __init__(self, spec: ViTSpec, rngs: nnx.Rngs):
        settings = spec.am_flow
        self.unit = UNITS[settings.tpu](settings, spec.dtype, rngs)
        self.width = self.unit.width
        self.per_token = settings.tpu_sequence == "tokens"
        self.mean = settings.tpu_squeeze == "mean" or (settings.tpu_squeeze == "auto" and settings.tpu == "transformer")

    def __call__(self, embedding: jax.Array) -> jax.Array:
        """float[B, T, N, r] -> float32[B, W]."""
        if self.per_token:
            x = rearrange(embedding.astype(jnp.float32), "b t n r -> (b n) t r")
        else:
            x = embedding.mean(axis=2, dtype=jnp.float32)
        x = self.unit(x)
        x = x.mean(axis=1) if self.mean else x[:, -1]
        return x.reshape(embedding.shape[0], -1, x.shape[-1]).mean(axis=1)
