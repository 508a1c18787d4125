"""A fixture of the tests that train."""

import jax
import pytest

from vidjoint.sharding import make_mesh


@pytest.fixture
def quick_runs(monkeypatch):
    """One device in place of eight, which is less to compile, and no curves drawn: both are tested elsewhere."""
    monkeypatch.setattr("vidjoint.train.open_devices", lambda config: make_mesh(config.mesh, jax.devices()[:1]))
    monkeypatch.setattr("vidjoint.reporting.plots.learning_curves_png", lambda *_: None)
