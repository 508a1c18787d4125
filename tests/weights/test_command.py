"""`python -m vidjoint.weights inspect | import | export`: what it prints, what it asks for, and that no file can make it do anything else."""

import json
import pickle
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.weights import small
from tests.weights.hand_made import most_memory, named, plain, state_dict, tensor, write_zip
from vidjoint.models.build import spec_from_config
from vidjoint.weights.__main__ import main
from vidjoint.weights.formats import FORMATS
from vidjoint.weights.pretrained import open_weights, swap_colours
from vidjoint.weights.translate import TASK

EXPERIMENT = """
from vidjoint.config import base_config, task_config

def get_config():
    config = base_config()
    config.total_steps = 1
    config.model.update(variant="Ti/8", width=16, depth=2, heads=2, mlp_dim=32, frames=4, image_size=24, mixer="divided")
    config.tasks.update(clips=task_config(train="nowhere.csv"), stills=task_config(train="nowhere.csv", media="image"))
    return config
"""


@pytest.fixture
def source(tmp_path):
    return small.write_foreign(tmp_path / "source")


@pytest.fixture
def command(tmp_path, capsys):
    """Runs the command; what it printed comes back as lines. Where it refuses, there is one line, and nothing is written."""

    def run(*words, status=0) -> list[str]:
        before = set(tmp_path.rglob("*"))
        assert main([str(word) for word in words]) == status
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        if status == 2:
            assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and err.rstrip("\n").isprintable(), err
            assert set(tmp_path.rglob("*")) == before
        return (err or out).removeprefix("error: ").splitlines()

    return run


# What a file is


def test_inspect_tells_kind_model_and_every_parameter_with_its_source(source, command):
    lines = command("inspect", source)
    arrays = load_file(source / "model.safetensors")
    total = sum(array.size for array in arrays.values())
    assert lines[0] == f"{source}: Hugging Face's ViT (hf_vit), {total / 1e6:.2f} M parameters in {len(open_weights(source).params)} arrays"
    assert lines[1] == "model       Ti/8: width 16, 2 blocks, 2 heads, MLP 32, patch 8, 16 x 16 pixels"
    assert lines[2].startswith("settings    pool class_token, gelu tanh, norm_eps 1e-12, ")
    assert lines[3] == "classifier  pretrained: 3 classes (cat, dog, 1 été)"
    rows = [" ".join(line.split()) for line in lines]
    assert "embed/proj/kernel [192, 16] <- vit.embeddings.patch_embeddings.projection.weight" in rows
    layer = "vit.encoder.layer.*.attention.attention"
    assert f"blocks/*/attn/qkv/kernel [16, 48] x 2 <- {layer}.query.weight, {layer}.key.weight, {layer}.value.weight" in rows
    assert "heads/pretrained/kernel [16, 3] <- classifier.weight" in rows
    told = {name for row in rows if " <- " in row for name in row.partition(" <- ")[2].split(", ")}
    assert told == {name.replace("layer.0.", "layer.*.").replace("layer.1.", "layer.*.") for name in arrays}


def test_inspect_tells_what_is_left_out_and_what_is_unknown(source, command):
    file = source / "model.safetensors"
    extra = {"vit.pooler.dense.bias": np.zeros(16, np.float32), "vit.\x1b[2Jodd\nname": np.zeros(3, np.float32)}
    save_file(load_file(file) | extra, file)
    lines = command("inspect", source)
    assert "not used    vit.pooler.dense.bias: a layer of its own training, which no classifier reads" in lines
    assert lines[-1] == r"unknown     vit.\x1b[2Jodd\nname"


def test_inspect_of_our_own(source, command, tmp_path):
    command("import", source, tmp_path / "out")
    lines = command("inspect", tmp_path / "out")
    assert lines[0].startswith(f"{tmp_path / 'out'}: this project's own (vidjoint), ") and "embed/class_token" in "".join(lines)
    bare = small.write_foreign(tmp_path / "bare", None)
    assert "classifier  none" in command("inspect", bare)


