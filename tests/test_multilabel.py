"""Tasks of many labels beside one of a single label, from the list to predictions: batches, loss, gradients, figures, reports and commands."""

import csv
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vidjoint
from tests import tiny
from vidjoint import evaluate, optim, predict
from vidjoint.checkpoints import load_params
from vidjoint.config import base_config, task_config
from vidjoint.data.mixture import Mixture
from vidjoint.data.tasks import open_tasks
from vidjoint.evaluate import Evaluator, TaskResult
from vidjoint.metrics import read_events
from vidjoint.models.build import build
from vidjoint.sharding import make_mesh
from vidjoint.step import init_state, make_train_step
from vidjoint.train import train

TAGS = ("big", "red", "round", "wet")
TRAIN = {"0": "red|big|round", "1": "red", "2": "", "3": "round|big", "4": "wet", "5": "round", "bad": "wet|red"}
VAL = {"1": {1}, "2": set(), "0": {0, 2}}  # as written below
KINDS = ("cat", "dog")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("many")
    for i in range(6):
        tiny.write_clip(root / f"{i}.mp4", i, frames=4)
    (root / "bad.mp4").write_bytes(b"no video")
    (root / "tags.csv").write_text("".join(f"{name}.mp4,{labels}\n" for name, labels in TRAIN.items()))
    (root / "tags_val.csv").write_text("1.mp4,red\n2.mp4,\n0.mp4,big\nbad.mp4,red\n0.mp4,round\n")
    (root / "kinds.csv").write_text("".join(f"{i}.mp4,{KINDS[i % 2]}\n" for i in range(6)))
    return root


def configure(root, **changes):
    config = base_config()
    config.update(total_steps=2, batch_size=6, data_root=str(root), eval_every=1, log_every=1)
    config.model.update(variant="Ti/8", width=16, depth=1, heads=2, mlp_dim=16, frames=2, image_size=16, dtype="float32")
    config.data.update(threads=2, max_bad_share=0.5)
    config.optim.update(name="sgd", lr=0.1, momentum=0.0, schedule="constant")
    config.eval.batch_size = 2
    config.tasks.kinds = task_config(train="kinds.csv", val="kinds.csv", sampler="segments")
    config.tasks.tags = task_config(train="tags.csv", val="tags_val.csv", sampler="segments", multilabel=True)
    config.update_from_flattened_dict(changes)
    return config


