"""Adapters: narrow branches that adapt a frozen model at its attention and its MLP (AM Flow, eqs. 1 and 6, fig. 3; Houlsby et al. 2019)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vidjoint.models.layers import ZEROS, Dense, affine, layer_norm
from vidjoint.models.spec import ViTSpec

TORCH_UNIFORM = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(-1/sqrt(inputs), 1/sqrt(inputs)), "Kaiming with a = sqrt(5)"
RULES = 4  # compacter: terms of a matrix, and side of the small factors


class Weights(NamedTuple):
    norm: Callable[[jax.Array], jax.Array]  # LayerNorm over the width D
    down: jax.Array  # float32[D + F, r]; the last F rows are those of the flow
    down_bias: jax.Array  # float32[r]
    up: jax.Array  # float32[r, D]
    up_bias: jax.Array  # float32[D]


class Adapter(nnx.Module):
    """Scaled adapter, s W_up ReLU(W_down [LN(X) || F]) (He et al. 2022): W_up starts at zero, so it starts as no change, and the scalar s at one.

    Parallel, X is the input of the sublayer; serial, X is its output. In both the branch is added to the output, and `double_residual` adds X to
    that once more, as eq. 1 is printed.
    """

    def __init__(self, spec: ViTSpec, place: tuple[int, int], flow: int, rngs: nnx.Rngs):
        """`place`: number of the block, and 0 at its attention or 1 at its MLP; `flow`: F, the numbers of AM flow per token, 0 without."""
        self.width = spec.width
        self.serial, self.double = spec.am_flow.adapter == "serial", spec.am_flow.double_residual
        self.scale = nnx.Param(jnp.ones(()))
        self.make(spec, flow, rngs)

    @staticmethod
    def make_shared(spec: ViTSpec, rngs: nnx.Rngs) -> nnx.Module | None:
        """What all adapters of a model have in common."""
        return None

    def make(self, spec: ViTSpec, flow: int, rngs: nnx.Rngs) -> None:
        self.norm = layer_norm(spec.width, spec.norm_eps, spec.dtype, rngs)
        self.down = Dense(spec.width + flow, spec.am_flow.bottleneck, dtype=spec.dtype, rngs=rngs, kernel_init=TORCH_UNIFORM)
        self.up = Dense(spec.am_flow.bottleneck, spec.width, dtype=spec.dtype, rngs=rngs, kernel_init=ZEROS)

    def weights(self, shared: nnx.Module | None) -> Weights:
        return Weights(self.norm, self.down.kernel[...], self.down.bias[...], self.up.kernel[...], self.up.bias[...])

    def __call__(self, residual: jax.Array, x: jax.Array, flow: jax.Array | None, shared: nnx.Module | None) -> tuple[jax.Array, jax.Array]:
        """The sublayer's output `residual` and input `x`, float[B, T, N, D], and flow float32[B, T, N, F] -> new output, E float[B, T, N, r]."""
        source, scale, weights = residual if self.serial else x, self.scale[...], self.weights(shared)
        hidden = affine(weights.norm(source), weights.down[: self.width], weights.down_bias)
        if flow is not None:  # the product with [LN(X) || F], without joining the two
            hidden = hidden + affine(flow.astype(hidden.dtype), weights.down[self.width :], jnp.zeros(()))
        embedding = jax.nn.relu(hidden)
        # s in the weights: the branch need not be kept for its gradient
        residual = residual + affine(embedding, scale * weights.up, scale * weights.up_bias)
        return residual + source if self.double else residual, embedding


class Rules(nnx.Module):
    """Compacter's small factors A_i, which all adapters share."""

    def __init__(self, rngs: nnx.Rngs):
        self.rules = nnx.Param(nnx.initializers.normal(RULES**-0.5)(rngs.params(), (RULES, RULES, RULES)))