def test_inspect_with_a_config_tells_what_a_training_would_take_over(source, command, tmp_path):
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    experiment = f"--config={tmp_path / 'experiment.py'}"
    lines = command("inspect", source, experiment)
    lines = lines[lines.index(f"experiment with init_from={source}:") :]
    assert "resized   embed/position  [5, 16] -> [10, 16]  <- vit.embeddings.position_embeddings" in lines
    assert "loaded    norm/bias  [16]  <- vit.layernorm.bias" in lines
    assert "copied from the spatial attention  blocks/0/mixer/temporal_norm/bias  [16]" in lines
    assert "new       embed/time  [4, 16]" in lines
    heads = [line for line in lines if "heads/" in line]
    assert heads == [f"new       heads/{task}, or from pretrained where the class names are the same" for task in ("clips", "stills")]
    assert not any("is that meant" in line for line in lines)  # what is not set is adopted

    other = small.write_foreign(tmp_path / "other")
    lines = command("inspect", source, experiment, f"--config.init_parts=('norm/.*={other}',)", "--config.init_heads=new")
    assert (
        f"loaded    norm/bias  [16]  <- {other}, vit.layernorm.bias" in lines and f"2 parameters are those of {other}: norm/{{bias,scale}}" in lines
    )
    assert [line for line in lines if "heads/" in line and line.startswith("new")] == ["new       heads/clips", "new       heads/stills"]

    lines = command("inspect", source, experiment, "--config.model.gelu=exact", "--config.model.mixer=none")
    assert lines[-1] == "model.gelu was tanh there and is exact here: is that meant?" and not any("mixer/" in line for line in lines)
    for change, words in (
        ("--config.model.variant=XXL/8", "model.variant='XXL/8' is unknown"),
        ("--config.model.width=32", "those weights are of a model of another size: set --config.model.variant=Ti/8 --config.model.width=16 "),
        ("--config.model.wdth=16", "there is no key model.wdth; the nearest is model.width"),
        ("--config.init_allow=('(',)", "init_allow: '(' is no regular expression"),
        ("--config.init_parts=('norm/.*',)", "init_parts: 'norm/.*': write REGEX=PATH"),
        (f"--config.init_parts=('pool/.*={source}',)", f"init_parts: {source} has nothing for this model that 'pool/.*' names"),
    ):
        assert words in command("inspect", source, experiment, change, status=2)[0]


# Taking it in


def test_import_writes_a_folder_that_is_the_file(source, command, tmp_path):
    out = tmp_path / "out"
    lines = command("import", source, out)
    assert lines[-1] == f"written to {out}: use it as --workdir, or as init_from" and not any(line.startswith("note") for line in lines)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "labels", "weights.safetensors"]
    theirs, ours = open_weights(source), open_weights(out)
    assert theirs.params.keys() == ours.params.keys() and ours.labels == theirs.labels == {TASK: small.CLASSES}
    assert all(np.array_equal(value, ours.params[name]) for name, value in theirs.params.items())
    assert spec_from_config(ours.config.model) == spec_from_config(theirs.config.model)
    assert (ours.config.model.gelu, ours.config.model.norm_eps) == ("tanh", 1e-12)


@pytest.mark.parametrize("kind", ["txt", "json", "json_numbers"])
def test_labels_come_from_a_file(source, command, tmp_path, kind):
    file, names = tmp_path / f"names.{kind[:4]}", ("a, b", "ü", "c d")
    text = {"txt": "\n".join(names), "json": json.dumps(names), "json_numbers": json.dumps(dict(enumerate(names)))}[kind]
    file.write_text(text, encoding="utf-8")
    command("import", source, tmp_path / "out", f"--labels={file}", "--task=animals")
    assert open_weights(tmp_path / "out").labels == {"animals": names}


def test_labels_that_do_not_fit(source, command, tmp_path):
    out, file = tmp_path / "out", tmp_path / "names.txt"
    file.write_text("a\nb\n")
    line = f"--labels={file} has 2 names, and the classifier 3 classes: give the file's own list"
    assert command("import", source, out, f"--labels={file}", status=2) == [line]
    bare = small.write_foreign(tmp_path / "bare", None)
    assert command("import", bare, out, f"--labels={file}", status=2) == ["--labels: this file has no classifier to name the classes of"]
    absent = tmp_path / "absent.txt"
    assert "absent.txt can't be read (No such file or directory)" in command("import", source, out, f"--labels={absent}", status=2)[0]
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps(["a\nb", "c", "d"]))
    assert "have line breaks" in command("import", source, out, f"--labels={odd}", status=2)[0]