def flat(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


# Batches


def test_labels_of_batches_have_one_shape(root):
    config = configure(root)
    tasks = open_tasks(config)
    known = {tuple(example["label"].tolist()) for example in tasks["tags"].train}
    assert known == {(1, 0, 2), (1, -1, -1), (-1, -1, -1), (2, 0, -1), (3, -1, -1), (2, -1, -1), (3, 1, -1)}
    parts = [Mixture(config, tasks, 8, tiny.share(process, 2), row_multiple=8) for process in range(2)]
    seen = set()
    for step in range(8):
        (whole,) = Mixture(config, tasks, 8, row_multiple=8).step(step)
        assert whole["label"].shape == (8, 3) and whole["label"].dtype == np.int32 and whole["mask"].sum() == 6
        for label, task, keep in zip(whole["label"], whole["task"], whole["mask"], strict=True):
            if keep and task == 0:
                assert label[0] in (0, 1) and label[1:].tolist() == [-1, -1]
            elif keep:
                seen.add(tuple(label.tolist()))
        halves = [part.step(step)[0] for part in parts]
        for key in whole:
            np.testing.assert_array_equal(np.concatenate([half[key] for half in halves]), whole[key])
    assert seen == known - {(3, 1, -1)}  # that of the damaged file, which another replaces

    config.schedule = "round_robin"
    turns = [Mixture(config, tasks, 8).step(step)[0] for step in range(2)]
    assert [batch["label"].shape for batch in turns] == [(6,), (6, 3)] and [set(batch["task"]) for batch in turns] == [{0}, {1}]


# The step


CLASSES = {"kinds": 2, "tags": 4}


def make_batch(tasks):
    rng = np.random.default_rng(0)
    label = np.array([[1, -1, -1], [3, 0, -1], [-1, -1, -1], [0, -1, -1], [1, 2, 3], [1, -1, -1]], np.int32)
    return {"pixels": rng.integers(0, 256, (6, 2, 16, 16, 3), np.uint8), "label": label, "task": np.int32(tasks), "mask": np.ones(6, bool)}


def oracle(name, logits, label):
    """The loss of one example, without smoothing for several labels."""
    logits = np.asarray(logits, np.float64)
    if name == "tags":
        share, own = 1 / (1 + np.exp(-logits)), np.isin(np.arange(len(logits)), label)
        return -np.where(own, np.log(share), np.log(1 - share)).mean()
    share = np.exp(logits) / np.exp(logits).sum()
    return -(0.9 * np.log(share[label[0]]) + 0.1 * np.log(share).mean())


@functools.cache
def make_model(root):
    """A model, and its compiled logits."""
    model = build(configure(root).model, CLASSES)
    return model, jax.jit(model.logits)


@functools.cache
def make(root, mixup):
    """The model's state and the compiled step."""
    config = configure(root, **{"loss.mixup": mixup, "loss.label_smoothing": 0.1, "tasks.tags.loss_weight": 3.0})
    model, _ = make_model(root)
    optimizer = optim.make_optimizer(config.optim, lambda step: 0.1)
    params = jax.tree.map(lambda x: np.float32(np.random.default_rng(x.size).normal(0, 0.1, x.shape)), model.abstract())
    return init_state(config, params, optimizer), jax.jit(make_train_step(config, model, optimizer))


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_one_batch_of_both_kinds(root, mixup, monkeypatch):
    partner, own = np.array([3, 2, 4, 5, 1, 0]), np.full(6, 0.3 if mixup else 1.0, np.float32)
    monkeypatch.setattr(vidjoint.step, "mix", lambda key, pixels, *_: (pixels // 2, jnp.asarray(partner), jnp.asarray(own)))  # without random numbers
    state, step = make(root, mixup)
    params, batch = state.params, make_batch([0, 1, 1, 0, 1, 0])
    logits = make_model(root)[1](params, batch["pixels"] // 2 if mixup else batch["pixels"])
    sums = dict.fromkeys(CLASSES, 0.0)
    for row, task in enumerate(batch["task"]):
        name = list(CLASSES)[task]
        both = (oracle(name, logits[name][row], batch["label"][other]) for other in (row, int(partner[row])))
        sums[name] += sum(share * loss for share, loss in zip((own[row], 1 - own[row]), both, strict=True))
    after, metrics = step(state, (batch,))
    for name in CLASSES:
        np.testing.assert_allclose(metrics[f"{name}/loss"], (sums[name], 3), atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (sums["kinds"] + 3 * sums["tags"]) / 3, atol=1e-5)
    assert all((flat(after.params)[f"heads/{name}/kernel"] != flat(params)[f"heads/{name}/kernel"]).any() for name in CLASSES)

    for present, absent in (("kinds", "tags"), ("tags", "kinds")):
        mask = batch["task"] == list(CLASSES).index(present)
        after, metrics = step(state, (batch | {"mask": mask},))
        assert metrics[f"{absent}/loss"] == (0, 0) and metrics[f"{present}/loss"][1] == 3
        changed = {path for path, x in flat(after.params).items() if (x != flat(params)[path]).any()}
        assert f"heads/{present}/kernel" in changed and not any(path.startswith(f"heads/{absent}/") for path in changed)


def test_tasks_in_turn(root):
    """Batches with and without room for several labels; a head changes in its own steps alone."""
    state, step = make(root, 0.0)
    config = configure(root, schedule="round_robin")
    mixture = Mixture(config, open_tasks(config), 2)
    for number, (name, other) in enumerate([("kinds", "tags"), ("tags", "kinds")]):
        before = flat(state.params)
        state, metrics = step(state, mixture.step(number))
        after = flat(state.params)
        assert metrics[f"{name}/loss"][1] == 6 and metrics[f"{other}/loss"] == (0, 0) and np.isfinite(metrics["loss"])
        assert (after[f"heads/{name}/bias"] != before[f"heads/{name}/bias"]).any()
        np.testing.assert_array_equal(after[f"heads/{other}/bias"], before[f"heads/{other}/bias"])


# Evaluation


WEIGHTS = np.random.default_rng(1).normal(0, 0.02, (2, 4)).astype(np.float32)


class Brightness:
    """A model that is compiled at once: logits are a weighted sum of the frames' mean brightness."""

    def logits(self, params, pixels, key=None):
        return {"tags": pixels.astype(jnp.float32).mean(axis=(2, 3, 4)) @ params - 2}


@pytest.mark.parametrize("devices, average", [(1, "softmax"), (8, "logits")])
def test_evaluation_gives_sigmoids_and_all_labels(root, devices, average):
    config = configure(root, **{"eval.average": average})
    tasks = {"tags": open_tasks(config)["tags"]}
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    (result,) = Evaluator(config, Brightness(), tasks, mesh).run(WEIGHTS, (2, 1), reverse=True).values()
    assert [set(label) - {-1} for label in result.label.tolist()] == list(VAL.values()) and result.label.shape == (3, 2)
    assert result.undecodable == 1 and result.labels == TAGS
    logits = []
    for i in range(3):
        clips = vidjoint.data.examples.views(tasks["tags"].val[i], tasks["tags"].clip, 2, 1)
        logits.append(clips.mean(axis=(2, 3, 4)) @ WEIGHTS - 2)
    expected = (1 / (1 + np.exp(-np.array(logits)))).mean(axis=1) if average == "softmax" else np.mean(logits, axis=1)
    np.testing.assert_allclose(result.scores, expected, atol=1e-4)
    assert list(result.summary()) == ["n", "classes", "map", "top1", "top5", "map_reversed", "top1_reversed", "undecodable"]


def test_summary_table_and_reports(tmp_path):
    label = np.array([[0, 2], [-1, -1], [1, -1], [2, -1]])
    scores = np.float32([[0.9, 0.2, 0.8], [0.95, 0.1, 0.2], [0.1, 0.3, 0.9], [0.6, 0.5, 0.4]])
    tags = TaskResult(("a", "b", "c"), label, scores, 1 - scores)
    # a is ranked 1, 0: found at 2 of 2. b: 3, 2: found at 2. c: 2, 0, 3: found at 2 and 3
    expected = [1 / 2, 1 / 2, (1 / 2 + 2 / 3) / 2]
    summary = tags.summary()
    assert {key: summary[key] for key in ("n", "classes", "top5")} == {"n": 4, "classes": 3, "top5": 1.0}
    assert summary["map"] == pytest.approx(np.mean(expected)) and summary["top1"] == pytest.approx(1 / 3)  # of the three that have a label
    assert summary["top1_reversed"] == pytest.approx(1 / 3)
    assert summary["map_reversed"] == pytest.approx(np.mean([1 / 3, 1 / 3, (1 / 2 + 2 / 3) / 2]))

    one = TaskResult(("x", "y"), np.array([1, 1]), np.float32([[0.6, 0.4], [0.1, 0.9]]), None)
    results = {"tags": tags, "one": one}
    assert evaluate.mean_score(results) == pytest.approx((np.mean(expected) + 0.5) / 2)
    events = evaluate.as_events(results)
    assert events["val/tags/map"] == summary["map"] and "val/one/map" not in events and set(events) >= {"val/tags/top1", "val/tags/map_reversed"}
    header, *lines = evaluate.table(evaluate.as_json(results, 3)).splitlines()
    assert header.split()[-5:] == ["top-5", "reversed", "mAP", "mAP", "rev."] and len({len(line) for line in (header, *lines)}) == 1
    assert lines[0].split() == ["tags", "4", "3", "-", "33.3", "%", "100.0", "%", "33.3", "%", "52.8", "%", "41.7", "%"]
    assert lines[1].split()[-4:] == ["%", "-", "-", "-"]

    none = TaskResult(("a", "b"), np.full((2, 1), -1), np.zeros((2, 2), np.float32), None)
    assert none.summary() == {"n": 2, "classes": 2, "map": None, "top1": None, "top5": None} and evaluate.mean_score({"none": none}) is None
    evaluate.write_reports({"tags": tags, "none": none}, tmp_path)
    for name in ("tags", "none"):
        assert [path.name for path in (tmp_path / "eval" / name).iterdir()] == ["per_class.csv"]
    with open(tmp_path / "eval/tags/per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["examples"] for row in rows] == ["1", "1", "2"] and float(rows[2]["average_precision"]) == pytest.approx(expected[2], abs=1e-6)


# A whole run


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    content = train(configure(root, **{"eval.reversed": False}), folder)
    assert content == json.loads((folder / "results.json").read_text())
    return folder


def test_what_a_run_leaves_behind(run, capsys):
    tasks = json.loads((run / "results.json").read_text())["tasks"]
    assert list(tasks["tags"]) == ["n", "classes", "map", "top1", "top5", "undecodable"]
    assert list(tasks["kinds"]) == ["n", "classes", "top1", "top5"]
    assert (tasks["tags"]["n"], tasks["tags"]["classes"]) == (3, 4) and 0 < tasks["tags"]["map"] <= 1
    assert {path.name for path in (run / "eval/tags").iterdir()} == {"per_class.csv"}
    assert all((run / name).exists() for name in ("confusion_kinds.png", "curves.png", "predictions_tags.csv"))
    events = read_events(run / "metrics.jsonl")
    assert events[-1]["val/tags/map"] == pytest.approx(tasks["tags"]["map"], rel=1e-5) and "val/kinds/map" not in events[-1]
    scores = {event["step"]: (event["val/tags/map"] + event["val/kinds/top1"]) / 2 for event in events if "val/tags/map" in event}
    assert scores[load_params(run, "best")[0]] == max(scores.values())


def test_evaluate_and_predict(root, run, tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("1.mp4 1\n2.mp4 \n0.mp4 0|2\n")  # the run's own list, with numbers in place of names
    arguments = [f"--workdir={run}", "--task=tags", f"--data={tmp_path}/mine.csv", f"--root={root}", f"--json={tmp_path}/out.json"]
    assert evaluate.main(arguments) == 0, capsys.readouterr().err
    assert "mAP" in capsys.readouterr().out
    own = json.loads((run / "results.json").read_text())["tasks"]["tags"]
    del own["undecodable"]
    assert json.loads((tmp_path / "out.json").read_text())["tasks"] == {"tags": own}
    (tmp_path / "bad.csv").write_text("1.mp4,red|blue\n0.mp4,4|big\n")
    assert evaluate.main(arguments[:2] + [f"--data={tmp_path}/bad.csv", f"--root={root}"]) == 2
    assert [line.split(": ")[-1][:14] for line in capsys.readouterr().err.splitlines()] == ["class 'blue' i", "class '4' is n"]

    assert predict.main([f"--workdir={run}", "--task=tags", "--topk=3", f"--json={tmp_path}/out.jsonl", f"{root}/0.mp4"]) == 0
    (answer,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    model = vidjoint.load(run)
    task = open_tasks(model.config)["tags"]
    logits = model.logits(vidjoint.data.examples.views(task.train[0], task.clip, 1, 1)[0][None], "tags")[0]
    shares = 1 / (1 + np.exp(-np.float64(logits)))
    order = np.argsort(-shares)[:3]
    assert answer["labels"] == [TAGS[c] for c in order] and answer["scores"] == sorted(answer["scores"], reverse=True)
    np.testing.assert_allclose(answer["scores"], shares[order], atol=1e-5)
