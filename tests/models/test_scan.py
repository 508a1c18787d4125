"""`model.scan`: equal blocks as one loop give what the unrolled model gives, with the same parameters; and what is frozen stores nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tests.models.test_vit import AM_FLOW, clip, random_params, tiny
from vidjoint import optim
from vidjoint.config import base_config, task_config
from vidjoint.models.adapters import ADAPTERS
from vidjoint.models.build import Model, build
from vidjoint.models.loop import runs
from vidjoint.models.mixers import MIXERS
from vidjoint.step import init_state, make_train_step

FEW = [  # one of each way: stochastic depth, what is recomputed, branches and a part that all blocks share, blocks that differ
    dict(mixer="divided", drop_path=0.5),
    dict(mixer="motion", remat="dots", frames=2),
    dict(mixer="am_flow", mixer_blocks=(1, 2), am_flow=dataclasses.replace(AM_FLOW, adapter="compacter", flow="aligned")),
]
ALL = [dict(mixer=mixer, drop_path=0.5, remat=remat) for mixer in MIXERS for remat in ("none", "block", "dots")]
ALL += [dict(mixer="am_flow", am_flow=dataclasses.replace(AM_FLOW, adapter=adapter, tpu="lstm", flow="vanilla")) for adapter in ADAPTERS]


def value_and_gradients(model: Model, params: dict, pixels: np.ndarray):
    def loss(params):
        return sum(jnp.sum(x**2) for x in model.logits(params, pixels, jax.random.key(3)).values())

    return jax.jit(jax.value_and_grad(loss)), jax.make_jaxpr(loss)(params)


def check(changes: dict):
    unrolled = tiny(**{"depth": 3} | changes)
    looped = dataclasses.replace(unrolled, spec=dataclasses.replace(unrolled.spec, scan=True))
    assert jax.tree.structure(looped.abstract()) == jax.tree.structure(unrolled.abstract())
    params = jax.tree.map(lambda x: 0.3 * x, random_params(unrolled))
    pixels = clip(2, batch=4).astype(np.float32)
    (plain, _), (scanned, jaxpr) = (value_and_gradients(model, params, pixels) for model in (unrolled, looped))
    (expected, gradients), (actual, others) = plain(params), scanned(params)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    scale = max(np.abs(x).max(initial=0) for x in jax.tree.leaves(gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * max(scale, 1)), others, gradients)
    return jaxpr


def loops(jaxpr) -> list[int]:
    """The lengths of the scans of a jaxpr that are not within another."""
    lengths = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            lengths.append(equation.params["length"])
        else:
            lengths += [n for inner in jaxprs_in_params(equation.params) for n in loops(inner)]
    return lengths


@pytest.mark.parametrize("changes", FEW, ids=lambda changes: changes["mixer"])
def test_a_loop_equals_its_blocks(changes):
    jaxpr = check(changes)
    assert loops(jaxpr.jaxpr)[0] == 2


def test_a_loop_equals_its_blocks_for_everything(full):
    if not full:
        pytest.skip("repeats the test above for every mixer, adapter and model.remat: --full")
    for changes in ALL:
        check(changes)


def test_blocks_that_differ_are_not_in_one_loop():
    def numbers(kinds=None, **changes):
        model = tiny(depth=4, **changes)
        return [list(run) for run in runs(model.bind(model.abstract()).blocks, kinds)]

    for mixer in MIXERS:
        assert numbers(mixer=mixer) == [[0, 1, 2, 3]], mixer
    assert numbers(mixer="divided", mixer_blocks=(2, 3)) == [[0, 1], [2, 3]]
    assert numbers(mixer="am_flow", mixer_blocks=(-1,)) == [[0, 1, 2], [3]]
    assert numbers(mixer="am_flow", am_flow=dataclasses.replace(AM_FLOW, adapter="hyperformer")) == [[0], [1], [2], [3]]  # each knows its number
    assert numbers(("a", "a", "b", "a")) == [[0, 1], [2], [3]]


@pytest.mark.parametrize("scan", [False, True])
def test_nothing_is_stored_of_what_is_frozen(scan):
    """The arrays that the backward pass gets, without parameters: as many less for each frozen block, and none of blocks if all are frozen."""

    def stored(blocks: int) -> int:
        model = tiny(mixer="divided", depth=4, scan=scan, pool="average")
        model = dataclasses.replace(model, kinds=tuple(i < blocks for i in range(4)))
        trained, frozen = optim.split_frozen(model.abstract(), ("embed/.*", *(rf"blocks/{i}/.*" for i in range(blocks))))
        pixels = clip(4).astype(np.float32)
        backward = jax.eval_shape(lambda trained, frozen: jax.vjp(lambda t: model.logits(optim.join(t, frozen), pixels), trained)[1], trained, frozen)
        own = {x.shape for x in jax.tree.leaves((trained, frozen))}
        own |= {(n, *shape) for shape in own for n in range(2, 5)}
        return sum(x.size for x in jax.tree.leaves(backward) if x.shape not in own)

    sizes = [stored(blocks) for blocks in range(5)]
    tokens = 2 * 4 * 10 * 24
    assert sizes[4] < 4 * tokens  # the last norm and the pool
    saved = -np.diff(sizes)
    assert (saved > 5 * tokens).all()
    assert scan or saved.max() < 1.1 * saved.min(), sizes


def test_frozen_blocks_have_a_loop_of_their_own_in_the_step():
    config = base_config()
    config.model.update(variant="Ti/8", width=16, depth=5, heads=2, mlp_dim=32, frames=2, image_size=16, dtype="float32", scan=True)
    config.tasks["a"] = task_config()
    counts = {}
    for frozen in ((), ("embed/.*", "blocks/[01]/.*")):
        config.optim.freeze = frozen
        model = build(config.model, {"a": 3})
        optimizer = optim.make_optimizer(config.optim, lambda step: 0.1)
        state = jax.eval_shape(lambda key, o=optimizer, m=model: init_state(config, m.init(key), o), jax.random.key(0))
        batch = {
            "pixels": np.zeros((2, 2, 16, 16, 3), np.uint8),
            "label": np.zeros(2, np.int32),
            "task": np.zeros(2, np.int32),
            "mask": np.ones(2, bool),
        }
        counts[frozen] = loops(jax.make_jaxpr(make_train_step(config, model, optimizer))(state, (batch,)).jaxpr)
    assert list(counts.values()) == [[4, 4], [2, 2, 2]]  # forward, backward; and frozen, forward, backward; without the last block