def test_class_names_that_a_config_lacks_are_numbers_and_that_is_said(command, tmp_path):
    source = small.write_foreign(tmp_path / "source", ("LABEL_0", "LABEL_1"))
    lines = command("import", source, tmp_path / "out", "--task=things")
    assert "classifier  things: 2 classes (numbered)" in lines
    assert "note: the file has no class names, so they are numbers; give --labels=FILE to name them" in lines
    assert open_weights(tmp_path / "out").labels == {"things": ("0", "1")}


def test_a_task_s_name_must_be_one(source, command, tmp_path):
    line = "--task=my task: letters, digits and underscores, for it names parameters and files"
    assert command("import", source, tmp_path / "out", "--task=my task", status=2) == [line]
    command("import", source, tmp_path / "out", "--task=animals")
    weights = open_weights(tmp_path / "out")
    assert weights.labels == {"animals": small.CLASSES} and "heads/animals/kernel" in weights.params and set(weights.config.tasks) == {"animals"}


def test_a_format_may_be_named(source, command, tmp_path):
    command("import", source, tmp_path / "named", "--format=hf_vit")
    known = ", ".join(format.name for format in FORMATS)
    assert command("import", source, tmp_path / "out", "--format=hf", status=2) == [f"--format=hf is unknown: choose one of {known}"]
    for wrong in ("hf_dinov2", "timesformer", "flax_vit", "vivit", "video_mae"):
        (line,) = command("import", source, tmp_path / "out", f"--format={wrong}", status=2)
        assert line.startswith(f"{source} looks like ") and "lacks" in line, line


def test_settings_that_no_file_tells(source, command, tmp_path):
    (source / "config.json").unlink()
    assert open_weights(source).config.model.heads == 1 and open_weights(source).config.model.gelu == "exact"  # what is usual
    command("import", source, tmp_path / "out", "--model.heads=4", "--model.gelu=quick", "--model.mean=(0.1,0.2,0.3)", "--model.norm_eps=1e-5")
    model = open_weights(tmp_path / "out").config.model
    assert (model.heads, model.gelu, model.mean, model.norm_eps) == (4, "quick", (0.1, 0.2, 0.3), 1e-5)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("headz=4", "--model.headz=4: there is no key model.headz; the nearest is model.heads"),
        ("heads=four", "--model.heads=four: model.heads takes a whole number; it is 0 now"),
        ("heads=3", "model.heads=3 does not divide the width 16"),
        ("heads=-1", "model.heads=-1 must be at least 0"),
        ("gelu=swish", "model.gelu='swish' is unknown: choose one of exact, tanh, quick"),
        ("mixer=shuffle", "model.mixer='shuffle' is unknown"),
        ("variant=B", "model.variant='B' is unknown"),
        ("image_size=17", "pictures of 17 pixels cannot be cut into patches of 8"),
        ("mean=(0.5,)", "model.mean=(0.5,) and model.std=(0.5, 0.5, 0.5) must be three numbers each"),
        ("divided.image_temporal=skip", "--model.divided.image_temporal=skip: only settings directly in config.model can be given"),
        ("heads", "--model.heads: write --model.KEY=VALUE"),
    ],
)
def test_settings_that_are_none(source, command, tmp_path, setting, words):
    (line,) = command("import", source, tmp_path / "out", f"--model.{setting}", status=2)
    assert words in line


def test_colours_are_swapped(source, command, tmp_path):
    (source / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}))
    command("import", source, tmp_path / "out", "--bgr")
    plain, swapped = open_weights(source), open_weights(tmp_path / "out")
    assert (swapped.config.model.mean, swapped.config.model.std) == ((0.3, 0.2, 0.1), (0.6, 0.5, 0.4))
    kernels = (weights.params["embed/proj/kernel"].reshape(64, 3, 16) for weights in (plain, swapped))
    np.testing.assert_array_equal(*(kernel[:, order] for kernel, order in zip(kernels, ((0, 1, 2), (2, 1, 0)), strict=True)))
    again = swap_colours(swapped)
    np.testing.assert_array_equal(again.params["embed/proj/kernel"], plain.params["embed/proj/kernel"])


