"""Attention-map (AM) flow (Agrawal et al. 2024): the change of a frozen image model's attention between two frames shows an adapter what moves."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vidjoint.models.adapters import ADAPTERS
from vidjoint.models.layers import Dense
from vidjoint.models.mixers.base import Branches, Mixer
from vidjoint.models.spec import ViTSpec
from vidjoint.models.tpu import TPU, EncoderLayer, linear_attention

KEYS, QUERIES = -1, -2  # axes of an attention map


def attention_map(q: jax.Array, k: jax.Array, scale: float) -> jax.Array:
    """Eq. 2: logits scale x q k^T float32[S, N, N] of one frame, for float[S, N, E]. With all heads side by side in E it is the sum over heads."""
    return jnp.einsum("sne,sme->snm", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32)) * scale


def received(weights: jax.Array, axis: int, softmax: bool = True) -> jax.Array:
    """softmax(weights)^T 1: normalised along `axis`, summed along the other; float32[S, N, N] -> float32[S, N]."""
    return (jax.nn.softmax(weights, axis) if softmax else weights).sum(KEYS + QUERIES - axis)


def _change(before: jax.Array, after: jax.Array, axis: int) -> jax.Array:
    return received(jnp.abs(before - after), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def vanilla_flow(q: jax.Array, k: jax.Array, scale: float, axis: int) -> jax.Array:
    """Eq. 3, still camera: softmax(|A_t - A_(t+1)|)^T 1 for consecutive frames, float[T, S, N, E] -> float32[T - 1, S, N].

    One frame's map exists at a time, here and in the backward pass, which computes the maps anew. It is a loop because XLA merges a recomputation
    outside of a loop with the original. Without motion the flow is 1 everywhere.
    """

    def step(before, frame):
        after = attention_map(*frame, scale)
        return after, _change(before, after, axis)

    _, flow = jax.lax.scan(step, jnp.zeros_like(attention_map(q[0], k[0], scale)), (q, k))
    return flow[1:]


def _vanilla_forward(q: jax.Array, k: jax.Array, scale: float, axis: int):
    return vanilla_flow(q, k, scale, axis), (q, k)


def _vanilla_backward(scale: float, axis: int, saved: tuple, gradient: jax.Array):
    q, k = saved
    gradient = jnp.concatenate([jnp.zeros_like(gradient[:1]), gradient])  # of the flow that ends in frame t

    def step(carry, t):
        after, later = carry  # the map of frame t and its gradient from the flow that starts there
        before = attention_map(q[t - 1], k[t - 1], scale)
        earlier, own = jax.vjp(functools.partial(_change, axis=axis), before, after)[1](gradient[t])
        return (before, earlier), jax.vjp(functools.partial(attention_map, scale=scale), q[t], k[t])[1](later + own)

    last = attention_map(q[-1], k[-1], scale)
    return jax.lax.scan(step, (last, jnp.zeros_like(last)), jnp.arange(len(q)), reverse=True)[1]


vanilla_flow.defvjp(_vanilla_forward, _vanilla_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def each_frame(function: Callable, params, q: jax.Array, k: jax.Array) -> jax.Array:
    """Stacks function(params, q[t], k[t]) over frames, one at a time; the backward pass keeps nothing of it and computes it anew."""
    return jax.lax.map(lambda frame: function(params, *frame), (q, k))


def _each_forward(function: Callable, params, q: jax.Array, k: jax.Array):
    return each_frame(function, params, q, k), (params, q, k)


def _each_backward(function: Callable, saved: tuple, gradient: jax.Array):
    params, q, k = saved

    def step(total, frame):
        more, *inputs = jax.vjp(function, params, *frame[:2])[1](frame[2])
        return jax.tree.map(jnp.add, total, more), inputs

    total, (dq, dk) = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, params), (q, k, gradient))
    return total, dq, dk


each_frame.defvjp(_each_forward, _each_backward)


class AligningEncoder(nnx.Module):
    """Transformer encoder with linear attention (eq. 4), which learns what to disregard of the motion of the camera.

    The paper does not say how numbers become vectors. `encoder_input="scalar"`: those of a token (one, or one per head) are projected to the width
    and back; there is no position, so any number of tokens works. `"tokens"`: those of all tokens are the vector of a frame, in a sequence of frames.
    """

    def __init__(self, spec: ViTSpec, numbers: int, rngs: nnx.Rngs):
        settings = spec.am_flow
        tokens = spec.grid[0] * spec.grid[1] + (spec.prefix if settings.flow_tokens == "all" else 0)
        self.inputs = numbers * (tokens if settings.encoder_input == "tokens" else 1)
        self.embed = Dense(self.inputs, settings.encoder_width, dtype=jnp.float32, rngs=rngs)
        layer = (settings.encoder_width, settings.encoder_heads, settings.encoder_mlp)
        self.layer = EncoderLayer(*layer, linear_attention, spec.dtype, rngs)
        self.out = Dense(settings.encoder_width, self.inputs, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32[S, N, inputs] -> the same, for S sequences of N.

        Raises:
          ValueError: with encoder_input="tokens", frames of another size than the model's.
        """
        if x.shape[-1] != self.inputs:
            message = f"model.am_flow.encoder_input=tokens takes {self.inputs} numbers per frame and got {x.shape[-1]}"
            raise ValueError(f"{message}: use frames of model.image_size, or encoder_input=scalar, which takes any size")
        return self.out(self.layer(self.embed(x)))


