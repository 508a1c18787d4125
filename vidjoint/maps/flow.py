"""Attention-map flow of one clip, for looking at."""

import jax
import jax.numpy as jnp

from vidjoint.maps.attention import walk
from vidjoint.models.build import Model
from vidjoint.models.mixers.am_flow import KEYS, vanilla_flow


def am_flow(model: Model, params: dict, pixels: jax.Array) -> dict[int, jax.Array]:
    """AM flow of one clip (AM Flow, eqs. 2-5): {number of a block: float32[T, rows, columns]}, for every block that computes it.

    The value of a patch in frame t is the change of the attention it receives, from t to t + 1 (mean over heads where each has its own).

    Args:
      pixels: uint8[T, H, W, 3].
    """
    rows, columns = pixels.shape[1] // model.spec.patch, pixels.shape[2] // model.spec.patch
    flows = {}
    for number, (block, calls, _) in enumerate(walk(model.bind(params), pixels)):
        ((_, q, k, _),) = calls
        if block.mixer.numbers:
            patches = block.mixer.flow(q, k)[0, :, model.spec.prefix :].mean(axis=-1)
            flows[number] = patches.reshape(len(patches), rows, columns)
    return flows


def flow_of_heads(model: Model, params: dict, pixels: jax.Array, frame: int) -> jax.Array:
    """AM flow (eqs. 2, 3) from `frame` to the next one in every block, of each head by itself: float32[blocks, rows, columns, H].

    For any model whose attention is frame by frame, whether it uses AM flow or not.
    """
    grid = pixels.shape[1] // model.spec.patch, pixels.shape[2] // model.spec.patch
    flows = []
    for _, calls, _ in walk(model.bind(params), pixels):
        q, k = next((q, k) for name, q, k, _ in calls if name == "attn")
        q, k = (jnp.moveaxis(z[0, frame : frame + 2, model.spec.prefix :], 2, 1) for z in (q, k))  # [2, H, N, d]
        flow = vanilla_flow(q, k, q.shape[-1] ** -0.5, KEYS)[0]  # [H, N]
        flows.append(flow.T.reshape(*grid, -1))
    return jnp.stack(flows)
