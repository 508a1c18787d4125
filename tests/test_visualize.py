import jax
import numpy as np
import pytest
from PIL import Image

from tests.tiny import write_clip
from vidjoint import visualize
from vidjoint.checkpoints import Checkpoints
from vidjoint.config import base_config, task_config
from vidjoint.models.build import build
from vidjoint.run_folder import RunFolder


def config_of(**changes):
    config = base_config()
    config.total_steps = 1
    config.model.update(variant="Ti/8", width=16, depth=3, heads=2, mlp_dim=32, frames=4, image_size=16, dtype="float32", gelu="tanh")
    config.model.update(mixer="am_flow", mixer_blocks=(0, -1), pool="last_frame", **changes)
    config.model.am_flow.update(bottleneck=8, tpu="none")
    config.tasks.clips = task_config(train="x.csv", image_size=(16, 24))
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_clip(folder / "clip.mp4", 1)
    config = config_of()
    RunFolder(folder).write(config, {"clips": ("a", "b")})
    params = jax.jit(build(config.model, {"clips": 2}).init)(jax.random.key(0))
    with Checkpoints(folder, 1) as checkpoints:
        checkpoints.save(1, {"params": params, "frozen": {}, "ema": {}}, None)
    return folder


def test_flow_is_where_something_changes():
    """One patch of a still clip changes between frames 1 and 2: in the first block nothing happens before, and most at that patch then."""
    model = build(config_of().model, {"clips": 2})
    params = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(0, 0.3, x.shape).astype(np.float32), model.abstract())
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 24, 3), np.uint8)[:1].repeat(4, 0)
    pixels[2:, 8:, 16:] = 255 - pixels[2:, 8:, 16:]
    flows = jax.jit(visualize.am_flow, static_argnums=0)(model, params, pixels)
    assert sorted(flows) == [0, 2] and all(flow.shape == (4, 2, 3) for flow in flows.values())
    for flow in flows.values():
        np.testing.assert_allclose(flow[0], 1, atol=1e-4)  # no change: a softmax over zeros
        assert not flow[3].any()  # the last frame has no next one
        assert np.ptp(flow[1]) > 0.1
    assert np.unravel_index(flows[0][1].argmax(), (2, 3)) == (1, 2)


def test_command_draws_a_picture(run, tmp_path, capsys):
    assert visualize.main([f"--workdir={run}", str(run / "clip.mp4"), "--what=am_flow", f"--out={tmp_path / 'flow.png'}"]) == 0
    assert "2 blocks, 4 frames" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "flow.png").convert("RGB"))
    assert min(picture.shape[:2]) > 200 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_mistakes_are_lines(run, tmp_path, capsys):
    clip, out = str(run / "clip.mp4"), f"--out={tmp_path / 'x.png'}"
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.mp4").write_text("no video")
    for arguments, line in {
        (f"--workdir={run}", clip, f"--out={tmp_path / 'x.txt'}"): "name a .png file",
        (f"--workdir={run}", clip, f"--out={tmp_path / 'no' / 'x.png'}"): "is no folder that can be written",
        (f"--workdir={run}", clip, f"--out={tmp_path / 'folder.png'}"): "is a folder",
        (f"--workdir={run}", str(run / "none.mp4"), out): "none.mp4: ",
        (f"--workdir={run}", str(tmp_path / "text.mp4"), out): "text.mp4: no video",
        (f"--workdir={tmp_path}", clip, out): str(tmp_path),
    }.items():
        assert visualize.main(list(arguments)) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ") and line in error
