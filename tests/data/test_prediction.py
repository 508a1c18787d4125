"""Files and windows become rows in order, whatever is wrong with them; rows are gathered by shape without waiting long."""

import itertools
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vidjoint.config import task_config
from vidjoint.data import prediction
from vidjoint.data.clips import view_times
from vidjoint.data.decode import DecodeError
from vidjoint.data.examples import ClipSpec, views
from vidjoint.data.prediction import Piece, Row, Window, cut_windows, decoded, group, list_files
from vidjoint.data.transforms import view_geometry
from vidjoint.data.video import Video
from vidjoint.errors import UserError

MAX_PIXELS = 10**6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two clips of 1 s and 3 s, a picture, an animation of 4 frames, a broken file."""
    folder = tmp_path_factory.mktemp("files")
    tiny.write_clip(folder / "short.mp4", 1)
    tiny.write_clip(folder / "long.mp4", 2, frames=36)
    pictures = [Image.fromarray(np.full((20, 30, 3), 60 * i, np.uint8)) for i in range(4)]
    pictures[1].save(folder / "still.png")
    pictures[0].save(folder / "moving.gif", save_all=True, append_images=pictures[1:], duration=100)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def spec(media: str = "video") -> ClipSpec:
    return ClipSpec(task_config(media=media, sampler="segments"), 1 if media == "image" else 4, (16, 24), MAX_PIXELS)


def rows_of(folder, names, media="video", temporal=1, spatial=1, threads=2, ahead=4):
    pieces = [name if isinstance(name, Piece) else Piece((Window(str(folder / name)),)) for name in names]
    return list(decoded(pieces, lambda path: (spec(media),), temporal, spatial, threads, ahead))


def test_files_of_folders(tmp_path, monkeypatch):
    for name in ("b/2.MP4", "b/1.jpg", "a.mov", "b/notes.txt", ".hidden/c.mp4", "b/.d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    inside = [str(tmp_path / name) for name in ("a.mov", "b/1.jpg", "b/2.MP4")]
    assert list_files(["-x.mp4", str(tmp_path), "not/there.bin"]) == ["-x.mp4", *inside, "not/there.bin"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list_files(["~/b"]) == inside[1:]

    (tmp_path / "empty1").mkdir()
    (tmp_path / "empty2").mkdir()
    with pytest.raises(UserError) as error:
        list_files([str(tmp_path / "empty1"), "x.mp4", str(tmp_path / "empty2")])
    assert len(error.value.lines) == 2 and "empty1" in error.value.lines[0] and "empty2" in error.value.lines[1]


def test_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.mp4", "a/b/2.mp4", "a/b/.3.mp4", "a/notes.txt", "a/[x].mp4", "c/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_files(["a/*.mp4"]) == ["a/1.mp4", "a/[x].mp4"]
    assert list_files(["a/**/*.mp4"]) == ["a/1.mp4", "a/[x].mp4", "a/b/2.mp4"]
    assert list_files(["a/*", "c/4.png", "a/1.mp4"]) == ["a/1.mp4", "a/[x].mp4", "a/b/2.mp4", "c/4.png"]  # folders, no texts, each once
    assert list_files(["a/[x].mp4"]) == ["a/[x].mp4"]  # there is a file of that very name
    with pytest.raises(UserError, match=r"there are no images or videos in \*\.mkv"):
        list_files(["*.mkv"])


@pytest.mark.parametrize(
    "name, length, stride, expected",
    [
        ("long.mp4", 1.0, 1.0, [(0, 1), (1, 2), (2, 3)]),
        ("long.mp4", 1.0, 0.75, [(0, 1), (0.75, 1.75), (1.5, 2.5)]),  # the rest, 2.25 to 3, is too short
        ("long.mp4", 2.0, 5.0, [(0, 2)]),
        ("long.mp4", 3.0, 1.0, [(0, 3)]),
        ("long.mp4", 3.1, 1.0, [None]),
        ("still.png", 0.01, 0.01, [None]),
        ("broken.mp4", 1.0, 1.0, [None]),
        ("absent.mp4", 1.0, 1.0, [None]),
    ],
)
def test_windows(folder, name, length, stride, expected):
    windows = [window for piece in cut_windows(str(folder / name), length, stride, spec(), most=2) for window in piece.windows]
    assert [window.path for window in windows] == [str(folder / name)] * len(expected)
    assert [(window.start, window.end) if window.end else None for window in windows] == expected


def test_windows_are_whole_seconds_where_they_should_be(folder):
    starts = [w.start for piece in cut_windows(str(folder / "long.mp4"), 0.1, 0.1, spec()) for w in piece.windows]
    assert starts == [i / 10 for i in range(30)]  # no 0.30000000000000004


def test_a_window_shows_its_part_of_the_video(folder):
    (row,) = rows_of(folder, [Piece((Window(str(folder / "long.mp4"), 1.0, 2.0),))])
    with Video(folder / "long.mp4") as video:
        geometry = view_geometry(video.info.height, video.info.width, spec().settings, (16, 24), 0, 1)
        expected = video.read(1.0 + (np.arange(4) + 0.5) / 4, geometry)
        whole = video.read(view_times(video.info, 4, spec().settings, 0, 1), geometry)
    np.testing.assert_array_equal(row.pixels[0], expected)
    assert (row.pixels[0] != whole).any()


@pytest.mark.parametrize("name", ["long.mp4", "long.ts"])
def test_windows_together_are_windows_one_by_one(folder, name):
    """In pieces of 4, which several threads decode; an MPEG-TS can't be jumped in, so its pieces share one decoder, each way of reading its own."""
    if name == "long.ts":
        tiny.write_clip(folder / "long.ts", 2, frames=36)
    pieces = list(cut_windows(str(folder / name), 0.5, 0.2, spec(), most=4))
    assert [len(piece.windows) for piece in pieces] == [4, 4, 4, 1] and all((piece.film is None) == (name == "long.mp4") for piece in pieces)
    ways = (spec(), replace(spec(), frames=2))
    rows = list(decoded(pieces, lambda path: ways, 1, 1, threads=3, ahead=4))
    windows = [window for piece in pieces for window in piece.windows]
    assert [(row.window, row.kind) for row in rows] == [(window, kind) for window in windows for kind in (0, 1)]
    for row in rows:
        expected = views({"video": str(folder / name)}, ways[row.kind], 1, 1, (row.window.start, row.window.end))
        np.testing.assert_array_equal(row.pixels, expected)


