import numpy as np
import pytest
from PIL import Image

from vidjoint.config import task_config
from vidjoint.data import transforms
from vidjoint.data.transforms import OPERATIONS, augment, train_geometry, view_geometry
from vidjoint.errors import UserError

PICTURES = [(240, 320), (320, 240), (100, 100), (1, 1), (3, 500), (2160, 3840)]
SIZES = [(224, 224), (96, 160), (33, 20)]


def assert_inside(geometry, size):
    assert (geometry.height, geometry.width) == size
    assert 0 <= geometry.top <= geometry.resize[0] - size[0]
    assert 0 <= geometry.left <= geometry.resize[1] - size[1]
    numbers = (*geometry.resize, geometry.top, geometry.left, geometry.height, geometry.width)
    assert all(type(number) is int for number in numbers) and type(geometry.flip) is bool


@pytest.fixture
def clip():
    """uint8[3, 40, 48, 3]: slopes with a bump (which sharpening needs), no symmetry; the frames differ in brightness only."""
    y, x = np.mgrid[:40, :48]
    frame = np.stack([3 * x + y, 5 * y + 10, 200 - 2 * x - y], axis=-1)
    frame[10:14, 20:25] += 40
    return np.stack([np.clip(frame + shift, 0, 255) for shift in (0, 7, 20)]).astype(np.uint8)


