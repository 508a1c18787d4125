"""From pixels to tokens."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vidjoint.models.layers import ZEROS, Dense, resize_position, resize_time
from vidjoint.models.mixers import MIXERS
from vidjoint.models.spec import ViTSpec


def inflate(kernel: jax.Array, frames: int, init: str) -> jax.Array:
    """A projection of patches, float[p p 3, D], made into one of tubelets of `frames` frames, float[frames p p 3, D] (ViViT 3.4).

    `central_frame` gives the whole kernel to frame number frames // 2 and zeros to the others; `average` gives kernel / frames to each.
    """
    if init == "average":
        return jnp.concatenate([kernel / frames] * frames)
    none = jnp.zeros_like(kernel)
    return jnp.concatenate([kernel if t == frames // 2 else none for t in range(frames)])


class PatchEmbed(nnx.Module):
    """Pixels to tokens: normalise, cut into patches, project, add class token, position and (for mixers that ask for it) time.

    With `embed="separate"` clips of two frames or more have a projection and a position table of their own (`video_proj`, `video_position`), and
    their patches may span `tubelet` frames (ViViT, PolyViT). Both start from those of the images. The class token is one for both. What has one frame
    is an image, also if it comes from a video file.
    """

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
            self.time = nnx.Param(init(rngs.params(), (spec.times, spec.width)))
        if spec.embed == "separate":
            kernel, bias = inflate(self.proj.kernel[...], spec.tubelet, spec.tubelet_init), self.proj.bias[...]
            none = nnx.Rngs(0)  # nothing is drawn here, and the parts that follow draw what they would without it
            self.video_proj = Dense(len(kernel), spec.width, dtype=spec.dtype, rngs=none, kernel_init=ZEROS)
            self.video_proj.kernel[...], self.video_proj.bias[...] = kernel, bias
            self.video_position = nnx.Param(self.position[...])

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """uint8 or float[B, F, height, width, 3] in 0..255 -> float[B, T, N, D].

        T = F / tubelet (1 for an image), N = class token + (height / patch) (width / patch).

        Raises:
          ValueError: the patch does not divide height or width, or the tubelet not the number of frames.
        """
        spec, (_, frames, height, width, _) = self.spec, pixels.shape
        if height % spec.patch or width % spec.patch:
            raise ValueError(f"frames of {height} x {width} pixels cannot be cut into patches of {spec.patch}")
        own = spec.embed == "separate" and frames > 1
        proj, position, depth = (self.video_proj, self.video_position, spec.tubelet) if own else (self.proj, self.position, 1)
        if frames % depth:
            raise ValueError(f"a clip of {frames} frames cannot be cut into tubelets of {depth}")
        grid = height // spec.patch, width // spec.patch
        x = (pixels.astype(jnp.float32) / 255 - jnp.array(spec.mean)) / jnp.array(spec.std)
        cut = "b (t z) (h p) (w q) c -> b t (h w) (z p q c)"
        x = proj(rearrange(x.astype(spec.dtype), cut, z=depth, p=spec.patch, q=spec.patch))
        position = resize_position(position[...], spec.prefix, spec.grid, grid)
        x = x + position[spec.prefix :].astype(x.dtype)
        if MIXERS[spec.mixer].time_table:
            x = x + resize_time(self.time[...], x.shape[1])[:, None].astype(x.dtype)
        if spec.class_token:
            token = (self.class_token[...] + position[0]).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (*x.shape[:2], 1, token.size)), x], axis=2)
        return x
