"""The self-contained folder: what a run exports answers like the run, bit for bit, wherever it lies; and what is no good says so in one line."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

import vidjoint
from tests.weights import small
from vidjoint import evaluate, predict
from vidjoint.checkpoints import Checkpoints
from vidjoint.errors import UserError
from vidjoint.run_folder import RunFolder
from vidjoint.train import initial_state, prepare, train
from vidjoint.weights.__main__ import main
from vidjoint.weights.pretrained import flat, open_weights, write_folder
from vidjoint.weights.translate import TASK

LABELS = {"animals": small.CLASSES, "others": ("x", "y")}
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 2, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run with checkpoints of steps 1 (the best) and 2, both with a moving average and a frozen part; its folder and data are gone.

    There remain `newest`, `first` and `best`, exported, the models that the run had at these steps, and its data in `elsewhere`.
    """
    folder = tmp_path_factory.mktemp("world")
    (folder / "data").mkdir()
    data = small.write_data(folder / "data")
    config = small.config_of(data, "video", mixer="divided")
    config.tasks.others = small.task_of(data, train="others.csv", val="others.csv", labels="")
    config.tasks.animals.val = "clips.csv"
    config.optim.update(ema=0.9, freeze=("embed/proj/.*",))
    classes = {task: len(names) for task, names in LABELS.items()}
    RunFolder(folder / "run").write(config, LABELS)
    with Checkpoints(folder / "run", 2) as checkpoints:
        for step, metric in ((1, 0.9), (2, 0.1)):
            params, average = (traverse_util.unflatten_dict(small.random_params(config, classes, 10 * step + i), sep="/") for i in (0, 1))
            frozen = {"embed": {"proj": params["embed"].pop("proj")}}
            del average["embed"]["proj"]
            state = {"step": np.int32(step), "params": params, "frozen": frozen, "ema": average}
            checkpoints.save(step, jax.tree.map(jax.numpy.asarray, state), metric)
    answers = {}
    for name, step in {"newest": None, "first": 1, "best": "best"}.items():
        answers[name] = vidjoint.load(folder / "run", step)
        words = [f"--step={step}"] if step else []
        assert main(["export", f"--workdir={folder / 'run'}", str(folder / name), *words]) == 0
    shutil.copytree(data, folder / "elsewhere")
    for gone in ("run", "data"):
        shutil.rmtree(folder / gone)
    return folder, answers


def same_bits(model, other):
    assert jax.tree.structure(model.params) == jax.tree.structure(other.params)
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(other.params), strict=True):
        assert a.dtype == b.dtype == np.float32 and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_an_exported_folder_is_the_run_bit_for_bit(world):
    folder, answers = world
    for name, model in answers.items():
        exported = vidjoint.load(folder / name)
        same_bits(exported, model)
        assert exported.labels == model.labels == LABELS and exported.step is None
        assert sorted(path.name for path in (folder / name).iterdir()) == ["config.json", "labels", "weights.safetensors"]
    for task in LABELS:
        found = vidjoint.load(folder / "newest").logits(PIXELS, task)
        assert found.tobytes() == answers["newest"].logits(PIXELS, task).tobytes() and np.ptp(found) > 0.01
    assert not np.array_equal(answers["best"].params["norm"]["bias"], answers["newest"].params["norm"]["bias"])
    np.testing.assert_array_equal(answers["best"].params["norm"]["bias"], answers["first"].params["norm"]["bias"])


def test_commands_take_it_though_the_run_and_its_data_are_gone(world, capsys, tmp_path):
    folder, answers = world
    workdir, clip = f"--workdir={folder / 'newest'}", str(folder / "elsewhere" / "0.mp4")
    assert predict.main([workdir, clip, "--json=-", "--topk=3"]) == 0
    (answer,) = answers["newest"].predict(clip, topk=3)
    assert json.loads(capsys.readouterr().out) == answer | {"path": clip}
    assert set(answer["labels"]) == set(small.CLASSES)

    arguments = [workdir, "--task=animals", f"--data={folder / 'elsewhere' / 'clips.csv'}", f"--json={tmp_path / 'results.json'}"]
    assert evaluate.main(arguments) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["step"] is None and result["tasks"]["animals"]["n"] == 6
    best = [model["labels"][0] for model in answers["newest"].predict([folder / "elsewhere" / f"{i}.mp4" for i in range(6)], topk=1)]
    assert result["tasks"]["animals"]["top1"] == np.mean([label == small.CLASSES[i % 3] for i, label in enumerate(best)])
    assert capsys.readouterr().out.startswith(f"{folder / 'newest'}, 1x1 views\n")
    assert evaluate.main([workdir]) == 2 and "clips.csv" in capsys.readouterr().err  # the data is gone


