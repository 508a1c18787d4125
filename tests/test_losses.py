import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidjoint import losses
from vidjoint.errors import UserError
from vidjoint.losses import weighted_loss

cross_entropy = jax.jit(losses.cross_entropy)  # one compilation per shape
sigmoid_cross_entropy = jax.jit(losses.sigmoid_cross_entropy)


def oracle(logits, label, smoothing):
    logits = np.asarray(logits, np.float64)
    target = np.full(logits.shape, smoothing / logits.shape[1])
    target[np.arange(len(label)), label] += 1 - smoothing
    log_share = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)
    return -(target * log_share).sum(1), np.exp(log_share) - target  # loss, gradient with respect to the logits


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_and_its_gradient(smoothing):
    rng = np.random.default_rng(0)
    logits, label = (5 * rng.normal(size=(6, 7))).astype(np.float32), np.int32([0, 6, 3, 3, 1, 5])
    loss, gradient = oracle(logits, label, smoothing)
    np.testing.assert_allclose(cross_entropy(jnp.asarray(logits), jnp.asarray(label), smoothing), loss, atol=1e-5)
    actual = jax.jit(jax.grad(lambda x: cross_entropy(x, jnp.asarray(label), smoothing).sum()))(jnp.asarray(logits))
    np.testing.assert_allclose(actual, gradient, atol=1e-5)


def test_bfloat16_logits_are_computed_in_float32():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(4, 1000)) * 4, jnp.bfloat16)
    label = jnp.int32([1, 20, 300, 999])
    loss = cross_entropy(logits, label, 0.1)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, oracle(np.asarray(logits, np.float32), np.asarray(label), 0.1)[0], atol=1e-5)


def test_large_logits_stay_finite():
    logits = jnp.float32([[1e4, -1e4, 0.0]])
    np.testing.assert_allclose(cross_entropy(logits, jnp.int32([0]), 0.0), [0.0])
    np.testing.assert_allclose(cross_entropy(logits, jnp.int32([1]), 0.0), [2e4])


def test_labels_of_other_tasks_are_finite_and_can_be_masked():
    logits, label, mask = jnp.ones((3, 4)), jnp.int32([2, 390, -1]), jnp.array([True, False, False])
    loss, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.where(mask, cross_entropy(x, label, 0.1), 0).sum()))(logits)
    np.testing.assert_allclose(loss, np.log(4), rtol=1e-6)
    assert np.isfinite(cross_entropy(logits, label, 0.1)).all() and np.isfinite(gradient).all() and not np.any(gradient[1:])


def sigmoid_oracle(logits, labels):
    """The binary cross-entropy of one class after the other, and the gradient of the sum of the examples' losses."""
    logits = np.asarray(logits, np.float64)
    loss, gradient = np.zeros(len(logits)), np.zeros(logits.shape)
    for i, own in enumerate(labels):
        for c, logit in enumerate(logits[i]):
            share = 1 / (1 + np.exp(-logit))
            loss[i] -= (np.log(share) if c in own else np.log(1 - share)) / len(logits[i])
            gradient[i, c] = (share - (c in own)) / len(logits[i])
    return loss, gradient


def test_sigmoid_cross_entropy_and_its_gradient():
    logits = (4 * np.random.default_rng(0).normal(size=(5, 7))).astype(np.float32)
    label = jnp.int32([[0, -1, -1], [6, 2, -1], [-1, -1, -1], [3, 3, 3], [5, -1, 1]])  # in any order, repeated, none at all
    loss, gradient = sigmoid_oracle(logits, [{0}, {2, 6}, {}, {3}, {1, 5}])
    np.testing.assert_allclose(sigmoid_cross_entropy(logits, label), loss, atol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda x: sigmoid_cross_entropy(x, label).sum()))(logits), gradient, atol=1e-5)
    half = sigmoid_cross_entropy(jnp.asarray(logits, jnp.bfloat16), label)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, sigmoid_oracle(jnp.asarray(logits, jnp.bfloat16), [{0}, {2, 6}, {}, {3}, {1, 5}])[0], atol=1e-5)


