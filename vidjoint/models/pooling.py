"""From the tokens of all frames to one feature vector per clip. A pool is a module that takes the tokens and the model's last norm."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from vidjoint.models.block import Block, drop_rates
from vidjoint.models.layers import Attention, affine, dot_product_attention, layer_norm
from vidjoint.models.position import resize_time
from vidjoint.models.spec import ViTSpec


class ClassToken(nnx.Module):
    """Mean of the frames' class tokens (late fusion; IV-ViT eq. 5)."""

    reads_first = True  # whether the first token of every frame is all that it reads

    def __init__(self, spec: ViTSpec, rngs: nnx.Rngs):
        self.prefix, self.width = spec.prefix, spec.width

    def __call__(self, x: jax.Array, norm: Callable, key: jax.Array | None) -> jax.Array:
        """Tokens float[B, T, N, D] before the last norm -> float[B, self.width]; `key` turns stochastic depth on where there is any."""
        return norm(x[:, :, 0]).mean(axis=1)


class Average(ClassToken):
    """Mean of all patches of all frames."""

    reads_first = False

    def __call__(self, x: jax.Array, norm: Callable, key: jax.Array | None) -> jax.Array:
        return norm(x[:, :, self.prefix :]).mean(axis=(1, 2))


class PatchMean(ClassToken):
    """Mean of all patches of all frames before the last norm (VideoMAE; timm's `fc_norm`)."""

    reads_first = False

    def __call__(self, x: jax.Array, norm: Callable, key: jax.Array | None) -> jax.Array:
        return norm(x[:, :, self.prefix :].mean(axis=(1, 2)))


class ClassAndAverage(ClassToken):
    """The class token and the mean of the patches side by side, both after the last norm, means over the frames: 2 D (DINOv2's linear classifier)."""

    reads_first = False

    def __init__(self, spec: ViTSpec, rngs: nnx.Rngs):
        super().__init__(spec, rngs)
        self.width = 2 * spec.width

    def __call__(self, x: jax.Array, norm: Callable, key: jax.Array | None) -> jax.Array:
        x = norm(x)
        return jnp.concatenate([x[:, :, 0].mean(axis=1), x[:, :, self.prefix :].mean(axis=(1, 2))], axis=-1)


class FrameMean(ClassToken):
    """Mean over the frames before the last norm, then the class token: with mixer `none`, TimeSformer's space-only attention."""

    def __call__(self, x: jax.Array, norm: Callable, key: jax.Array | None) -> jax.Array:
        return norm(x[:, :, 0].mean(axis=1))


class LastFrame(ClassToken):
    """The class token of the last frame (AM Flow's image branch)."""

    def __call__(self, x: jax.Array, norm: Callable, key: jax.Array | None) -> jax.Array:
        return norm(x[:, -1, 0])


class FirstToken(ClassToken):
    """The first token of the first frame, which without a class token is a patch: Hugging Face's VideoMAE without `use_mean_pooling`."""

    reads_first = False  # joint attention may have no class token to ask for

    def __call__(self, x: jax.Array, norm: Callable, key: jax.Array | None) -> jax.Array:
        return norm(x[:, 0, 0])


class ClassAttention(nnx.Module):
    """Class-attention stage (MEViT eqs. 10, 9; CaiT): a class token of its own reads the patches of all frames, which stay as they are.

    It enters here, without a position; class tokens of the frames, where there are any, are not used. Its blocks are never dropped (CaiT).
    """

    reads_first = False

    def __init__(self, spec: ViTSpec, rngs: nnx.Rngs):
        self.prefix, self.width = spec.prefix, spec.width
        self.class_token = nnx.Param(table(rngs, spec.width))
        self.blocks = nnx.List([ClassAttentionBlock(spec, rngs) for _ in range(spec.class_attention.blocks)])

    def __call__(self, x: jax.Array, norm: Callable, key: jax.Array | None) -> jax.Array:
        patches = x[:, :, self.prefix :].reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        for block in self.blocks:
            token = block(token, patches)
        return norm(token[:, 0])


