"""The step against NumPy: its loss, what it updates, and that neither padding nor the number of devices changes it.

A compilation takes seconds and a step none, so tests share configs and shapes as far as they can.
"""

import dataclasses
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vidjoint import optim, sharding
from vidjoint.config import base_config, task_config
from vidjoint.mixup import mix
from vidjoint.models.build import build
from vidjoint.step import init_state, make_eval_step, make_train_step

CLASSES = {"actions": 5, "gestures": 3, "pictures": 4}  # in the order of their numbers in batches
WEIGHTS = {"actions": 1.0, "gestures": 0.3, "pictures": 2.0}
SMOOTHING = 0.1


def make_config(**model):
    config = base_config()
    config.model.update(variant="Ti/8", width=16, depth=1, heads=2, mlp_dim=24, frames=3, image_size=16, dtype="float32")
    config.model.update(temporal_init="random", **model)
    config.optim.update(name="sgd", lr=0.5, schedule="constant")
    config.loss.label_smoothing = SMOOTHING
    for name, weight in WEIGHTS.items():
        config.tasks[name] = task_config(loss_weight=weight)
    return config


def noisy_config(**model):
    """Everything random on, so that it is seen to depend on seed and step alone."""
    config = make_config(mixer="token_shift", depth=2, drop_path=0.3, dropout=0.2, **model)
    config.loss.mixup = 0.5
    config.optim.update(momentum=0.9, lr=0.1, clip_norm=1.0, ema=0.9)
    return config


MADE = {}  # config -> what `make` returned for it


def make(config):
    """The model, a state at step 0 and the jitted step of a config."""
    key = config.to_json()
    if key not in MADE:
        MADE[key] = compile_config(config)
    return MADE[key]


def compile_config(config):
    model = build(config.model, CLASSES)
    optimizer = optim.make_optimizer(config.optim, optim.make_schedule(config.optim, 1000, 10))
    rng = np.random.default_rng(0)  # NumPy's numbers need no compiler

    def draw(path, x):
        return np.float32((path[-1].key == "scale") + rng.normal(0, 0.02 if x.ndim > 1 else 0.1, x.shape))

    params = jax.tree_util.tree_map_with_path(draw, model.abstract())
    return model, jax.jit(lambda params: init_state(config, params, optimizer))(params), jax.jit(make_train_step(config, model, optimizer))


@functools.cache
def logits_of(model):
    return jax.jit(lambda params, *pixels: [model.logits(params, x) for x in pixels])


def make_batch(seed: int, tasks: list[int], frames: int = 3, masked: tuple[int, ...] = ()) -> dict:
    rng = np.random.default_rng(seed)
    task = np.array(tasks, np.int32)
    label = rng.integers(0, np.array(list(CLASSES.values()))[task]).astype(np.int32)
    mask = ~np.isin(np.arange(len(task)), masked)
    return {"pixels": rng.integers(0, 256, (len(task), frames, 16, 16, 3), np.uint8), "label": label, "task": task, "mask": mask}


def videos() -> tuple[dict]:
    return (make_batch(1, [0, 1, 0, 0, 1, 0, 2, 0], masked=(3,)),)


def videos_and_images() -> tuple[dict, dict]:
    """Two batches of unlike shapes, tasks mixed in both, each with masked rows."""
    return make_batch(1, [0, 1, 0, 0, 1, 0, 2, 0], masked=(3, 6)), make_batch(2, [2, 2, 0, 2, 2, 2], frames=1, masked=(0,))


