"""From pixels to tokens."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vidjoint.models.layers import ZEROS, Dense, resize_position, resize_time
from vidjoint.models.mixers import MIXERS
from vidjoint.models.spec import ViTSpec


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