class AMFlow(Mixer):
    """Adapters in every block; in those of `mixer_blocks` the attention's adapter also reads AM flow and both have a temporal processing unit.

    The units' outputs are branches for the heads. A fresh model gives the tokens of the bare image model. At T = 1 there is no motion: the flow is
    zero and a unit sees a sequence of one.
    """

    apart = False

    def __init__(self, spec: ViTSpec, index: int, rngs: nnx.Rngs):
        super().__init__(spec, index, rngs)
        self.settings = spec.am_flow
        flow = self.settings.flow if self.active else "none"
        self.numbers = 0 if flow == "none" else spec.heads if self.settings.flow_heads == "each" else 1  # per token
        adapter = ADAPTERS[self.settings.adapter]
        self.shared = nnx.data(adapter.make_shared(spec, rngs) if index == 0 else None)
        self.attention_adapter = adapter(spec, (index, 0), self.numbers, rngs)
        self.mlp_adapter = adapter(spec, (index, 1), 0, rngs)
        if flow == "aligned":
            self.encoder = AligningEncoder(spec, self.numbers, rngs)
        self.has_units = self.active and self.settings.tpu != "none"
        if self.has_units:
            self.attention_tpu, self.mlp_tpu = TPU(spec, rngs), TPU(spec, rngs)
            self.branch_widths = self.attention_tpu.width, self.mlp_tpu.width

    def share(self, first: Mixer) -> None:
        self.shared = first.shared

    def after_attention(self, residual: jax.Array, x: jax.Array, q: jax.Array, k: jax.Array) -> tuple[jax.Array, Branches]:
        flow = self.flow(q, k) if self.numbers else None
        residual, embedding = self.attention_adapter(residual, x, flow, self.shared)
        return residual, (self.attention_tpu(embedding),) if self.has_units else ()

    def after_mlp(self, residual: jax.Array, x: jax.Array) -> tuple[jax.Array, Branches]:
        residual, embedding = self.mlp_adapter(residual, x, None, self.shared)
        return residual, (self.mlp_tpu(embedding),) if self.has_units else ()

    def flow(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """AM flow float32[B, T, N, 1 or H] from queries and keys float[B, T, N, H, d]: at frame t, the change to t + 1. Class tokens have zeros."""
        settings, (batch, frames, tokens, heads, width) = self.settings, q.shape
        if frames == 1:
            return jnp.zeros((batch, frames, tokens, self.numbers))
        skipped = self.prefix if settings.flow_tokens == "patches" else 0
        q, k = (rearrange(x[:, :, skipped:], "b t n (m h) d -> t (b m) n (h d)", m=self.numbers) for x in (q, k))
        scale = self.numbers / heads * width**-0.5  # mean over heads
        axis = {"keys": KEYS, "queries": QUERIES}[settings.flow_softmax]
        if settings.flow == "vanilla":
            flow = vanilla_flow(q, k, scale, axis)
        else:
            flow = jnp.abs(jnp.diff(self.aligned(q, k, scale, axis), axis=0))  # eq. 5
        last = jnp.zeros_like(flow[:1]) if settings.flow_last == "zeros" else flow[-1:]
        flow = rearrange(jnp.concatenate([flow, last]), "t (b m) n -> b t n m", b=batch)
        return jnp.pad(flow[:, :, self.prefix - skipped :], ((0, 0), (0, 0), (self.prefix, 0), (0, 0)))

    def aligned(self, q: jax.Array, k: jax.Array, scale: float, axis: int) -> jax.Array:
        """Eq. 4, moving camera: what the aligning encoder makes of the attention that each token receives; float[T, S, N, E] -> float32[T, S, N]."""
        numbers, softmax = self.numbers, self.settings.flow_map == "softmax"

        def sums(params, q, k):
            return received(attention_map(q, k, scale), axis, softmax)

        if self.settings.encoder_input == "tokens":
            sequences = rearrange(each_frame(sums, (), q, k), "t (b m) n -> b t (n m)", m=numbers)
            return rearrange(self.encoder(sequences), "b t (n m) -> t (b m) n", m=numbers)
        graph, params = nnx.split(self.encoder)

        def encode(params, q, k):
            sequences = rearrange(sums(params, q, k), "(b m) n -> b n m", m=numbers)
            return rearrange(nnx.merge(graph, params)(sequences), "b n m -> (b m) n")

        return each_frame(encode, params, q, k)
