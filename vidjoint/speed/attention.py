"""The attentions of a model by themselves, at its own shapes: made of products (XLA), and by cuDNN where this machine has it."""

from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vidjoint.maps.attention import listen
from vidjoint.models.build import Model
from vidjoint.models.layers import ATTENTIONS, dot_product_attention, flash_fits, has_flash
from vidjoint.speed.training import largest_view, on_paper, seconds_per_call

Shape = tuple[int, int, int, int, int]  # sequences, queries, keys, heads, channels of a head


def measure_attention(config: ConfigDict) -> dict:
    """Times each kind of attention in the blocks for one device's share of a batch, all of it clips of the largest size: forward, and with gradients.

    Attention with a mask, as motion attention has at the picture's edge, is measured without.
    """
    model, view = largest_view(config)
    examples = max(1, config.batch_size // jax.device_count())
    shapes = attention_shapes(model, jax.ShapeDtypeStruct((examples, *view.shape[1:]), np.uint8))
    ordered = sorted(shapes.items(), key=lambda item: item[0][1], reverse=True)
    return {"examples": examples, "cudnn": has_flash(), "rows": [_times(shape, count, model.spec.dtype) for shape, count in ordered]}


def attention_shapes(model: Model, pixels: jax.ShapeDtypeStruct) -> Counter[Shape]:
    """How often the blocks ask for an attention of which shape, for pixels uint8[B, T, H, W, 3]."""
    found = Counter()

    def run(params: dict, pixels: jax.Array) -> jax.Array:
        vit = on_paper(model).bind(params)
        calls = [listen(block) for block in vit.blocks]
        features = vit.features(pixels)
        for _, q, k, _ in (call for block in calls for call in block):
            *lead, queries, heads, channels = q.shape
            found[(int(np.prod(lead)), queries, k.shape[-3], heads, channels)] += 1
        return features

    jax.eval_shape(run, model.abstract(), pixels)
    return found


def _times(shape: Shape, count: int, dtype: str) -> dict:
    sequences, queries, keys, heads, channels = shape
    sizes = ((sequences, size, heads, channels) for size in (queries, keys, keys, queries))
    *arrays, weight = (jax.random.normal(jax.random.key(i), size).astype(dtype) for i, size in enumerate(sizes))
    row = {"sequences": sequences, "queries": queries, "keys": keys, "heads": heads, "channels": channels, "calls": count}
    for how in ATTENTIONS if flash_fits(*arrays[:2]) and has_flash() else ATTENTIONS[:1]:
        forward, both = _calls(how, weight)
        row[f"{how}_forward_ms"] = 1000 * seconds_per_call(lambda call=forward: call(*arrays))
        row[f"{how}_train_ms"] = 1000 * seconds_per_call(lambda call=both: call(*arrays))
    return row


def _calls(how: str, weight: jax.Array) -> tuple[Callable, Callable]:
    """The attention, and it with the gradients of its inputs."""

    def attend(q, k, v):
        return dot_product_attention(q, k, v, how=how)

    def loss(q, k, v):
        return (attend(q, k, v) * weight).sum(dtype=jnp.float32)

    return jax.jit(attend), jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