def test_sigmoid_cross_entropy_at_the_edges():
    large = jnp.float32([[1e4, -1e4, 0.0]])
    np.testing.assert_allclose(sigmoid_cross_entropy(large, jnp.int32([[0]])), [np.log(2) / 3], rtol=1e-6)
    np.testing.assert_allclose(sigmoid_cross_entropy(large, jnp.int32([[1]])), [(2e4 + np.log(2)) / 3], rtol=1e-6)
    for classes in (3, 300):  # a model that knows nothing starts at the same loss, whatever their number
        np.testing.assert_allclose(sigmoid_cross_entropy(jnp.zeros((1, classes)), jnp.int32([[1]])), [np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(sigmoid_cross_entropy(large, jnp.int32([[390]])), sigmoid_cross_entropy(large, jnp.int32([[-1]])))  # of another task


def test_weighted_loss():
    per_task = {"motion": (jnp.float32(6), jnp.float32(3)), "digits": (jnp.float32(10), jnp.float32(2)), "absent": (jnp.float32(0), jnp.float32(0))}
    weights = {"motion": 0.5, "digits": 2.0, "absent": 7.0}
    np.testing.assert_allclose(weighted_loss(per_task, weights, "per_task"), 0.5 * 6 / 3 + 2 * 10 / 2)
    np.testing.assert_allclose(weighted_loss(per_task, weights, "per_example"), (0.5 * 6 + 2 * 10) / 5)
    assert weighted_loss(per_task, weights, "per_task").dtype == jnp.float32


@pytest.mark.parametrize("reduction", ["per_task", "per_example"])
@pytest.mark.parametrize("present", [("a",), ("a", "b"), ()])
def test_gradient_through_tasks_without_examples(reduction, present):
    rng = np.random.default_rng(2)
    logits = {name: jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for name in "ab"}
    label, weights = jnp.int32([0, 1, 2, 1]), {"a": 0.5, "b": 3.0}
    shown = {"a": [True, True, False, True], "b": [False, False, True, False]}
    mask = {name: np.array(rows) & (name in present) for name, rows in shown.items()}

    @jax.jit
    @jax.value_and_grad
    def step(logits):
        losses = {name: cross_entropy(logits[name], label, 0.1) for name in logits}
        per_task = {name: (jnp.where(mask[name], losses[name], 0).sum(), jnp.float32(mask[name].sum())) for name in logits}
        return weighted_loss(per_task, weights, reduction)

    loss, gradient = step(logits)
    count = {name: mask[name].sum() for name in "ab"}
    expected = 0.0
    for name in "ab":
        each, slope = oracle(logits[name], np.asarray(label), 0.1)
        share = weights[name] / max(count[name] if reduction == "per_task" else sum(count.values()), 1)
        expected += share * (each * mask[name]).sum()
        np.testing.assert_allclose(gradient[name], share * slope * mask[name][:, None], atol=1e-5)
        assert count[name] or not np.any(gradient[name])
    np.testing.assert_allclose(loss, expected, atol=1e-5)


def test_gradient_with_respect_to_the_sums_is_finite():
    counts, weights = {"a": 4, "b": 0}, {"a": 0.5, "b": 3.0}
    slope = jax.grad(lambda sums, reduction: weighted_loss({name: (sums[name], counts[name]) for name in sums}, weights, reduction))
    assert slope({"a": jnp.float32(2), "b": jnp.float32(0)}, "per_task") == {"a": 0.5 / 4, "b": 0}
    counts["a"] = 0
    for reduction in ("per_task", "per_example"):
        assert slope({"a": jnp.float32(0), "b": jnp.float32(0)}, reduction) == {"a": 0, "b": 0}


def test_order_of_tasks_does_not_change_the_bits():
    rng = np.random.default_rng(3)
    per_task = {f"t{i}": (jnp.float32(rng.normal() * 10**i), jnp.float32(3)) for i in range(6)}
    weights = dict.fromkeys(per_task, 0.1)
    backwards = dict(reversed(per_task.items()))
    assert weighted_loss(per_task, weights, "per_task") == weighted_loss(backwards, weights, "per_task")


def test_unknown_reduction():
    with pytest.raises(UserError, match="per_task, per_example"):
        weighted_loss({"a": (jnp.float32(1), jnp.float32(1))}, {"a": 1.0}, "mean")
