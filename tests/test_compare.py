"""Two runs on the same examples: interval and p value are those of SciPy; examples are matched in any order and folder, or refused."""

import json

import numpy as np
import pytest
from scipy import stats

from vidjoint import compare
from vidjoint.reporting import predictions

CLASSES = ("up", "down", "left, right")


def write(folder, task, predicted, paths=None, labels=None, root="/data"):
    folder.mkdir(exist_ok=True)
    labels = np.arange(len(predicted)) % 3 if labels is None else labels
    paths = [f"{root}/{i % 5}/{i}.mp4" for i in range(len(predicted))] if paths is None else paths
    probabilities = 0.1 + 0.7 * np.eye(3)[predicted]
    predictions.write(predictions.file_of(folder, task), paths, np.asarray(labels), probabilities, CLASSES)


@pytest.fixture
def runs(tmp_path):
    """Two runs of 90 examples: A has 45 right, B 60."""
    rng = np.random.default_rng(0)
    truth = np.arange(90) % 3
    a = np.where(rng.permutation(90) < 45, truth, (truth + 1) % 3)
    b = np.where(rng.permutation(90) < 60, truth, (truth + 2) % 3)
    write(tmp_path / "a", "motion", a)
    write(tmp_path / "b", "motion", b)
    return tmp_path, a == truth, b == truth


def call(capsys, *arguments):
    status = compare.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err.splitlines()


def test_figures_are_those_of_scipy(runs, capsys):
    folder, right_a, right_b = runs
    status, shown, errors = call(capsys, folder / "a", folder / "b", f"--json={folder / 'c.json'}")
    assert status == 0 and not errors
    (name, result) = next(iter(json.loads((folder / "c.json").read_text()).items()))
    assert name == "motion" and result["n"] == 90
    assert (result["top1_a"], result["top1_b"], result["difference"]) == pytest.approx((0.5, 60 / 90, 15 / 90))
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    assert (result["only_a"], result["only_b"]) == (only_a, only_b)
    assert result["p"] == pytest.approx(stats.binomtest(only_a, only_a + only_b).pvalue, rel=1e-12)
    expected = stats.bootstrap((right_b.astype(float) - right_a,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    np.testing.assert_allclose(result["interval"], expected, atol=0.012)  # a step of the difference is 1/90 = 0.011
    assert [row["label"] for row in result["per_class"]] != [] and sum(row["examples"] for row in result["per_class"]) == 90
    for row in result["per_class"]:
        own = np.arange(90) % 3 == CLASSES.index(row["label"])
        assert (row["top1_a"], row["top1_b"]) == (right_a[own].mean(), right_b[own].mean())
    differences = [row["difference"] for row in result["per_class"]]
    assert differences == sorted(differences, reverse=True)
    assert "top-1       A 50.0 %, B 66.7 %" in shown and "+16.7 points" in shown


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (3, 3), (1, 9), (40, 12), (300, 380), (2500, 2300)])
def test_mcnemar(only_a, only_b):
    expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert compare.mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9) == compare.mcnemar(only_b, only_a)


def test_the_interval_is_that_of_resampling_every_example():
    n, only_a, only_b = 400, 30, 60
    change = np.repeat([-1, 1, 0], [only_a, only_b, n - only_a - only_b])
    rng = np.random.default_rng(5)
    means = [change[rng.integers(n, size=n)].mean() for _ in range(4000)]
    np.testing.assert_allclose(compare.bootstrap(only_a, only_b, n), np.percentile(means, [2.5, 97.5]), atol=0.004)
    assert compare.bootstrap(only_a, only_b, n) == compare.bootstrap(only_a, only_b, n)
    assert compare.bootstrap(0, 0, 7) == (0, 0)


def test_a_run_equals_itself_in_another_order_and_folder(tmp_path, capsys):
    predicted = np.arange(30) % 2
    write(tmp_path / "a", "motion", predicted)
    order = np.random.default_rng(1).permutation(30)
    paths = [f"/elsewhere/far/{i % 5}/{i}.mp4" for i in order]
    write(tmp_path / "b", "motion", predicted[order], paths, order % 3)
    status, shown, _ = call(capsys, tmp_path / "a", tmp_path / "b")
    assert status == 0 and "no clear difference" in shown and "only A right 0, only B right 0, McNemar's exact p 1" in shown


def test_what_does_not_match_is_refused_in_one_line(tmp_path, capsys):
    write(tmp_path / "a", "motion", [0, 1, 2])
    for name, kept, labels in (("fewer", [0, 1], None), ("relabelled", [0, 1, 2], [0, 1, 1])):
        write(tmp_path / name, "motion", kept, labels=labels)
        status, shown, errors = call(capsys, tmp_path / "a", tmp_path / name)
        assert status == 2 and not shown and len(errors) == 1 and "motion: the runs were not evaluated on the same examples" in errors[0], errors
    write(tmp_path / "other", "still", [0])
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "predictions_motion.csv").write_text("path,label\n1")
    for arguments, words in (
        (("a", "other"), "there is no task that both have"),
        (("a", "other", "--task=motion"), "has no predictions_motion.csv: python -m vidjoint.evaluate --workdir="),
        (("a", "empty"), "has no predictions of any task"),
        (("a", "absent"), "is no folder"),
        (("a", "damaged"), "it is damaged"),
    ):
        folders = [tmp_path / argument if not argument.startswith("-") else argument for argument in arguments]
        status, shown, errors = call(capsys, *folders)
        assert status == 2 and not shown and len(errors) == 1 and words in errors[0], errors


def test_multilabel_examples_are_right_by_any_of_their_labels(tmp_path, capsys):
    labels = np.array([[0, 1], [2, -1], [-1, -1]])
    write(tmp_path / "a", "tags", [0, 0, 0], labels=labels)
    write(tmp_path / "b", "tags", [1, 2, 1], labels=labels)
    status, shown, _ = call(capsys, tmp_path / "a", tmp_path / "b")
    assert status == 0 and "A 33.3 %, B 66.7 %" in shown and "class" not in shown