def test_a_folder_is_exported_again_whole_or_for_one_task(world, tmp_path, capsys):
    folder, answers = world
    for _ in range(2):  # the second time over what is there
        assert main(["export", f"--workdir={folder / 'newest'}", str(tmp_path / "again")]) == 0
    same_bits(vidjoint.load(tmp_path / "again"), answers["newest"])
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    assert main(["export", f"--workdir={tmp_path / 'again'}", str(tmp_path / "again"), "--task=others"]) == 0  # into itself
    one, whole = open_weights(tmp_path / "again"), open_weights(folder / "newest")
    assert one.labels == {"others": ("x", "y")} and set(one.config.tasks) == {"others"}
    assert one.params.keys() == {name for name in whole.params if not name.startswith("heads/animals/")}
    assert [path.name for path in (tmp_path / "again" / "labels").iterdir()] == ["others.txt"]
    assert main(["export", f"--workdir={folder / 'newest'}", str(tmp_path / "x"), "--task=cats"]) == 2
    assert capsys.readouterr().err == "error: --task=cats: there is no such task, choose one of animals, others\n"


def test_an_import_that_names_the_classifier_asks_for_one_with_a_single_one(world, tmp_path, capsys):
    source = world[0] / "newest"
    (tmp_path / "names.txt").write_text("a\nb\n")
    for word in ("--task=cats", f"--labels={tmp_path / 'names.txt'}"):
        assert main(["import", str(source), str(tmp_path / "out"), word]) == 2
        assert capsys.readouterr().err == (
            f"error: {source} has several classifiers (animals, others): export one with python -m vidjoint.weights export --workdir={source} FOLDER "
            "--task=NAME first, and import that\n"
        )
    assert not (tmp_path / "out").exists()
    assert main(["export", f"--workdir={source}", str(tmp_path / "one"), "--task=others"]) == 0
    assert main(["import", str(tmp_path / "one"), str(tmp_path / "out"), "--task=cats", f"--labels={tmp_path / 'names.txt'}"]) == 0
    assert open_weights(tmp_path / "out").labels == {"cats": ("a", "b")}
    assert main(["import", str(source), str(tmp_path / "both")]) == 0 and open_weights(tmp_path / "both").labels == LABELS


def test_a_folder_is_a_start_but_no_run(world, tmp_path, quick_runs):
    folder, _ = world
    shutil.copytree(folder / "newest", tmp_path / "weights")
    before = {path: path.read_bytes() for path in (tmp_path / "weights").rglob("*") if path.is_file()}
    config = small.config_of(folder / "elsewhere", "video", mixer="divided")
    for force in (False, True):
        with pytest.raises(UserError) as caught:
            train(config, tmp_path / "weights", force)
        where = tmp_path / "weights"
        assert caught.value.lines == (f"{where} holds weights, not a run: give another --workdir, and init_from={where} to start from them",)
    assert {path: path.read_bytes() for path in (tmp_path / "weights").rglob("*") if path.is_file()} == before

    config.init_from = str(tmp_path / "weights")
    start, went_on = open_weights(tmp_path / "weights").params, flat(initial_state(prepare(config)).params)
    assert went_on.keys() == {name for name in start if "others" not in name}
    for name, value in went_on.items():
        np.testing.assert_array_equal(value, start[name], err_msg=name)


def test_a_step_is_of_a_run(world, capsys):
    folder, _ = world
    for step in ("2", "best"):
        assert predict.main([f"--workdir={folder / 'newest'}", str(folder / "elsewhere" / "0.mp4"), f"--step={step}"]) == 2
        line = f"{folder / 'newest'} holds weights, not a run with checkpoints: leave out --step={step}"
        assert capsys.readouterr().err == f"error: {line}\n"


def test_an_export_over_other_things_is_refused(world, tmp_path, capsys):
    folder, _ = world
    other, file = tmp_path / "other", tmp_path / "file"
    other.mkdir()
    (other / "thesis.tex").write_text("years")
    file.write_text("")
    for out in (other, file):
        assert main(["export", f"--workdir={folder / 'newest'}", str(out)]) == 2
        assert capsys.readouterr().err == f"error: {out} is there and holds other things than weights: give a new folder\n"
    assert main(["export", f"--workdir={folder / 'newest'}", str(file / "below")]) == 2
    assert capsys.readouterr().err == f"error: {file / 'below'} can't be written (File exists): give another folder\n"
    assert (other / "thesis.tex").read_text() == "years" and len(list(other.iterdir())) == 1
    (tmp_path / "empty").mkdir()
    assert main(["export", f"--workdir={folder / 'newest'}", str(tmp_path / "empty")]) == 0
    assert open_weights(tmp_path / "empty").labels == LABELS


