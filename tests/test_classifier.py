"""`vidjoint.load`: logits, features and labels of a saved model are those of its parameters, whatever the batching."""

import jax
import numpy as np
import pytest

import vidjoint
from tests import tiny
from vidjoint.classifier import Classifier, parse_step
from vidjoint.data.examples import ClipSpec, views
from vidjoint.data.prediction import Piece, Window
from vidjoint.errors import UserError


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return tiny.make_run(tmp_path_factory)


@pytest.fixture(scope="module")
def model(run):
    return vidjoint.load(run)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def files_of(run):
    return sorted((run / "data" / "clips").glob("*.mp4"))


def test_labels_and_step(run, model):
    assert model.labels == {"clips": tiny.CLIPS, "stills": tiny.STILLS}
    assert model.step == 20 and vidjoint.load(run, 10).step == 10 and vidjoint.load(str(run), "best").step == 10
    assert (vidjoint.load(run, 10).params["heads"]["clips"]["kernel"] != model.params["heads"]["clips"]["kernel"]).any()


@pytest.mark.parametrize("shape, task", [((2, 7, 8, 40, 3), "clips"), ((3, 1, 16, 16, 3), "stills")])
def test_logits_and_features_of_any_clip_that_the_patch_divides(model, shape, task):
    pixels = noise(*shape)
    features, logits, head = model.embed(pixels), model.logits(pixels, task), model.params["heads"][task]
    assert features.shape == (shape[0], 16) and features.dtype == np.float32
    assert logits.shape == (shape[0], len(model.labels[task])) and logits.dtype == np.float32
    np.testing.assert_allclose(logits, features @ np.asarray(head["kernel"]) + np.asarray(head["bias"]), atol=1e-5)


def test_pixels_that_are_no_pixels_are_refused(model):
    for pixels in (noise(4, 16, 16, 3), noise(1, 4, 3, 16, 16), noise(1, 4, 16, 16, 3) / np.float32(255)):
        with pytest.raises(ValueError, match=r"uint8\[B, T, H, W, 3\]"):
            model.logits(pixels, "clips")
    with pytest.raises(ValueError, match="patches of 8"):
        model.embed(noise(1, 1, 12, 16, 3))


def expected_views(model, file, size=(16, 24)):
    """Softmax and logits of each of the 2 x 3 views of a clip by itself: float32[6, C]."""
    spec = ClipSpec(model.config.tasks.clips, 4, size, 10**6)
    logits = model.logits(views({"video": str(file)}, spec, 2, 3), "clips")
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True), logits


def scores_by_class(answer, labels):
    return np.array([answer["scores"][answer["labels"].index(label)] for label in labels])


@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_predictions_are_averages_over_the_views(run, model, average):
    other = model
    if average == "logits":
        text = (run / "config.json").read_text()
        (run / "config.json").write_text(text.replace('"softmax"', '"logits"'))
        other = vidjoint.load(run)
        (run / "config.json").write_text(text)
        assert other.config.eval.average == "logits"
    files = files_of(run)[:4]
    means = []
    for file, answer in zip(files, other.predict(files, "clips", topk=99), strict=True):
        softmax, logits = expected_views(model, file)
        odds = np.exp(logits.mean(axis=0))
        means.append(softmax.mean(axis=0) if average == "softmax" else odds / odds.sum())
        assert answer["path"] == str(file) and answer["task"] == "clips" and list(answer) == ["path", "task", "labels", "scores"]
        assert answer["scores"] == sorted(answer["scores"], reverse=True)
        np.testing.assert_allclose([answer["scores"][answer["labels"].index(label)] for label in tiny.CLIPS], means[-1], atol=2e-6)
    assert np.ptp(means, axis=0).max() > 0.01  # the model does tell clips apart


def test_batching_changes_nothing(run, model):
    answers = {}
    for size in (1, 100, 4):  # leaves it at 4
        model.config.eval.batch_size = size
        answers[size] = model.predict(files_of(run)[:7])
        for answer, other in zip(answers[size], answers[1], strict=True):
            assert answer["labels"] == other["labels"]
            np.testing.assert_allclose(answer["scores"], other["scores"], atol=2e-6)


@pytest.fixture
def batches(model, monkeypatch):
    """Sizes of the batches that go to the device."""
    sizes, original = [], model._scores
    monkeypatch.setattr(model, "_scores", lambda params, pixels, tasks: sizes.append(len(pixels)) or original(params, pixels, tasks))
    return sizes


def test_clips_share_batches_of_few_sizes(run, model, batches):
    model.predict(files_of(run))  # 11 clips
    model.predict(files_of(run)[:1])
    assert batches == [4, 4, 4, 1]


def test_large_clips_go_in_smaller_batches(run, model, batches, monkeypatch):
    monkeypatch.setattr("vidjoint.classifier.MAX_BATCH_BYTES", 6 * 4 * 16 * 24 * 3 + 1)
    model.predict(files_of(run)[:3])
    assert batches == [1, 1, 1]


def test_images_and_videos_mixed_keep_their_order(run, model, tmp_path):
    clips = files_of(run)[:4]
    stills = sorted((run / "data" / "stills" / "val").rglob("*.png"))[:4]
    mixed = [path for pair in zip(clips, stills, strict=True) for path in pair]
    answers = model.predict([*mixed, tmp_path / "absent.mp4"], "clips", topk=1)
    assert [answer["path"] for answer in answers] == [*map(str, mixed), str(tmp_path / "absent.mp4")]
    assert answers[-1] == {"path": str(tmp_path / "absent.mp4"), "error": "No such file or directory"}
    separate = {answer["path"]: answer for answer in model.predict(clips, "clips", topk=1) + model.predict(stills, "clips", topk=1)}
    for answer in answers[:-1]:
        assert answer["labels"] == separate[answer["path"]]["labels"]
        np.testing.assert_allclose(answer["scores"], separate[answer["path"]]["scores"], atol=2e-6)


