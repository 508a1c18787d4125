"""From pixels to tokens."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vidjoint.models.layers import ZEROS, Dense, layer_norm
from vidjoint.models.mixers import MIXERS
from vidjoint.models.position import resize_position, resize_space_time, resize_time
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
    """Pixels to tokens: normalise, cut into patches, project, add class token, position and (for mixers that ask for it) time; then registers.

    With `embed="separate"` clips of two frames or more have a projection and a position table of their own (`video_proj`, `video_position`), and
    their patches may span `tubelet` frames (ViViT, PolyViT). Both start from those of the images. The class token is one for both. What has one frame
    is an image, also if it comes from a video file. With `video_position="space_time"` the table of the videos has a row for each token of a clip
    (ViViT, VideoMAE), and there is no table over time alone.

    Registers (DINOv2) are tokens without a position, between the class token and the patches. `pre_norm` is a norm before the blocks (CLIP).
    """

    def __init__(self, spec: ViTSpec, rngs: nnx.Rngs):
        self.spec = spec
        rows, columns = spec.grid
        self.proj = Dense(3 * spec.patch**2, spec.width, dtype=spec.dtype, rngs=rngs)
        table = nnx.initializers.normal(spec.width**-0.5)  # as large as what the projection makes of the pixels, whatever the width
        self.lead = int(spec.class_token)  # rows of the position table before those of the patches
        self.position = nnx.Param(table(rngs.params(), (self.lead + rows * columns, spec.width)))
        if spec.class_token:
            self.class_token = nnx.Param(ZEROS(rngs.params(), (spec.width,)))
        self.timed = MIXERS[spec.mixer].time_table and spec.video_position == "grid"
        if self.timed:
            init = table if spec.temporal_init == "random" else ZEROS
            self.time = nnx.Param(init(rngs.params(), (spec.times, spec.width)))
        if spec.embed == "separate":
            kernel, bias = inflate(self.proj.kernel[...], spec.tubelet, spec.tubelet_init), self.proj.bias[...]
            none = nnx.Rngs(0)  # nothing is drawn here, and the parts that follow draw what they would without it
            self.video_proj = Dense(len(kernel), spec.width, dtype=spec.dtype, rngs=none, kernel_init=ZEROS)
            self.video_proj.kernel[...], self.video_proj.bias[...] = kernel, bias
            own = self.position[...]
            if spec.video_position == "space_time":  # the image's table at every time
                own = jnp.concatenate([own[: self.lead], *[own[self.lead :]] * spec.times])
            self.video_position = nnx.Param(own)
        if spec.registers:
            self.registers = nnx.Param(table(rngs.params(), (spec.registers, spec.width)))
        if spec.pre_norm == "layer_norm":
            self.norm = layer_norm(spec.width, spec.norm_eps, spec.dtype, rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """uint8 or float[B, F, height, width, 3] in 0..255 -> float[B, T, N, D].

        T = F / tubelet (1 for an image), N = class token + registers + (height / patch) (width / patch).

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
        if own and spec.video_position == "space_time":
            size, new_size = (spec.times, *spec.grid), (x.shape[1], *grid)
            position = resize_space_time(position[...], self.lead, size, new_size, spec.position_resize)
            x = x + position[self.lead :].reshape(*x.shape[1:]).astype(x.dtype)
        else:
            position = resize_position(position[...], self.lead, spec.grid, grid, spec.position_resize)
            x = x + position[self.lead :].astype(x.dtype)
        if self.timed:
            x = x + resize_time(self.time[...], x.shape[1])[:, None].astype(x.dtype)
        special = []
        if spec.class_token:
            special.append((self.class_token[...] + position[:1]).astype(x.dtype))
        if spec.registers:
            special.append(self.registers[...].astype(x.dtype))
        if special:
            special = jnp.concatenate(special)
            x = jnp.concatenate([jnp.broadcast_to(special, (*x.shape[:2], *special.shape)), x], axis=2)
        return self.norm(x) if spec.pre_norm == "layer_norm" else x
