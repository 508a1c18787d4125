"""Position tables of another size: each kind of pretrained weights is stretched the way its own library stretches it.

A table has `prefix` rows (class token) that stay as they are, then one row per patch, row by row: float[prefix + h * w, D]. Sizes are static, so
weights and indices are NumPy constants under jit.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Grid = tuple[int, int]  # rows and columns of patches


def resize_position(table: jax.Array, prefix: int, grid: Grid, new_grid: Grid, how: str = "bicubic") -> jax.Array:
    """Stretches a position table float[prefix + h * w, D] to another patch grid, float[prefix + h' * w', D], by one of RESIZERS.

    At its own grid a table is returned as it is, whatever `how` would make of it.
    """
    if grid == new_grid:
        return table
    return jnp.concatenate([table[:prefix], RESIZERS[how](jnp.asarray(table[prefix:]), grid, new_grid)])


def resize_space_time(table: jax.Array, prefix: int, size: tuple[int, int, int], new_size: tuple[int, int, int], how: str = "bicubic") -> jax.Array:
    """The same for a table with a row for every token of a clip, float[prefix + t * h * w, D], `size` being (t, h, w).

    Time by nearest neighbour (a single image gets the first time step), then the grid of each time step by `how`; a sinusoid runs through all tokens.
    """
    if size == new_size:
        return table
    (frames, *grid), (new_frames, *new_grid), width = size, new_size, table.shape[-1]
    if how == "sinusoid":
        patches = sinusoid(math.prod(new_size), width)
    else:
        patches = resize_time(jnp.asarray(table[prefix:]).reshape(frames, -1, width), new_frames)
        if grid != new_grid:
            patches = RESIZERS[how](patches, grid, new_grid)
    return jnp.concatenate([table[:prefix], patches.reshape(-1, width)])


def resize_time(table: jax.Array, frames: int) -> jax.Array:
    """Takes `frames` rows of a time table float[T, ...] by nearest neighbour, as TimeSformer does: a single image gets row 0."""
    return table if len(table) == frames else table[nearest_index(len(table), frames)]


def nearest_index(size: int, new_size: int) -> np.ndarray:
    """int[new_size]: floor(i * size / new_size), in float32 as torch computes it: 14 to 46 and some other sizes round to the row before."""
    index = np.floor(np.arange(new_size, dtype=np.float32) * (np.float32(size) / np.float32(new_size)))
    return np.minimum(index.astype(int), size - 1)


def sinusoid(count: int, width: int) -> np.ndarray:
    """VideoMAE's fixed table float32[count, width]: sine (even columns j) or cosine (odd) of p / 10000^(2 (j // 2) / width) for token number p."""
    columns = np.arange(width)
    angle = np.arange(count)[:, None] / 10000.0 ** (2 * (columns // 2) / width)
    return np.where(columns % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)


def bicubic_matrix(size: int, new_size: int, offset: float = 0.0) -> np.ndarray:
    """Weights float32[new_size, size] of cubic interpolation along one axis: half-pixel centres, clamped edges, no antialias, A = -0.75.

    This is torch's kernel, with which published position tables were resized; `jax.image.resize` uses A = -0.5 and antialiases. DINOv2's own code
    stretches by (new_size + 0.1) / size, its `offset`, so that rounding cannot lose a row; the samples sit a little closer than they should.
    """
    return _interpolation(_places(size, new_size, -0.5, offset), size, functools.partial(_cubic, a=-0.75), reach=2)


def antialias_matrix(size: int, new_size: int) -> np.ndarray:
    """The same with torch's antialias: A = -0.5, the kernel as wide as the step between samples, weights beyond the edge left out."""
    distance = np.abs(np.arange(size) + 0.5 - _places(size, new_size, 0.0)[:, None])
    weights = _cubic(distance / max(size / new_size, 1.0), a=-0.5)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def bilinear_matrix(size: int, new_size: int) -> np.ndarray:
    """Weights float32[new_size, size] of linear interpolation: half-pixel centres, clamped edges, no antialias (torch)."""
    return _interpolation(_places(size, new_size, -0.5), size, _hat, reach=1)


def corners_matrix(size: int, new_size: int) -> np.ndarray:
    """Linear interpolation with the first and last samples on the first and last rows (`scipy.ndimage.zoom` of order 1).

    For some sizes (28 to 14) scipy rounds the last sample to a place outside the table, and makes it zero. Here it is the last row.
    """
    return _interpolation(np.arange(new_size) * (size - 1) / max(new_size - 1, 1), size, _hat, reach=1)


def _places(size: int, new_size: int, start: float, offset: float = 0.0) -> np.ndarray:
    """float32[new_size]: the samples' middles on an axis of `size` rows whose first edge is `start`.

    Torch rounds the step and the place to float32, which moves the values of large tables by 2e-5: so does this.
    """
    step = np.float32(size / (new_size + offset))
    return ((np.arange(new_size) + 0.5) * np.float64(step) + start).astype(np.float32)


def _interpolation(centre: np.ndarray, size: int, kernel: Callable, reach: int) -> np.ndarray:
    """float32[len(centre), size]: `kernel` of the distance to the 2 * reach rows around each centre; the first and last rows go on for ever."""
    first = np.floor(centre).astype(int) - reach + 1
    matrix = np.zeros((len(centre), size))
    for row in range(2 * reach):
        np.add.at(matrix, (np.arange(len(centre)), np.clip(first + row, 0, size - 1)), kernel(np.abs(centre - (first + row))))
    return matrix.astype(np.float32)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Cubic convolution (Keys 1981) with the free parameter `a`."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


def _hat(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1 - distance, 0)


def _separable(matrix: Callable[[int, int], np.ndarray]) -> Callable:
    """A resizer that multiplies rows and columns with the weights that `matrix` gives for the old and new size of each."""

    def resize(patches: jax.Array, grid: Grid, new_grid: Grid) -> jax.Array:
        rows, columns = (matrix(old, new) for old, new in zip(grid, new_grid, strict=True))
        patches = patches.reshape(*patches.shape[:-2], *grid, patches.shape[-1])
        patches = jnp.einsum("ih,...hwd,jw->...ijd", rows, patches, columns, precision="highest")  # accelerators would round to 8 or 10 bits
        return patches.reshape(*patches.shape[:-3], -1, patches.shape[-1])

    return resize


def _nearest(patches: jax.Array, grid: Grid, new_grid: Grid) -> jax.Array:
    rows, columns = (nearest_index(old, new) for old, new in zip(grid, new_grid, strict=True))
    return patches[..., (rows[:, None] * grid[1] + columns).reshape(-1), :]


def _nearest_1d(patches: jax.Array, grid: Grid, new_grid: Grid) -> jax.Array:
    """Nearest neighbour in the flat list of patches, which scrambles the picture. Published high-resolution TimeSformers were trained from that."""
    return patches[..., nearest_index(math.prod(grid), math.prod(new_grid)), :]


def _sinusoid(patches: jax.Array, grid: Grid, new_grid: Grid) -> jax.Array:
    """Not stretched but made anew."""
    table = jnp.asarray(sinusoid(math.prod(new_grid), patches.shape[-1]), patches.dtype)
    return jnp.broadcast_to(table, (*patches.shape[:-2], *table.shape))


# How a grid is stretched: float[..., h * w, D], (h, w) and (h', w') -> float[..., h' * w', D]. In brackets whose convention it is.
RESIZERS = {
    "bicubic": _separable(bicubic_matrix),  # torch; Hugging Face's ViT, CLIP and DINOv2
    "bicubic_antialias": _separable(antialias_matrix),  # torch with antialias; timm, and DINOv2 with registers
    "bicubic_offset": _separable(functools.partial(bicubic_matrix, offset=0.1)),  # DINOv2's own code, without registers
    "bilinear": _separable(bilinear_matrix),  # torch; timm for Google's .npz
    "bilinear_corners": _separable(corners_matrix),  # scipy's zoom; vision_transformer and big_vision
    "nearest": _nearest,  # TimeSformer in its forward pass
    "nearest_1d": _nearest_1d,  # TimeSformer where it loads weights
    "sinusoid": _sinusoid,  # VideoMAE
}
