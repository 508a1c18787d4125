import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from vidjoint.metrics import (
    MetricsWriter,
    Summary,
    average_precision,
    best_label,
    calibration,
    count_confusion,
    mean_per_class,
    per_class,
    positives,
    read_events,
    topk_correct,
    write_average_precision_csv,
    write_confusion_csv,
    write_per_class_csv,
)

# Counting


def test_topk_against_sorting():
    rng = np.random.default_rng(0)
    scores, label = rng.normal(size=(50, 9)).astype(np.float32), rng.integers(0, 9, 50)
    for k in (1, 2, 5, 9, 12):
        best = np.argsort(-scores, axis=1)[:, :k]
        np.testing.assert_array_equal(topk_correct(scores, label, k), (best == label[:, None]).any(axis=1))
    assert topk_correct(scores, label, 9).all() and not topk_correct(scores, label, 1).all()


def test_topk_of_ties_and_nan():
    np.testing.assert_array_equal(topk_correct(np.zeros((3, 3)), [0, 1, 2], 1), [True, False, False])  # a constant output is right once, not always
    np.testing.assert_array_equal(topk_correct(np.zeros((3, 3)), [0, 1, 2], 2), [True, True, False])
    np.testing.assert_array_equal(topk_correct([[np.nan, 0.0], [1.0, np.nan], [1.0, 0.0]], [0, 0, 0], 5), [False, False, True])
    assert topk_correct(np.zeros((0, 3)), np.zeros(0, int), 1).shape == (0,)
    for label in (-1, 2):
        with pytest.raises(ValueError, match=r"outside 0\.\.1"):
            topk_correct(np.zeros((1, 2)), [label], 1)


def test_topk_takes_device_arrays():
    scores = jnp.asarray([[0.0, 1.0], [2.0, 1.0]], jnp.bfloat16)
    np.testing.assert_array_equal(topk_correct(scores, jnp.int32([1, 1]), 1), [True, False])


def precision_oracle(scores: list[float], positive) -> float:
    """Mean over the positive examples of the share of positives among the examples with no lower score."""
    if not any(positive):
        return np.nan
    precisions = []
    for own in (score for score, hit in zip(scores, positive, strict=True) if hit):
        down_to = [hit for score, hit in zip(scores, positive, strict=True) if score >= own]
        precisions.append(sum(down_to) / len(down_to))
    return sum(precisions) / len(precisions)


def test_average_precision():
    rng = np.random.default_rng(2)
    scores, positive = rng.normal(size=(40, 6)).astype(np.float32), rng.random((40, 6)) < 0.3
    positive[:, 4], positive[:, 5] = False, True
    tied = np.round(scores, 0)
    for given in (scores, tied):
        expected = [precision_oracle(given[:, c].tolist(), positive[:, c]) for c in range(6)]
        np.testing.assert_allclose(average_precision(given, positive), expected, atol=1e-12)
    assert np.isnan(expected[4]) and expected[5] == 1
    np.testing.assert_allclose(average_precision([[0.9], [0.8], [0.7], [0.1]], np.array([[True], [False], [True], [False]])), [(1 + 2 / 3) / 2])
    metrics = pytest.importorskip("sklearn.metrics")
    for c in (0, 1, 2, 3, 5):
        for given in (scores, tied):
            assert average_precision(given, positive)[c] == pytest.approx(metrics.average_precision_score(positive[:, c], given[:, c]), abs=1e-9)


def test_average_precision_of_what_is_no_number():
    positive = np.array([[True, True], [False, True], [True, False]])
    scores = np.array([[np.nan, np.nan], [2.0, np.nan], [1.0, np.nan]])
    np.testing.assert_allclose(average_precision(scores, positive), [(1 / 2 + 0) / 2, 0])
    assert np.isnan(average_precision(np.zeros((0, 3)), np.zeros((0, 3), bool))).all()


