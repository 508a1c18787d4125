"""Probes: against plain NumPy, by what they must and must not see, and from the command line, where training shows in the features."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from tests import tiny
from vidjoint import probe, sharding
from vidjoint.checkpoints import Checkpoints
from vidjoint.config import base_config, task_config
from vidjoint.data.examples import views
from vidjoint.data.tasks import open_tasks
from vidjoint.losses import cross_entropy
from vidjoint.models.build import build
from vidjoint.probes import attentive, knn, linear
from vidjoint.probes.features import Backbone, hold_out, labels_of, pick
from vidjoint.probes.study import wilson
from vidjoint.run_folder import RunFolder
from vidjoint.sharding import make_mesh

RNG = np.random.default_rng(0)
ORIENTATIONS, SIDE = 6, 16  # of the pictures that the command is tried on


# k nearest neighbours


@pytest.mark.parametrize("block", [(3, 4), (100, 100)])
def test_nearest_neighbours_are_those_of_a_full_search(block):
    queries, bank = RNG.normal(size=(7, 5)).astype(np.float32), RNG.normal(size=(18, 5)).astype(np.float32)
    bank[11] = 2 * bank[2]  # the same direction: the first one comes first
    bank[17] = 0  # a vector without direction is like none
    similarity, index = knn.nearest(queries, bank, 6, block)
    norms = np.maximum(np.linalg.norm(bank, axis=1), 1e-12) * np.linalg.norm(queries, axis=1)[:, None]
    cosine = np.round(queries @ bank.T / norms, 5)
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :6]
    np.testing.assert_array_equal(index, order)
    np.testing.assert_allclose(similarity, np.take_along_axis(cosine, order, axis=1), atol=2e-5)


def test_votes_are_weighted_by_similarity():
    similarity, index = np.array([[0.9, 0.83, 0.2], [0.5, 0.5, 0.5]], np.float32), np.array([[3, 0, 1], [0, 1, 2]])
    label = np.array([2, 0, 0, 1])
    expected = np.zeros((2, 4))
    for q in range(2):
        weights = [np.exp(s / 0.07) for s in similarity[q]]
        for i, weight in zip(index[q], weights, strict=True):
            expected[q, label[i]] += weight / sum(weights)
    np.testing.assert_allclose(knn.vote(similarity, index, label, 4), expected, atol=1e-6)
    assert expected[0].argmax() == 1 and expected[1].argmax() == 0  # the nearest alone; two of three
    several = np.array([[2, 0], [0, -1], [-1, -1], [1, 2]])
    scores = knn.vote(similarity, index, several, 3)
    np.testing.assert_allclose(scores[1], [2 / 3, 0, 1 / 3], atol=1e-6)


# Linear


def objective(model, x, label, l2):
    """Mean loss and penalty, for features of mean 0 and variance 1."""
    logits = jnp.asarray(x) @ model.weights + model.bias
    return cross_entropy(logits, jnp.asarray(label)).mean() + l2 / 2 * (model.weights**2).sum()


@pytest.mark.parametrize("classes", [2, 4])
def test_linear_is_the_minimum_of_its_objective_whatever_the_scale_of_the_features(classes):
    label = RNG.integers(0, classes, 200).astype(np.int32)
    x = RNG.normal(size=(200, 6)).astype(np.float32)
    x[:, 0] += label
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    found = list(linear.fit(x, label, classes, (1.0, 0.1)))
    for model, l2 in zip(found, (1.0, 0.1), strict=True):
        best = float(objective(model, x, label, l2 if classes > 2 else l2 * 2))  # scikit-learn's two classes have one logit, the difference
        for change in (RNG.normal(size=(6, classes)) for _ in range(20)):
            other = dataclasses.replace(model, weights=model.weights + 1e-2 * change.astype(np.float32))
            if classes > 2:
                assert float(objective(other, x, label, l2)) > best
    scaled = next(linear.fit(5 + 100 * x, label, classes, (0.1,)))
    np.testing.assert_allclose(scaled.scores(5 + 100 * x), found[1].scores(x), atol=0.02)
    assert np.abs(found[0].weights).sum() < np.abs(found[1].weights).sum()


def test_linear_with_classes_that_never_occur_and_channels_that_never_change():
    x = RNG.normal(size=(40, 3)).astype(np.float32)
    x[:, 1] = 7
    label = np.where(x[:, 0] > 0, 3, 1)
    model = next(linear.fit(x, label, 5, (1e-3,)))
    assert (model.scores(x).argmax(axis=1) == label).mean() > 0.95 and not model.weights[1].any()
    only = next(linear.fit(x, np.full(40, 2), 5, (1e-3,)))
    assert (only.scores(x).argmax(axis=1) == 2).all()


def test_linear_of_several_labels():
    x = RNG.normal(size=(100, 4)).astype(np.float32)
    label = np.where(x[:, :2] > 0, [0, 1], -1).astype(np.int32)  # class 2 never, class 3 always
    label = np.concatenate([label, np.full((100, 1), 3, np.int32)], axis=1)
    model = next(linear.fit(x, label, 4, (1e-2,)))
    answers = model.scores(x) > 0
    assert (answers[:, :2] == (x[:, :2] > 0)).mean() > 0.95 and not answers[:, 2].any() and answers[:, 3].all()


# Attentive


def test_attentive_pooling_equals_projecting_every_token():
    heads, width, classes = 2, 8, 3
    params = jax.jit(attentive.init, static_argnums=(1, 2))(jax.random.key(1), width, classes)
    params = {name: np.asarray(x) + 0.1 * RNG.normal(size=x.shape).astype(np.float32) for name, x in params.items()}
    x = RNG.normal(size=(4, 5, width)).astype(np.float16)

    def norm(z, name):
        z = (z - z.mean()) / np.sqrt(z.var() + 1e-6)
        return z * params[f"{name}_scale"] + params[f"{name}_bias"]

    def gelu(z):
        return z * 0.5 * (1 + np.vectorize(__import__("math").erf)(z / np.sqrt(2)))

    expected = []
    for tokens in x.astype(np.float32):
        query, keys, values = params["query"] @ params["q"], tokens @ params["k"], tokens @ params["v"] + params["v_bias"]
        read = []
        for part in np.split(np.arange(width), heads):
            odds = np.exp(keys[:, part] @ query[part] / np.sqrt(len(part)))
            read.append((odds / odds.sum()) @ values[:, part])
        z = params["query"] + np.concatenate(read) @ params["proj"] + params["proj_bias"]
        z = z + gelu(norm(z, "norm1") @ params["fc1"] + params["fc1_bias"]) @ params["fc2"] + params["fc2_bias"]
        expected.append(norm(z, "norm2") @ params["head"] + params["head_bias"])
    np.testing.assert_allclose(jax.jit(attentive.logits, static_argnums=2)(params, x, heads), expected, atol=1e-5)


def test_attentive_finds_the_token_that_tells_and_never_sees_what_is_held_out(monkeypatch):
    """One token of sixteen, at a place that changes, bears a mark and the class; the held-out labels say something else."""
    monkeypatch.setattr(attentive, "LEAST", 1)
    count, width = 96, 24  # shapes and number of updates as in the tests of the command, for which it is compiled
    label = np.arange(count, dtype=np.int32) % ORIENTATIONS
    x = 0.3 * RNG.normal(size=(count, 16, width)).astype(np.float16)
    place = RNG.integers(0, 16, count)
    x[np.arange(count), place] = 0
    x[np.arange(count), place, 0] = 4
    x[np.arange(count), place, 1 + label] = 4
    held, mesh = np.arange(count) % 5 == 0, make_mesh(base_config().mesh, jax.devices()[:1])

    def trained(label):
        def batches(order):
            for start in range(0, count, 16):
                index = np.arange(start, start + 16)
                yield sharding.put_batch({"x": x[order[index]]}, mesh)["x"], label[order[index]], index, np.ones(16, bool)

        return attentive.train(batches, mesh, held, width, 2, ORIENTATIONS, 16, 10, 0)

    probes = trained(label)
    scores, found = probes.scores([(jnp.asarray(x), label, np.arange(count), np.arange(count) < 90)], slice(None))
    assert scores.shape == (8, 90, 6) and found.shape == (90,)
    assert (scores[-2].argmax(axis=1) == label[:90]).mean() > 0.9
    other = trained(np.where(held, (label + 1) % ORIENTATIONS, label).astype(np.int32))
    for a, b in zip(jax.tree.leaves(probes.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_array_equal(a[:4], b[:4])
    assert np.abs(probes.params["head"][4:] - other.params["head"][4:]).max() > 1e-3


# What is read


def test_held_out_part():
    label = np.repeat([0, 1, 2, 3], [50, 10, 2, 1])
    held = hold_out(label, 3)
    assert np.bincount(label[held], minlength=4).tolist() == [10, 2, 1, 0]
    np.testing.assert_array_equal(held, hold_out(label, 3))
    assert (held != hold_out(label, 4)).any()
    assert hold_out(np.stack([label, np.full(63, -1)], axis=1), 3).tolist() == held.tolist()


def test_wilson_interval():
    for correct, n, low, high in ((0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1), (81, 263, 0.2553, 0.3662)):  # Newcombe 1998
        np.testing.assert_allclose(wilson(correct, n), (low, high), atol=1e-4)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A config of two tasks, noise, and the tasks."""
    folder = tmp_path_factory.mktemp("noise")
    tiny.write_data(folder)
    config = tiny.config_of(folder)
    config.model.mixer = "none"
    return config, open_tasks(config)


