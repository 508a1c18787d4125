"""TimeSformer's attention over space and time (Bertasius et al. 2021), the model of CoVeR (3.1): divided and joint.

There is one class token per video. Here every frame holds a copy of it and all copies stay equal.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vidjoint.models.layers import XAVIER, ZEROS, Attention, Dense, layer_norm, one_product
from vidjoint.models.mixers.base import Drop, Grid, Mixer
from vidjoint.models.spec import ViTSpec


def identity(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
    """An initialiser: the identity matrix."""
    return jnp.eye(*shape, dtype=dtype)


# temporal_init -> how the last layer of a temporal branch starts. With "copied" the attention before it, which `weights.init_from` copies from the
# spatial one, acts at once (ViViT's copied temporal attention)
BRANCH_END = {"zero": ZEROS, "copied": identity, "random": XAVIER}


class OneClassToken(Mixer):
    """Spatial attention that keeps the frames' copies of the class token equal: its residual is averaged over the frames (TimeSformer's code)."""

    def attend(self, attention, y: jax.Array):
        residual, q, k = attention(y)
        special = residual[:, :, : self.prefix]
        special = jnp.broadcast_to(special.mean(axis=1, keepdims=True), special.shape)
        return jnp.concatenate([special, residual[:, :, self.prefix :]], axis=2), q, k


class TemporalBranch(OneClassToken):
    """Parameters of an attention branch before the spatial attention, which `divided` and `motion` share: norm, attention and a dense layer.

    How the last layer starts is `BRANCH_END`; without the dense layer (`fc=False`) it is the attention's own projection.
    """

    time_table = True

    def __init__(self, spec: ViTSpec, index: int, rngs: nnx.Rngs, fc: bool = True):
        super().__init__(spec, index, rngs)
        self.fc = fc
        if not self.active:
            return
        self.temporal_norm = layer_norm(spec.width, spec.norm_eps, spec.dtype, rngs)
        self.temporal_attn = Attention(spec.width, spec.heads, dtype=spec.dtype, rngs=rngs, how=spec.attention)
        last = Dense(spec.width, spec.width, dtype=spec.dtype, rngs=rngs, kernel_init=BRANCH_END[spec.temporal_init])
        if fc:
            self.temporal_fc = last
        else:
            self.temporal_attn.proj = last

    def temporal_residual(self, x: jax.Array, drop: Drop, mask: jax.Array | None = None) -> jax.Array:
        """float[B, sequences, tokens, D] -> what to add to it; `mask` as for `Attention`."""
        x = self.temporal_norm(x)
        if self.fc and x.shape[1] * x.shape[2] > x.shape[3]:  # of one clip, lest the batch decide: projection and dense layer in one
            both = one_product(self.temporal_attn.proj, self.temporal_fc)
            return drop(self.temporal_attn(x, mask, last=both)[0]) + self.temporal_fc.bias[...].astype(x.dtype)
        residual = drop(self.temporal_attn(x, mask)[0])
        return self.temporal_fc(residual) if self.fc else residual


class Divided(TemporalBranch):
    """Divided attention: each patch attends to its own place in all frames, then to all patches of its frame.

    Follows the published code where the paper differs from it: the class token takes no part in temporal attention, and its spatial residual is
    averaged over the frames. The branch ends in a dense layer that is zero at the start (`temporal_init="zero"`): a fresh model is the image ViT.
    At T = 1 the softmax has one key, and the branch is the affine map fc(W_o W_v LN(x)) (CoVeR, appendix A); `image_temporal="skip"` leaves it out.
    """

    def __init__(self, spec: ViTSpec, index: int, rngs: nnx.Rngs):
        super().__init__(spec, index, rngs)
        self.skip_images = spec.divided.image_temporal == "skip"

    def before_attention(self, x: jax.Array, drop: Drop, grid: Grid | None) -> jax.Array:
        frames = x.shape[1]
        if not self.active or (frames == 1 and self.skip_images):
            return x
        patches = rearrange(x[:, :, self.prefix :], "b t n d -> b n t d")
        patches = rearrange(patches + self.temporal_residual(patches, drop), "b n t d -> b t n d")
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
