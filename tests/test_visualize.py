import functools
import json

import av
import jax
import numpy as np
import pytest
from PIL import Image

from tests.tiny import write_clip
from vidjoint import visualize
from vidjoint.checkpoints import Checkpoints
from vidjoint.config import base_config, task_config
from vidjoint.maps.flow import am_flow
from vidjoint.models.build import build
from vidjoint.run_folder import RunFolder


def config_of(**changes):
    config = base_config()
    config.total_steps = 1
    config.model.update(variant="Ti/8", width=16, depth=3, heads=2, mlp_dim=32, frames=4, image_size=16, dtype="float32", gelu="tanh")
    config.model.update(**(dict(mixer="am_flow", mixer_blocks=(0, -1), pool="last_frame") | changes))
    config.model.am_flow.update(bottleneck=8, tpu="none")
    config.tasks.clips = task_config(train="x.csv", image_size=(16, 24))
    return config


def write_run(folder, config):
    write_clip(folder / "clip.mp4", 1)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).save(folder / "still.png")
    RunFolder(folder).write(config, {"clips": ("a", "b")})
    params = jax.jit(build(config.model, {"clips": 2}).init)(jax.random.key(0))
    with Checkpoints(folder, 1) as checkpoints:
        checkpoints.save(1, {"params": params, "frozen": {}, "ema": {}}, None)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), config_of())


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("divided"), config_of(mixer="divided", mixer_blocks=(), pool="class_token", depth=2))


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """Each run is loaded, and its model compiled, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize, "Classifier", functools.cache(visualize.Classifier))
        yield


def test_flow_is_where_something_changes():
    """One patch of a still clip changes between frames 1 and 2: in the first block nothing happens before, and most at that patch then."""
    model = build(config_of().model, {"clips": 2})
    params = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(0, 0.3, x.shape).astype(np.float32), model.abstract())
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 24, 3), np.uint8)[:1].repeat(4, 0)
    pixels[2:, 8:, 16:] = 255 - pixels[2:, 8:, 16:]
    flows = jax.jit(am_flow, static_argnums=0)(model, params, pixels)
    assert sorted(flows) == [0, 2] and all(flow.shape == (4, 2, 3) for flow in flows.values())
    for flow in flows.values():
        np.testing.assert_allclose(flow[0], 1, atol=1e-4)  # no change: a softmax over zeros
        assert not flow[3].any()  # the last frame has no next one
        assert np.ptp(flow[1]) > 0.1
    assert np.unravel_index(flows[0][1].argmax(), (2, 3)) == (1, 2)


def pictures_of(file):
    """uint8[n, H, W, 3] of a PNG, GIF or MP4."""
    if file.suffix == ".mp4":
        with av.open(str(file)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with Image.open(file) as image:
        frames = []
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")))
        return np.stack(frames)


@pytest.mark.parametrize(
    "what, ending, arguments, said",
    [
        ("am_flow", "png", [], "2 maps over 4 frames"),
        ("am_flow_grid", "png", [], "3 maps over 4 frames"),
        ("rollout", "mp4", [], "1 map over 4 frames"),
        ("attention", "gif", ["--block=2"], "2 maps over 4 frames"),  # each head
    ],
)
def test_pictures(run, tmp_path, capsys, what, ending, arguments, said):
    out = tmp_path / f"x.{ending}"
    assert visualize.main([f"--workdir={run}", str(run / "clip.mp4"), f"--what={what}", f"--out={out}", *arguments]) == 0
    assert said in capsys.readouterr().out
    pictures = pictures_of(out)
    assert len(pictures) == (1 if ending == "png" else 12)  # the clip lasts a second
    assert min(pictures.shape[1:3]) > 150 and len(np.unique(pictures[0].reshape(-1, 3), axis=0)) > 50
    if ending != "png":
        assert (pictures[0] != pictures[-1]).any()


def test_time_and_images(divided, tmp_path, capsys):
    clip, still, out = str(divided / "clip.mp4"), str(divided / "still.png"), tmp_path / "x.png"
    for arguments, said in (
        ([clip, "--what=attention"], "4 maps over 4 frames"),  # space and time of two blocks
        ([clip, "--what=motion", "--patch=1,2", "--frame=0"], "2 maps over 4 frames"),
        ([still, "--what=rollout"], "1 map over 1 frames"),
    ):
        assert visualize.main([f"--workdir={divided}", *arguments, f"--out={out}"]) == 0
        assert said in capsys.readouterr().out and pictures_of(out).std() > 10


def test_principal_colours():
    flow = np.zeros((2, 3, 4))
    np.testing.assert_array_equal(visualize.principal_colours(flow), 0.5)  # as everywhere: grey
    flow[1, 2] = 5
    colours = visualize.principal_colours(flow)
    assert colours.shape == (2, 3, 3) and colours[1, 2, 0] == 1 and (np.delete(colours.reshape(6, 3), 5, 0)[:, 0] < 0.5).all()


def test_mistakes_are_lines(run, divided, tmp_path, capsys):
    clip, out = str(run / "clip.mp4"), f"--out={tmp_path / 'x.png'}"
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.mp4").write_text("no video")
    for arguments, line in {
        (f"--workdir={run}", clip, f"--out={tmp_path / 'x.txt'}"): "name a .png or .gif or .mp4 file",
        (f"--workdir={run}", clip, "--what=am_flow_grid", f"--out={tmp_path / 'x.gif'}"): "name a .png file",
        (f"--workdir={run}", clip, f"--out={tmp_path / 'no' / 'x.png'}"): "is no folder that can be written",
        (f"--workdir={run}", clip, f"--out={tmp_path / 'folder.png'}"): "is a folder",
        (f"--workdir={run}", str(run / "none.mp4"), out): "none.mp4: ",
        (f"--workdir={run}", str(tmp_path / "text.mp4"), out): "text.mp4: no video",
        (f"--workdir={run}", str(run / "still.png"), out): "is an image",
        (f"--workdir={run}", clip, "--block=1", out): "--block=1: choose one of 0, 2",
        (f"--workdir={run}", clip, "--what=motion", out): "no patch looks at other frames",
        (f"--workdir={divided}", clip, "--what=am_flow", out): "computes no AM flow",
        (f"--workdir={divided}", clip, "--what=motion", "--patch=2,0", out): "rows are 0 to 1",
        (f"--workdir={divided}", clip, "--what=motion", "--frame=4", out): "frames 0 to 3",
        (f"--workdir={tmp_path}", clip, out): str(tmp_path),
    }.items():
        assert visualize.main(list(arguments)) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ") and line in error, json.dumps(error)