@pytest.mark.parametrize("crop", ["short_side", "area", "none"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("picture", PICTURES)
def test_every_box_lies_in_the_picture_and_has_the_input_size(crop, size, picture):
    task, rng = task_config(crop=crop), np.random.default_rng(0)
    for _ in range(50):
        assert_inside(train_geometry(*picture, task, size, rng), size)
    for views in (1, 2, 3, 5):
        for view in range(views):
            assert_inside(view_geometry(*picture, task, size, view, views), size)


def test_short_side_is_uniform_over_the_range_and_keeps_the_aspect():
    task, rng = task_config(short_side=(256, 260)), np.random.default_rng(0)
    drawn = [train_geometry(480, 640, task, (224, 224), rng) for _ in range(500)]
    counts = np.bincount([geometry.resize[0] for geometry in drawn], minlength=261)[256:]
    assert counts.sum() == 500 and counts.min() > 60
    assert all(geometry.resize[1] == round(geometry.resize[0] * 4 / 3) for geometry in drawn)
    ends = [geometry for geometry in drawn if geometry.resize[0] == 256]
    assert min(geometry.top for geometry in ends) == 0 and max(geometry.top for geometry in ends) == 32
    assert len({geometry.left for geometry in drawn}) > 80


def test_short_side_scales_up_where_the_input_does_not_fit():
    geometry = train_geometry(240, 320, task_config(short_side=(100, 100)), (200, 400), np.random.default_rng(0))
    assert geometry.resize == (300, 400)


def test_area_crop_draws_share_and_aspect_from_their_ranges():
    task, rng = task_config(crop="area", area=(0.1, 0.5), aspect=(0.5, 2.0)), np.random.default_rng(0)
    shares, ratios = [], []
    for _ in range(1000):
        geometry = train_geometry(1000, 1000, task, (200, 100), rng)
        height, width = 200 * 1000 / geometry.resize[0], 100 * 1000 / geometry.resize[1]
        shares.append(height * width / 1e6)
        ratios.append(width / height)
    assert 0.095 < min(shares) < 0.12 and 0.48 < max(shares) < 0.51
    assert 0.49 < min(ratios) < 0.55 and 1.8 < max(ratios) < 2.02
    assert abs(np.mean(shares) - 0.3) < 0.02
    assert abs(np.mean(np.log(ratios))) < 0.05


def test_area_crop_reaches_every_corner():
    task, rng = task_config(crop="area", area=(0.25, 0.25), aspect=(1.0, 1.0)), np.random.default_rng(0)
    boxes = np.array([(g.top, g.left) for g in (train_geometry(64, 64, task, (32, 32), rng) for _ in range(500))])
    assert boxes.min(axis=0).tolist() == [0, 0] and boxes.max(axis=0).tolist() == [32, 32]


def test_area_crop_falls_back_to_the_largest_central_box():
    task = task_config(crop="area", area=(0.9, 1.0), aspect=(3 / 4, 4 / 3))
    wide = train_geometry(100, 1000, task, (90, 120), np.random.default_rng(0))  # box 100 x 133.3, so 90 / 100 of the size
    assert (wide.resize, wide.top, wide.left) == ((90, 900), 0, 390)
    tall = train_geometry(1000, 75, task, (100, 75), np.random.default_rng(0))  # box 100 x 75
    assert (tall.resize, tall.top, tall.left) == ((1000, 75), 450, 0)


@pytest.mark.parametrize("crop", ["short_side", "area"])
def test_a_sliver_is_not_blown_up_without_bound(crop):
    for picture in [(2, 20000), (20000, 2)]:
        for geometry in (
            train_geometry(*picture, task_config(crop=crop), (224, 224), np.random.default_rng(0)),
            view_geometry(*picture, task_config(crop=crop), (224, 224), 0, 3),
        ):
            assert max(geometry.resize) <= 8192


def test_flip_half_of_the_time_and_never_if_off():
    rng = np.random.default_rng(0)
    for crop in ("short_side", "area", "none"):
        on, off = task_config(crop=crop), task_config(crop=crop, flip=False)
        assert 160 < sum(train_geometry(240, 320, on, (32, 32), rng).flip for _ in range(400)) < 240
        assert not any(train_geometry(240, 320, off, (32, 32), rng).flip for _ in range(100))


def test_the_same_seed_gives_the_same_geometry():
    for crop in ("short_side", "area"):
        task = task_config(crop=crop)
        first, again, other = (train_geometry(240, 320, task, (64, 64), np.random.default_rng(seed)) for seed in (5, 5, 6))
        assert first == again != other


@pytest.mark.parametrize(
    "picture, size, resize, starts",
    [
        ((240, 320), (120, 120), (120, 160), [(0, 0), (0, 20), (0, 40)]),  # left, centre, right
        ((320, 240), (120, 120), (160, 120), [(0, 0), (20, 0), (40, 0)]),  # top, centre, bottom
        ((100, 100), (50, 100), (100, 100), [(0, 0), (25, 0), (50, 0)]),  # an input wider than the picture
        ((60, 80), (120, 120), (120, 160), [(0, 0), (0, 20), (0, 40)]),  # scaled up
        ((77, 77), (32, 32), (32, 32), [(0, 0), (0, 0), (0, 0)]),
    ],
)
def test_views_cover_the_picture_from_end_to_end(picture, size, resize, starts):
    task = task_config()
    views = [view_geometry(*picture, task, size, view, 3) for view in range(3)]
    assert [geometry.resize for geometry in views] == [resize] * 3
    assert [(geometry.top, geometry.left) for geometry in views] == starts
    assert view_geometry(*picture, task, size, 0, 1) == views[1]
    assert not any(geometry.flip for geometry in views)


def test_crop_none_shows_everything():
    task = task_config(crop="none", flip=False)
    expected = transforms.Geometry((24, 32), 0, 0, 24, 32, False)
    assert train_geometry(240, 100, task, (24, 32), np.random.default_rng(0)) == expected
    assert view_geometry(240, 100, task, (24, 32), 2, 3) == expected


def test_unknown_crop_and_view_are_refused():
    with pytest.raises(UserError, match=r"crop='middle'.*short_side, area or none"):
        train_geometry(10, 10, task_config(crop="middle"), (8, 8), np.random.default_rng(0))
    with pytest.raises(UserError, match="crop='middle'"):
        view_geometry(10, 10, task_config(crop="middle"), (8, 8), 0, 1)
    with pytest.raises(ValueError):
        view_geometry(10, 10, task_config(), (8, 8), 3, 3)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_shape_and_input(name, clip):
    before = clip.copy()
    for strength in (0.0, 0.35, 1.0):
        for sign in (-1, 1):
            out = OPERATIONS[name](clip, strength, sign)
            assert out.shape == clip.shape and out.dtype == np.uint8
            np.testing.assert_array_equal(clip, before)
            again = OPERATIONS[name](clip, strength, sign)
            np.testing.assert_array_equal(out, again)


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"autocontrast", "equalize", "invert"}))
def test_operations_at_strength_zero_do_nothing_and_grow_from_there(name, clip):
    change = [np.abs(OPERATIONS[name](clip, strength, 1).astype(int) - clip).mean() for strength in (0, 0.2, 0.6, 1)]
    assert change[0] == 0
    if name != "identity":
        assert change[1] < change[2] < change[3]


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"autocontrast", "equalize", "contrast"}))
def test_operations_treat_all_frames_alike(name, clip):
    still = np.stack([clip[0], clip[0], clip[0]])
    out = OPERATIONS[name](still, 0.7, -1)
    alone = OPERATIONS[name](clip[:1], 0.7, -1)
    np.testing.assert_array_equal(out, np.repeat(alone, 3, axis=0))


