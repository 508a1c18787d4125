import warnings

import numpy as np
import pytest
from PIL import Image

from vidjoint.reporting.plots import confusion_png, learning_curves_png


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def test_rows_are_normalised(tmp_path):
    confusion_png(tmp_path / "few.png", np.array([[1, 1], [0, 2]]), ["a", "b"])
    confusion_png(tmp_path / "many.png", np.array([[50, 50], [0, 2]]), ["a", "b"])
    few, many = pixels(tmp_path / "few.png"), pixels(tmp_path / "many.png")
    height = min(len(few), len(many)) // 2
    np.testing.assert_array_equal(few[:height, -400:], many[:height, -400:])  # all but the counts at the left


def test_size_follows_the_number_of_classes(tmp_path):
    """Cells and names stay readable: small pictures for few classes, whole pixels per class for many, and never a huge picture."""
    for classes, at_least, at_most in ((2, 300, 900), (20, 1350, 2200), (400, 1200, 1600)):
        matrix = np.eye(classes, dtype=np.int64)
        confusion_png(tmp_path / "c.png", matrix, [f"class {i}" for i in range(classes)], title="a title")
        height, width, _ = pixels(tmp_path / "c.png").shape
        assert at_least <= height <= at_most and at_least <= width <= at_most


def test_every_cell_of_400_classes_can_be_seen(tmp_path):
    matrix = np.zeros((400, 400), np.int64)
    matrix[:, 0] = 50
    confusion_png(tmp_path / "before.png", matrix, range(400))
    matrix[100, 300] = 1
    confusion_png(tmp_path / "after.png", matrix, range(400))
    changed = np.abs(pixels(tmp_path / "after.png") - pixels(tmp_path / "before.png")).sum(axis=2)
    rows, columns = np.nonzero(changed[:, changed.shape[1] // 2 :])
    assert len(rows) == 9 and np.ptp(rows) == np.ptp(columns) == 2  # one cell of 3 x 3 pixels
    assert changed[:, changed.shape[1] // 2 :].max() > 60  # 2 % of a row stand out


def test_a_class_without_examples_is_grey(tmp_path):
    confusion_png(tmp_path / "c.png", np.array([[2, 0], [0, 0]]), ["a", "b"])
    assert (pixels(tmp_path / "c.png") == 204).all(axis=2).mean() > 0.15
    confusion_png(tmp_path / "c.png", np.array([[2, 0], [0, 2]]), ["a", "b"])
    assert (pixels(tmp_path / "c.png") == 204).all(axis=2).mean() < 0.01


def test_any_class_name_can_be_drawn(tmp_path):
    names = ["$x_{", "挥手", "a" * 300, "line\nbreak", r"\frac", ""]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        confusion_png(tmp_path / "c.png", np.eye(6, dtype=int), names, title="$100 {")
        learning_curves_png(tmp_path / "l.png", [{"step": 1, f"train/{name}/loss": 1.0} for name in names if name])
    assert max(pixels(tmp_path / "c.png").shape) < 1500
    assert [file.suffix for file in tmp_path.iterdir()] == [".png", ".png"]


@pytest.mark.parametrize(
    "events",
    [
        [],
        [{"step": 1, "train/loss": None}],
        [{"step": 1, "train/loss": 2.0, "train/a/loss": 2.0}],
        [{"step": 1, "train/lr": 0.1, "val/a/top1": 0.5}],
        [{"step": 1, "val/a/top1": 0.5, "val/b/top1": 0.9, "val/b/map": 0.1}],
    ],
)
def test_short_logs_can_be_drawn(tmp_path, events):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learning_curves_png(tmp_path / "l.png", events)
    assert pixels(tmp_path / "l.png").shape[1] > 1000


def test_curves_of_each_task(tmp_path):
    events = [{"step": s, "train/loss": 3 / s, "train/a/loss": 1 / s, "train/b/loss": 2 / s, "val/a/top1": 1 - 1 / s} for s in range(1, 40)]
    learning_curves_png(tmp_path / "l.png", events)
    picture = pixels(tmp_path / "l.png")
    middle = picture.shape[1] // 2
    blue, orange = (31, 119, 180), (255, 127, 14)  # colours of the first and second task
    drawn = [[(half == colour).all(axis=2).sum() for colour in (blue, orange)] for half in (picture[:600, :middle], picture[:600, middle:])]
    (loss_a, loss_b), (top1_a, top1_b) = drawn
    assert loss_a > 100 and loss_b > 100 and top1_a > 100 and top1_b == 0


def test_curves_of_multilabel_tasks_are_their_map(tmp_path):
    events = [{"step": s, "val/a/top1": 0.9, "val/a/map": 0.2} for s in (1, 2, 3)]
    learning_curves_png(tmp_path / "map.png", events)
    learning_curves_png(tmp_path / "other.png", [event | {"val/a/top1": 0.5} for event in events])
    np.testing.assert_array_equal(pixels(tmp_path / "map.png"), pixels(tmp_path / "other.png"))
    learning_curves_png(tmp_path / "other.png", [event | {"val/a/map": 0.5} for event in events])
    assert (pixels(tmp_path / "map.png") != pixels(tmp_path / "other.png")).any()