class ClassAttentionBlock(Block):
    """A block that updates the class token alone. Its parameters are those of a plain block: the last one of a pretrained ViT fits.

    One norm serves token and patches (eq. 10). Keys are the patches, or with `keys="all"` the token as well (CaiT).
    """

    def __init__(self, spec: ViTSpec, rngs: nnx.Rngs):
        super().__init__(plain(spec, depth=1), 0, rngs)
        self.token_is_key = spec.class_attention.keys == "all"

    def __call__(self, token: jax.Array, patches: jax.Array) -> jax.Array:
        """Token float[B, 1, D] and the patches of all frames float[B, T N, D] -> the token."""
        query, keys = self.norm1(token), self.norm1(patches)
        if self.token_is_key:
            keys = jnp.concatenate([query, keys], axis=1)
        token = token + self.attention_scale(cross_attention(self.attn, query, keys))
        return token + self.mlp_residual(token)


class TemporalEncoder(nnx.Module):
    """ViViT's factorised encoder (Arnab et al. 2021, model 2): one vector per frame, a time table, and a small transformer over the frames.

    The vector is the frame's class token after the model's last norm, or the mean of its patches where there is none. The encoder has a class token
    and a last norm of its own; its stochastic depth rises from 0 as the model's does. At T = 1 it sees one frame, that of the table's first row.
    """

    def __init__(self, spec: ViTSpec, rngs: nnx.Rngs):
        depth = spec.temporal_encoder.depth
        self.prefix, self.has_class_token, self.width = spec.prefix, spec.class_token, spec.width
        self.reads_first = spec.class_token
        self.class_token = nnx.Param(table(rngs, spec.width))
        self.time = nnx.Param(table(rngs, spec.times, spec.width))
        self.blocks = nnx.List([Block(plain(spec, depth), i, rngs) for i in range(depth)])
        self.rates = drop_rates(plain(spec, depth))
        self.norm = layer_norm(spec.width, spec.norm_eps, spec.dtype, rngs)

    def __call__(self, x: jax.Array, norm: Callable, key: jax.Array | None) -> jax.Array:
        batch, frames, _, width = x.shape
        x = norm(x[:, :, 0]) if self.has_class_token else norm(x[:, :, self.prefix :]).mean(axis=2)
        x = x + resize_time(self.time[...], frames).astype(x.dtype)
        token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (batch, 1, width))
        x = jnp.concatenate([token, x], axis=1)[:, None]  # [B, 1, 1 + T, D]: to a block, one frame whose tokens are the frames
        for i, block in enumerate(self.blocks):
            x, _ = block(x, None if key is None else jax.random.fold_in(key, i), rate=self.rates[i])
        return self.norm(x[:, 0, 0])


def cross_attention(attention: Attention, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """float[B, Q, D] attends to float[B, N, D], projected by a self-attention's parameters; returns float[B, Q, D]."""
    width, heads, dtype = queries.shape[-1], attention.heads, queries.dtype
    kernels, biases = (jnp.split(p[...].astype(dtype), 3, axis=-1) for p in (attention.qkv.kernel, attention.qkv.bias))

    def project(x, i):
        return affine(x, kernels[i], biases[i]).reshape(x.shape[0], -1, heads, width // heads)

    out = dot_product_attention(project(queries, 0), project(keys, 1), project(keys, 2))
    return attention.proj(out.reshape(queries.shape))


def plain(spec: ViTSpec, depth: int) -> ViTSpec:
    """The model's spec for `depth` blocks that have no temporal mixer."""
    return dataclasses.replace(spec, depth=depth, mixer="none", mixer_blocks=())


def table(rngs: nnx.Rngs, *shape: int) -> jax.Array:
    """Normal entries, as large as those of the model's position table."""
    return nnx.initializers.normal(shape[-1] ** -0.5)(rngs.params(), shape)


POOLS = {
    "class_token": ClassToken,
    "average": Average,
    "patch_mean": PatchMean,
    "class_and_average": ClassAndAverage,
    "frame_mean": FrameMean,
    "last_frame": LastFrame,
    "first_token": FirstToken,
    "class_attention": ClassAttention,
    "temporal_encoder": TemporalEncoder,
}
NEED_CLASS_TOKEN = ("class_token", "class_and_average", "frame_mean", "last_frame")
