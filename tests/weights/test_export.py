"""Other projects' weights are taken in, trained for one update and given back: the library's own class loads them whole and has our logits."""

import json
import warnings

import jax
import numpy as np
import pytest

import vidjoint
from tests.weights import small
from tests.weights.parity import ATOL, library, pixels_of, randomise, saved
from vidjoint.errors import UserError
from vidjoint.models.build import OF_WEIGHTS, spec_from_config
from vidjoint.sharding import make_mesh
from vidjoint.train import train
from vidjoint.weights.__main__ import main
from vidjoint.weights.export import TARGETS, obstacles
from vidjoint.weights.pretrained import open_weights

DINO = {key: value for key, value in small.SIZES.items() if key != "intermediate_size"} | dict(mlp_ratio=2, layerscale_value=0.5)
KINDS = {  # kind -> target, config's class, settings, changes to a new run's model
    "vit": ("hf_vit", "ViTConfig", small.SIZES | dict(hidden_act="gelu_new"), {}),
    "dinov2": ("hf_dinov2", "Dinov2Config", DINO, dict(pool="class_and_average")),
    "dinov2_registers": ("hf_dinov2_registers", "Dinov2WithRegistersConfig", DINO | dict(num_register_tokens=3), dict(pool="class_and_average")),
    "divided": ("hf_timesformer", "TimesformerConfig", small.SIZES | dict(num_frames=2), dict(mixer="divided")),
    "joint": ("hf_timesformer", "TimesformerConfig", small.SIZES | dict(num_frames=2, attention_type="joint_space_time"), dict(mixer="joint")),
}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Training on eight devices would compile for longer, and is tested elsewhere."""
    monkeypatch.setattr("vidjoint.train.open_devices", lambda config: make_mesh(config.mesh, jax.devices()[:1]))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small.write_data(tmp_path_factory.mktemp("data"))


def reference_of(kind: str, folder):
    """A tiny random model of the library's, saved, with the class names of the data."""
    transformers = library("transformers")
    target, config, settings, _ = KINDS[kind]
    names = dict(enumerate(small.CLASSES))
    settings = settings | dict(id2label=names, label2id={name: i for i, name in names.items()})
    reference = getattr(transformers, TARGETS[target][0])(getattr(transformers, config)(**settings)).eval()
    randomise(reference)
    saved(reference, folder)
    return reference


def loaded(folder, name: str):
    """The exported model by the library's own loader, which must miss nothing and have nothing left."""
    transformers = library("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert str(model.dtype) == "torch.float32"
    return model.eval()


def theirs(model, pixels: np.ndarray, spec) -> np.ndarray:
    torch = library("torch")
    x = torch.from_numpy(np.moveaxis((pixels.astype(np.float32) / 255 - np.float32(spec.mean)) / np.float32(spec.std), -1, 2).copy())
    with torch.no_grad():
        return model(x if "Timesformer" in type(model).__name__ else x[:, 0]).logits.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_in_one_update_and_out_again(tmp_path, data, kind, capsys):
    target, _, _, changes = KINDS[kind]
    video, (name, processor) = target == "hf_timesformer", TARGETS[target]
    reference_of(kind, tmp_path / "reference")
    assert main(["import", str(tmp_path / "reference"), str(tmp_path / "folder"), "--task=animals"]) == 0
    before = open_weights(tmp_path / "folder")

    config = small.config_of(data, "video" if video else "image", **changes)
    config.init_from = str(tmp_path / "folder")
    train(config, tmp_path / "run")
    run = vidjoint.load(tmp_path / "run")
    after = open_weights(tmp_path / "run").params
    assert after.keys() == before.params.keys() and run.step == 1
    moved = {part for part, value in after.items() if not np.array_equal(value, before.params[part])}
    assert {"embed/position", "blocks/1/mlp/fc1/kernel", "norm/scale", "heads/animals/kernel"} <= moved and len(moved) > 0.8 * len(after)
    assert np.abs(after["heads/animals/kernel"] - before.params["heads/animals/kernel"]).max() < 0.1  # it went on from that head

    capsys.readouterr()
    assert main(["export", f"--workdir={tmp_path / 'run'}", str(tmp_path / "out"), "--format=hf"]) == 0
    out = str(tmp_path / "out")
    assert capsys.readouterr().out == f"written to {out}: transformers.{name}.from_pretrained({out!r})\n"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    model, spec, pixels = loaded(tmp_path / "out", name), spec_from_config(run.config.model), pixels_of(3, 2 if video else 1, 16, 16)
    found = theirs(model, pixels, spec)
    np.testing.assert_allclose(found, run.logits(pixels), atol=ATOL)
    assert np.ptp(found, axis=0).max() > 0.01 and np.abs(found - vidjoint.load(tmp_path / "folder").logits(pixels)).max() > 1e-3
    assert [model.config.id2label[i] for i in range(3)] == list(small.CLASSES) and model.config.label2id == {"cat": 0, "dog": 1, "1 été": 2}

    again = open_weights(tmp_path / "out")  # and what was written is read here as what it was
    assert again.format == target and again.labels == {"pretrained": small.CLASSES} and not again.unexplained
    for part, value in after.items():
        np.testing.assert_array_equal(again.params[part.replace("/animals/", "/pretrained/")], value, err_msg=part)
    for key in (*OF_WEIGHTS, "pool", "mixer"):
        assert getattr(spec_from_config(again.config.model), key, None) == getattr(spec, key, None), key
    check_processor(tmp_path / "out", processor, spec)


def check_processor(folder, name: str, spec) -> None:
    """The library's own loader makes the image processor, and what it makes of pictures is what our model sees of them."""
    transformers = library("transformers")
    library("torchvision")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert type(processor).__name__ == name
    picture = pixels_of(1, 1, 16, 16)[0, 0]
    wanted = np.moveaxis((picture / 255 - np.array(spec.mean)) / np.array(spec.std), -1, 0)
    given = [picture] if name.startswith("VideoMAE") else picture
    found = np.asarray(processor(given, return_tensors="np")["pixel_values"], np.float64).reshape(3, 16, 16)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    wide = np.pad(picture, ((0, 0), (4, 4), (0, 0)))  # the short side fits: the centre is cut out
    found = np.asarray(processor([wide] if given is not picture else wide, return_tensors="np")["pixel_values"]).reshape(3, 16, 16)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
