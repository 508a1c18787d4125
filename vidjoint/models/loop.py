"""Equal blocks as one loop, so that XLA compiles one of them whatever the depth. Parameters keep their names: they are stacked when it is traced."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx


def runs(blocks: Sequence[nnx.Module], kinds: Sequence | None = None) -> list[range]:
    """The numbers of consecutive blocks that are equal in structure, in the shapes of their parameters and, if given, in `kinds`."""

    def sort(number: int):
        graph, state = nnx.split(blocks[number])
        return graph, [(x.shape, x.dtype) for x in jax.tree.leaves(state)], kinds and kinds[number]

    return [range(numbers[0], numbers[-1] + 1) for _, same in itertools.groupby(range(len(blocks)), sort) if (numbers := list(same))]


def loop(run: Callable, blocks: Sequence[nnx.Module], x: jax.Array, *each: Sequence | None, remat: Callable = lambda step: step) -> tuple:
    """`x, out = run(block, x, *values)` for one block after the other, which must be equal (`runs`); returns x and the list of the outs.

    Args:
      run: a pure function; `values` are arrays, one of each of `each`, or None where that is None.
      x: must keep its shape and type.
      remat: `jax.checkpoint` with its settings, which include prevent_cse=False.
    """
    graph = nnx.split(blocks[0])[0]
    leaves = [jax.tree.leaves(nnx.split(block)[1]) for block in blocks]
    tree = jax.tree.structure(nnx.split(blocks[0])[1])
    columns = list(zip(*leaves, strict=True))
    own = [any(x is not column[0] for x in column) for column in columns]  # others are one array in all blocks: a part that these share
    stacked = [jnp.stack(column) for column, is_own in zip(columns, own, strict=True) if is_own]

    def step(x, values):
        parameters, values = values
        parameters = iter(parameters)
        state = tree.unflatten([next(parameters) if is_own else column[0] for column, is_own in zip(columns, own, strict=True)])
        return run(nnx.merge(graph, state), x, *values)

    each = tuple(None if values is None else jnp.stack([jnp.asarray(value) for value in values]) for values in each)
    x, outs = jax.lax.scan(remat(step), x, (stacked, each))
    return x, [jax.tree.map(lambda out, i=i: out[i], outs) for i in range(len(blocks))]
