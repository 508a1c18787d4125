"""k nearest neighbours among the training examples, as DINO evaluates features (Caron et al. 2021, section 4.1)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

NEIGHBOURS = (5, 10, 20, 50, 100, 200)  # values of k that are tried
TEMPERATURE = 0.07  # of the votes (Wu et al. 2018; DINO)
BLOCK = 1024, 16384  # queries and training examples that are compared at a time


def nearest(queries: np.ndarray, bank: np.ndarray, k: int, block: tuple[int, int] = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of the bank that are most like each query: exact, block by block on the device; equals in order of their number.

    Args:
      queries, bank: float32[Q, D], float32[n, D], of any length.
      k: 1..n.

    Returns:
      Cosine similarities float32[Q, k], highest first, and row numbers int32[Q, k].
    """
    rows, columns = min(block[0], len(queries)), min(block[1], len(bank))
    parts = [_unit(_filled(bank[i : i + columns], columns)) for i in range(0, len(bank), columns)]  # on the device
    found = []
    for start in range(0, len(queries), rows):
        query = _unit(_filled(queries[start : start + rows], rows))
        best = jnp.full((rows, k), -jnp.inf), jnp.zeros((rows, k), jnp.int32)
        for number, part in enumerate(parts):
            best = _merge(query, part, *best, number * columns, len(bank))
        found.append(jax.tree.map(np.asarray, best))
    similarity, index = (np.concatenate(parts)[: len(queries)] for parts in zip(*found, strict=True))
    return similarity, index


def vote(similarity: np.ndarray, index: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    """Each neighbour votes for its labels with weight exp(similarity / TEMPERATURE); the shares of all votes, float32[Q, C].

    Args:
      similarity, index: float[Q, k], int[Q, k], see `nearest`.
      label: of the bank, int[n], or int[n, K] filled up by -1.
    """
    weight = np.exp((similarity - 1) / TEMPERATURE)  # the factor exp(-1 / TEMPERATURE) falls out of the shares
    weight = weight / weight.sum(axis=1, keepdims=True)
    votes = label.reshape(len(label), -1)[index]  # [Q, k, K]
    query, neighbour, place = np.nonzero(votes >= 0)
    scores = np.zeros((len(index), classes), np.float32)
    np.add.at(scores, (query, votes[query, neighbour, place]), weight[query, neighbour])
    return scores


def _filled(x: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([x, np.zeros((rows - len(x), x.shape[1]), x.dtype)])


@jax.jit
def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnames="size")
def _merge(query, part, similarity, index, first, size):
    """The best so far, and those of one part of the bank, whose rows count from `first`; rows from `size` on are filling."""
    found = jnp.matmul(query, part.T, precision="highest")
    numbers = first + jnp.arange(len(part))
    found = jnp.where(numbers < size, found, -jnp.inf)
    numbers = jnp.broadcast_to(numbers.astype(jnp.int32), found.shape)
    similarity, place = jax.lax.top_k(jnp.concatenate([similarity, found], axis=1), similarity.shape[1])
    return similarity, jnp.take_along_axis(jnp.concatenate([index, numbers], axis=1), place, axis=1)