def test_every_example_is_read_once_in_order_and_as_mean_of_its_views(noise):
    config, tasks = noise
    model = build(config.model, {"clips": 8, "stills": 10})
    params = jax.jit(model.init)(jax.random.key(0))
    task = tasks["clips"]
    backbone = Backbone(config, model, params, (2, 3), 3)  # 8 devices: 8 at a time
    found = backbone.read(task, task.val, "features", "")
    assert found.x.dtype == np.float32 and found.index.tolist() == list(range(11))
    np.testing.assert_array_equal(found.label, labels_of(task.val))
    clips = np.stack([views(task.val[i], task.clip, 2, 3) for i in range(11)])
    expected = jax.jit(model.features)(params, clips.reshape(-1, *clips.shape[2:])).reshape(11, 6, -1).mean(axis=1)
    np.testing.assert_allclose(found.x, expected, atol=1e-5)

    tokens = backbone.read(task, task.val, "tokens", "")
    assert tokens.x.shape == (11, 6 * 4 * 2 * 3, 16) and tokens.x.dtype == np.float16
    np.testing.assert_allclose(tokens.x.astype(np.float32).var(axis=-1), 1, atol=0.01)
    order = np.array([7, 2, 10])
    x, label, index, mask = next(backbone.batches(task, pick(task.val, order), "tokens"))
    np.testing.assert_array_equal(np.asarray(x)[mask], tokens.x[order])
    assert label[mask].tolist() == found.label[order].tolist() and index[mask].tolist() == [0, 1, 2]