def test_pointwise_operations_against_their_formulas(clip):
    x = clip.astype(int)
    np.testing.assert_array_equal(OPERATIONS["invert"](clip, 0.5, 1), 255 - x)
    np.testing.assert_array_equal(OPERATIONS["posterize"](clip, 0.5, 1), x // 4 * 4)  # 6 bits
    np.testing.assert_array_equal(OPERATIONS["posterize"](clip, 1.0, 1), x // 16 * 16)  # 4 bits
    np.testing.assert_array_equal(OPERATIONS["solarize"](clip, 0.5, 1), np.where(x < 128, x, 255 - x))
    np.testing.assert_array_equal(OPERATIONS["solarize_add"](clip, 1.0, 1), np.where(x < 128, np.minimum(x + 110, 255), x))
    low, high = x.min(axis=(0, 1, 2)), x.max(axis=(0, 1, 2))
    stretched = OPERATIONS["autocontrast"](clip, 0.5, 1)
    np.testing.assert_allclose(stretched, (x - low) * 255 / (high - low), atol=1)
    darker = OPERATIONS["brightness"](clip, 1.0, -1)
    np.testing.assert_allclose(darker, 0.1 * x, atol=1)
    np.testing.assert_allclose(OPERATIONS["color"](clip, 1.0, -1), 0.1 * x + 0.9 * (x @ [0.299, 0.587, 0.114])[..., None], atol=1.5)
    mean = (x @ [0.299, 0.587, 0.114]).mean()
    np.testing.assert_allclose(OPERATIONS["contrast"](clip, 1.0, -1), 0.1 * x + 0.9 * mean, atol=1.5)


def test_equalize_flattens_the_histogram_of_the_whole_clip():
    rng = np.random.default_rng(0)
    dark = (255 * rng.random((4, 50, 50, 3)) ** 3).astype(np.uint8)
    out = OPERATIONS["equalize"](dark, 0.5, 1)
    assert abs(np.median(dark) - 32) < 5 and abs(np.median(out) - 128) < 10
    frames = OPERATIONS["equalize"](np.stack([dark[0] // 2, dark[0]]), 0.5, 1)  # a darker frame stays darker
    assert frames[0].mean() < frames[1].mean() - 20


def test_translations_move_by_the_stated_pixels(clip):
    right = OPERATIONS["translate_x"](clip, 10 / (0.45 * 48), -1)
    np.testing.assert_array_equal(right[:, :, 10:], clip[:, :, :-10])
    assert (right[:, :, :10] == 128).all()
    up = OPERATIONS["translate_y"](clip, 9 / (0.45 * 40), 1)
    np.testing.assert_array_equal(up[:, :-9], clip[:, 9:])
    assert (up[:, -9:] == 128).all()


def test_shear_and_rotation_turn_about_the_centre():
    y, x = np.mgrid[:41, :41].astype(float)
    dot = np.zeros((1, 41, 41, 3), np.uint8)
    dot[:, 19:22, 19:22] = 255
    dot[:, 5:8, 19:22] = 255  # 14 above the centre
    for name, moved in [("shear_x", (-14, 0.3 * 14)), ("shear_y", (-14, 0)), ("rotate", (-14 * np.cos(np.pi / 6), -14 * np.sin(np.pi / 6)))]:
        out = OPERATIONS[name](dot, 1.0, 1)[0, :, :, 0].astype(float)
        for place in ((0, 0), moved):
            near = out * (np.hypot(y - 20 - place[0], x - 20 - place[1]) < 4) * (out != 128)
            centroid = (near * y).sum() / near.sum() - 20, (near * x).sum() / near.sum() - 20
            np.testing.assert_allclose(centroid, place, atol=0.4)


def test_sharpness_does_not_mix_frames():
    pair = np.stack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)])
    np.testing.assert_array_equal(OPERATIONS["sharpness"](pair, 1.0, -1), pair)


def test_augment_is_decided_by_the_generator(clip):
    task = task_config(randaugment_layers=2, erase=0.5)
    before = clip.copy()
    outs = [augment(clip, task, np.random.default_rng(seed)) for seed in range(30)]
    for seed, out in enumerate(outs):
        np.testing.assert_array_equal(out, augment(clip, task, np.random.default_rng(seed)))
        assert out.shape == clip.shape and out.dtype == np.uint8
    assert len({out.tobytes() for out in outs}) > 25
    np.testing.assert_array_equal(clip, before)


def test_augment_draws_every_operation_and_both_signs(clip, monkeypatch):
    drawn = []
    recorders = {name: lambda clip, strength, sign, name=name: (drawn.append((name, strength, sign)), clip)[1] for name in OPERATIONS}
    monkeypatch.setattr(transforms, "OPERATIONS", recorders)
    rng = np.random.default_rng(0)
    for _ in range(400):
        augment(clip, task_config(randaugment_layers=2, randaugment_magnitude=4.0), rng)
    assert len(drawn) == 800 and {strength for _, strength, _ in drawn} == {0.4}
    assert {(name, sign) for name, _, sign in drawn} == {(name, sign) for name in OPERATIONS for sign in (-1, 1)}


def test_augment_off_returns_the_clip(clip):
    assert augment(clip, task_config(), np.random.default_rng(0)) is clip


def test_augment_takes_one_frame_and_strided_clips(clip):
    task = task_config(randaugment_layers=3, erase=1.0)
    for seed in range(20):
        mirrored = clip[:1, :, ::-1]
        out = augment(mirrored, task, np.random.default_rng(seed))
        np.testing.assert_array_equal(out, augment(np.ascontiguousarray(mirrored), task, np.random.default_rng(seed)))


def test_erasing_covers_one_box_of_the_right_size_in_every_frame():
    clip, task = np.zeros((3, 100, 120, 3), np.uint8), task_config(erase=1.0)
    rng, shares, ratios = np.random.default_rng(0), [], []
    for _ in range(300):
        out = augment(clip, task, rng)
        assert (out == out[0]).all()  # a still patch
        rows, columns = np.flatnonzero(out[0].any(axis=(1, 2))), np.flatnonzero(out[0].any(axis=(0, 2)))
        box = out[0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (box > 0).mean() > 0.95 and abs(box.mean() - 127.5) < 12
        shares.append(box[..., 0].size / 12000)
        ratios.append(box.shape[1] / box.shape[0])
    assert 0.018 < min(shares) < 0.04 and 0.3 < max(shares) < 0.34
    assert 0.27 < min(ratios) < 0.5 and 2 < max(ratios) < 3.6


def test_erasing_happens_as_often_as_asked():
    clip, task, rng = np.zeros((1, 32, 32, 3), np.uint8), task_config(erase=0.25), np.random.default_rng(0)
    hits = sum(augment(clip, task, rng).any() for _ in range(800))
    assert 160 < hits < 240


def test_pillow_follows_the_geometry():
    """The resized picture, cut at the box, shows the part of the original that the geometry names."""
    y, x = np.mgrid[:120, :200]
    picture = np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)
    geometry = view_geometry(120, 200, task_config(), (60, 60), 2, 3)
    height, width = geometry.resize
    resized = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
    crop = resized[geometry.top : geometry.top + 60, geometry.left : geometry.left + 60]
    assert abs(int(crop[0, 0, 0]) - 80) <= 1 and abs(int(crop[-1, -1, 0]) - 199) <= 1 and abs(int(crop[-1, -1, 1]) - 119) <= 1
