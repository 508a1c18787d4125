"""An attentive classifier on frozen tokens: one learned query reads the patches of all frames (V-JEPA, Bardes et al. 2024, section 4.2).

Cross-attention, then an MLP with a residual, a norm and a linear classifier; AdamW. All settings that are tried train side by side on the same
batches, twice: without the held-out examples, which choose among them, and with all.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from vidjoint.losses import cross_entropy, sigmoid_cross_entropy

RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # learning rates that are tried
WEIGHT_DECAY = 0.01
WARM_UP = 0.1  # share of the updates in which the rate rises; then it falls to 0 as a cosine
LEAST = 1000  # updates, if the epochs have fewer

Batches = Callable[[np.ndarray | None], Iterator[tuple[jax.Array, np.ndarray, np.ndarray, np.ndarray]]]


def init(key: jax.Array, width: int, classes: int) -> dict:
    """Parameters of one probe, float32."""
    shapes = {
        "q": (width, width),
        "k": (width, width),
        "v": (width, width),
        "proj": (width, width),
        "fc1": (width, 4 * width),
        "fc2": (4 * width, width),
    }
    keys = dict(zip((*shapes, "query", "head"), jax.random.split(key, len(shapes) + 2), strict=True))
    params = {name: jax.random.normal(keys[name], shape) * shape[0] ** -0.5 for name, shape in shapes.items()}
    params |= {f"{name}_bias": jnp.zeros(shapes[name][1]) for name in ("v", "proj", "fc1", "fc2")}
    params |= {
        f"{norm}_{part}": jnp.full(width, value, jnp.float32) for norm in ("norm1", "norm2") for part, value in (("scale", 1.0), ("bias", 0.0))
    }
    params |= {"query": 0.02 * jax.random.normal(keys["query"], (width,)), "head": 0.02 * jax.random.normal(keys["head"], (width, classes))}
    return params | {"head_bias": jnp.zeros(classes)}


def logits(params: dict, tokens: jax.Array, heads: int) -> jax.Array:
    """Normalised tokens float16[B, M, D] -> float32[B, C].

    As there is one query for all examples, its product with the keys' projection is made first, and values are projected after their mean: two passes
    over the tokens, of D numbers for each head, in place of two products with D x D. A bias of the keys would change nothing.
    """
    x, width = tokens.astype(jnp.float32), tokens.shape[-1]
    query = (params["query"] @ params["q"]).reshape(heads, -1)
    key = jnp.einsum("hd,xhd->hx", query, params["k"].reshape(width, heads, -1)) * (width // heads) ** -0.5
    weights = jax.nn.softmax(jnp.einsum("bmx,hx->bhm", x, key))
    mean = jnp.einsum("bhm,bmx->bhx", weights, x)
    value = jnp.einsum("bhx,xhd->bhd", mean, params["v"].reshape(width, heads, -1)).reshape(-1, width) + params["v_bias"]
    z = params["query"] + value @ params["proj"] + params["proj_bias"]
    hidden = jax.nn.gelu(_norm(params, "norm1", z) @ params["fc1"] + params["fc1_bias"], approximate=False)
    z = z + hidden @ params["fc2"] + params["fc2_bias"]
    return _norm(params, "norm2", z) @ params["head"] + params["head_bias"]


def _norm(params: dict, name: str, x: jax.Array) -> jax.Array:
    x = (x - x.mean(axis=-1, keepdims=True)) * jax.lax.rsqrt(x.var(axis=-1, keepdims=True) + 1e-6)
    return x * params[f"{name}_scale"] + params[f"{name}_bias"]


@dataclasses.dataclass
class Probes:
    """Trained probes, of RATES without the held-out examples, then of RATES with all: arrays [2 RATES, ...]."""

    params: dict
    heads: int

    def scores(self, batches: Iterator, which: slice) -> tuple[np.ndarray, np.ndarray]:
        """Logits of some of the probes float32[S, n, C], and the labels int32[n] or int32[n, K]."""
        params = jax.tree.map(lambda x: x[which], self.params)
        found, labels = [], []
        for tokens, label, _, mask in batches:
            found.append(np.asarray(_all_logits(params, tokens, self.heads))[:, mask])
            labels.append(label[mask])
        return np.concatenate(found, axis=1), np.concatenate(labels)


@functools.partial(jax.jit, static_argnums=2)
def _all_logits(params, tokens, heads):
    return jax.vmap(lambda params: logits(params, tokens, heads))(params)


def train(batches: Batches, mesh: Mesh, held: np.ndarray, width: int, heads: int, classes: int, batch_size: int, epochs: float, seed: int) -> Probes:
    """Trains all probes at once.

    Args:
      mesh: over which the examples of a batch are split.
      batches: order of the training examples int[n] -> batches (tokens, label, index, mask) in that order; `index` counts along the order.
      held: bool[n], the examples that half of the probes don't see.
      epochs: passes through the training split; more if they have fewer than LEAST updates.
    """
    per_epoch = math.ceil(len(held) / batch_size)
    steps = max(LEAST, round(epochs * per_epoch))
    blind = np.repeat([True, False], len(RATES))  # those that don't see the held-out examples
    params, state = jax.device_put(_start(jax.random.key(seed), width, classes, steps), NamedSharding(mesh, PartitionSpec()))  # whole on each device
    done, epoch = 0, 0
    with tqdm(total=steps, desc="attentive probe", disable=None, delay=2, leave=False, unit=" updates") as bar:
        while done < steps:
            order = np.random.default_rng([seed, 1, epoch]).permutation(len(held))
            for tokens, label, index, mask in batches(order):
                seen = np.where(blind[:, None], mask & ~held[order[index]], mask)  # [probes, B]
                params, state = _step(params, state, tokens, label, seen.astype(np.float32), heads, steps)
                done += 1
                bar.update()
                if done == steps:
                    break
            epoch += 1
    return Probes(params, heads)


def _optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW on all probes at once, for a rate of 1."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, round(WARM_UP * steps)), steps)
    decayed = functools.partial(jax.tree.map, lambda x: x.ndim > 2)  # matrices, one for each probe
    return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(WEIGHT_DECAY, decayed), optax.scale_by_learning_rate(schedule))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _start(key, width, classes, steps):
    """Parameters, the same for all probes, and the optimiser's state."""
    params = jax.tree.map(lambda x: jnp.stack([x] * 2 * len(RATES)), init(key, width, classes))
    return params, _optimizer(steps).init(params)


@functools.partial(jax.jit, static_argnums=(5, 6), donate_argnums=(0, 1))
def _step(params, state, tokens, label, weight, heads, steps):
    """One update of all probes; `weight` float32[probes, B] says which examples each of them sees."""

    def loss(params, weight):
        found = logits(params, tokens, heads)
        values = cross_entropy(found, label) if label.ndim == 1 else sigmoid_cross_entropy(found, label)
        return (values * weight).sum() / jnp.maximum(weight.sum(), 1)

    gradients = jax.vmap(jax.grad(loss))(params, weight)
    updates, state = _optimizer(steps).update(gradients, state, params)
    rates = jnp.tile(jnp.array(RATES), 2)
    updates = jax.tree.map(lambda x: x * rates.reshape(-1, *[1] * (x.ndim - 1)), updates)
    return optax.apply_updates(params, updates), state
