import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidjoint.mixup import draw_weights, mix, partners

compiled_mix = jax.jit(mix, static_argnums=(4, 5))
compiled_partners = jax.jit(partners)


def oracle_partners(task, mask):
    """The next unmasked example of the same task, found by walking on."""
    size, found = len(task), []
    for i in range(size):
        partner = i
        for step in range(1, size):
            j = (i + step) % size
            if mask[i] and mask[j] and task[i] == task[j]:
                partner = j
                break
        found.append(partner)
    return np.array(found, np.int32)


def batch(size=6, frames=2, height=10, width=12, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size, frames, height, width, 3), dtype=np.uint8)
    return pixels, rng.integers(0, 3, size).astype(np.int32), rng.random(size) < 0.7


@pytest.mark.parametrize(
    "task, mask, expected",
    [
        ([0, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1], [2, 3, 4, 5, 0, 1]),  # interleaved
        ([0, 0, 0, 1, 0], [1, 1, 1, 1, 1], [1, 2, 4, 3, 0]),  # a task with one example
        ([0, 0, 0, 0], [1, 0, 1, 0], [2, 1, 0, 3]),  # padding is skipped and left alone
        ([0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 2, 3]),  # alone because of the mask
        ([5], [1], [0]),
        ([0, 0, 0], [0, 0, 0], [0, 1, 2]),
    ],
)
def test_partners_by_hand(task, mask, expected):
    out = compiled_partners(jnp.array(task), jnp.array(mask, bool))
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(oracle_partners(task, mask), expected)


def test_partners_against_the_oracle():
    for seed in range(30):
        _, task, mask = batch(size=11, seed=seed)
        np.testing.assert_array_equal(compiled_partners(jnp.array(task), jnp.array(mask)), oracle_partners(task, mask))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_mixup_against_numpy(dtype):
    pixels, task, mask = batch()
    for seed in range(5):
        mixed, partner, lam = compiled_mix(jax.random.key(seed), jnp.array(pixels.astype(dtype)), jnp.array(task), jnp.array(mask), 0.8, 0.0)
        assert mixed.dtype == lam.dtype == jnp.float32 and lam.shape == (6,) and 0 <= lam[0] <= 1
        np.testing.assert_array_equal(lam, np.full(6, lam[0]))
        np.testing.assert_array_equal(partner, oracle_partners(task, mask))
        share = float(lam[0])
        expected = share * pixels.astype(np.float64) + (1 - share) * pixels[partner]
        np.testing.assert_allclose(mixed / 255, expected / 255, atol=1e-6)


def test_cutmix_against_numpy():
    pixels, task, mask = batch()
    flat = np.broadcast_to(np.array([7, 200] * 3, np.uint8)[:, None, None, None, None], pixels.shape)  # shows where the box is, the same for all
    for seed in range(10):
        mixed, partner, lam = compiled_mix(jax.random.key(seed), jnp.array(pixels), jnp.array(task), jnp.array(mask), 0.0, 1.0)
        shown, _, _ = compiled_mix(jax.random.key(seed), jnp.array(flat), jnp.zeros(6, jnp.int32), jnp.ones(6, bool), 0.0, 1.0)
        inside = np.asarray(shown)[0, 0, :, :, 0] == 200
        assert np.isin(shown, [7, 200]).all()
        rows, columns = inside.any(axis=1), inside.any(axis=0)
        np.testing.assert_array_equal(inside, rows[:, None] & columns[None, :])
        for line in (rows, columns):
            assert line.sum() == 0 or line[line.argmax() :][: line.sum()].all()  # one piece
        np.testing.assert_allclose(lam, np.full(6, 1 - inside.sum() / 120), atol=1e-6)  # the true area
        expected = np.where(inside[None, None, :, :, None], pixels[partner], pixels)
        np.testing.assert_array_equal(mixed, expected)


def test_padding_and_lone_examples_keep_their_pixels():
    pixels, _, _ = batch()
    task, mask = jnp.array([0, 1, 0, 0, 2, 0]), jnp.array([True, True, True, False, True, False])
    for alphas in ((0.8, 0.0), (0.0, 1.0)):
        mixed, partner, _ = compiled_mix(jax.random.key(1), jnp.array(pixels), task, mask, *alphas)
        np.testing.assert_array_equal(partner, [2, 1, 0, 3, 4, 5])
        np.testing.assert_array_equal(mixed[np.array([1, 3, 4, 5])], pixels[[1, 3, 4, 5]])


@pytest.fixture(scope="module")
def draws():
    """The weights float32[4000, 16, 16] and lam float32[4000] of as many keys, with both kinds on, and which of them hold a box."""
    keys = jax.random.split(jax.random.key(0), 4000)
    weight, lam = jax.jit(jax.vmap(lambda key: draw_weights(key, 16, 16, 0.4, 1.0)))(keys)
    return np.asarray(weight), np.asarray(lam), np.isin(weight, [0, 1]).all(axis=(1, 2))


def test_both_take_turns_at_even_odds(draws):
    weight, lam, is_box = draws
    assert 0.46 < is_box.mean() < 0.54
    np.testing.assert_allclose(lam, weight.mean(axis=(1, 2)), atol=1e-6)


def test_mixup_share_follows_its_beta(draws):
    weight, lam, is_box = draws
    weight, lam = weight[~is_box], lam[~is_box]
    assert abs(lam.mean() - 0.5) < 0.03
    assert abs(lam.var() - 1 / (4 * (2 * 0.4 + 1))) < 0.01  # variance of Beta(alpha, alpha)
    np.testing.assert_array_equal(weight, np.broadcast_to(lam[:, None, None], weight.shape))


def test_cutmix_box_follows_its_beta_and_reaches_every_pixel(draws):
    weight, lam, is_box = draws
    weight, lam = weight[is_box], lam[is_box]
    # By simulation: sides sqrt(1 - lam), uniform centre, cut off at the borders.
    rng = np.random.default_rng(0)
    side = np.sqrt(1 - rng.beta(1, 1, 100_000))[:, None]
    centre = rng.random((100_000, 2))
    area = np.prod(np.minimum(centre + side / 2, 1) - np.maximum(centre - side / 2, 0), axis=1)
    assert abs((1 - lam).mean() - area.mean()) < 0.02 and abs((1 - lam).std() - area.std()) < 0.02
    reached = (1 - weight).mean(axis=0)
    assert reached.min() > 0.1
    np.testing.assert_allclose(reached, reached[::-1, ::-1], atol=0.06)  # no side is preferred


def test_the_key_decides():
    pixels, task, mask = (jnp.array(x) for x in batch())
    first, again, other = (compiled_mix(jax.random.key(seed), pixels, task, mask, 0.8, 1.0) for seed in (3, 3, 4))
    chex.assert_trees_all_equal(first, again)
    assert (first[0] != other[0]).any()


def test_both_off_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        draw_weights(jax.random.key(0), 8, 8, 0.0, 0.0)
