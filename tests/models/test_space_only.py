"""TimeSformer's space-only attention: mixer `none` with pool `frame_mean`. What it costs: tests/test_benchmark.py."""

import numpy as np
import pytest

from tests.models import oracles, oracles_embed
from tests.models.test_vit import clip, features, random_params, tiny


@pytest.mark.parametrize("frames", [1, 4])
def test_it_equals_its_definition(frames):
    model = tiny(mixer="none", pool="frame_mean")
    params = random_params(model)
    expected = oracles_embed.space_only(clip(frames), oracles.numpy_tree(params), 3, 8)
    np.testing.assert_allclose(features(model, params, clip(frames)), expected, atol=1e-5)


def test_the_mean_comes_before_the_norm_and_time_does_not_matter():
    model, late = tiny(mixer="none", pool="frame_mean"), tiny(mixer="none", pool="class_token")
    params = random_params(model)
    assert "time" not in params["embed"]
    forward = features(model, params, clip(4))
    np.testing.assert_allclose(forward, features(model, params, clip(4)[:, ::-1]), atol=1e-5)
    assert np.abs(forward - features(late, params, clip(4))).max() > 1e-3
    np.testing.assert_allclose(features(model, params, clip(1)), features(late, params, clip(1)), atol=1e-6)  # an image: the plain ViT