def test_each_file_has_the_tasks_of_its_kind(run, model):
    clip, still = files_of(run)[0], next((run / "data" / "stills" / "val").rglob("*.png"))
    assert [(a["path"], a["task"]) for a in model.predict([clip, still])] == [(str(clip), "clips"), (str(still), "stills")]
    both = model.predict([clip, still], ["stills", "clips"], topk=99)
    assert [(a["path"], a["task"]) for a in both] == [(str(path), task) for path in (clip, still) for task in ("stills", "clips")]
    assert [a["task"] for a in model.predict(clip, "all")] == ["clips", "stills"]
    for answer in both:  # the same whether tasks are asked for together or not
        (alone,) = model.predict(answer["path"], answer["task"], topk=99)
        assert alone["labels"] == answer["labels"]
        np.testing.assert_allclose(alone["scores"], answer["scores"], atol=2e-6)
    assert model.tasks_for("x.gif") == ("clips",) and model.tasks_for("x") == ("clips",) and model.tasks_for("x.JPG") == ("stills",)


def test_tasks_that_cut_clips_alike_share_them(model):
    config = model.config.copy_and_resolve_references()
    other = Classifier.__new__(Classifier)
    other.config, other._kinds_of = config, {}
    with config.unlocked(), config.tasks.unlocked():
        config.tasks.more = config.tasks.clips.copy_and_resolve_references()
        config.tasks.other = config.tasks.clips.copy_and_resolve_references()
        config.tasks.other.sampler = "uniform"
    kinds = other._kinds(("clips", "more", "other", "stills"))
    assert [kind.tasks for kind in kinds] == [("clips", "more"), ("other",), ("stills",)]


def test_pixels_and_files_are_taken_alike(run, model):
    pixels = noise(5, 4, 16, 24, 3)
    answers = model.predict(pixels, "clips", topk=99)
    odds = np.exp(model.logits(pixels, "clips"))
    for answer, row in zip(answers, odds / odds.sum(axis=1, keepdims=True), strict=True):
        assert list(answer) == ["task", "labels", "scores"]
        np.testing.assert_allclose(scores_by_class(answer, tiny.CLIPS), row, atol=2e-6)
    files = files_of(run)[:3]
    features = model.embed(files)
    assert features.shape == (3, 16) and features.dtype == np.float32
    spec = ClipSpec(model.config.tasks.clips, 4, (16, 24), 10**6)
    np.testing.assert_allclose(features[1], model.embed(views({"video": str(files[1])}, spec, 2, 3)).mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(model.embed(files[1]), features[1:2], atol=1e-5)
    with pytest.raises(UserError, match=r"none\.mp4: No such file"):
        model.embed([files[0], "none.mp4"])


def test_windows_are_answered_one_by_one(run, model):
    path = str(files_of(run)[0])
    whole, first, second = model.iter_predict([Piece((Window(path),)), Piece((Window(path, 0.0, 0.5), Window(path, 0.5, 1.0)))], "clips")
    assert "start" not in whole and (second["start"], second["end"]) == (0.5, 1.0)
    assert list(first) == ["path", "start", "end", "task", "labels", "scores"] and first["scores"] != second["scores"]


def test_answers_stream(run, model):
    """Memory does not grow with the number of files: they are asked for as answers are taken."""
    path, drawn = str(files_of(run)[0]), []

    def endless():
        while True:
            drawn.append(path)
            yield Piece((Window(path),))

    answers = model.iter_predict(endless(), "clips")
    for i in range(40):
        assert next(answers)["path"] == path
        assert len(drawn) <= i + 30
    answers.close()


def test_a_model_that_has_diverged_says_so(run, model, monkeypatch):
    monkeypatch.setattr(model, "params", jax.tree.map(lambda x: np.full_like(x, np.nan), model.params))
    (answer,) = model.predict(files_of(run)[0])
    assert set(answer) == {"path", "error"} and "not a number" in answer["error"]


def test_the_task_may_be_left_out_where_it_is_clear(run, model):
    assert model.choose_task("stills") == "stills" and model.choose_task() == "clips"  # the only one of videos
    two = Classifier.__new__(Classifier)
    two.config, two.labels = model.config.copy_and_resolve_references(), model.labels
    two.config.tasks.stills.media = "video"
    with pytest.raises(UserError, match="several tasks could be meant: task must be one of clips, stills"):
        two.choose_task()
    with pytest.raises(UserError, match="there is no task 'cups': task must be one of clips, stills"):
        model.choose_task("cups")
    two.labels = {"stills": tiny.STILLS}
    assert two.choose_task() == "stills"


def test_errors_of_the_user(run, tmp_path):
    with pytest.raises(UserError, match=r"holds neither a run \(config\.json"):
        vidjoint.load(tmp_path)
    with pytest.raises(UserError, match="no checkpoint of step 7; there are 10, 20"):
        vidjoint.load(run, 7)
    with pytest.raises(UserError, match="batch_size"):
        vidjoint.load(run, batch_size=0)
    assert (parse_step(None), parse_step("best"), parse_step("30")) == (None, "best", 30)
    for text in ("-3", "last", "1e3"):
        with pytest.raises(UserError, match="--step"):
            parse_step(text)
