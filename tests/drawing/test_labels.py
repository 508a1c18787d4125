"""Labels on pictures: legible at any size, in the right place and time, and nothing else of a video changes."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vidjoint.drawing.labels import Line, Span, annotate_image, annotate_video, draw_on_picture, panel

LINES = (Line("folding napkins and towels", 0.83), Line("été", 0.11), Line("swipe left", 0.04), Line("x", 0.01), Line("y", 0.01))


@pytest.mark.parametrize("height, width", [(120, 160), (160, 120), (1080, 1920), (1920, 1080), (240, 2000), (121, 163)])
def test_a_panel_fits_the_picture(height, width):
    box = panel(height, width, LINES)
    assert box.dtype == np.uint8 and box.shape[2] == 4 and not box.shape[0] % 2 and not box.shape[1] % 2
    assert box.shape[0] <= 0.5 * height and box.shape[1] <= width
    letters = (box[..., :3] > 200).all(axis=2)
    rows = np.flatnonzero(letters.any(axis=1))
    assert rows[0] > 0 and rows[-1] < box.shape[0] - 1 and letters.sum() > 50  # not cut off
    assert letters.any(axis=1).sum() >= 8 * max(1, min(3, box.shape[0] // 16))  # letters of at least some pixels


def test_bars_are_as_long_as_the_scores():
    box = panel(480, 640, (Line("a", 1.0), Line("b", 0.5), Line("c", 0.0)))
    blue = (box[..., 2] > box[..., 0].astype(int) + 100).sum(axis=1)
    thirds = [int(part.max()) for part in np.array_split(blue, 3)]
    assert thirds[0] > 0.9 * box.shape[1] and abs(thirds[1] - thirds[0] / 2) < 0.1 * thirds[0] and thirds[2] < 4


def test_small_pictures_are_enlarged():
    picture = np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3)
    made = draw_on_picture(picture, LINES)
    assert made.shape == (120, 160, 3)
    np.testing.assert_array_equal(made[:40:4, ::4], picture[:10])  # above the panel nothing changes


@pytest.fixture
def clip(tmp_path):
    """Two seconds at an uneven rate, with sound and a late start: frame i has the grey 20 + 8 i."""
    file = tmp_path / "clip.mp4"
    times = [0, 100, 200, 400, 500, 700, 1000, 1100, 1500, 1700]
    with av.open(str(file), "w") as out:
        video, sound = out.add_stream("libx264", rate=10, options={"crf": "5"}), out.add_stream("aac", rate=16000)
        video.width, video.height, video.pix_fmt = 162, 120, "yuv420p"
        video.time_base = video.codec_context.time_base = Fraction(1, 1000)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((120, 162, 3), 20 + 8 * i, np.uint8))
            frame.pts, frame.time_base = time + 300, Fraction(1, 1000)
            out.mux(video.encode(frame))
        out.mux(video.encode())
        for i in range(32):
            samples = av.AudioFrame.from_ndarray(np.sin(np.arange(1024) / 9, dtype=np.float32)[None] / 2, format="fltp", layout="mono")
            samples.sample_rate, samples.pts = 16000, 1024 * i
            out.mux(sound.encode(samples))
        out.mux(sound.encode())
    return file, times


def test_a_copy_has_the_frames_their_times_and_the_sound(clip, tmp_path):
    file, times = clip
    target = tmp_path / "copies" / "clip.mp4"
    spans = [Span(0.0, 0.6, LINES[:1]), Span(0.6, 1.2, (Line("other", 0.5),))]
    assert annotate_video(str(file), target, spans, 10**6) is False
    assert [path.name for path in target.parent.iterdir()] == ["clip.mp4"]
    with av.open(str(target)) as made:
        frames = [(frame.time, frame.to_ndarray(format="rgb24").astype(int)) for frame in made.decode(video=0)]
    assert [round(1000 * (time - frames[0][0])) for time, _ in frames] == times
    with av.open(str(target)) as made, av.open(str(file)) as original:
        assert made.streams.video[0].codec_context.name == "h264"
        heard, all_of_it = (sum(packet.size > 0 for packet in container.demux(audio=0)) for container in (made, original))
    assert all_of_it - 8 <= heard < all_of_it  # what sounds before the first frame goes
    for i, (_, frame) in enumerate(frames):
        assert frame.shape == (120, 162, 3) and np.abs(frame[:60] - (20 + 8 * i)).max() <= 6  # above the labels nothing changes
    labels = [frame[70:].max() > 200 for _, frame in frames]
    assert labels == [time < 1200 for time in times]  # no answer after 1.2 s
    assert np.abs(frames[0][1][70:] - frames[5][1][70:]).max() > 60  # others in the second part


def test_overlapping_spans_change_half_way(tmp_path):
    tiny.write_clip(tmp_path / "x.mp4", 0, frames=12, size=(120, 160))
    spans = [Span(0.0, 0.6, ()), Span(0.2, 0.8, (Line("a", 1.0),)), Span(0.4, 1.0, ())]  # middles 0.3, 0.5, 0.7
    annotate_video(str(tmp_path / "x.mp4"), tmp_path / "y.mp4", spans, 10**6)
    with av.open(str(tmp_path / "x.mp4")) as a, av.open(str(tmp_path / "y.mp4")) as b:
        pairs = [(p.to_ndarray(format="gray").astype(int), q.to_ndarray(format="gray")) for p, q in zip(a.decode(), b.decode(), strict=True)]
    changes = [np.abs(p - q)[90:].mean() for p, q in pairs]
    assert [i for i, change in enumerate(changes) if change > 15] == [5, 6, 7]  # from 0.4 to 0.6 s at 12 a second


def test_pictures_keep_their_kind(tmp_path):
    picture = Image.fromarray(np.full((130, 200, 3), 90, np.uint8))
    for name in ("a.png", "b.jpg"):
        picture.save(tmp_path / name)
        annotate_image(str(tmp_path / name), tmp_path / "out" / name, LINES, 10**6)
        with Image.open(tmp_path / "out" / name) as made:
            assert made.format == {"a.png": "PNG", "b.jpg": "JPEG"}[name] and made.size == (200, 130)
            assert np.asarray(made)[70:].max() > 200 and np.abs(np.asarray(made)[:50].astype(int) - 90).max() < 4
