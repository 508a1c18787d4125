"""TimeSformer's attention over space and time (Bertasius et al. 2021), the model of CoVeR (3.1): divided and joint.

There is one class token per video. Here every frame holds a copy of it and all copies stay equal.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vidjoint.models.layers import XAVIER, ZEROS, Attention, Dense, layer_norm
from vidjoint.models.mixers.base import Drop, Mixer
from vidjoint.models.spec import ViTSpec


class OneClassToken(Mixer):
    """Spatial attention that keeps the frames' copies of the class token equal: its residual is averaged over the frames (TimeSformer's code)."""

    def attend(self, attention, y: jax.Array):
        residual, q, k = attention(y)
        special = residual[:, :, : self.prefix]
        special = jnp.broadcast_to(special.mean(axis=1, keepdims=True), special.shape)
        return jnp.concatenate([special, residual[:, :, self.prefix :]], axis=2), q, k


class Divided(OneClassToken):
    """Divided attention: each patch attends to its own place in all frames, then to all patches of its frame.

    Follows the published code where the paper differs from it: the class token takes no part in temporal attention, and its spatial residual is
    averaged over the frames. The branch ends in a dense layer that is zero at the start (`temporal_init="zero"`): a fresh model is the image ViT.
    At T = 1 the softmax has one key, and the branch is the affine map fc(W_o W_v LN(x)) (CoVeR, appendix A); `image_temporal="skip"` leaves it out.
    """

    time_table = True

    def __init__(self, spec: ViTSpec, index: int, rngs: nnx.Rngs):
        super().__init__(spec, index, rngs)
        self.skip_images = spec.divided.image_temporal == "skip"
        if not self.active:
            return
        init = ZEROS if spec.temporal_init == "zero" else XAVIER
        self.temporal_norm = layer_norm(spec.width, spec.norm_eps, spec.dtype, rngs)
        self.temporal_attn = Attention(spec.width, spec.heads, dtype=spec.dtype, rngs=rngs)
        self.temporal_fc = Dense(spec.width, spec.width, dtype=spec.dtype, rngs=rngs, kernel_init=init)

    def before_attention(self, x: jax.Array, drop: Drop) -> jax.Array:
        frames = x.shape[1]
        if not self.active or (frames == 1 and self.skip_images):
            return x
        patches = rearrange(x[:, :, self.prefix :], "b t n d -> b n t d")
        residual = self.temporal_fc(drop(self.temporal_attn(self.temporal_norm(patches))[0]))
        patches = rearrange(patches + residual, "b n t d -> b t n d")
        return jnp.concatenate([x[:, :, : self.prefix], patches], axis=2)


class Joint(OneClassToken):
    """Joint attention: the class token and the patches of all frames in one sequence of 1 + T (N - 1) tokens. At T = 1 this is the plain ViT."""

    time_table = True

    def attend(self, attention, y: jax.Array):
        if not self.active:
            return super().attend(attention, y)
        frames = y.shape[1]
        special, patches = y[:, 0, : self.prefix], rearrange(y[:, :, self.prefix :], "b t n d -> b (t n) d")
        residual, q, k = attention(jnp.concatenate([special, patches], axis=1))
        special, patches = residual[:, None, : self.prefix], rearrange(residual[:, self.prefix :], "b (t n) d -> b t n d", t=frames)
        special = jnp.broadcast_to(special, (special.shape[0], frames, *special.shape[2:]))
        return jnp.concatenate([special, patches], axis=2), q, k
