"""What the attention of a trained model looks at: the maps of every block for one clip.

The maps are made anew from queries and keys, for the model itself never holds them: `record` listens to its attentions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from vidjoint.models.block import Block
from vidjoint.models.build import Model
from vidjoint.models.mixers.motion import from_blocks, to_blocks
from vidjoint.models.pooling import ClassAttention, TemporalEncoder
from vidjoint.models.spec import ViTSpec
from vidjoint.models.vit import ViT

RESIDUAL = 0.5  # share of a token that its residual keeps for itself (Abnar and Zuidema 2020, section 3)


@dataclass(frozen=True)
class Stage:
    """One step in which tokens read other tokens. Maps are float32[.., queries, keys] and each row sums to 1.

    kind, and the shape of `weights`, mean over heads (`heads` has an axis H before queries and keys):
      space: each frame by itself, [T, N, N]; joint: class token and registers of the first frame, then the patches of all, [S, S];
      time: each place over the frames, [patches, T, T]; motion: blocks of places over the frames, [blocks, T M M, T M M];
      shift: a token of frame t is made of those of the frames, [T, T], for the first `moving` tokens of each frame.
    """

    block: int  # -1: the pool
    kind: str
    weights: np.ndarray
    heads: np.ndarray | None = None
    moving: int = 0


@dataclass
class Maps:
    """All stages of one clip, in the order in which the tokens pass them.

    Attributes:
      reader: float32[T, N], what the pool reads of the last tokens; sums to 1.
      reads_class: whether the pool reads class tokens (else patches).
    """

    spec: ViTSpec
    grid: tuple[int, int]
    stages: list[Stage]
    reader: np.ndarray = field(repr=False)
    reads_class: bool = True


class _Listener:
    """Stands in for an attention, and keeps what it is asked."""

    def __init__(self, attention: Callable, calls: list, name: str):
        self._attention, self._calls, self._name = attention, calls, name

    def __call__(self, x: jax.Array, mask: jax.Array | None = None, **others):
        out, q, k = self._attention(x, mask, **others)
        self._calls.append((self._name, q, k, mask))
        return out, q, k

    def __getattr__(self, name: str):
        return getattr(self._attention, name)


def softmax_map(q: jax.Array, k: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """float[.., Q, H, d] and [.., K, H, d] -> float32[.., H, Q, K]."""
    logits = jnp.einsum("...qhd,...khd->...hqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jax.nn.softmax(logits if mask is None else jnp.where(mask[..., None, None, :], logits, -jnp.inf))


def record(model: Model, params: dict, pixels: jax.Array) -> dict:
    """Runs one clip, uint8[T, H, W, 3]; returns every attention's maps and what the pool needs, as arrays; jit-able.

    {"blocks": for each block its maps in order of use, float32[.., H, Q, K], "pool": those of the pool, see `_pool_maps`}.
    """
    vit, blocks = model.bind(params), []
    for _, calls, x in walk(vit, pixels):
        blocks.append([(name, softmax_map(q, k, mask)[0]) for name, q, k, mask in calls])
        tokens = x
    return {"blocks": blocks, "pool": _pool_maps(vit, tokens)}


def walk(vit: ViT, pixels: jax.Array) -> Iterator[tuple[Block, list[tuple], jax.Array]]:
    """Takes one clip, uint8[T, H, W, 3], through the blocks: each block, what it asks (`listen`), and tokens float[1, T, N, D] after it."""
    x, grid = vit.embed(pixels[None]), (pixels.shape[1] // vit.spec.patch, pixels.shape[2] // vit.spec.patch)
    for block in vit.blocks:
        calls = listen(block)
        x, _ = block(x, None, grid)
        yield block, calls, x


def listen(block: Block) -> list[tuple]:
    """Makes a block keep (which attention, q, k, mask) of what it asks its attentions from now on, in the list that is returned."""
    calls: list = []
    block.attn = _Listener(block.attn, calls, "attn")
    if hasattr(block.mixer, "temporal_attn"):
        block.mixer.temporal_attn = _Listener(block.mixer.temporal_attn, calls, "temporal")
    return calls


def _pool_maps(vit: ViT, x: jax.Array) -> list[jax.Array]:
    """Maps of a pool that attends: of class-attention float32[H, 1, keys], of a temporal encoder [H, 1 + T, 1 + T]."""
    pool = vit.pool
    if isinstance(pool, TemporalEncoder):
        calls = [listen(block) for block in pool.blocks]
        pool(x, vit.norm, None)
        return [softmax_map(q, k)[0, 0] for ((_, q, k, _),) in calls]
    if not isinstance(pool, ClassAttention):
        return []
    maps, patches = [], x[:, :, pool.prefix :].reshape(1, -1, x.shape[-1])
    token = jnp.broadcast_to(pool.class_token[...].astype(x.dtype), (1, 1, x.shape[-1]))
    for block in pool.blocks:
        query, keys = block.norm1(token), block.norm1(patches)
        keys = jnp.concatenate([query, keys], axis=1) if block.token_is_key else keys
        _, q, _ = block.attn(query)
        _, _, k = block.attn(keys)
        maps.append(softmax_map(q, k)[0])
        token = block(token, patches)
    return maps


def maps_of(model: Model, params: dict, pixels: np.ndarray, heads: bool = False) -> Maps:
    """The maps of one clip, uint8[T, H, W, 3]; with `heads` also those of each head."""
    spec = model.spec
    grid = pixels.shape[1] // spec.patch, pixels.shape[2] // spec.patch

    def run(params, pixels):
        found = record(model, params, pixels)
        names = [[name for name, _ in block] for block in found["blocks"]]
        reduced = [[(jnp.mean(weights, axis=-3), weights if heads else None) for _, weights in block] for block in found["blocks"]]
        order.append(names)
        return reduced, [jnp.mean(weights, axis=-3) for weights in found["pool"]]

    order: list = []
    blocks, pool = jax.tree.map(np.asarray, jax.jit(run)(params, pixels))
    frames = len(pixels) // (spec.tubelet if spec.embed == "separate" and len(pixels) > 1 else 1)
    stages = []
    for number, (names, found) in enumerate(zip(order[0], blocks, strict=True)):
        mixes = spec.mixes(number)
        kinds = {"attn": "joint" if spec.mixer == "joint" and mixes else "space", "temporal": "time" if spec.mixer == "divided" else "motion"}
        attentions = [Stage(number, kinds[name], *weights) for name, weights in zip(names, found, strict=True)]
        shift = [_shift_stage(number, spec, frames, grid)] if spec.mixer == "token_shift" and mixes and frames > 1 else []
        stages += [*shift, *attentions, *shift]
    reader, reads_class, last = _reader(spec, frames, grid, pool)
    return Maps(spec, grid, stages + last, reader, reads_class)


def _shift_stage(block: int, spec: ViTSpec, frames: int, grid: tuple[int, int]) -> Stage:
    """How much of a token comes from its neighbours in time; what would come from beyond the ends is left out, and the row made 1 again."""
    share = round(spec.width * spec.token_shift.fraction) / spec.width
    weights = (1 - 2 * share) * np.eye(frames) + share * (np.eye(frames, k=1) + np.eye(frames, k=-1))
    moving = spec.prefix + grid[0] * grid[1] if spec.token_shift.tokens == "all" else int(spec.class_token)
    return Stage(block, "shift", (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32), moving=moving)


def _reader(spec: ViTSpec, frames: int, grid: tuple[int, int], pool: list[np.ndarray]) -> tuple[np.ndarray, bool, list[Stage]]:
    """What the pool reads of the tokens, float32[T, N]; whether that is the class tokens; and its own attention over the patches as a stage."""
    reader = np.zeros((frames, spec.prefix + grid[0] * grid[1]), np.float32)
    patches = reader[:, spec.prefix :]
    if spec.pool == "class_attention":
        token, seen = 1.0, np.zeros(patches.size, np.float32)
        for weights in reversed(pool):  # the last block reads first
            kept = RESIDUAL * token
            own = kept * weights[0, 0] if weights.shape[-1] > patches.size else 0.0
            seen, token = seen + kept * weights[0, -patches.size :], token - kept + own
        patches[:] = (seen / seen.sum()).reshape(patches.shape)
        return reader, False, [Stage(-1, "class attention", (pool[-1][0, -patches.size :]).reshape(frames, *grid))]
    if spec.pool == "temporal_encoder":
        row = np.zeros(1 + frames, np.float32)
        row[0] = 1
        for weights in reversed(pool):
            row = RESIDUAL * row + (1 - RESIDUAL) * row @ weights
        share = row[1:] / row[1:].sum()
        target = reader[:, :1] if spec.class_token else patches
        target[:] = share[:, None] / target.shape[1]
        return reader, spec.class_token, []
    if spec.pool in ("average", "patch_mean"):
        patches[:] = 1 / patches.size
        return reader, False, []
    if spec.pool in ("last_frame", "first_token"):
        reader[-1 if spec.pool == "last_frame" else 0, 0] = 1
        return reader, spec.class_token, []
    reader[:, 0] = 1 / frames  # class_token, frame_mean
    if spec.pool == "class_and_average":
        reader[:, 0] /= 2
        patches[:] = 1 / (2 * patches.size)
    return reader, True, []


def looks(maps: Maps, stage: Stage, head: int | None = None) -> np.ndarray:
    """Where the reader looks in one stage, float32[T, rows, columns] over the patches.

    The reader is the class token (of each frame, where frames have their own maps), or the mean of all patches where the pool reads patches. Of a
    stage over time: the attention that a frame gets at a place, mean over the frames that ask.
    """
    prefix = maps.spec.prefix
    weights = stage.weights if head is None else np.take(stage.heads, head, axis=-3)
    shape = (-1, *maps.grid)
    if stage.kind == "class attention":
        return weights
    if stage.kind == "time":
        return weights.mean(axis=1).T.reshape(shape)
    if stage.kind == "motion":
        received = weights.mean(axis=1)[None, :, :, None]
        return np.asarray(from_blocks(jnp.asarray(received), maps.grid, maps.spec.motion.block))[0, :, :, 0].reshape(shape)
    asking = slice(0, 1) if maps.reads_class else slice(prefix, None)
    return weights[..., asking, prefix:].mean(axis=-2).reshape(shape)


def neighbours(maps: Maps, stage: Stage, frame: int, row: int, column: int, head: int | None = None) -> np.ndarray:
    """What one patch looks at in a stage of kind motion, time, space or joint: float32[T, rows, columns], NaN for patches that it can't see."""
    weights = stage.weights if head is None else np.take(stage.heads, head, axis=-3)
    (rows, columns), prefix, place = maps.grid, maps.spec.prefix, row * maps.grid[1] + column
    frames = len(maps.reader)
    seen = np.full((frames, rows * columns), np.nan, np.float32)
    if stage.kind == "time":
        seen[:, place] = weights[place, frame]
    elif stage.kind == "space":
        seen[frame] = weights[frame, prefix + place, prefix:]
    elif stage.kind == "joint":
        seen[:] = weights[prefix + frame * rows * columns + place, prefix:].reshape(frames, -1)
    else:
        side = maps.spec.motion.block
        ids = jnp.arange(frames * rows * columns).reshape(1, frames, rows * columns, 1)
        cells = np.asarray(to_blocks(ids + 1, maps.grid, side)[0])[0, :, :, 0] - 1  # -1: beyond the grid's edge
        block, query = np.argwhere(cells == frame * rows * columns + place)[0]
        real = cells[block] >= 0
        seen.reshape(-1)[cells[block][real]] = weights[block, query][real]
    return seen.reshape(frames, rows, columns)
