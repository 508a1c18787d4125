import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vidjoint import sharding
from vidjoint.checkpoints import Checkpoints
from vidjoint.config import base_config, task_config
from vidjoint.errors import UserError
from vidjoint.optim import decay_mask, ema_update, join, make_optimizer, make_schedule, split_frozen
from vidjoint.step import init_state, make_train_step


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
        ({"schedule": "step", "milestone_steps": (5,), "decay_factor": -0.1}, "decay_factor=-0.1 must be above 0"),
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


# Tasks that take turns

TASKS = 3
MODES = ("shared", "independent", "cumulative_ref", "accumulated")
ADAMW = dict(name="adamw", betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2, clip_norm=2.0)
SGD = dict(name="sgd", momentum=0.9, nesterov=True, weight_decay=0.1, clip_norm=2.0)


def few():
    rng = np.random.default_rng(1)
    return {"mlp": {"kernel": rng.normal(size=(4, 6)).astype(np.float32), "bias": rng.normal(size=6).astype(np.float32)}}


@functools.cache
def run_modes(mode, name):
    """The parameters after each of the 9 steps of 3 rounds."""
    optim = settings(per_task=mode, **(ADAMW if name == "adamw" else SGD))
    rates = jnp.linspace(0.3, 0.1, 9)
    optimizer = make_optimizer(optim, lambda step: rates[step], TASKS)

    @jax.jit
    def update(noise, state, params):
        grads = jax.tree.map(lambda p, g: g + jnp.sin(p), params, noise)  # hangs on the parameters, so that it matters where it is taken
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, seen = few(), []
    state = jax.jit(optimizer.init)(params)
    for step in range(9):
        params, state = update(gradients(few(), step), state, params)
        seen.append(jax.device_get(params))
    return seen


