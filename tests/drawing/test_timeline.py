import numpy as np
from PIL import Image

from tests import tiny
from vidjoint.drawing.timeline import borders, clock, runs, timeline_png


def test_windows_that_overlap_meet_half_way_and_gaps_stay():
    spans = np.array([[0, 2], [1, 3], [5, 6], [6, 7]])
    np.testing.assert_allclose(borders(spans), [[0, 1.5], [1.5, 3], [5, 6], [6, 7]])


def test_neighbours_with_one_label_are_one_band():
    edges = np.array([[0, 1], [1, 2], [2, 3], [5, 6], [6, 7]])
    assert runs(np.array([4, 4, 1, 1, 1]), edges) == [((0, 2), 4), ((2, 3), 1), ((5, 7), 1)]


def test_times_read_as_people_say_them():
    assert [clock(7.5, 60), clock(65, 600), clock(3725, 4000), clock(59.6, 600)] == ["7.5 s", "1:05", "1:02:05", "1:00"]


def test_picture(tmp_path):
    """The bands have the colours of their labels, each for its time."""
    tiny.write_clip(tmp_path / "x.mp4", 1, frames=48, size=(48, 64))
    scores = np.zeros((4, 12))
    scores[[0, 1, 2, 3], [7, 7, 2, 2]] = 1, 1, 0.9, 0.9
    spans = np.array([[0, 1], [1, 2], [2, 3], [3, 4]])
    labels = {"t": tuple(f"$class {i}" for i in range(12)), "u": tuple("abcdefghijkl")}
    timeline_png(tmp_path / "x.png", str(tmp_path / "x.mp4"), 10**6, spans, {"t": scores, "u": scores}, labels)
    with Image.open(tmp_path / "x.png") as image:
        picture = np.asarray(image.convert("RGB")).astype(int)
    for colour, half in (((0, 114, 178), slice(0, 0.5)), ((230, 159, 0), slice(0.5, 1))):
        band = (np.abs(picture - colour).sum(axis=2) < 6).sum(axis=0)  # rows of that colour in each column
        columns = np.flatnonzero(band > 20)
        assert len(columns) > 0.35 * picture.shape[1]
        assert half.start * picture.shape[1] - 40 < columns.min() and columns.max() < half.stop * picture.shape[1] + 60
