"""The parts every block is made of: dense layers, attention, MLP and stochastic depth.

Parameters are float32; `dtype` is the compute type. Softmax and layer statistics are computed in float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

XAVIER = nnx.initializers.xavier_uniform()  # scaled to the width, as in ViT's own code: a fixed 0.02 leaves narrow models almost linear, and stuck
ZEROS = nnx.initializers.zeros_init()
DENSE = "dense"
ATTENTIONS = ("xla", "cudnn")
FLASH = 128  # queries and keys from which cuDNN's attention is used: its blocks are of that size
PAGE = 1024  # float32 numbers of 4 KiB: Eigen is slow (0.7 x) where rows of the result are a multiple of so many


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x W for x float[..., D] and W float[D, E]. Leading axes are flattened first: XLA's batched products are slow on CPUs.

    The gradient is our own, for the sake of its order. JAX makes that of W as [E, D] and transposes it. Where devices share a batch, their sum comes
    in between, XLA can't take the transposition into the product any more, and the optimiser reads each gradient across its rows. The name `DENSE`
    is for the choice of what is kept for the backward pass, which does not look into functions with a gradient of their own.
    """
    return checkpoint_name(_product(x, kernel), DENSE)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """What is run where no gradient is asked for."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.dtype == jnp.float32 and kernel.shape[1] % PAGE:
        out = jax.lax.platform_dependent(rows, kernel, cpu=_pointwise_convolution, default=jnp.matmul)
    else:
        out = rows @ kernel
    return out.reshape(*x.shape[:-1], -1)


def _pointwise_convolution(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """float[N, D] times float[D, E], for CPUs. XLA makes a product of this again once it has given its other products to YNNPACK.

    So Eigen does it, with oneDNN's kernels: 1.0 to 1.5 times as many operations a second on one core. A step that trains gains nothing from that.
    """
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(rows[:, None], kernel[None], (1,), "VALID", dimension_numbers=numbers)[:, 0]


def _product_forward(x, kernel):
    """Keeps only what the gradients that are asked for need: of a frozen layer, the kernel.

    A scalar stands for the other, not None: blocks that `jax.checkpoint` traces once share what JAX remembers of this tree, whichever of their
    parts are frozen.
    """
    out, none = x.value.reshape(-1, x.value.shape[-1]) @ kernel.value, jnp.zeros(())
    return out.reshape(*x.value.shape[:-1], -1), (x.value if kernel.perturbed else none, kernel.value if x.perturbed else none)


def _product_backward(saved, grad):
    x, kernel = saved
    rows = grad.reshape(-1, grad.shape[-1])
    to_x = None if kernel.ndim == 0 else jax.lax.dot_general(rows, kernel, (((1,), (1,)), ((), ()))).reshape(*grad.shape[:-1], -1)
    to_kernel = None if x.ndim == 0 else jax.lax.dot_general(x.reshape(-1, x.shape[-1]), rows, (((0,), (0,)), ((), ())))
    return to_x, to_kernel


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


class Dense(nnx.Linear):
    """A linear layer, float[..., D] -> float[..., E]."""

    def __init__(self, in_features: int, out_features: int, *, dtype, rngs: nnx.Rngs, kernel_init=XAVIER):
        super().__init__(in_features, out_features, dtype=dtype, kernel_init=kernel_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return affine(x, self.kernel[...], self.bias[...], self.dtype)


def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array, dtype=None) -> jax.Array:
    """x W + b, computed in `dtype`, by default that of x."""
    dtype = dtype or x.dtype
    return product(x.astype(dtype), kernel.astype(dtype)) + bias.astype(dtype)


def one_product(first: Dense, second: Dense) -> Callable:
    """x -> second(first(x)) but for second's bias, as one product: the kernels are multiplied before. Fewer operations for more rows than columns."""
    exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    kernel, bias = (exact(value[...], second.kernel[...]) for value in (first.kernel, first.bias))
    return functools.partial(affine, kernel=kernel, bias=bias)