class Compacter(Adapter):
    """Parallel adapter whose matrices are sums of Kronecker products, W = sum_i A_i (x) s_i t_i^T, with A_i shared (Karimi Mahabadi et al. 2021b).

    The rows of the flow are a plain matrix, for their number is not a multiple of four.
    """

    @staticmethod
    def make_shared(spec: ViTSpec, rngs: nnx.Rngs) -> Rules:
        return Rules(rngs)

    def make(self, spec: ViTSpec, flow: int, rngs: nnx.Rngs) -> None:
        width, bottleneck = spec.width, spec.am_flow.bottleneck
        unit = nnx.initializers.normal(1.0)
        self.norm = layer_norm(width, spec.norm_eps, spec.dtype, rngs)
        left = nnx.initializers.normal((3 * width) ** -0.5)  # gives W the variance of a plain adapter's
        self.down_left = nnx.Param(left(rngs.params(), (RULES, width // RULES)))
        self.down_right = nnx.Param(unit(rngs.params(), (RULES, bottleneck // RULES)))
        self.down_flow = nnx.Param(TORCH_UNIFORM(rngs.params(), (width + flow, bottleneck))[width:])
        self.down_bias = nnx.Param(jnp.zeros(bottleneck))
        self.up_left = nnx.Param(jnp.zeros((RULES, bottleneck // RULES)))
        self.up_right = nnx.Param(unit(rngs.params(), (RULES, width // RULES)))
        self.up_bias = nnx.Param(jnp.zeros(width))

    def weights(self, shared: Rules) -> Weights:
        rules = shared.rules[...]
        down = jnp.concatenate([kronecker_sum(rules, self.down_left[...], self.down_right[...]), self.down_flow[...]])
        up = kronecker_sum(rules, self.up_left[...], self.up_right[...])
        return Weights(self.norm, down, self.down_bias[...], up, self.up_bias[...])


def kronecker_sum(rules: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """sum_i A_i (x) s_i t_i^T for A float[n, n, n], s float[n, rows / n], t float[n, columns / n]; returns float[rows, columns]."""
    return rearrange(jnp.einsum("iab,ic,id->acbd", rules, left, right), "a c b d -> (a c) (b d)")


class HyperNet(nnx.Module):
    """Makes the weights of every adapter from embeddings of the task, the block and the sublayer (Karimi Mahabadi et al. 2021a, hyperformer++).

    The task is the whole run: all data sets have one. Biases hold the weights that all adapters start from; those of W_up are zero.
    """

    def __init__(self, spec: ViTSpec, rngs: nnx.Rngs):
        settings, width, hidden = spec.am_flow, spec.width, spec.am_flow.hyper_width
        self.flow = 0 if settings.flow == "none" else spec.heads if settings.flow_heads == "each" else 1
        unit = nnx.initializers.normal(1.0)
        self.task = nnx.Param(unit(rngs.params(), (hidden,)))
        self.blocks = nnx.Param(unit(rngs.params(), (spec.depth, hidden)))
        self.positions = nnx.Param(unit(rngs.params(), (2, hidden)))
        self.fc1 = Dense(3 * hidden, hidden, dtype="float32", rngs=rngs)
        self.fc2 = Dense(hidden, hidden, dtype="float32", rngs=rngs)
        starts = {  # size and start of each output
            "norm_scale": (width, nnx.initializers.ones_init()),
            "norm_bias": (width, ZEROS),
            "down": ((width + self.flow) * settings.bottleneck, nnx.initializers.normal((3 * width) ** -0.5)),
            "down_bias": (settings.bottleneck, ZEROS),
            "up": (settings.bottleneck * width, ZEROS),
            "up_bias": (width, ZEROS),
        }
        small = nnx.initializers.normal(0.01)
        for name, (size, start) in starts.items():
            setattr(self, name, nnx.Linear(hidden, size, kernel_init=ZEROS if name.startswith("up") else small, bias_init=start, rngs=rngs))

    def __call__(self, place: tuple[int, int]) -> tuple[jax.Array, ...]:
        """Scale and bias of the norm, down float32[D + F, r] and its bias, up float32[r, D] and its bias."""
        block, position = place
        source = jnp.concatenate([self.task[...], self.blocks[block], self.positions[position]])[None]
        source = self.fc2(jax.nn.relu(self.fc1(source)))[0]
        bottleneck = self.down_bias.out_features
        down, up = self.down(source).reshape(-1, bottleneck), self.up(source).reshape(bottleneck, -1)
        return self.norm_scale(source), self.norm_bias(source), down, self.down_bias(source), up, self.up_bias(source)


class Hyperformer(Adapter):
    """Parallel adapter whose norm and matrices come from the shared `HyperNet`; only its scalar s is its own."""

    def __init__(self, spec: ViTSpec, place: tuple[int, int], flow: int, rngs: nnx.Rngs):
        super().__init__(spec, place, flow, rngs)
        self.place = place

    @staticmethod
    def make_shared(spec: ViTSpec, rngs: nnx.Rngs) -> HyperNet:
        return HyperNet(spec, rngs)

    def make(self, spec: ViTSpec, flow: int, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(spec.width, epsilon=spec.norm_eps, dtype=spec.dtype, use_scale=False, use_bias=False, rngs=rngs)

    def weights(self, shared: HyperNet) -> Weights:
        scale, bias, *others = shared(self.place)
        return Weights(lambda x: self.norm(x) * scale.astype(x.dtype) + bias.astype(x.dtype), *others)


ADAPTERS = {"parallel": Adapter, "serial": Adapter, "hyperformer": Hyperformer, "compacter": Compacter}