def test_what_is_unknown_is_refused_unless_it_is_allowed(source, command, tmp_path):
    file = source / "model.safetensors"
    save_file(load_file(file) | {f"vit.extra.{i}\n": np.zeros(3, np.float32) for i in range(7)}, file)
    (line,) = command("import", source, tmp_path / "out", status=2)
    assert line.startswith(r"nothing is known of 7 arrays, such as vit.extra.0\n, ") and line.endswith(": leave them out with --allow_unused=REGEX")
    (line,) = command("import", source, tmp_path / "out", r"--allow_unused=vit\.extra\.[0-5]\n", status=2)
    assert line.startswith("nothing is known of 1 arrays, such as vit.extra.6")
    assert command("import", source, tmp_path / "out", "--allow_unused=vit.(", status=2)[0].startswith("--allow_unused=vit.(: no regular expression")
    command("import", source, tmp_path / "out", r"--allow_unused=vit\.extra\.\d\s")
    assert not open_weights(tmp_path / "out").unexplained


def test_what_is_not_there(command, tmp_path):
    for words in (("inspect", tmp_path / "no"), ("import", tmp_path / "no.npz", tmp_path / "out"), ("export", f"--workdir={tmp_path / 'no'}", "x")):
        assert "does not exist" in command(*words, status=2)[0]
    (tmp_path / "empty").mkdir()
    for words in (("inspect", tmp_path / "empty"), ("export", f"--workdir={tmp_path / 'empty'}", tmp_path / "out")):
        assert "holds neither a run (config.json, checkpoints) nor weights" in command(*words, status=2)[0]
    (tmp_path / "README.md").write_text("")
    assert "is no weights file by its name" in command("inspect", tmp_path / "README.md", status=2)[0]


def test_export_asks_for_what_it_needs(source, command, tmp_path):
    out = tmp_path / "out"
    (line,) = command("export", f"--workdir={source}", out, "--format=vit", status=2)
    assert line.startswith("--format=vit is unknown: choose vidjoint, hf, hf_vit, ")
    assert command("export", f"--workdir={source}", out, "--step=last", status=2) == ["--step=last: write the number of a checkpoint, or best"]
    assert command("export", f"--workdir={source}", out, "--format=hf") == [
        f"written to {out}: transformers.ViTForImageClassification.from_pretrained({str(out)!r})"
    ]
    theirs, again = (load_file(folder / "model.safetensors") for folder in (source, out))  # what came in goes out
    assert theirs.keys() == again.keys() and all(np.array_equal(value, again[name]) for name, value in theirs.items())


