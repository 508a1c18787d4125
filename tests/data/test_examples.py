"""Examples to pixels: pure functions of the file and the generator, and evaluation views that are what decoding each by itself gives."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidjoint.config import task_config
from vidjoint.data import clips, examples, transforms
from vidjoint.data.decode import DecodeError
from vidjoint.data.demo import write_video
from vidjoint.data.examples import ClipSpec, training_clip, views
from vidjoint.data.image import read_image
from vidjoint.data.video import Video

SIZE = (16, 20)  # height, width


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A wide and a tall video of 20 frames (0.8 s), each frame brighter than the last, with noise; a wide picture; a file that is neither."""
    folder = tmp_path_factory.mktemp("examples")
    rng = np.random.default_rng(0)
    for name, shape in (("wide", (24, 50)), ("tall", (60, 26))):
        brightness = np.arange(20)[:, None, None] * 10
        write_video(folder / f"{name}.mp4", (brightness + rng.integers(0, 50, (20, *shape))).astype(np.uint8))
    Image.fromarray(rng.integers(0, 256, (24, 50, 3), np.uint8)).save(folder / "still.png")
    (folder / "bad.mp4").write_bytes(b"neither")
    return {file.stem: str(file) for file in folder.iterdir()}


def spec(frames=4, max_pixels=10**6, **changes):
    return ClipSpec(task_config(**{"short_side": (20, 30), **changes}), frames, SIZE, max_pixels)


def still(**changes):
    return spec(frames=1, media="image", **changes)


def train(example, spec, seed):
    return training_clip(example, spec, np.random.default_rng(seed))


AUGMENTED = dict(randaugment_layers=2, erase=0.5)


@pytest.mark.parametrize("crop", ["short_side", "area", "none"])
@pytest.mark.parametrize("sampler", ["uniform", "window", "segments"])
def test_training_clips_of_videos(files, crop, sampler):
    settings = spec(crop=crop, sampler=sampler, **AUGMENTED)
    made = [train({"video": files["wide"]}, settings, seed) for seed in (0, 0, 1, 2)]
    assert settings.shape == (4, 16, 20, 3)
    assert all(clip.shape == settings.shape and clip.dtype == np.uint8 for clip in made)
    np.testing.assert_array_equal(made[0], made[1])
    assert (made[0] != made[2]).any() and (made[0] != made[3]).any()


def test_frames_of_a_training_clip_run_forward(files):
    brightness = train({"video": files["wide"]}, spec(flip=False), 0).mean(axis=(1, 2, 3))
    assert (np.diff(brightness) > 20).all()  # five frames of 10 apart


def test_training_clips_of_images(files):
    content = Path(files["still"]).read_bytes()
    made = [train({"image": source}, still(**AUGMENTED), seed) for source in (files["still"], content) for seed in (0, 1)]
    assert all(clip.shape == (1, 16, 20, 3) and clip.dtype == np.uint8 for clip in made)
    np.testing.assert_array_equal(made[0], made[2])  # a file and its bytes
    assert (made[0] != made[1]).any()


def each_by_itself(example, spec, temporal, spatial, start=0.0, end=None):
    """Views decoded one at a time, each from a file opened anew."""
    made = []
    for moment in range(temporal):
        for place in range(spatial):
            if "image" in example:
                made.append(read_image(example["image"], lambda h, w, v=place: transforms.view_geometry(h, w, spec.settings, spec.size, v, spatial)))
                continue
            with Video(example["video"]) as video:
                info = video.info
                part = type(info)(info.width, info.height, (end or info.duration) - start, info.fps, info.frames)
                times = start + clips.view_times(part, spec.frames, spec.settings, moment, temporal)
                made.append(video.read(times, transforms.view_geometry(info.height, info.width, spec.settings, spec.size, place, spatial)))
    return np.stack(made)


@pytest.mark.parametrize("name", ["wide", "tall"])
@pytest.mark.parametrize("crop", ["short_side", "none"])
@pytest.mark.parametrize(("sampler", "temporal", "spatial"), [("uniform", 1, 1), ("uniform", 1, 3), ("segments", 3, 1), ("window", 2, 3)])
def test_views_of_videos(files, name, crop, sampler, temporal, spatial):
    example, settings = {"video": files[name]}, spec(crop=crop, sampler=sampler, window_seconds=0.5)
    made = views(example, settings, temporal, spatial)
    assert made.shape == (temporal * spatial, 4, 16, 20, 3) and made.dtype == np.uint8
    np.testing.assert_array_equal(made, each_by_itself(example, settings, temporal, spatial))
    np.testing.assert_array_equal(made, views(example, settings, temporal, spatial))
    distinct = temporal * (spatial if crop != "none" else 1)
    assert len({view.tobytes() for view in made}) == distinct


def test_views_know_nothing_of_augmentation(files):
    plain = views({"video": files["wide"]}, spec(flip=False), 1, 3)
    np.testing.assert_array_equal(plain, views({"video": files["wide"]}, spec(flip=True, short_side=(40, 50), **AUGMENTED), 1, 3))


def test_views_of_a_part(files):
    example, settings = {"video": files["wide"]}, spec(sampler="segments")
    made = views(example, settings, 2, 1, part=(0.2, 0.4))
    np.testing.assert_array_equal(made, each_by_itself(example, settings, 2, 1, 0.2, 0.4))
    whole = views(example, settings, 1, 1)
    assert whole[0, 0].mean() < made.mean() < whole.mean()  # frames 5 to 9 of 20 that grow brighter


@pytest.mark.parametrize("spatial", [1, 3])
def test_views_of_images(files, spatial):
    example = {"image": files["still"]}
    made = views(example, still(), 1, spatial)
    assert made.shape == (spatial, 1, 16, 20, 3)
    # Pillow computes a crop of a resized picture from where the crop begins: now and then a pixel is rounded the other way
    np.testing.assert_allclose(made.astype(int), each_by_itself(example, still(), 1, spatial).astype(int), rtol=0, atol=1 if spatial > 1 else 0)
    assert len({view.tobytes() for view in made}) == spatial
    np.testing.assert_array_equal(views(example, still(), 2, spatial), np.concatenate([made, made]))


def test_a_file_is_decoded_once_for_all_its_views(files, monkeypatch):
    opened = []

    class Counted(Video):
        def __init__(self, *args):
            super().__init__(*args)
            opened.append(self)

    monkeypatch.setattr(examples, "Video", Counted)
    views({"video": files["wide"]}, spec(sampler="segments"), 4, 3)
    assert len(opened) == 1 and opened[0].decoded <= 20


@pytest.mark.parametrize("read", [lambda example, spec: train(example, spec, 0), lambda example, spec: views(example, spec, 1, 1)])
def test_files_that_cannot_be_used(files, read):
    for example, settings in (({"video": files["bad"]}, spec()), ({"image": files["bad"]}, still())):
        with pytest.raises(DecodeError):
            read(example, settings)
    with pytest.raises(DecodeError):
        read({"video": files["bad"] + ".gone"}, spec())
    with pytest.raises(DecodeError, match="max_pixels"):
        read({"video": files["wide"]}, spec(max_pixels=24 * 50 - 1))
    with pytest.raises(DecodeError, match="pixels"):
        read({"image": files["still"]}, still(max_pixels=24 * 50 - 1))