def numpy_modes(mode, name):
    """The same in float64, array by array: which gradient, whose moments, when, with the rate of which step."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(few())]
    mask = dict(zip(names, jax.tree.leaves(decay_mask(few(), "matrices")), strict=True))

    def flat(tree):
        return {key: np.float64(x) for key, x in zip(names, jax.tree.leaves(tree), strict=True)}

    params, structure = flat(few()), jax.tree.structure(few())
    owners = TASKS if mode in ("independent", "cumulative_ref") else 1
    zeros = [{key: np.zeros_like(p) for key, p in params.items()} for _ in range(2 * owners)]
    mean, square, made = zeros[:owners], zeros[owners:], [0] * owners
    total, seen = None, []
    for step, rate in enumerate(np.linspace(0.3, 0.1, 9)):
        task = step % TASKS
        gradient = {key: g + np.sin(params[key]) for key, g in flat(gradients(few(), step)).items()}
        total = gradient if task == 0 else {key: total[key] + gradient[key] for key in names}
        if mode == "accumulated" and task < TASKS - 1:
            seen.append(jax.tree.unflatten(structure, list(params.values())))
            continue
        used = total if mode in ("cumulative_ref", "accumulated") else gradient
        norm = np.sqrt(sum((g**2).sum() for g in used.values()))
        assert norm > 2
        mine = task % owners
        made[mine] += 1
        for key, p in params.items():
            g, decay = used[key] * (2 / norm), mask[key] * p
            if name == "sgd":
                g = g + 0.1 * decay
                mean[mine][key] = 0.9 * mean[mine][key] + g
                params[key] = p - rate * (g + 0.9 * mean[mine][key])
            else:
                mean[mine][key] = 0.8 * mean[mine][key] + 0.2 * g
                square[mine][key] = 0.95 * square[mine][key] + 0.05 * g**2
                first, second = mean[mine][key] / (1 - 0.8 ** made[mine]), square[mine][key] / (1 - 0.95 ** made[mine])
                params[key] = p - rate * (first / (np.sqrt(second) + 1e-3) + 0.2 * decay)
        seen.append(jax.tree.unflatten(structure, list(params.values())))
    return seen


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("mode", MODES)
def test_three_rounds_of_three_tasks(mode, name):
    for actual, expected in zip(run_modes(mode, name), numpy_modes(mode, name), strict=True):
        assert_trees_close(actual, expected)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_modes_differ_and_accumulated_moves_at_the_end_of_a_round_alone(name):
    ends = [jax.tree.leaves(run_modes(mode, name)[-1])[0] for mode in MODES]
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(ends) for b in ends[:i])
    jax.tree.map(np.testing.assert_array_equal, run_modes("accumulated", name)[4], run_modes("accumulated", name)[2])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_moments_are_as_many_as_the_tasks_and_frozen_parameters_have_none(name):
    trainable, _ = split_frozen(parameters(), ("blocks/.*",))
    size = sum(leaf.size for leaf in jax.tree.leaves(trainable))

    def stored(mode):
        state = jax.eval_shape(make_optimizer(settings(per_task=mode, name=name), lambda step: 1.0, TASKS).init, trainable)
        return sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype == np.float32) / size  # without counters

    moments = 2 if name == "adamw" else 1
    assert [stored(mode) for mode in MODES] == [moments, TASKS * moments, TASKS * moments + 1, moments + 1]


@pytest.mark.parametrize("mode", ["cumulative_ref", "accumulated"])
def test_a_resume_within_a_round_is_bit_equal(mode, tmp_path):
    optimizer = make_optimizer(settings(per_task=mode, **ADAMW), make_schedule(settings(), 20, 1.0), TASKS)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, noise):
        params, opt_state = state
        updates, opt_state = optimizer.update(jax.tree.map(lambda p, g: g + jnp.sin(p), params, noise), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state = jax.jit(lambda params: (params, optimizer.init(params)))(few())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with Checkpoints(tmp_path, 1) as checkpoints:
        for step in range(7):
            state = update(state, gradients(few(), step))
            if step == 3:  # after the first step of the second round
                checkpoints.save(4, state)
        resumed = checkpoints.restore(abstract)
    for step in range(4, 7):
        resumed = update(resumed, gradients(few(), step))
    assert jax.tree.structure(resumed) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, resumed, state)


@pytest.mark.parametrize("mode", ["cumulative_ref", "accumulated"])
def test_moments_are_split_like_their_parameters_and_the_result_is_that_of_one_device(mode):
    rng = np.random.default_rng(0)
    shapes = {"attn": {"qkv": {"kernel": (4, 12), "bias": (12,)}}, "heads": {"a": {"kernel": (4, 6)}}}
    params = jax.tree.map(lambda shape: rng.normal(size=shape).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))
    tasks = 4  # an axis that two devices could split
    optimizer = make_optimizer(settings(per_task=mode, **ADAMW), lambda step: 0.1, tasks)

    def update(state, noise):
        params, opt_state = state
        updates, opt_state = optimizer.update(jax.tree.map(lambda p, g: g + jnp.sin(p), params, noise), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    one = jax.jit(lambda params: (params, optimizer.init(params)))(params)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, jax.devices()[:4])
    shardings = sharding.tree_sharding(one, mesh)
    many = jax.device_put(one, shardings)
    update_one, update_many = jax.jit(update), jax.jit(update, out_shardings=shardings, donate_argnums=0)
    for step in range(6):
        noise = gradients(params, step)
        one, many = update_one(one, noise), update_many(many, noise)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jax.device_get(many), jax.device_get(one))

    def parts(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): x.addressable_shards[0].data.shape for path, x in leaves if x.dtype == np.float32
        }

    own, states = parts(many[0]), parts(many[1])
    assert own == {"attn/qkv/kernel": (2, 6), "attn/qkv/bias": (6,), "heads/a/kernel": (4, 6)}
    assert sum("/per_task/" in path for path in states) == (6 if mode == "cumulative_ref" else 0)
    for name, shape in own.items():
        matched = [path for path in states if path.endswith("/" + name)]
        assert len(matched) == 3  # the sum of the round, and two moments
        for path in matched:
            assert states[path] == ((tasks, *shape) if "/per_task/" in path else shape), path


def test_an_accumulated_round_through_the_step_is_one_step_with_all_its_batches():
    """PolyViT's accumulated schedule and IV-ViT's mode of that name meet: the sum of the tasks' gradients, one update, one move of the average."""
    classes = {"a": 3, "b": 2}
    params = {"embed": {"kernel": (48, 8)}, "heads": {name: {"kernel": (8, count)} for name, count in classes.items()}}
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda shape: draw.normal(size=shape).astype(np.float32), params, is_leaf=lambda x: isinstance(x, tuple))

    def logits(params, pixels, key):
        features = jnp.tanh(pixels.reshape(len(pixels), -1) / 1024 @ params["embed"]["kernel"])
        return {name: features @ params["heads"][name]["kernel"] for name in classes}

    def make(mode):
        config = base_config()
        config.optim.update(name="sgd", per_task=mode, ema=0.9, clip_norm=0.05, freeze=("embed/.*",))
        for name in classes:
            config.tasks[name] = task_config(loss_weight=0.5)
        optimizer = make_optimizer(config.optim, lambda step: 0.1, len(classes))
        return init_state(config, params, optimizer), jax.jit(make_train_step(config, SimpleNamespace(logits=logits), optimizer))

    def batch(seed, task):
        rng = np.random.default_rng(seed)
        mask = np.arange(4) < 3
        pixels = rng.integers(0, 256, (4, 1, 4, 4, 3), np.uint8)
        return {"pixels": pixels, "label": np.arange(4, dtype=np.int32) % 2, "task": np.int32([task, task, task, 0]), "mask": mask}

    state, train_step = make("accumulated")
    whole, whole_step = make("shared")
    frozen = state.frozen
    for step in range(4):  # two rounds
        before = state
        state, _ = train_step(state, (batch(step, step % 2),))
        if step % 2:
            whole, _ = whole_step(whole, (batch(step - 1, 0), batch(step, 1)))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), (state.params, state.ema), (whole.params, whole.ema))
        else:
            jax.tree.map(np.testing.assert_array_equal, (state.params, state.ema), (before.params, before.ema))
    assert state.step == 4 and any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), state.params, state.ema)))
    jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen)


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
        ({"eps": -1e-8}, "eps"),
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