@pytest.mark.parametrize("words", [[], ["inspect"], ["import"], ["export"]])
def test_help(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*words, "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and "usage: python -m vidjoint.weights" in out
    if words in (["inspect"], ["import"]):
        assert all(format.name in out for format in FORMATS)
    elif words:
        assert "hf_timesformer" in out and "vidjoint (default)" in out
    else:
        assert all(name in out for name in ("inspect", "import", "export", "docs/weights.md"))


# Hostile files


def truncated(folder, marker):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    return "is damaged or incomplete"


def cut_in_its_header(folder, marker):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    return "is damaged or incomplete: its header is to have "


def endless_header(folder, marker):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{" * 100)
    return "its header is to have 1,152,921,504,606,846,976 bytes, and the file has 108"


def unknown_type(folder, marker):
    header = json.dumps({"vit.embeddings.cls_token": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    return "holds vit.embeddings.cls_token as F8_E4M3, which is not read"


def integers(folder, marker):
    arrays = load_file(folder / "model.safetensors")
    arrays["vit.layernorm.bias"] = np.ones(16, np.int8)
    save_file(arrays, folder / "model.safetensors")
    return "has vit.layernorm.bias as int8, and parameters are floating-point numbers"


def not_numbers(folder, marker):
    arrays = load_file(folder / "model.safetensors")
    arrays["vit.layernorm.bias"][5] = np.nan
    save_file(arrays, folder / "model.safetensors")
    return f"{folder}: 1 of {len(arrays)} arrays hold NaN or infinity: vit.layernorm.bias"


def lacking(folder, marker):
    arrays = load_file(folder / "model.safetensors")
    del arrays["vit.encoder.layer.1.output.dense.weight"]
    save_file(arrays, folder / "model.safetensors")
    return "lacks encoder.layer.1.output.dense.weight (here blocks/1/mlp/fc2/kernel, [32, 16])"


def of_another_shape(folder, marker):
    arrays = load_file(folder / "model.safetensors")
    arrays["vit.layernorm.bias"] = np.zeros(9, np.float32)
    save_file(arrays, folder / "model.safetensors")
    return "vit.layernorm.bias makes norm/bias [9], which should be [16]"


def foreign_names(folder, marker):
    save_file({"a\n\x1b[2J": np.zeros(3, np.float32)}, folder / "model.safetensors")
    return r"has 1 arrays, such as a\n\x1b[2J: that is none of the kinds known here"


def code_in_a_pickle(folder, marker):
    (folder / "model.safetensors").unlink()
    program = b"\x80\x02" + named("os", "system") + pickle.dumps(f"touch {marker}", 2)[2:-1] + b"\x85R."
    write_zip(folder / "pytorch_model.bin", program)
    return "os.system"


def code_in_an_old_pickle(folder, marker):
    (folder / "model.safetensors").unlink()
    program = b"\x80\x02" + named("os", "system") + pickle.dumps(f"touch {marker}", 2)[2:-1] + b"\x85R."
    (folder / "pytorch_model.bin").write_bytes(program)
    return "pytorch_model.bin"


def code_in_an_npz(folder, marker):
    (folder / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return marker.write_text, ("",)

    with open(folder / "weights.npz", "wb") as file:
        np.savez(file, cls=np.array([Evil()], object))
    return "holds Python objects as cls (a pickle)"


CONFIGS = {  # of config.json and preprocessor_config.json, which come with the weights: damaged, or of types that no library writes
    "config": ["{", "[]", '{"id2label": ["a", "b"]}', '{"id2label": {"x": 1}}', '{"layer_norm_eps": "much"}', '{"layer_norm_eps": -1}']
    + ['{"hidden_act": []}', '{"hidden_act": "swish"}', '{"num_attention_heads": 5}', '{"num_attention_heads": "many"}', '{"num_hidden_layers": 7}']
    + ['{"pretrained_cfg": []}', "[" * 100_000],
    "preprocessor_config": [
        "",
        '{"image_mean": "red"}',
        '{"image_mean": [1, 2]}',
        '{"image_std": [0, 0, 0]}',
        '{"image_mean": 0, "rescale_factor": 0}',
    ]
    + ['{"rescale_factor": "a"}', '{"resample": []}', '{"image_mean": [NaN, 0, 0]}'],
}

HOSTILE = [truncated, cut_in_its_header, endless_header, unknown_type, integers, not_numbers, lacking, of_another_shape, foreign_names]
HOSTILE += [code_in_a_pickle, code_in_an_old_pickle, code_in_an_npz]


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_file_is_one_line(source, command, tmp_path, attack):
    marker = tmp_path / "marker"
    words = attack(source, marker)
    before = most_memory(reset=True)
    for arguments in (("inspect", source), ("import", source, tmp_path / "out")):
        (line,) = command(*arguments, status=2)
        assert words in line, line
    assert not marker.exists() and not (tmp_path / "out").exists() and most_memory() - before < 100 << 20


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in CONFIGS.items() for text in texts])
def test_a_hostile_config_is_one_line(source, command, tmp_path, name, text):
    (source / f"{name}.json").write_text(text)
    (line,) = command("import", source, tmp_path / "out", status=2)
    assert line.startswith(str(source)) and len(line) < len(str(source)) + 400


def test_a_checkpoint_says_which_part_of_it_was_taken(source, command, tmp_path):
    """A file of torch.save in which the weights lie beside what else a training keeps."""
    arrays = load_file(source / "model.safetensors")
    tensors, storages = {}, {}
    for i, (name, array) in enumerate(arrays.items()):
        stride = tuple(step // 4 for step in array.strides)
        tensors[name], storages[str(i)] = tensor(key=str(i), count=array.size, size=array.shape, stride=stride), array.tobytes()
    program = b"\x80\x02}(" + plain("model") + state_dict(**tensors)[2:-1] + plain("epoch") + plain(3) + b"u."
    file = write_zip(tmp_path / "checkpoint.pth", program, storages)
    note = f"{file}: the weights are those under model; beside them it holds epoch"
    assert command("inspect", file)[-1] == f"note        {note}"
    command("import", file, tmp_path / "out", "--model.heads=2", "--model.gelu=tanh", "--model.norm_eps=1e-12")
    theirs, ours = open_weights(source), open_weights(tmp_path / "out")
    assert all(np.array_equal(value, ours.params[name]) for name, value in theirs.params.items())
    assert spec_from_config(ours.config.model) == spec_from_config(theirs.config.model)