def test_frames_of_a_piece_are_decoded_once(folder, monkeypatch):
    videos = []

    class Watched(Video):
        def __init__(self, *args):
            videos.append(self)
            super().__init__(*args)

    monkeypatch.setattr("vidjoint.data.examples.Video", Watched)
    pieces = list(cut_windows(str(folder / "long.mp4"), 1.0, 0.25, spec()))  # 9 windows of 12 frames, of a video of 36
    videos.clear()
    rows = list(decoded(pieces, lambda path: (spec(),), 1, 1, 2, 4))
    assert len(rows) == 9 and [video.decoded <= 40 for video in videos] == [True]


def test_a_window_that_fails_leaves_the_others_alone(folder, monkeypatch):
    def fail(example, clip, temporal, spatial, parts, opened=None):
        if (1.0, 2.0) in parts:
            raise DecodeError("damaged after 1 s")
        return prediction_view_parts(example, clip, temporal, spatial, parts, opened)

    prediction_view_parts = prediction.view_parts
    monkeypatch.setattr(prediction, "view_parts", fail)
    (piece,) = cut_windows(str(folder / "long.mp4"), 1.0, 1.0, spec())
    rows = list(decoded([piece], lambda path: (spec(),), 1, 1, 2, 4))
    assert [row.error for row in rows] == ["", "damaged after 1 s", ""] and [row.pixels is None for row in rows] == [False, True, False]


def test_rows_come_in_order_with_errors_in_their_place(folder):
    names = ["long.mp4", "broken.mp4", "still.png", "absent.mp4", "short.mp4", "."] * 3
    rows = rows_of(folder, names, temporal=2, spatial=3)
    assert [row.number for row in rows] == list(range(len(names)))
    assert [row.window.path for row in rows] == [str(folder / name) for name in names]
    shapes = [None if row.pixels is None else row.pixels.shape for row in rows[:6]]
    assert shapes == [(6, 4, 16, 24, 3), None, (3, 1, 16, 24, 3), None, (6, 4, 16, 24, 3), None]  # of an image, temporal views would be equal
    for row in rows:
        assert bool(row.error) == (row.pixels is None) and "\n" not in row.error
    assert rows[3].error == "No such file or directory"
    np.testing.assert_array_equal(rows[4].pixels, views({"video": str(folder / "short.mp4")}, spec(), 2, 3))


