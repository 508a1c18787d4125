"""Mixup and CutMix on the device: each example is mixed with another one of its own task, so that one head can answer for both labels.

The loss of an example is then `lam * ce(label) + (1 - lam) * ce(label[partner])`. All shapes are static.
"""

import chex
import jax
import jax.numpy as jnp


def mix(
    key: jax.Array, pixels: jax.Array, task: jax.Array, mask: jax.Array, mixup_alpha: float, cutmix_alpha: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mixes every example of a batch with its partner; key decides everything random.

    Args:
      key: a JAX random key.
      pixels: uint8 or float[B, T, H, W, 3] in 0..255.
      task: int32[B].
      mask: bool[B], False for padding, which is left as it is and mixed into nothing.
      mixup_alpha, cutmix_alpha: Python floats, see `draw_weights`.

    Returns:
      The mixed pixels float32[B, T, H, W, 3], the partner of each example int32[B] (see `partners`), and the share of an example's own label
      float32[B], one number for the whole batch.
    """
    chex.assert_rank(pixels, 5)
    batch, _, height, width, _ = pixels.shape
    chex.assert_shape([task, mask], (batch,))
    partner = partners(task, mask)
    weight, lam = draw_weights(key, height, width, mixup_alpha, cutmix_alpha)
    other = pixels[partner].astype(jnp.float32)
    mixed = other + weight[None, None, :, :, None] * (pixels.astype(jnp.float32) - other)
    return mixed, partner, jnp.full((batch,), lam)


def partners(task: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns int32[B]: the next unmasked example of the same task, from the end on to the start; an example without one, or masked, is its own.

    Args:
      task: int32[B].
      mask: bool[B].
    """
    batch = task.shape[0]
    index = jnp.arange(batch)
    match = (task[:, None] == task[None, :]) & mask[:, None] & mask[None, :]  # [B, B]
    steps = (index[None, :] - index[:, None] - 1) % batch  # [B, B]: 0 for the next example, B - 1 for itself
    return jnp.argmin(jnp.where(match | (steps == batch - 1), steps, batch), axis=1).astype(jnp.int32)


def draw_weights(key: jax.Array, height: int, width: int, mixup_alpha: float, cutmix_alpha: float) -> tuple[jax.Array, jax.Array]:
    """Draws how much of each pixel is an example's own, for the whole batch: float32[H, W] and its mean lam, float32[].

    Mixup (Zhang et al. 2018, arXiv:1710.09412): every weight is lam ~ Beta(mixup_alpha, mixup_alpha). CutMix (Yun et al. 2019, arXiv:1905.04899,
    eq. 2): a box with the input's aspect, a share of 1 - Beta(cutmix_alpha, cutmix_alpha) of its area and a uniform centre is the partner's; what
    stands out of the picture is cut off, and lam counts the pixels that are left. With both alphas above 0 one of the two is taken, at even odds.

    Raises:
      ValueError: neither alpha is above 0.
    """
    if not (mixup_alpha > 0 or cutmix_alpha > 0):
        raise ValueError("mixing needs mixup_alpha or cutmix_alpha above 0")
    choice_key, mixup_key, cutmix_key, centre_key = jax.random.split(key, 4)
    if mixup_alpha > 0:
        mixup_lam = jax.random.beta(mixup_key, mixup_alpha, mixup_alpha)
        mixup_weight = jnp.full((height, width), mixup_lam)
        if not cutmix_alpha > 0:
            return mixup_weight, mixup_lam
    side = jnp.sqrt(1 - jax.random.beta(cutmix_key, cutmix_alpha, cutmix_alpha))
    centre = jax.random.uniform(centre_key, (2,))
    rows = _inside(height, side, centre[0])  # [H]
    columns = _inside(width, side, centre[1])  # [W]
    cutmix_weight = 1.0 - (rows[:, None] & columns[None, :]).astype(jnp.float32)
    cutmix_lam = 1.0 - rows.sum() * columns.sum() / (height * width)
    if not mixup_alpha > 0:
        return cutmix_weight, cutmix_lam
    cut = jax.random.bernoulli(choice_key)
    return jnp.where(cut, cutmix_weight, mixup_weight), jnp.where(cut, cutmix_lam, mixup_lam)


def _inside(length: int, side: jax.Array, centre: jax.Array) -> jax.Array:
    """Returns bool[length]: the pixels of an interval; `side` and `centre` are shares of the length."""
    pixels = jnp.round(length * side).astype(jnp.int32)
    start = jnp.floor(length * centre).astype(jnp.int32) - pixels // 2
    index = jnp.arange(length)
    return (index >= start) & (index < start + pixels)