def layer_norm(width: int, eps: float, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=eps, dtype=dtype, rngs=rngs)


def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None, how: str = "xla") -> jax.Array:
    """softmax(q k^T / sqrt(d)) v for q float[B, N, H, d] and k, v float[B, M, H, d]; returns float[B, N, H, d].

    Args:
      mask: bool[B, M], False for keys that no query may see; each sequence must keep one.
      how: one of ATTENTIONS. cudnn is flash attention, which writes no attention map to memory; where it can't be (`flash_fits`), this is as xla.

    The gradient of xla is our own: it makes the attention map again from q and k, as flash attention does (Dao et al. 2022, algorithm 4), so that
    none is kept from the forward pass, and it divides by the softmax's sum where that is cheap, on the output.
    """
    if how == "cudnn" and mask is None and flash_fits(q, k) and has_flash():
        return _flash(q, k, v)
    return jax.lax.platform_dependent(q * q.shape[-1] ** -0.5, k, v, mask, cpu=_merged, default=_by_heads)


def _flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """cuDNN's flash attention. JAX has its gradient for even numbers of tokens alone: odd ones get one more, which as a key nobody sees."""
    queries, keys = q.shape[1], k.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    seen = jnp.full(len(k), keys, jnp.int32) if keys % 2 else None
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=seen, implementation="cudnn")[:, :queries]


def flash_fits(q: jax.Array, k: jax.Array) -> bool:
    """Whether cuDNN has an attention for these shapes and types, and sequences are as long as its blocks."""
    return q.dtype == jnp.bfloat16 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and min(q.shape[1], k.shape[1]) >= FLASH


@functools.cache
def has_flash() -> bool:
    """Whether this process computes on NVIDIA GPUs for which cuDNN has flash attention: compute capability 8.0 (A100) and above."""
    device = jax.local_devices()[0]
    return device.platform == "gpu" and "cuda" in device.client.platform_version and float(device.compute_capability) >= 8.0


def _merged(q, k, v, mask):
    """One batch axis: the form that CPUs run fast."""
    batch, _, heads, _ = q.shape
    q, k, v = (rearrange(x, "b n h d -> (b h) n d") for x in (q, k, v))
    mask = None if mask is None else jnp.repeat(mask, heads, axis=0)[:, None]
    return rearrange(_attend(True, q, k, v, mask), "(b h) n d -> b n h d", b=batch, h=heads)