def test_nothing_half_written_stays(world, tmp_path, monkeypatch):
    folder, _ = world
    shutil.copytree(folder / "first", tmp_path / "there")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    weights = open_weights(folder / "newest")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vidjoint.weights.files.save_file", full)
    for out in ("new", "there"):
        with pytest.raises(UserError, match="No space left on device"):
            write_folder(weights, tmp_path / out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    weights.labels["others"] = ("x\ny", "z")
    with pytest.raises(UserError, match="have line breaks"):
        write_folder(weights, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def cut(folder, arrays):
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "weights.safetensors is damaged or incomplete: its arrays take "


def no_weights(folder, arrays):
    (folder / "weights.safetensors").unlink()
    return "no checkpoints there"


def without_an_array(folder, arrays):
    del arrays["blocks/1/mlp/fc1/bias"]
    return "lacks blocks/1/mlp/fc1/bias, which is [32] in its model"


def with_another(folder, arrays):
    arrays["blocks/2/norm1/bias"] = arrays["norm/bias"]
    return "has blocks/2/norm1/bias [16], which its model has no place for"


def of_another_shape(folder, arrays):
    arrays["norm/bias"] = arrays["norm/bias"][:-1]
    return "has norm/bias [15], which is [16] in its model"


def with_nan(folder, arrays):
    arrays["norm/bias"][3] = np.nan
    return "1 of 51 arrays hold NaN or infinity: norm/bias: the file is damaged, or its training diverged"


def of_integers(folder, arrays):
    arrays["norm/bias"] = arrays["norm/bias"].astype(np.int32)
    return "weights.safetensors holds norm/bias as int32, and parameters are floating-point numbers"


def without_labels(folder, arrays):
    shutil.rmtree(folder / "labels")
    return "its class names can't be read"


def with_a_label_less(folder, arrays):
    (folder / "labels" / "others.txt").write_text("x\n")
    return "has heads/others/bias [2], which is [1] in its model"


def with_another_config(folder, arrays):
    config = json.loads((folder / "config.json").read_text())
    config["model"]["variant"] = "XXL/8"
    (folder / "config.json").write_text(json.dumps(config))
    return "config.json: model.variant='XXL/8' is unknown: "


def with_a_damaged_config(folder, arrays):
    (folder / "config.json").write_text("{")
    return "config.json is damaged or of another version of vidjoint"


DAMAGES = [cut, no_weights, without_an_array, with_another, of_another_shape, with_nan, of_integers, without_labels]
DAMAGES += [with_a_label_less, with_another_config, with_a_damaged_config]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_clear_line(world, tmp_path, capsys, damage):
    folder, _ = world
    shutil.copytree(folder / "newest", tmp_path / "weights")
    file = tmp_path / "weights" / "weights.safetensors"
    arrays = {name: array.copy() for name, array in load_file(file).items()}
    words = damage(tmp_path / "weights", arrays)
    if damage in (without_an_array, with_another, of_another_shape, with_nan, of_integers):
        save_file(arrays, file)
    assert predict.main([f"--workdir={tmp_path / 'weights'}", str(folder / "elsewhere" / "0.mp4")]) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and words in err and str(tmp_path / "weights") in err, err
    assert len(lines) == (2 if damage is with_a_label_less else 1)  # its kernel and its bias


def test_half_precision_is_taken(world, tmp_path):
    folder, answers = world
    shutil.copytree(folder / "newest", tmp_path / "weights")
    file = tmp_path / "weights" / "weights.safetensors"
    save_file({name: array.astype(np.float16) for name, array in load_file(file).items()}, file)
    found = vidjoint.load(tmp_path / "weights")
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(answers["newest"].params), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_imported_weights_answer_and_are_evaluated_on_data(world, tmp_path, capsys):
    folder, _ = world
    source = small.write_foreign(tmp_path / "foreign")
    assert main(["import", str(source), str(tmp_path / "weights")]) == 0
    shutil.rmtree(source)
    capsys.readouterr()
    workdir, data = f"--workdir={tmp_path / 'weights'}", folder / "elsewhere"
    assert evaluate.main([workdir]) == 2
    assert capsys.readouterr().err == f"error: {TASK}: no validation split in its config: give one by --task=NAME --data=CSV\n"
    assert evaluate.main([workdir, f"--task={TASK}", f"--data={data / 'pictures.csv'}", f"--json={tmp_path / 'results.json'}"]) == 0
    capsys.readouterr()
    result = json.loads((tmp_path / "results.json").read_text())["tasks"][TASK]
    assert predict.main([workdir, *(str(data / f"{i}.png") for i in range(6)), "--topk=1", "--json=-"]) == 0
    best = [json.loads(line)["labels"][0] for line in capsys.readouterr().out.splitlines()]
    assert result["n"] == 6 and result["top1"] == np.mean([label == small.CLASSES[i % 3] for i, label in enumerate(best)])