def flat(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def cross_entropy(logits, label):
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    target = np.full(len(logits), SMOOTHING / len(logits))
    target[label] += 1 - SMOOTHING
    return -(target * log_p).sum()


def numpy_loss(logits, batches, reduction="per_task"):
    """CoVeR 3.3.2, example by example. `logits[batch index][task]` is float[B, C]; returns the loss and name -> (sum, count)."""
    sums = {name: [0.0, 0] for name in CLASSES}
    for i, batch in enumerate(batches):
        for row in np.flatnonzero(batch["mask"]):
            name = list(CLASSES)[batch["task"][row]]
            sums[name][0] += cross_entropy(logits[i][name][row], batch["label"][row])
            sums[name][1] += 1
    if reduction == "per_task":
        return sum(WEIGHTS[name] * total / count for name, (total, count) in sums.items() if count), sums
    return sum(WEIGHTS[name] * total for name, (total, _) in sums.items()) / sum(count for _, count in sums.values()), sums


@pytest.mark.parametrize("reduction", ["per_task", "per_example"])
def test_the_loss_of_a_tuple_of_batches_is_the_papers(reduction):
    config = make_config()
    config.loss.reduction = reduction
    model, state, train_step = make(config)
    batches = videos_and_images()
    logits = logits_of(model)(state.params, *(batch["pixels"].astype(np.float32) for batch in batches))
    expected, sums = numpy_loss(logits, batches, reduction)
    _, metrics = train_step(state, batches)
    np.testing.assert_allclose(metrics["loss"], expected, atol=1e-5)
    for name, (total, count) in sums.items():
        np.testing.assert_allclose(metrics[f"{name}/loss"][0], total, atol=1e-5)
        assert metrics[f"{name}/loss"][1] == count
    assert [count for _, count in sums.values()] == [5, 2, 4]  # the masked rows are not among them


def gradient_of_everything() -> dict:
    """What one step of plain SGD subtracts, over its learning rate."""
    config = make_config()
    _, state, train_step = make(config)
    after, _ = train_step(state, videos_and_images())
    return jax.tree.map(lambda old, new: (np.asarray(old) - np.asarray(new)) / config.optim.lr, state.params, after.params)


def test_the_gradient_is_that_of_the_loss():
    """Against finite differences of the NumPy loss in random directions."""
    model, state, train_step = make(make_config())
    batches, gradient = videos_and_images(), gradient_of_everything()
    np.testing.assert_allclose(train_step(state, batches)[1]["grad_norm"], optax.tree.norm(gradient), rtol=1e-4)
    rng = np.random.default_rng(0)
    for _ in range(3):
        direction = jax.tree.map(lambda x: rng.normal(0, 0.02, x.shape).astype(np.float32), gradient)
        values = []
        for sign in (0.05, -0.05):
            moved = jax.tree.map(lambda x, d, sign=sign: np.asarray(x) + sign * d, state.params, direction)
            values.append(numpy_loss(logits_of(model)(moved, *(batch["pixels"].astype(np.float32) for batch in batches)), batches)[0])
        slope = sum((g * d).sum() for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
        np.testing.assert_allclose((values[0] - values[1]) / 0.1, slope, atol=2e-4)


def test_mixed_examples_answer_for_both_labels():
    config = make_config()
    config.loss.update(mixup=0.4, cutmix=1.0)
    model, state, train_step = make(config)
    batches, mixed = videos_and_images(), []
    for i, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 0), i)
        mixed.append(jax.jit(mix, static_argnums=(4, 5))(jax.random.fold_in(key, 1), batch["pixels"], batch["task"], batch["mask"], 0.4, 1.0))
    logits = logits_of(model)(state.params, *(pixels for pixels, _, _ in mixed))
    expected, counts = dict.fromkeys(CLASSES, 0.0), dict.fromkeys(CLASSES, 0)
    for batch, out, (_, partner, own) in zip(batches, logits, mixed, strict=True):
        for row in np.flatnonzero(batch["mask"]):
            name, other, share = list(CLASSES)[batch["task"][row]], int(partner[row]), float(own[row])
            assert batch["task"][other] == batch["task"][row] and batch["mask"][other]
            own_loss, other_loss = (cross_entropy(out[name][row], batch["label"][r]) for r in (row, other))
            expected[name] += share * own_loss + (1 - share) * other_loss
            counts[name] += 1
    _, metrics = train_step(state, batches)
    for name in CLASSES:
        np.testing.assert_allclose(metrics[f"{name}/loss"][0], expected[name], atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], sum(WEIGHTS[name] * expected[name] / counts[name] for name in CLASSES), atol=1e-5)


def test_a_task_that_is_absent_has_no_gradient():
    _, state, train_step = make(make_config())
    batches = make_batch(1, [0, 2, 0, 2, 0, 0, 2, 0]), make_batch(2, [0, 1, 1, 0, 0, 0], frames=1, masked=(1, 2))  # gestures only where it is masked
    after, metrics = train_step(state, batches)
    assert metrics["gestures/loss"] == (0, 0)
    chex.assert_trees_all_equal(after.params["heads"]["gestures"], state.params["heads"]["gestures"])
    for name in ("actions", "pictures"):
        assert (after.params["heads"][name]["kernel"] != state.params["heads"][name]["kernel"]).any()


def test_a_step_without_any_example_changes_nothing():
    _, state, train_step = make(make_config())
    batches = videos_and_images()
    after, metrics = train_step(state, tuple(batch | {"mask": np.zeros_like(batch["mask"])} for batch in batches))
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
    chex.assert_trees_all_equal(after.params, state.params)


