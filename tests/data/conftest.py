import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.data.sets import SIZES
from vidjoint.data import schedules
from vidjoint.data.demo import write_video


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Three sets of noise; an example's label is its number, so a label says which file a row came from."""
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    for name, size in SIZES.items():
        (root / name).mkdir()
        lines = []
        for i in range(size):
            if name == "stills":
                Image.fromarray(rng.integers(0, 256, (20 + i, 24, 3), np.uint8)).save(root / name / f"{i}.png")
            else:
                write_video(root / name / f"{i}.mp4", rng.integers(0, 256, (6, 20, 24), np.uint8))
            lines.append(f"{i}.{'png' if name == 'stills' else 'mp4'} {i}\n")
        (root / f"{name}.csv").write_text("".join(lines))
    return root


@pytest.fixture
def undecoded(monkeypatch):
    """Makes decoding free: all clips are black. Its `calls` counts them."""
    seen = SimpleNamespace(calls=0, lock=threading.Lock())

    def clip(example, spec, rng):
        with seen.lock:
            seen.calls += 1
        return np.zeros(spec.shape, np.uint8)

    monkeypatch.setattr(schedules, "training_clip", clip)
    return seen