# The command


def gratings(rng, count):
    """Stripes of a random phase and contrast in one of six directions, in noise: uint8[count, 1, 16, 16, 3] and labels."""
    label = np.arange(count, dtype=np.int32) % ORIENTATIONS
    angle = np.pi * label / ORIENTATIONS
    y, x = np.mgrid[:SIDE, :SIDE]
    wave = x * np.cos(angle)[:, None, None] + y * np.sin(angle)[:, None, None]
    picture = np.sin(1.2 * wave + rng.uniform(0, 2 * np.pi, (count, 1, 1))) * rng.uniform(0.5, 1, (count, 1, 1))
    pixels = 128 + 60 * picture + 30 * rng.normal(size=picture.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)[:, None, :, :, None].repeat(3, axis=-1), label


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has learned to tell gratings apart, and the folder of other gratings."""
    folder = tmp_path_factory.mktemp("probe")
    rng = np.random.default_rng(1)
    for split, count in (("train", 96), ("val", 61)):
        pixels, label = gratings(rng, count)
        for i in range(count):
            file = folder / "data" / split / f"turned {30 * label[i]}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i, 0]).save(file)
    (folder / "data" / "val" / "turned 0" / "bad.png").write_bytes(b"no picture")
    config = base_config()
    config.update(total_steps=1, batch_size=16, data_root=str(folder / "data"))
    config.model.update(variant="Ti/4", width=24, depth=1, heads=2, mlp_dim=48, frames=1, image_size=SIDE, dtype="float32", pool="average")
    config.tasks.stripes = task_config(source="folder", media="image", train="train", val="val")
    config.eval.views = "1x1"
    RunFolder(folder / "run").write(config, {"stripes": tuple(f"turned {30 * i}" for i in range(ORIENTATIONS))})
    model, optimizer = build(config.model, {"stripes": ORIENTATIONS}), optax.adam(3e-3)
    pixels, label = map(jnp.asarray, gratings(rng, 1200))

    @jax.jit
    def learned(key):
        def update(carry, rows):
            params, state = carry
            gradients = jax.grad(lambda params: cross_entropy(model.logits(params, pixels[rows])["stripes"], label[rows]).mean())(params)
            updates, state = optimizer.update(gradients, state)
            return (optax.apply_updates(params, updates), state), None

        params = model.init(key)
        rows = jax.random.randint(key, (150, 32), 0, len(pixels))
        return jax.lax.scan(update, (params, optimizer.init(params)), rows)[0][0]

    with Checkpoints(folder / "run", 1) as checkpoints:
        checkpoints.save(1, {"params": learned(jax.random.key(0)), "frozen": {}, "ema": {}}, 0.5)
    return folder / "run"


@pytest.fixture
def command(run, capsys, tmp_path, monkeypatch):
    """Runs the command on one device; returns its exit status, the content of --json, what it printed and its error lines."""
    monkeypatch.setattr(attentive, "LEAST", 1)
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))

    def call(*arguments, workdir=run):
        status = probe.main([f"--workdir={workdir}", "--epochs=10", f"--json={tmp_path / 'out.json'}", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, json.loads((tmp_path / "out.json").read_text()) if status == 0 else None, captured.out, captured.err.splitlines()

    return call


def test_training_shows_in_the_features(command):
    status, trained, shown, _ = command("--kind=linear,knn,attentive")
    assert status == 0
    _, fresh, _, _ = command("--kind=linear,knn,attentive", "--untrained")
    print(shown, *((kind, fresh["probes"][kind]["top1"]) for kind in fresh["probes"]))
    for kind in ("linear", "knn", "attentive"):
        result = trained["probes"][kind]
        assert result["n"] == 61 and result["classes"] == ORIENTATIONS and result["undecodable"] == 1
        assert result["top1"] > 0.8 and result["top1"] > fresh["probes"][kind]["top1"] + 0.05, kind
        low, high = result["top1_interval"]
        assert low < result["top1"] < high or result["top1"] == 1
        assert result["held_out"] == max(row["held_out"] for row in result["tried"]) and result["chosen"].keys() < result["tried"][0].keys()
    assert (trained["task"], trained["train"], trained["val"], trained["step"], trained["untrained"]) == ("stripes", 96, 62, 1, False)
    assert trained["features"] == {"width": 24, "bytes": 4 * 24 * 158}
    assert trained["tokens"] == {"count": 16, "width": 24, "bytes": 2 * 16 * 24 * 158, "kept": True}
    assert "stripes: 96 training and 62 validation examples, 6 classes" in shown.splitlines()
    assert [line.split()[0] for line in shown.splitlines()[-4:]] == ["probe", "linear", "knn", "attentive"]


def test_the_same_again_with_tokens_made_in_each_epoch_and_features_kept(command, tmp_path):
    kinds = "--kind=attentive,linear"
    _, first, _, _ = command(kinds, f"--features={tmp_path / 'f.npz'}")
    _, again, shown, _ = command(kinds, "--memory=0.00002", f"--features={tmp_path / 'f.npz'}")
    assert not again["tokens"]["kept"] and "runs in every epoch" in shown
    assert again["probes"] == first["probes"]
    with np.load(tmp_path / "f.npz", allow_pickle=False) as stored:
        assert stored["train_x"].shape == (96, 24) and stored["val_x"].shape == (61, 24) and stored["val_index"].max() == 61
        assert stored["labels"].tolist() == [f"turned {i}" for i in (0, 120, 150, 30, 60, 90)]
        np.testing.assert_array_equal(np.bincount(stored["val_label"]), [11, 10, 10, 10, 10, 10])
    status, _, _, errors = command(f"--features={tmp_path / 'f.npz'}", "--untrained")
    assert status == 2 and errors == [
        f"error: --features={tmp_path / 'f.npz'} holds features of other weights, data or views: give another name, or remove it"
    ]


def test_kept_features_are_not_those_of_other_labels(noise):
    config, tasks = noise
    model = build(config.model, {"clips": 8, "stills": 10})
    backbone = Backbone(config, model, jax.jit(model.init)(jax.random.key(0)), (1, 1), 8)
    task = tasks["clips"]
    records = copy.copy(task.val.records)
    records.targets = (records.targets + 1) % 8
    corrected = dataclasses.replace(task, val=dataclasses.replace(task.val, records=records))
    renamed = dataclasses.replace(task, val=dataclasses.replace(task.val, labels=task.val.labels[::-1]))
    assert len({backbone.fingerprint(other) for other in (task, corrected, renamed)}) == 3
    assert backbone.fingerprint(task) == backbone.fingerprint(dataclasses.replace(task))


def test_other_data_by_flags_and_by_config(command, run, tmp_path):
    data = run.parent / "data"
    _, own, _, _ = command("--kind=knn")
    _, flags, _, _ = command("--kind=knn", f"--data_root={data}", "--train=train", "--val=val", "--source=folder", "--media=image", "--task=mine")
    assert flags["probes"] == own["probes"] and flags["task"] == "mine"
    (tmp_path / "other.py").write_text(
        "from vidjoint.config import base_config, task_config\n\n\ndef get_config():\n    config = base_config()\n"
        f"    config.data_root = {str(data)!r}\n"
        "    config.tasks.a = task_config(source='folder', media='image', train='train', fold='1/3')\n    return config\n"
    )
    _, content, _, _ = command("--kind=knn", f"--config={tmp_path / 'other.py'}", "--config.tasks.a.fold=1/4")
    assert (content["task"], content["train"], content["val"]) == ("a", 72, 24)


def test_mistakes_are_one_line_each(command, run, tmp_path):
    lonely = tmp_path / "lonely"
    for i in range(2):
        (lonely / str(i)).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(lonely / str(i) / "0.png")
    (tmp_path / "broken.npz").write_text("no features")
    np.save(tmp_path / "array.npy", np.zeros(3))
    cases = {
        ("--kind=nearest",): ["--kind=nearest: choose from linear, knn, attentive, comma-separated"],
        ("--views=3", "--epochs=0"): ["--views=3: write temporal x spatial views", "--epochs=0.0: above 0"],
        ("--taks=x",): ["unknown argument --taks=x: see --help"],
        ("--task=x",): ["has no task 'x': --task must be one of stripes"],
        ("--train=absent", "--source=folder", "--media=image"): ["absent"],
        (f"--data_root={run.parent / 'data'}", "--train=train", "--source=folder", "--media=image"): [
            "probe has no validation split: give --val, or --fold"
        ],
        ("--config=x.py", "--train=y"): ["--config and --train exclude each other"],
        ("--config=x.py",): ["--config=x.py: there is no such file"],
        ("--memory=1e-9",): ["features of 24 numbers take 0.0 MiB, above --memory=1e-09"],
        (f"--features={tmp_path}/absent/f.npz",): ["can't be written: name a file in a folder that exists and is yours"],
        (f"--features={tmp_path}/broken.npz",): ["can't be read"],
        (f"--features={tmp_path}/array.npy",): ["can't be read (it holds a single array): give the name of a new file"],
        (f"--train={lonely}", f"--val={lonely}", "--source=folder", "--media=image"): ["no class has two training examples"],
    }
    for arguments, lines in cases.items():
        status, _, _, errors = command(*arguments)
        assert status == 2, arguments
        assert len(errors) == len(lines), errors
        for error, line in zip(errors, lines, strict=True):
            assert error.startswith("error: ") and line in error, error