def test_any_of_several_labels_counts():
    scores = np.array([[0.1, 0.9, 0.5, 0.0], [0.4, 0.1, 0.4, 0.2], [0.1, 0.2, 0.3, 0.4], [np.nan, 1, 0, 0]])
    positive = positives(np.array([[0, 2, -1], [2, 0, 3], [-1, -1, -1], [1, -1, 0]]), 4)
    np.testing.assert_array_equal(positive, [[1, 0, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    best = best_label(scores, positive)
    assert best[:2].tolist() == [2, 0]  # of equal scores the lower class, as in the ranking
    assert topk_correct(scores, best, 1).tolist()[:2] == [False, True] and topk_correct(scores, best, 2).tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match=r"outside 0\.\.3"):
        positives(np.array([[4]]), 4)


def test_table_of_average_precision(tmp_path):
    positive = np.array([[True, False, True], [True, False, False]])
    write_average_precision_csv(tmp_path / "classes.csv", np.array([1, np.nan, 1 / 3]), positive, ["a, b", "x", "größer"])
    with open(tmp_path / "classes.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["class", "label", "examples", "average_precision"],
            ["0", "a, b", "2", "1.0"],
            ["1", "x", "0", ""],
            ["2", "größer", "1", "0.333333"],
        ]


def test_confusion_adds_up_over_batches():
    rng = np.random.default_rng(1)
    label, prediction = rng.integers(0, 4, 100), rng.integers(0, 4, 100)
    matrix = np.zeros((4, 4), np.int64)
    for start in range(0, 100, 30):
        count_confusion(matrix, label[start : start + 30], prediction[start : start + 30])
    expected = [[int(((label == row) & (prediction == column)).sum()) for column in range(4)] for row in range(4)]
    np.testing.assert_array_equal(matrix, expected)
    with pytest.raises(ValueError, match="prediction outside"):
        count_confusion(matrix, [0], [-1])
    assert matrix.sum() == 100


def test_per_class_and_csv(tmp_path):
    matrix, labels = np.array([[3, 1, 0], [0, 0, 0], [0, 2, 4]]), ["left, up", "x", "größer"]
    rows = per_class(matrix, labels)
    assert [(row["examples"], row["correct"], row["top1"], row["taken_for"], row["taken_for_examples"]) for row in rows] == [
        (4, 3, 0.75, "x", 1),
        (0, 0, None, "", 0),
        (6, 4, 4 / 6, "x", 2),
    ]
    write_per_class_csv(tmp_path / "classes.csv", matrix, labels)
    with open(tmp_path / "classes.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["class", "label", "examples", "correct", "top1", "taken_for", "taken_for_examples"]
    assert list(table[0].values()) == ["0", "left, up", "4", "3", "0.75", "x", "1"]
    assert table[1]["top1"] == "" and table[2]["top1"] == "0.666667" and table[2]["label"] == "größer"

    write_confusion_csv(tmp_path / "confusion.csv", matrix, labels)
    with open(tmp_path / "confusion.csv", encoding="utf-8", newline="") as file:
        header, *body = csv.reader(file)
    assert header[1:] == labels and [row[0] for row in body] == labels
    np.testing.assert_array_equal([[int(cell) for cell in row[1:]] for row in body], matrix)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["classes.csv", "confusion.csv"]


def expected_ece(confidence, correct, bins):
    """One bin at a time, as the paper writes it."""
    total = 0.0
    for b in range(1, bins + 1):
        inside = [i for i, p in enumerate(confidence) if (b - 1) / bins < p <= b / bins]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - sum(confidence[i] for i in inside) / len(inside))
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration(bins):
    rng = np.random.default_rng(bins)
    confidence = rng.uniform(0.01, 1, 500)
    confidence[:3] = 1.0, 1 / 15, 0.1  # ends of bins
    correct = rng.random(500) < confidence**2
    result = calibration(confidence, correct, bins)
    assert result["ece"] == pytest.approx(expected_ece(confidence, correct, bins), abs=1e-12)
    assert sum(bar["examples"] for bar in result["bins"]) == 500 and len(result["bins"]) == bins
    assert all(bar["from"] < bar["confidence"] <= bar["to"] and 0 <= bar["accuracy"] <= 1 for bar in result["bins"])
    json.dumps(result, allow_nan=False)


def test_calibration_of_the_sure_the_right_and_the_unknown():
    assert calibration([1.0, 1.0, 0.0], [True, True, False])["ece"] == 0
    assert calibration([0.9] * 10, [True] * 9 + [False])["ece"] == pytest.approx(0)
    assert calibration([1.0] * 4, [True, False, False, False])["ece"] == pytest.approx(0.75)
    assert calibration([np.nan, 0.5], [False, True])["ece"] == pytest.approx(0.5)
    assert calibration([], []) == {"ece": None, "bins": []}


def test_mean_over_the_classes():
    assert mean_per_class(per_class(np.array([[3, 1, 0], [0, 0, 0], [0, 2, 4]]), "abc")) == pytest.approx((3 / 4 + 4 / 6) / 2)
    assert mean_per_class(per_class(np.zeros((2, 2), int), "ab")) is None


# The training log


def test_summary_weighs_by_examples():
    summary = Summary()
    none = (jnp.float32(0), jnp.float32(0))
    summary.add({"train/a/loss": (jnp.float32(6), jnp.float32(3)), "train/b/loss": none, "lr": 0.1})
    summary.add({"train/a/loss": (jnp.float32(1), jnp.float32(1)), "train/b/loss": none, "lr": 0.3, "once": jnp.float32(5)})
    assert list(summary.take().items()) == [("lr", pytest.approx(0.2)), ("once", 5.0), ("train/a/loss", 7 / 4)]
    assert summary.take() == {}


def test_summary_fetches_only_when_taken():
    fetched = []

    class OnDevice:
        def __array__(self, dtype=None, copy=None):
            fetched.append(self)
            return np.array(3, dtype)

    summary = Summary()
    for _ in range(3):
        summary.add({"loss": (OnDevice(), 2)})
    assert not fetched
    assert summary.take() == {"loss": 1.5} and len(fetched) == 3


def test_lines_of_the_log(tmp_path):
    with MetricsWriter(tmp_path / "new" / "run") as writer:
        values = {"train/loss": jnp.float32(1.23456789), "n": np.int64(7), "train/lr": 1e-5 / 3, "val/digits/top1": np.float64(0.5), "bad": np.nan}
        writer.write(10, values)
        writer.write(np.int32(20), {"huge": float("inf"), "note": "größer", "none": None})
        text = (tmp_path / "new" / "run" / "metrics.jsonl").read_text(encoding="utf-8")  # already there before the writer is closed
    first, second = text.splitlines()
    assert first == '{"step": 10, "train/loss": 1.23457, "n": 7, "train/lr": 3.33333e-06, "val/digits/top1": 0.5, "bad": null}'
    assert json.loads(second) == {"step": 20, "huge": None, "note": "größer", "none": None}
    assert read_events(tmp_path / "new" / "run" / "metrics.jsonl") == [json.loads(first), json.loads(second)]


def write_run(workdir, first, last, resume_step):
    with MetricsWriter(workdir, resume_step) as writer:
        for step in range(first, last + 1):
            writer.write(step, {"train/loss": 1 / step})
            if step % 2 == 0:
                writer.write(step, {"val/a/top1": step / 100})


@pytest.mark.parametrize("torn", [b"", b'{"step": 8, "train', b'{"step": 3}', b"\xff\x00"])
def test_an_interrupted_log_equals_an_uninterrupted_one(tmp_path, torn):
    write_run(tmp_path / "whole", 1, 9, 0)
    write_run(tmp_path / "broken", 1, 7, 0)
    with (tmp_path / "broken" / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    write_run(tmp_path / "broken", 5, 9, 4)  # its newest checkpoint was that of step 4
    assert (tmp_path / "broken" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert {file.name for file in (tmp_path / "broken").iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_without_resume_step_only_a_torn_line_goes(tmp_path):
    write_run(tmp_path, 1, 3, None)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "tr')
    write_run(tmp_path, 9, 9, None)
    assert [event["step"] for event in read_events(tmp_path / "metrics.jsonl")] == [1, 2, 2, 3, 9]


def test_readers_pass_over_a_torn_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "a": 2}\n[3]\n{"step": 2, "a')
    assert read_events(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 2}]


def test_tensorboard_events(tmp_path):
    write_run(tmp_path, 1, 2, 0)
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:  # TFRecord: length (8 bytes), its checksum (4), content, its checksum (4)
        length = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    scalars = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert scalars == [(1, "train/loss", 1.0), (2, "train/loss", 0.5), (2, "val/a/top1", pytest.approx(0.02))]
    assert [event.step for event in events if event.session_log.status == event.session_log.START] == [1]  # what came from step 1 on is hidden