def test_the_task_decides_what_its_own_extensions_mean(folder):
    video, image = rows_of(folder, ["moving.gif"])[0].pixels, rows_of(folder, ["moving.gif"], "image")[0].pixels
    assert video.shape[1] == 4 and (video[0, 0] != video[0, 3]).any()
    assert image.shape[1] == 1 and not image.any()  # the first frame is black
    (clip,) = rows_of(folder, ["short.mp4"], "image")  # a video for a task of images: one frame of it
    assert clip.pixels.shape == (1, 1, 16, 24, 3)


def test_no_more_rows_than_asked_are_held(folder):
    drawn = []

    def endless():
        for i in itertools.count():
            drawn.append(i)
            yield Piece((Window(str(folder / "still.png")),))

    rows = decoded(endless(), lambda path: (spec(),), 1, 1, threads=2, ahead=5)
    for i in range(20):
        assert next(rows).number == i
        assert len(drawn) <= i + 5
    rows.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode") and not thread.join(5) and thread.is_alive()]


def test_large_pictures_are_decoded_one_at_a_time(folder, monkeypatch):
    active, most = 0, {}
    lock, all_of_them = threading.Lock(), threading.Event()

    original = prediction.view_parts

    def slow_views(example, clip, *args):
        nonlocal active
        if clip.max_pixels >= 24 * 40:
            with lock:
                active += 1
                most[clip.max_pixels] = max(most.get(clip.max_pixels, 0), active)
            if active == 4:
                all_of_them.set()
            all_of_them.wait(10)
            time.sleep(0.05)
            with lock:
                active -= 1
        return original(example, clip, *args)

    monkeypatch.setattr(prediction, "view_parts", slow_views)
    rows = rows_of(folder, ["short.mp4"] * 4, threads=4, ahead=8)
    assert all(row.pixels is not None for row in rows) and most == {MAX_PIXELS: 4}
    monkeypatch.setattr(prediction, "LARGE", 100)
    most.clear()
    assert all((row.pixels == rows[0].pixels).all() for row in rows_of(folder, ["short.mp4"] * 4, threads=4, ahead=8))
    assert most == {MAX_PIXELS: 1}


def test_a_lack_of_memory_is_an_error_of_that_file(folder, monkeypatch):
    def fail(*args):
        raise MemoryError("Unable to allocate 9 GiB\nfor it")

    monkeypatch.setattr(prediction, "view_parts", fail)
    (row,) = rows_of(folder, ["short.mp4"])
    assert row.error == "Unable to allocate 9 GiB for it"


def test_names_that_are_no_text(folder, tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")
    os.symlink(folder / "short.mp4", name)
    (row,) = decoded([Piece((Window(name),))], lambda path: (spec(),), 1, 1, 1, 1)
    assert row.pixels is not None and list_files([str(tmp_path)]) == [name]


# group


def fake_rows(shapes):
    return [Row(i, Window(str(i)), 0, 1, None if shape is None else np.zeros(shape, np.uint8)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_groups_hold_every_row_once_and_one_shape(size):
    rng = np.random.default_rng(0)
    rows = fake_rows([(None, (1,), (2,), (3,))[i] for i in rng.integers(0, 4, 100)])
    latest, numbers = -1, []

    def watched():
        nonlocal latest
        for row in rows:
            latest = row.number
            yield row

    for held in group(watched(), size):
        assert 1 <= len(held) <= size
        assert len({row.pixels is None or row.pixels.shape for row in held}) == 1
        assert latest - held[0].number <= 2 * size or latest == 99
        numbers += [row.number for row in held]
    assert sorted(numbers) == list(range(100))


def test_images_between_videos_do_not_break_batches_up():
    lengths = [len(held) for held in group(fake_rows([(8,), (1,)] * 32), 8)]
    assert lengths == [8] * 8
