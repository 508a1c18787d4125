import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vidjoint.config import base_config
from vidjoint.errors import UserError
from vidjoint.optim import decay_mask, ema_update, join, make_optimizer, make_schedule, split_frozen


def settings(**changes):
    optim = base_config().optim
    optim.update(changes)
    return optim


def parameters():
    rng = np.random.default_rng(0)
    block = {"attn": {"qkv": {"kernel": (2, 3), "bias": (3,)}}, "norm": {"scale": (3,)}}
    embed = {"class_token": (3,), "position": (5, 3), "time": (2, 3), "proj": {"kernel": (2, 3)}}
    shapes = {"embed": embed, "blocks": {"0": block, "1": block, "10": block}, "heads": {"time_lapse": {"kernel": (2, 3)}}}
    return jax.tree.map(lambda shape: rng.normal(size=shape).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))


# Schedules


def test_cover_drops_at_epochs_11_and_15():
    per_epoch = 19389.25
    schedule = make_schedule(settings(schedule="step", lr=5e-3, milestone_epochs=(11, 15)), round(20 * per_epoch), per_epoch)
    first, second = round(11 * per_epoch), round(15 * per_epoch)
    expected = {0: 5e-3, first - 1: 5e-3, first: 5e-4, second - 1: 5e-4, second: 5e-5, round(20 * per_epoch): 5e-5}
    for step, rate in expected.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-6, err_msg=f"step {step}")


def test_steps_and_epochs_agree_and_warm_up_counts_towards_milestones():
    by_steps = make_schedule(settings(schedule="step", lr=0.2, warmup_steps=10, milestone_steps=(30, 60), decay_factor=0.5), 100, 12.0)
    by_epochs = make_schedule(settings(schedule="step", lr=0.2, warmup_epochs=1.0, milestone_epochs=(3.0, 6.0), decay_factor=0.5), 100, 10.0)
    for step, rate in {0: 0.0, 1: 0.02, 5: 0.1, 10: 0.2, 29: 0.2, 30: 0.1, 59: 0.1, 60: 0.05, 99: 0.05}.items():
        np.testing.assert_allclose(by_steps(step), rate, rtol=1e-6, err_msg=f"step {step}")
        np.testing.assert_allclose(by_epochs(step), rate, rtol=1e-6, err_msg=f"step {step}")


def test_cosine_against_its_formula():
    schedule = make_schedule(settings(lr=3e-3, warmup_steps=20), 120, 1.0)
    for step in range(0, 150, 5):
        expected = 3e-3 * step / 20 if step < 20 else 3e-3 * 0.5 * (1 + np.cos(np.pi * min(step - 20, 100) / 100))
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-5, atol=1e-10, err_msg=f"step {step}")
    np.testing.assert_allclose(schedule(20), 3e-3, rtol=1e-6)
    assert schedule(119) > 0 and schedule(120) == schedule(1000) == 0


def test_constant_and_schedules_are_traceable():
    schedule = make_schedule(settings(schedule="constant", lr=0.1, warmup_steps=4), 10, 1.0)
    np.testing.assert_allclose([schedule(i) for i in (0, 2, 4, 9)], [0, 0.05, 0.1, 0.1], rtol=1e-6)
    for name in ("cosine", "step", "constant"):
        traced = make_schedule(settings(schedule=name, milestone_steps=(3,)), 10, 1.0)
        rate = jax.jit(traced)(jnp.int32(5))
        assert rate.dtype == jnp.float32 and rate.shape == ()
        np.testing.assert_allclose(rate, traced(5), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"warmup_steps": 5, "warmup_epochs": 1.0}, "warmup_steps=5 and optim.warmup_epochs=1.0"),
        ({"schedule": "step", "milestone_steps": (5,), "milestone_epochs": (1.0,)}, "both optim.milestone_steps"),
        ({"schedule": "step"}, "needs milestones"),
        ({"schedule": "step", "milestone_epochs": (15, 11)}, "rise"),
        ({"schedule": "step", "milestone_steps": (0, 10)}, "above 0"),
        ({"schedule": "linear"}, "cosine, step, constant"),
        ({"warmup_steps": 100}, "not shorter than the run"),
        ({"warmup_epochs": -1.0}, "negative"),
        ({"lr": -1.0}, "negative"),
    ],
)
def test_schedule_errors(changes, words):
    with pytest.raises(UserError, match=words):
        make_schedule(settings(**changes), 100, 10.0)