def frozen_config():
    config = make_config()
    config.optim.update(name="adamw", lr=1e-2, weight_decay=0.1, decay="all", ema=0.3, freeze=("embed/.*", r"blocks/\d+/attn/.*"))
    return config


def test_frozen_parameters_stay_and_cost_nothing():
    _, state, train_step = make(frozen_config())
    before, full = flat(state.frozen), flat(state.eval_params)
    assert before.keys() == {name for name in full if name.startswith("embed/") or "/attn/" in name} and len(before) == 8
    assert flat(state.params).keys() == full.keys() - before.keys()
    gradient = flat(gradient_of_everything())
    for i in range(3):
        state, metrics = train_step(state, videos_and_images())
        if i == 0:
            np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(sum((gradient[name] ** 2).sum() for name in flat(state.params))), rtol=1e-4)
    after = flat(state.frozen)
    assert all(after[name].tobytes() == before[name].tobytes() for name in before)
    for part in (state.opt_state, state.ema):
        assert not [name for name in flat(part) if any(name.endswith(frozen) for frozen in before)]
    moments = 2 * sum(x.size for x in flat(state.params).values())
    assert sum(x.size for x in flat(state.opt_state).values()) == moments + 2  # and two counters
    assert all((flat(state.params)[name] != full[name]).any() for name in full.keys() - before.keys())


def test_the_moving_average_follows_the_parameters_and_is_what_is_evaluated():
    _, state, train_step = make(frozen_config())
    expected = flat(state.params)
    for update in range(4):
        state, _ = train_step(state, videos_and_images())
        decay = min(0.3, (1 + update) / (10 + update))
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in flat(state.params).items()}
    chex.assert_trees_all_close(flat(state.ema), expected, atol=1e-6)
    chex.assert_trees_all_equal(flat(state.eval_params), flat(state.ema) | flat(state.frozen))
    assert any((flat(state.ema)[name] != value).any() for name, value in flat(state.params).items())
    _, plain, _ = make(make_config())
    assert plain.ema == {} and plain.eval_params.keys() == plain.params.keys()


@pytest.mark.parametrize("sizes", [{"data": 8, "fsdp": 1}, {"data": 4, "fsdp": 2}])
def test_the_step_on_eight_devices_is_the_step_on_one(sizes):
    """Three steps, with a noise that would differ if it hung on the place of an example among the devices."""
    config = noisy_config()
    model, one, one_step = make(config)
    mesh = sharding.make_mesh({**sizes, "tensor": 1})
    optimizer = optim.make_optimizer(config.optim, optim.make_schedule(config.optim, 1000, 10))
    shardings = sharding.tree_sharding(one, mesh)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    many_step = jax.jit(
        make_train_step(config, model, optimizer), in_shardings=(shardings, sharding.batch_sharding(mesh)), out_shardings=(shardings, replicated)
    )
    many = jax.device_put(one, shardings)
    for i in range(3):
        batches = (make_batch(i, [0, 1, 0, 0, 1, 0, 2, 0], masked=(i,)),)
        one, expected = one_step(one, batches)
        many, metrics = many_step(many, tuple(sharding.put_batch(batch, mesh) for batch in batches))
        chex.assert_trees_all_close(jax.device_get(metrics), jax.device_get(expected), atol=2e-6, rtol=2e-6)
    chex.assert_trees_all_close(jax.device_get(many), jax.device_get(one), atol=2e-6, rtol=0)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(many)} == {8}
    if sizes["fsdp"] > 1:
        kernel = many.params["blocks"]["0"]["mlp"]["fc1"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size / sizes["fsdp"]


def test_padding_a_batch_changes_nothing():
    _, state, train_step = make(noisy_config())
    (batch,) = videos()
    extra = make_batch(77, [0, 2, 1], masked=(0, 1, 2))
    plain, filled = train_step(state, (batch,)), train_step(state, ({key: np.concatenate([batch[key], extra[key]]) for key in batch},))
    chex.assert_trees_all_close(filled, plain, atol=1e-6)
    assert plain[1]["grad_norm"] > 0.1


def test_a_step_is_a_function_of_the_state_and_its_noise_of_the_step_number():
    _, state, train_step = make(noisy_config())
    first, again = train_step(state, videos()), train_step(state, videos())
    chex.assert_trees_all_equal(first, again)
    assert first[0].step == 1
    _, later = train_step(dataclasses.replace(state, step=jnp.int32(5)), videos())
    assert later["loss"] != first[1]["loss"]


def test_recomputing_blocks_changes_nothing():
    after = [make(noisy_config(remat=remat))[2](make(noisy_config())[1], videos()) for remat in ("none", "block")]
    chex.assert_trees_all_close(*after, atol=1e-6)


def test_bfloat16_computes_what_float32_does_within_its_precision():
    losses = {}
    for dtype in ("float32", "bfloat16"):
        _, state, train_step = make(make_config(mixer="divided", dtype=dtype))
        state, first = train_step(state, videos())
        assert {x.dtype for x in jax.tree.leaves((state.params, state.opt_state))} <= {np.dtype("float32"), np.dtype("int32")}
        _, second = train_step(state, videos())
        losses[dtype] = [first["loss"], second["loss"], first["grad_norm"]]
    assert losses["bfloat16"] != losses["float32"]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.02)