def _by_heads(q, k, v, mask):
    """Heads as an axis of their own: where they are split over devices (mesh.tensor), a merged axis would make XLA gather all of them on each."""
    q, k, v = (rearrange(x, "b n h d -> b h n d") for x in (q, k, v))
    mask = None if mask is None else mask[:, None, None]
    return rearrange(_attend(False, q, k, v, mask), "b h n d -> b n h d")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(turn_first: bool, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`turn_first`: the backward pass transposes a map before the product that reads it so (CPUs do such products sequence by sequence)."""
    return _attend_forward(turn_first, q, k, v, mask)[0]


def _attend_forward(_, q, k, v, mask):
    logits = jnp.einsum("...nd,...md->...nm", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    most = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - most)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("...nm,...md->...nd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    out = out.astype(v.dtype)
    return out, (q, k, v, mask, out, most, total)


def _attend_backward(turn_first, saved, grad):
    """Works on the transposed map: the gradients of keys and values are plain products of it then, and only that of queries reads it turned."""
    q, k, v, mask, out, most, total = saved
    grad = grad / total  # float32
    own = (grad * out).sum(axis=-1)[..., None, :]
    grad = grad.astype(v.dtype)

    def by_keys(x: jax.Array, y: jax.Array) -> jax.Array:  # [..., M, d], [..., N, d] -> [..., M, N]
        return jnp.einsum("...md,...nd->...mn", x, y, preferred_element_type=jnp.float32)

    logits = by_keys(k, q)
    if mask is not None:
        logits = jnp.where(mask.swapaxes(-1, -2), logits, -jnp.inf)
    weights = jnp.exp(logits - most.swapaxes(-1, -2))
    to_v = jnp.einsum("...mn,...nd->...md", weights.astype(v.dtype), grad)
    to_logits = (weights * (by_keys(v, grad) - own)).astype(q.dtype)
    to_k = jnp.einsum("...mn,...nd->...md", to_logits, q)
    if turn_first:
        to_q = jnp.einsum("...nm,...md->...nd", jax.lax.optimization_barrier(to_logits.swapaxes(-1, -2)), k)
    else:
        to_q = jnp.einsum("...mn,...md->...nd", to_logits, k)
    return to_q, to_k, to_v, None


_attend.defvjp(_attend_forward, _attend_backward)


class Attention(nnx.Module):
    """Multi-head self-attention over the last but one axis, with the projections to q, k and v fused (rows q | k | v)."""

    def __init__(self, width: int, heads: int, *, dtype, rngs: nnx.Rngs, how: str = "xla"):
        """`how`: as for `dot_product_attention`."""
        self.heads, self.how = heads, how
        self.qkv = Dense(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = Dense(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, *, queries: int | None = None, last: Callable | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """float[..., N, D] -> (output float[..., N, D], q and k float[..., N, H, D / H]).

        Args:
          mask: bool[..., N], True for keys that are used.
          queries: only the first so many tokens ask, and output and q are theirs.
          last: takes the place of the output's projection.
        """
        *lead, tokens, width = x.shape
        mask = None if mask is None else jnp.broadcast_to(mask, x.shape[:-1]).reshape(-1, tokens)
        q, k, v = jnp.split(self.qkv(x).reshape(-1, tokens, 3 * self.heads, width // self.heads), 3, axis=2)
        q = q[:, :queries]  # cut out after the product: a cut through kernels that are split over devices would gather them
        out = dot_product_attention(q, k, v, mask, self.how).reshape(*lead, -1, width)
        return (last or self.proj)(out), q.reshape(*lead, *q.shape[1:]), k.reshape(*lead, *k.shape[1:])


@jax.custom_vjp
def exact_gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution's probability of at most x. Several times faster on CPUs than `jax.nn.gelu`, whose erfc is not vectorised."""
    return (x * _probability(x)).astype(x.dtype)


def _probability(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x.astype(jnp.float32) * 0.5**0.5))


def _exact_gelu_backward(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    x = jax.lax.optimization_barrier(x)  # lest the probability of the forward pass be kept for this
    density = jnp.exp(-0.5 * x.astype(jnp.float32) ** 2) * (2 * jnp.pi) ** -0.5
    return ((grad * (_probability(x) + x * density)).astype(x.dtype),)


exact_gelu.defvjp(lambda x: (exact_gelu(x), x), _exact_gelu_backward)

GELUS = {
    "exact": exact_gelu,  # timm, Hugging Face's ViT, DINOv2, TimeSformer
    "tanh": functools.partial(jax.nn.gelu, approximate=True),  # Flax: the ViT of Google, big_vision, ViViT
    "quick": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP
}


class Mlp(nnx.Module):
    """Two dense layers with GELU between them (float[..., D] -> float[..., D]); `gelu` is one of GELUS."""

    def __init__(self, width: int, hidden: int, *, gelu: str, dtype, rngs: nnx.Rngs):
        self.gelu = gelu
        self.fc1 = Dense(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Dense(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(GELUS[self.gelu](self.fc1(x)))


class LayerScale(nnx.Module):
    """A factor for each channel of a residual (CaiT; DINOv2): float[..., D] -> the same."""

    def __init__(self, width: int, value: float):
        self.gamma = nnx.Param(jnp.full(width, value))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.gamma[...].astype(x.dtype)


def drop_path(x: jax.Array, rate: float | jax.Array, key: jax.Array | None) -> jax.Array:
    """Stochastic depth (Huang et al. 2016): zeroes examples of a residual float[B, ...] with probability `rate`; others grow by 1 / (1 - rate)."""
    if key is None or (isinstance(rate, float) and rate == 0.0):
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), 0)
