"""Other projects' weights are taken in, trained for one update and given back: the library's own class loads them whole and has our logits."""

import json
import warnings

import numpy as np
import pytest

import vidjoint
from tests.weights import small
from tests.weights.parity import ATOL, library, pixels_of, randomise, saved
from vidjoint import validate
from vidjoint.config import base_config, task_config
from vidjoint.errors import UserError
from vidjoint.models.build import OF_WEIGHTS, spec_from_config
from vidjoint.train import train
from vidjoint.weights.__main__ import main
from vidjoint.weights.export import TARGETS, choose_target, to_hugging_face
from vidjoint.weights.pretrained import Pretrained, open_weights, rename_task

ONE = dict(num_hidden_layers=1)  # block where two would show no more, for less to compile
DINO = {key: value for key, value in small.SIZES.items() if key != "intermediate_size"} | dict(mlp_ratio=2, layerscale_value=0.5) | ONE
KINDS = {  # kind -> target, config's class, settings, changes to a new run's model
    "vit": ("hf_vit", "ViTConfig", small.SIZES | dict(hidden_act="gelu_new"), {}),
    "dinov2": ("hf_dinov2", "Dinov2Config", DINO, dict(pool="class_and_average", depth=1)),
    "dinov2_registers": (
        "hf_dinov2_registers",
        "Dinov2WithRegistersConfig",
        DINO | dict(num_register_tokens=3),
        dict(pool="class_and_average", depth=1),
    ),
    "divided": ("hf_timesformer", "TimesformerConfig", small.SIZES | dict(num_frames=2), dict(mixer="divided")),
    "joint": (
        "hf_timesformer",
        "TimesformerConfig",
        small.SIZES | ONE | dict(num_frames=2, attention_type="joint_space_time"),
        dict(mixer="joint", depth=1),
    ),
}


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
def test_in_one_update_and_out_again(tmp_path, data, kind, capsys, quick_runs):
    """Of images with a second task besides, of other labels, whose classifier is new."""
    target, _, _, changes = KINDS[kind]
    video, (name, processor) = target == "hf_timesformer", TARGETS[target]
    reference_of(kind, tmp_path / "reference")
    assert main(["import", str(tmp_path / "reference"), str(tmp_path / "folder"), "--task=animals"]) == 0
    before = open_weights(tmp_path / "folder")

    config = small.config_of(data, "video" if video else "image", **changes)
    config.init_from = str(tmp_path / "folder")
    if kind == "vit":
        config.tasks.others = small.task_of(data, train="others.csv", labels="")
    train(config, tmp_path / "run")
    run = vidjoint.load(tmp_path / "run")
    after = open_weights(tmp_path / "run").params
    new = {f"heads/others/{part}" for part in ("kernel", "bias")} if kind == "vit" else set()
    assert after.keys() == before.params.keys() | new and run.step == 1
    moved = {part for part, value in before.params.items() if not np.array_equal(value, after[part])}
    assert {"embed/position", "blocks/0/mlp/fc1/kernel", "norm/scale", "heads/animals/kernel"} <= moved and len(moved) > 0.8 * len(after)
    assert np.abs(after["heads/animals/kernel"] - before.params["heads/animals/kernel"]).max() < 0.1  # it went on from that head
    assert ("new       heads/others/kernel  [16, 2]" in (tmp_path / "run" / "init_from.txt").read_text()) == bool(new)

    pixels, command = pixels_of(3, 2 if video else 1, 16, 16), ["export", f"--workdir={tmp_path / 'run'}", "--format=hf"]
    if new:
        assert main([*command, str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()
        line = "error: --task is missing: these weights have 2 classifiers (animals, others), and one goes along"
        assert capsys.readouterr().err.splitlines()[-1] == line
        assert main([*command, str(tmp_path / "others"), "--task=others"]) == 0
        model = loaded(tmp_path / "others", name)
        np.testing.assert_allclose(theirs(model, pixels, run.model.spec), run.logits(pixels, "others"), atol=ATOL)
        assert model.config.id2label == {0: "x", 1: "y"}
    capsys.readouterr()
    assert main([*command, str(tmp_path / "out"), *["--task=animals"] * bool(new)]) == 0
    out = str(tmp_path / "out")
    assert capsys.readouterr().out == f"written to {out}: transformers.{name}.from_pretrained({out!r})\n"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    model, spec = loaded(tmp_path / "out", name), run.model.spec
    found = theirs(model, pixels, spec)
    np.testing.assert_allclose(found, run.logits(pixels, "animals"), atol=ATOL)
    assert np.ptp(found, axis=0).max() > 0.01
    assert [model.config.id2label[i] for i in range(3)] == list(small.CLASSES) and model.config.label2id == {"cat": 0, "dog": 1, "1 été": 2}

    again = open_weights(tmp_path / "out")  # and what was written is read here as what it was
    assert again.format == target and again.labels == {"pretrained": small.CLASSES} and not again.unexplained
    for part in after.keys() - new:
        value = after[part]
        np.testing.assert_array_equal(again.params[part.replace("/animals/", "/pretrained/")], value, err_msg=part)
    theirs_again = spec_from_config(again.config.model)
    for key in (*OF_WEIGHTS.keys() - {"interpolation"}, "pool", "mixer", "image_size", *["frames"] * video):
        assert getattr(theirs_again, key) == getattr(spec, key), key
    assert again.config.model.interpolation == (run.config.model.interpolation or "bilinear")
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


FITTING = {
    "hf_vit": {},
    "hf_dinov2": dict(pool="class_and_average", layer_scale=0.5),
    "hf_dinov2_registers": dict(pool="class_and_average", layer_scale=0.5, registers=4),
    "hf_timesformer": dict(mixer="divided"),
}
OBSTACLES = [
    ("hf_vit", dict(mixer="divided"), "model.mixer=divided, not none"),
    ("hf_vit", dict(mixer="token_shift"), "model.mixer=token_shift, not none"),
    ("hf_vit", dict(pool="average"), "model.pool=average, not class_token"),
    ("hf_vit", dict(class_token=False, pool="average"), "model.class_token=False, not True"),
    ("hf_vit", dict(layer_scale=0.5), "model.layer_scale=0.5, not 0.0"),
    ("hf_vit", dict(registers=2), "model.registers=2, not 0"),
    ("hf_vit", dict(embed="separate"), "model.embed=separate, not shared"),
    ("hf_vit", dict(pre_norm="layer_norm"), "model.pre_norm=layer_norm, not none"),
    ("hf_vit", dict(last_norm_eps=1e-5), "model.last_norm_eps=1e-05, not 0.0 or 1e-06"),
    ("hf_dinov2", dict(pool="class_token"), "model.pool=class_token, not class_and_average"),
    ("hf_dinov2", dict(layer_scale=0.0), "no LayerScale"),
    ("hf_dinov2", dict(registers=4), "4 registers"),
    ("hf_dinov2", dict(mlp_dim=40), "an MLP of 40, no multiple of the width"),
    ("hf_dinov2_registers", dict(registers=0), "0 registers"),
    ("hf_dinov2_registers", dict(mixer="joint"), "model.mixer=joint, not none"),
    ("hf_timesformer", dict(mixer="motion"), "model.mixer=motion, not divided or joint"),
    ("hf_timesformer", dict(mixer_blocks=(1,)), "model.mixer_blocks=(1,), not all blocks"),
    ("hf_timesformer", dict(pool="last_frame"), "model.pool=last_frame, not class_token"),
    ("hf_timesformer", dict(layer_scale=0.5), "model.layer_scale=0.5, not 0.0"),
]


def spec_of(**changes):
    config = base_config()
    config.model.update(small.MODEL | changes)
    return spec_from_config(config.model)


@pytest.mark.parametrize(("target", "changes", "words"), OBSTACLES)
def test_each_obstacle_is_one_clear_line(target, changes, words):
    with pytest.raises(UserError) as caught:
        choose_target(spec_of(**FITTING[target] | changes), target)
    (line,) = caught.value.lines
    assert line.startswith(f"{TARGETS[target][0]} cannot hold this model: it has ") and words in line.partition(": it has ")[2].split("; ")


def test_the_class_that_fits_is_found():
    assert FITTING.keys() == TARGETS.keys()
    for target, changes in FITTING.items():
        spec = spec_of(**changes)
        assert choose_target(spec, "hf") == choose_target(spec, target) == target
    assert choose_target(spec_of(mixer="joint", mixer_blocks=(0, -1)), "hf") == "hf_timesformer"  # all blocks, by another name
    assert choose_target(spec_of(last_norm_eps=1e-6), "hf") == "hf_vit"
    with pytest.raises(UserError) as caught:
        choose_target(spec_of(mixer="motion"), "hf")
    assert len(caught.value.lines) == len(TARGETS)
    with pytest.raises(UserError, match="--format=hf_clip is unknown: choose vidjoint, hf, hf_vit, "):
        choose_target(spec_of(), "hf_clip")


def weights_of(labels, **changes) -> Pretrained:
    config = base_config()
    config.model.update(small.MODEL | changes)
    config.tasks.update({task: task_config() for task in labels})
    return Pretrained("W", "vidjoint", small.random_params(config, {task: len(names) for task, names in labels.items()}), config, labels)


def test_what_is_written_tells_the_recipe(tmp_path):
    weights = weights_of({"tags": ("a", "b")}, gelu="quick", norm_eps=1e-5, interpolation="bicubic", mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    weights.config.tasks.tags.update(multilabel=True, crop="none")
    assert to_hugging_face(weights, tmp_path / "deep" / "out") == "ViTForImageClassification"
    config, processor = (json.loads((tmp_path / "deep" / "out" / f"{name}.json").read_text()) for name in ("config", "preprocessor_config"))
    assert config["hidden_act"] == "quick_gelu" and config["layer_norm_eps"] == 1e-5 and config["problem_type"] == "multi_label_classification"
    assert processor["size"] == {"height": 16, "width": 16} and not processor["do_center_crop"] and processor["resample"] == 3  # as in evaluation
    assert (processor["image_mean"], processor["image_std"]) == ([0.4, 0.5, 0.6], [0.1, 0.2, 0.3])
    weights.config.tasks.tags.update(multilabel=False, crop="area")
    to_hugging_face(weights, tmp_path / "empty")
    config, processor = (json.loads((tmp_path / "empty" / f"{name}.json").read_text()) for name in ("config", "preprocessor_config"))
    assert config["problem_type"] == "single_label_classification" and processor["size"] == {"shortest_edge": 16} and processor["do_center_crop"]


def test_a_task_of_another_shape_than_the_model_s_is_refused(tmp_path):
    """Neither the class nor its image processor would know of it."""
    frames, size = small.MODEL["frames"], small.MODEL["image_size"]
    cases = [
        ("hf_vit", dict(image_size=(2 * size, size)), f"a task of {2 * size} x {size} pixels, not model.image_size={size}"),
        ("hf_timesformer", dict(frames=2 * frames), f"a task of {2 * frames} frames, not model.frames={frames}"),
        ("hf_timesformer", dict(media="image"), f"a task of 1 frames, not model.frames={frames}"),
    ]
    for target, changes, words in cases:
        weights = weights_of({"tags": ("a", "b")}, **FITTING[target])
        weights.config.tasks.tags.update(changes)
        with pytest.raises(UserError) as caught:
            to_hugging_face(weights, tmp_path / "out", target)
        assert caught.value.lines == (f"{TARGETS[target][0]} cannot hold this model: it has {words}",)
    assert not (tmp_path / "out").exists()
    weights = weights_of({"tags": ("a", "b"), "stills": ("c", "d")})
    weights.config.tasks.stills.update(media="image", image_size=(size, size))
    to_hugging_face(weights, tmp_path / "out", "hf", "stills")  # a ViT sees one picture at a time


def test_a_renamed_task_is_in_no_order_of_the_old_names():
    weights = weights_of({"tags": ("a", "b")})
    weights.config.task_order = ("tags",)
    renamed = rename_task(weights, "marks").config
    assert set(renamed.tasks) == {"marks"} and validate.check(renamed, trains=False) == []


def test_what_cannot_be_written(tmp_path):
    both, file, full = {"a": ("x", "y"), "b": ("z", "w")}, tmp_path / "file", tmp_path / "full"
    file.write_text("")
    full.mkdir()
    (full / "notes").write_text("")
    cases = [
        (weights_of(both), tmp_path / "out", "", "--task is missing: these weights have 2 classifiers (a, b), and one goes along"),
        (weights_of(both), tmp_path / "out", "c", "--task=c: there is no such task, choose one of a, b"),
        (weights_of({}), tmp_path / "out", "", "W has no classifier, and ViTForImageClassification is one: train one with --config.init_from=W"),
        (weights_of(both), file, "a", f"{file} is there and not empty: give a new folder"),
        (weights_of(both), full, "a", f"{full} is there and not empty: give a new folder"),
        (weights_of(both), file / "out", "a", f"{file / 'out'} can't be written (File exists): give another folder"),
    ]
    for weights, out, task, line in cases:
        with pytest.raises(UserError) as caught:
            to_hugging_face(weights, out, "hf", task)
        assert caught.value.lines == (line,)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"] and [path.name for path in full.iterdir()] == ["notes"]
