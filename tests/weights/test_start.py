"""An experiment starts straight from another project's file, by the command that users give, and needs that file only for its first step."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util

import vidjoint
from tests.weights import small
from vidjoint.checkpoints import load_params
from vidjoint.errors import UserError
from vidjoint.main import main
from vidjoint.train import initial_state, prepare
from vidjoint.weights.pretrained import flat, open_weights

EXPERIMENT = """
from tests.weights.small import config_of, task_of

def get_config():
    config = config_of(DATA)
    config.update(total_steps=2, checkpoint_every=1)
    config.tasks.others = task_of(DATA, train="others.csv", labels="")
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    (folder / "data").mkdir()
    small.write_data(folder / "data")
    (folder / "experiment.py").write_text(EXPERIMENT.replace("DATA", repr(str(folder / "data"))))
    small.write_foreign(folder / "source", layer_norm_eps=1e-5)
    normalisation = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3], "resample": 3}
    (folder / "source" / "preprocessor_config.json").write_text(json.dumps(normalisation))
    return folder


@pytest.fixture
def run(folder, monkeypatch, quick_runs):
    """The command, in this process. Returns its exit status."""
    monkeypatch.setenv("VIDJOINT_CACHE", str(folder / "cache"))

    def run(workdir, *changes):
        return main([f"--config={folder / 'experiment.py'}", f"--workdir={workdir}", *changes])

    return run


def test_a_run_starts_from_a_foreign_file_and_goes_on_without_it(folder, run, capsys):
    source, straight, broken = folder / "source" / "model.safetensors", folder / "straight", folder / "broken"
    weights = open_weights(source)
    assert run(straight, f"--config.init_from={source}") == 0
    log = capsys.readouterr().err
    start = f"INFO: init_from={source}: "
    assert f"{start}{len(weights.params)} parameters loaded, with the classifier of animals, whose class names are the same\n" in log
    assert f"{start}2 parameters new: heads/others/{{bias,kernel}}\n" in log and "is that meant" not in log

    table = (straight / "init_from.txt").read_text().splitlines()
    assert "loaded    blocks/1/mlp/fc1/kernel  [16, 32]  <- vit.encoder.layer.1.intermediate.dense.weight" in table
    assert "loaded    heads/animals/kernel  [16, 3]  <- classifier.weight" in table and "new       heads/others/kernel  [16, 2]" in table
    params = flat(open_weights(straight, 1).params)
    assert sorted(line.split()[1] for line in table) == sorted(params)
    assert sorted(name for line in table if " <- " in line for name in line.split(" <- ")[1].split(", ")) == sorted(small.foreign_arrays())

    model = json.loads((straight / "config.json").read_text())["model"]
    adopted = dict(mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3], gelu="tanh", norm_eps=1e-5, position_resize="bicubic", interpolation="bicubic")
    assert {key: model[key] for key in adopted} == adopted and model["layer_scale"] in (0, -1) and model["registers"] in (0, -1)

    shutil.copytree(straight, broken)  # what is left of a run that was stopped after its first step
    shutil.rmtree(broken / "checkpoints" / "2")
    (broken / "results.json").unlink()
    shutil.move(folder / "source", folder / "away")
    try:
        assert run(broken, f"--config.init_from={source}") == 0
        assert run(folder / "new", f"--config.init_from={source}") == 2
    finally:
        shutil.move(folder / "away", folder / "source")
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == f"error: init_from: {source} does not exist: give the folder of a run, or weights (docs/weights.md)"
    )
    assert not (folder / "new").exists()
    for a, b in zip(*(jax.tree.leaves(restored(path)) for path in (straight, broken)), strict=True):
        assert a.tobytes() == b.tobytes()
    for name in ("config.json", "init_from.txt"):
        assert (straight / name).read_bytes() == (broken / name).read_bytes()
    first, last = open_weights(straight, 1).params, open_weights(straight).params
    assert not np.array_equal(first["norm/bias"], last["norm/bias"])


def restored(workdir):
    step, parts = load_params(workdir)
    assert step == 2
    return parts


def fresh(folder, media="video", **model) -> tuple[dict, object]:
    """The parameters that a run begins with, and its setup."""
    config = small.config_of(folder / "data", media, **model)
    config.init_from = str(folder / "source")
    setup = prepare(config)
    state = initial_state(setup)
    return flat(jax.tree.map(np.asarray, state.params)), setup


@pytest.fixture(scope="module")
def image(folder):
    """The image model, and what it says of two pictures, uint8[2, 1, 16, 16, 3]."""
    model, frame = vidjoint.load(folder / "source"), np.random.default_rng(0).integers(0, 256, (2, 1, 16, 16, 3), np.uint8)
    return model.params, frame, model.logits(frame)


@pytest.mark.parametrize("init", ["zero", "copied"])
def test_from_an_image_checkpoint_the_temporal_branch_is_nothing_at_first(folder, quick_runs, image, init):
    """zero: it adds nothing, so a still picture has the image model's logits; copied: it is the spatial attention, and acts at once."""
    spatial, frame, alone = image
    params, setup = fresh(folder, mixer="divided", temporal_init=init)
    kinds = {line.name: line.kind for line in setup.start.lines}
    for i in range(2):
        name = f"blocks/{i}/mixer/temporal_attn/qkv/kernel"
        assert kinds[name] == "copied from the spatial attention"
        np.testing.assert_array_equal(params[name], spatial["blocks"][str(i)]["attn"]["qkv"]["kernel"])
        np.testing.assert_array_equal(params[f"blocks/{i}/mixer/temporal_fc/kernel"], np.zeros((16, 16)) if init == "zero" else np.eye(16))
    assert kinds["heads/animals/kernel"] == "loaded" and kinds["embed/time"] == "new" and not params["embed/time"].any()
    logits = jax.jit(setup.model.logits)(traverse_util.unflatten_dict(params, sep="/"), np.concatenate([frame, frame], axis=1))["animals"]
    apart = np.abs(np.asarray(logits) - alone).max()
    assert apart < 1e-5 if init == "zero" else apart > 1e-3


def test_what_a_config_sets_itself_stays_and_is_named(folder):
    config = small.config_of(folder / "data", gelu="exact", mean=(0.1, 0.1, 0.1))
    config.init_from = str(folder / "source")
    setup = prepare(config)
    model = setup.config.model
    assert (model.gelu, tuple(model.mean), tuple(model.std), model.norm_eps) == ("exact", (0.1, 0.1, 0.1), (0.2, 0.25, 0.3), 1e-5)
    named = [line for line in setup.start.summary() if "is that meant" in line]
    assert [line.split(": ")[1].split()[0] for line in named] == ["model.gelu", "model.mean"]


def test_faults_of_weights_and_config_are_told_together(folder):
    config = small.config_of(folder / "data", heads=3)
    config.init_from, config.init_allow = str(folder / "data"), ("(",)
    with pytest.raises(UserError) as caught:
        prepare(config)
    lines = "\n".join(caught.value.lines)
    assert len(caught.value.lines) == 3 and "init_from: " in lines and "model.heads=3 does not divide" in lines and "no regular expression" in lines
