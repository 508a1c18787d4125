"""Token shift (TokenShift, Zhang et al. 2021; IV-ViT 4.2): a share of the channels moves to the neighbouring frame, twice per block."""

import jax
import jax.numpy as jnp
from flax import nnx

from vidjoint.models.mixers.base import Drop, Grid, Mixer
from vidjoint.models.spec import ViTSpec


def shift(x: jax.Array, fraction: float, next_first: bool) -> jax.Array:
    """IV-ViT eq. 7 on float[B, T, ..., D]: the first `fraction` of the channels comes from frame t + 1, the next from t - 1; zeros beyond the ends.

    That is the order of both reference implementations; with `next_first=False` the two are exchanged, as eq. 7 prints them.
    """
    fold = round(x.shape[-1] * fraction)
    first, second, rest = x[..., :fold], x[..., fold : 2 * fold], x[..., 2 * fold :]
    none = jnp.zeros_like(x[:, :1, ..., :fold])
    if next_first:
        first, second = jnp.concatenate([first[:, 1:], none], 1), jnp.concatenate([none, second[:, :-1]], 1)
    else:
        first, second = jnp.concatenate([none, first[:, :-1]], 1), jnp.concatenate([second[:, 1:], none], 1)
    return jnp.concatenate([first, second, rest], axis=-1)


class TokenShift(Mixer):
    """Shifts the residual stream before it branches into attention and again before the MLP; no parameters.

    `tokens="class"` moves the class token only (the papers), `"all"` every token. The shift is never the identity on videos, so a pretrained image
    model changes at once; images (T = 1) are not shifted.
    """

    def __init__(self, spec: ViTSpec, index: int, rngs: nnx.Rngs):
        super().__init__(spec, index, rngs)
        self.settings, self.has_class_token = spec.token_shift, spec.class_token

    def before_attention(self, x: jax.Array, drop: Drop, grid: Grid | None) -> jax.Array:
        return self.before_mlp(x, drop, grid)

    def before_mlp(self, x: jax.Array, drop: Drop, grid: Grid | None) -> jax.Array:
        if x.shape[1] == 1 or not self.active:
            return x
        moving = x.shape[2] if self.settings.tokens == "all" else int(self.has_class_token)
        moved = shift(x[:, :, :moving], self.settings.fraction, self.settings.direction == "next_first")
        return jnp.concatenate([moved, x[:, :, moving:]], axis=2)