def test_all_problems_at_once():
    with pytest.raises(UserError) as error:
        make_schedule(settings(schedule="linear", warmup_steps=5, warmup_epochs=1.0), 100, 10.0)
    assert len(error.value.lines) == 2
    with pytest.raises(UserError) as error:
        make_optimizer(settings(name="lion", decay="some", clip_norm=-1.0), None)
    assert len(error.value.lines) == 3


# Optimisers, against NumPy


def gradients(params, step):
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)


def clipped(grads, limit):
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in jax.tree.leaves(grads)))
    assert norm > limit  # so that clipping takes part in the test
    return jax.tree.map(lambda g: g * (limit / norm), grads)


def run_optax(optim, rates, params):
    optimizer = make_optimizer(optim, lambda step: jnp.asarray(rates)[step])
    state, trained = jax.jit(optimizer.init)(params), params

    @jax.jit
    def update(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(len(rates)):
        trained, state = update(gradients(params, step), state, trained)
    return trained


def assert_trees_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_sgd_for_three_steps(nesterov, decay):
    optim = settings(name="sgd", momentum=0.9, nesterov=nesterov, weight_decay=0.1, decay=decay, clip_norm=2.0)
    rates, params = np.float32([0.5, 0.4, 0.3]), parameters()
    actual = run_optax(optim, rates, params)

    mask = decay_mask(params, decay)
    expected, velocity = params, jax.tree.map(np.zeros_like, params)
    for step, rate in enumerate(rates):
        grads = clipped(gradients(params, step), 2.0)
        grads = jax.tree.map(lambda g, p, m: g + 0.1 * p * m, grads, expected, mask)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        update = jax.tree.map(lambda v, g: g + 0.9 * v, velocity, grads) if nesterov else velocity
        expected = jax.tree.map(lambda p, u, rate=rate: p - rate * u, expected, update)
    assert_trees_close(actual, expected)


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_adamw_for_three_steps(decay):
    optim = settings(name="adamw", betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2, decay=decay, clip_norm=2.0)
    rates, params = np.float32([0.5, 0.4, 0.3]), parameters()
    actual = run_optax(optim, rates, params)

    mask = decay_mask(params, decay)
    expected, mean, square = params, jax.tree.map(np.zeros_like, params), jax.tree.map(np.zeros_like, params)
    for step, rate in enumerate(rates):
        grads = clipped(gradients(params, step), 2.0)
        mean = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, mean, grads)
        square = jax.tree.map(lambda s, g: 0.95 * s + 0.05 * g**2, square, grads)
        first, second = 1 - 0.8 ** (step + 1), 1 - 0.95 ** (step + 1)
        direction = jax.tree.map(lambda m, s, first=first, second=second: (m / first) / (np.sqrt(s / second) + 1e-3), mean, square)
        expected = jax.tree.map(lambda p, d, m, rate=rate: p - rate * (d + 0.2 * p * m), expected, direction, mask)
    assert_trees_close(actual, expected)