def small(mode="shared", accumulate=1, **settings):
    """A config of two tasks and a model that is one layer: compiled in no time. Its loss is NaN where a pixel is."""
    config = base_config()
    config.accumulate = accumulate
    config.optim.update(per_task=mode, lr=0.1, schedule="constant", **settings)
    classes = {"a": 3, "b": 2}
    for name in classes:
        config.tasks[name] = task_config(loss_weight=0.5)
    rng = np.random.default_rng(0)
    params = {"embed": {"kernel": (48, 8)}, "heads": {name: {"kernel": (8, count)} for name, count in classes.items()}}
    params = jax.tree.map(lambda shape: rng.normal(size=shape).astype(np.float32), params, is_leaf=lambda x: isinstance(x, tuple))

    def logits(params, pixels, key):
        features = jnp.tanh(pixels.reshape(len(pixels), -1) / 1024 @ params["embed"]["kernel"])
        return {name: features @ params["heads"][name]["kernel"] for name in classes}

    optimizer = optim.make_optimizer(config.optim, optim.make_schedule(config.optim, 1000, 10), len(classes))
    return config, init_state(config, params, optimizer), make_train_step(config, types.SimpleNamespace(logits=logits), optimizer)


def small_batch(seed: int, tasks: list[int], fault=None) -> tuple[dict]:
    rng = np.random.default_rng(seed)
    pixels = rng.uniform(0, 256, (len(tasks), 1, 4, 4, 3)).astype(np.float32)
    if fault is not None:
        pixels[-1, 0, 2, 2, 1] = fault
    mask = np.ones(len(tasks), bool) if fault != 0 else np.zeros(len(tasks), bool)
    return ({"pixels": pixels, "label": np.arange(len(tasks), dtype=np.int32) % 2, "task": np.int32(tasks), "mask": mask},)


PER_TASK = ("shared", "independent", "cumulative_ref", "accumulated")


@pytest.mark.parametrize("mode", PER_TASK)
def test_a_step_that_is_not_finite_changes_nothing(mode):
    _, state, train_step = small(mode, name="adamw", weight_decay=0.1, ema=0.9)
    train_step = jax.jit(train_step)
    for i in range(2):
        state, metrics = train_step(state, small_batch(i, [i] * 4))
        assert metrics["skipped"] == 0
    for fault in (np.nan, np.inf):
        after, metrics = train_step(state, small_batch(2, [0] * 4, fault))
        assert metrics["skipped"] == 1 and not np.isfinite(metrics["grad_norm"]) and after.step == state.step + 1
        chex.assert_trees_all_equal((after.params, after.ema), (state.params, state.ema))
        moments, before = ({name: x for name, x in flat(tree.opt_state).items() if x.ndim} for tree in (after, state))
        if mode == "cumulative_ref":  # a round begins with nothing
            moments, before = ({name: x for name, x in tree.items() if "/sum/" not in name} for tree in (moments, before))
        chex.assert_trees_all_equal(moments, before)
    last, metrics = train_step(after, small_batch(3, [1] * 4))
    assert metrics["skipped"] == 0 and (last.params["embed"]["kernel"] != after.params["embed"]["kernel"]).any()


@pytest.mark.parametrize("mode", PER_TASK)
def test_after_it_the_run_goes_on_as_if_the_step_had_had_no_example(mode):
    """Without moments and decay that is the same. At the beginning of a round, step 2, and at its end: turns and sums stay in step."""
    _, start, train_step = small(mode, name="sgd", momentum=0.0)
    train_step = jax.jit(train_step)
    for bad in (2,) if mode == "cumulative_ref" else (2, 3):  # a step without examples would still take the sum of its round
        states = dict.fromkeys((np.nan, 0), start)
        for i in range(6):
            states = {fault: train_step(state, small_batch(i, [i % 2] * 4, fault if i == bad else None))[0] for fault, state in states.items()}
        chex.assert_trees_all_close(states[np.nan].params, states[0].params, atol=1e-6)
        assert states[np.nan].step == 6 and (states[0].params["embed"]["kernel"] != start.params["embed"]["kernel"]).any()