def test_small_gradients_are_not_clipped_and_zero_means_off():
    params = {"kernel": np.ones((2, 2), np.float32)}
    grads = {"kernel": np.full((2, 2), 0.25, np.float32)}  # norm 0.5
    for limit, length in ((0.0, 0.5), (1.0, 0.5), (0.1, 0.1)):
        optimizer = make_optimizer(settings(name="sgd", momentum=0.0, clip_norm=limit), lambda step: 1.0)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        np.testing.assert_allclose(optax.tree.norm(updates), length, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "adam"}, "adamw, sgd"),
        ({"decay": "none"}, "matrices, all"),
        ({"name": "sgd", "momentum": 1.0}, "momentum"),
        ({"name": "sgd", "momentum": 0.0, "nesterov": True}, "needs momentum"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"ema": 1.0}, "ema"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ],
)
def test_optimizer_errors(changes, words):
    with pytest.raises(UserError, match=words):
        make_optimizer(settings(**changes), lambda step: 1.0)


def test_decay_mask():
    decayed = {
        "/".join(str(key.key) for key in path) for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(parameters(), "matrices")) if decays
    }
    assert decayed == {"embed/proj/kernel", "heads/time_lapse/kernel"} | {f"blocks/{i}/attn/qkv/kernel" for i in (0, 1, 10)}
    assert all(jax.tree.leaves(decay_mask(parameters(), "all")))
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, parameters()))
    assert decay_mask(abstract, "matrices") == decay_mask(parameters(), "matrices")


# Freezing


@pytest.mark.parametrize("patterns", [(), ("blocks/.*",), ("embed/(position|time)", r"blocks/1/.*", ".*/bias"), ("embed/.*", ".*/kernel")])
def test_split_and_join_round_trip(patterns):
    params = parameters() | {"empty": {}}
    trainable, frozen = split_frozen(params, patterns)
    joined = join(trainable, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(params), strict=True))
    assert len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(params))


def test_a_pattern_matches_whole_names():
    trainable, frozen = split_frozen(parameters(), (r"blocks/1/.*",))
    assert set(frozen) == {"blocks"} and set(frozen["blocks"]) == {"1"}
    assert set(trainable["blocks"]) == {"0", "10"}
    assert split_frozen(parameters(), ())[1] == {}
    assert split_frozen({"embed": {"time": 1, "time_fc": 2}}, ("embed/time",)) == ({"embed": {"time_fc": 2}}, {"embed": {"time": 1}})


def test_patterns_that_match_nothing_are_reported_together():
    with pytest.raises(UserError) as error:
        split_frozen(parameters(), ("blocks/.*", "block/.*", "blocks/(", "position"))
    lines = error.value.lines
    assert len(lines) == 3 and "'block/.*'" in lines[0] and "blocks, embed, heads" in lines[0] and "no regular expression" in lines[1]
    with pytest.raises(UserError, match="nothing is left to train"):
        split_frozen(parameters(), (".*",))
    with pytest.raises(ValueError, match="both"):
        join({"a": {"b": 1}}, {"a": {"b": 2}})


def test_frozen_parameters_have_no_gradient_and_no_state():
    params = parameters()
    trainable, frozen = split_frozen(params, ("blocks/.*", "embed/.*"))
    grads = jax.eval_shape(jax.grad(lambda part: optax.tree.norm(join(part, frozen))), trainable)
    assert jax.tree.structure(grads) == jax.tree.structure(trainable)
    state = jax.eval_shape(make_optimizer(settings(), lambda step: 1.0).init, trainable)
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * sum(leaf.size for leaf in jax.tree.leaves(trainable))


# Moving average


def test_ema_against_numpy():
    params = parameters()
    average, expected = params, params
    update = jax.jit(ema_update, static_argnums=2)
    for step in range(6):
        now = gradients(params, step)
        average = update(average, now, 0.3, step)
        keep = min(0.3, (1 + step) / (10 + step))
        expected = jax.tree.map(lambda e, p, keep=keep: keep * e + (1 - keep) * p, expected, now)
    assert_trees_close(average, expected)
    assert min(0.3, 1 / 10) == 0.1 and min(0.3, 6 / 15) == 0.3  # both branches took part
    unchanged = update(params, params, 0.999, 7)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), unchanged, params)))