def test_its_schedule_and_its_counters():
    """The rate follows the steps, Adam's bias correction the updates."""
    _, state, train_step = small("shared", name="adamw")
    train_step = jax.jit(train_step)
    for i, fault in enumerate([None, np.nan, None]):
        state, _ = train_step(state, small_batch(i, [0, 1], fault))
    counts = {name: int(x) for name, x in flat(state.opt_state).items() if x.ndim == 0}
    assert sorted(counts.values()) == [2, 3], counts


@pytest.mark.parametrize("reduction", ["per_task", "per_example"])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_make_the_update_of_the_whole_batch(parts, reduction):
    """Tasks and masked rows are spread unevenly over the parts; means are over the whole batch."""
    batches = small_batch(0, [0, 0, 0, 1, 0, 1, 0, 0]) + small_batch(1, [1, 1, 1, 0])
    batches[0]["mask"][[1, 6]] = False
    after = []
    for accumulate in (1, parts):
        config, state, train_step = small(accumulate=accumulate, name="sgd", ema=0.9)
        config.loss.reduction, config.loss.mixup = reduction, 0.4
        after.append(jax.jit(train_step)(state, batches))
    chex.assert_trees_all_close(*after, atol=2e-6, rtol=2e-6)
    assert {name: int(after[1][1][f"{name}/loss"][1]) for name in "ab"} == {"a": 5, "b": 5}


def test_accumulated_parts_of_a_vision_transformer_need_less_memory():
    config = make_config(mixer="divided", depth=2)
    config.optim.clip_norm = 1.0
    batches, after, memory = (make_batch(1, [0, 1, 0, 0, 1, 0, 2, 0] * 4, masked=(3,)),), [], []
    for accumulate in (1, 4):
        config.accumulate = accumulate
        _, state, train_step = compile_config(config)
        compiled = train_step.lower(state, batches).compile()
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
        after.append(compiled(state, batches))
    chex.assert_trees_all_close(*after, atol=2e-6, rtol=2e-6)
    assert memory[1] < 0.4 * memory[0], memory


def test_each_part_is_spread_over_all_devices():
    """On four devices: nothing but sums is exchanged, and every device works on a quarter of each part."""
    _, state, train_step = small(accumulate=2, name="sgd", freeze=("embed/.*",))
    mesh = sharding.make_mesh({"data": 4, "fsdp": 1, "tensor": 1}, jax.devices()[:4])
    shardings, replicated = sharding.tree_sharding(state, mesh), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = sharding.batch_sharding(mesh)
    many = jax.jit(train_step, in_shardings=(shardings, split), out_shardings=(shardings, replicated))
    batches = small_batch(0, [0, 1, 0, 0, 1, 0, 1, 0] * 2)
    hlo = many.lower(state, batches).compile().as_text()
    assert "all-reduce" in hlo
    assert not [kind for kind in ("all-gather", "all-to-all", "collective-permute") if f" {kind}(" in hlo]
    chex.assert_trees_all_close(
        jax.device_get(many(state, jax.device_put(batches, split))), jax.device_get(jax.jit(train_step)(state, batches)), atol=2e-6
    )


@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_evaluation_averages_views_forward_and_reversed(average):
    model, state, _ = make(make_config(mixer="token_shift"))
    params = jax.tree.map(lambda x: x + 0.3 * np.sin(np.arange(x.size, dtype=np.float32)).reshape(x.shape), state.params)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 3, 16, 16, 3), np.uint8)
    evaluate = jax.jit(make_eval_step(model, average), static_argnums=(2, 3))
    for reverse in (False, True):
        clips = (pixels[:, :, ::-1] if reverse else pixels).astype(np.float32)
        (logits,) = logits_of(model)(params, clips.reshape(8, 3, 16, 16, 3))
        views = np.asarray(logits["gestures"], np.float64).reshape(2, 4, 3)
        if average == "softmax":
            views = np.exp(views) / np.exp(views).sum(-1, keepdims=True)
        np.testing.assert_allclose(evaluate(params, pixels, "gestures", reverse), views.mean(axis=1), atol=1e-5)
    forward, backward = (evaluate(params, pixels, "gestures", reverse) for reverse in (False, True))
    assert np.abs(forward - backward).max() > 1e-4  # the model does tell the directions apart
