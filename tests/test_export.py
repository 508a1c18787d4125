"""The export command: what it writes runs without this package, with JAX alone, and gives the same scores."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import vidjoint
from tests import tiny
from tests.data.test_video import numbered, write
from vidjoint import export, exported
from vidjoint.config import base_config
from vidjoint.data.examples import ClipSpec, views
from vidjoint.data.tasks import clip_spec
from vidjoint.models.build import build

pytest.importorskip("flatbuffers", reason="jax.export writes in its format: pip install flatbuffers")

ONLY_JAX = ("jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum")  # what `pip install jax` brings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.make_run(tmp_path_factory)


@pytest.fixture(scope="module")
def loaded(run):
    return vidjoint.load(run)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """The run, exported by the command."""
    out = tmp_path_factory.mktemp("export") / "out"
    assert export.main([f"--workdir={run}", f"--out={out}"]) == 0
    return out


@pytest.fixture
def command(run, tmp_path, capsys):
    """Runs the command; returns its exit status, lines on standard output and on standard error."""

    def call(*arguments, workdir=run, out=tmp_path / "out"):
        status = export.main([f"--workdir={workdir}", f"--out={out}", *arguments])
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return call


def middle_view(loaded, task, file):
    """uint8[T, H, W, 3]: what this package makes of a file."""
    spec = clip_spec(loaded.config, task)
    return views({spec.settings.media: str(file)}, spec, 1, 1)[0]


def test_the_script_runs_without_this_package(folder, loaded, tmp_path):
    """Where nothing but JAX is installed; same top-1 and scores as the model, for clips of a batch size of its own."""
    site = tmp_path / "site"
    site.mkdir()
    for package in ONLY_JAX:
        place = Path(importlib.util.find_spec(package).origin).parent
        for path in (place, place.with_name(f"{package}.libs")):
            if path.exists():
                (site / path.name).symlink_to(path)
    pixels = np.random.default_rng(3).integers(0, 256, (3, *clip_spec(loaded.config, "clips").shape), np.uint8)
    files = [str(tmp_path / f"{i}.npy") for i in range(3)]
    for file, clip in zip(files, pixels, strict=True):
        np.save(file, clip)
    environment = {"PYTHONPATH": str(site), "PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"}
    call = [sys.executable, "-S", folder / "run.py", "clips", *files]
    result = subprocess.run(call, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=100)
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["path"] for answer in answers] == files and {answer["task"] for answer in answers} == {"clips"}
    for answer, scores in zip(answers, np.asarray(jax.nn.softmax(loaded.logits(pixels, "clips"))), strict=True):
        best = np.argsort(-scores)[:5]
        assert answer["labels"] == [loaded.labels["clips"][c] for c in best]
        np.testing.assert_allclose(answer["scores"], scores[best], atol=1e-5)


def test_the_script_is_short():
    """As promised: without docstring, comments and blank lines."""
    _, _, code = Path(exported.__file__).with_name("run.py").read_text().split('"""')
    assert len([line for line in code.splitlines() if line.strip() and not line.lstrip().startswith("#")]) < 30


def test_the_script_says_what_is_wrong(folder, tmp_path):
    def said(*arguments) -> str:
        result = subprocess.run([sys.executable, folder / "run.py", *arguments], capture_output=True, text=True, timeout=100)
        assert result.returncode == 1
        return result.stderr

    usage = "usage: python run.py TASK CLIP...   TASK: clips, stills\n"
    assert [said(), said("clips"), said("clip", "a.npy")] == [usage] * 3
    with wave.open(str(tmp_path / "sound.wav"), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(bytes(8000))
    for file in ("missing.npy", "sound.wav"):
        (line,) = said("clips", tmp_path / file).splitlines()
        assert line.startswith("error: ") and file in line


def reader(folder):
    """The folder's own reader of video and picture files."""
    spec = importlib.util.spec_from_file_location("exported_video", folder / "video.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, json.loads((folder / "preprocessing.json").read_text())["tasks"]


def test_files_become_the_same_pixels(folder, loaded, run):
    """Videos of two shapes and PNG files, to the last bit."""
    module, settings = reader(folder)
    for task, pattern in (("clips", "clips/*.mp4"), ("stills", "stills/val/*/*.png")):
        for file in sorted((run / "data").glob(pattern))[:4]:
            np.testing.assert_array_equal(module.read(str(file), settings[task]), middle_view(loaded, task, file))


def test_real_files_become_the_same_pixels(folder, loaded, shared_data):
    """Clips of several codecs, with variable frame rates, edit lists and rotation; uniform frames and a window; cut out or scaled."""
    module, _ = reader(folder)
    files = [*sorted((shared_data / "clips").glob("*.[mawf]*"))[:8], *sorted((shared_data / "gestures").rglob("*.mp4"))[:4]]
    files += (shared_data / "nasty_video" / "rotation").glob("decord*")
    assert len(files) > 8
    for i, file in enumerate(files):
        for sampler, crop in (("window", "none"), ("uniform", "short_side"))[i % 2 :]:
            task = loaded.config.tasks.clips.copy_and_resolve_references()
            task.update(sampler=sampler, crop=crop, window_seconds=1.1)
            spec = ClipSpec(task, 3, (40, 56), loaded.config.data.max_pixels, "bicubic")
            made = export._preprocessing(spec, False)
            np.testing.assert_array_equal(module.read(str(file), made), views({"video": str(file)}, spec, 1, 1)[0], err_msg=file.name)


def odd_files(folder) -> dict[str, Path]:
    """Files whose heads tell little or mislead, and what they are to a task."""
    pictures = [numbered(i) for i in range(40)]
    names = "mirrored.mp4 turned.mp4 moving.gif b_frames.avi late.mkv no_duration.mkv slow_end.mp4 dropped.avi grey.pgm deep.png large.jpg turned.jpg"
    files = {name: folder / name for name in names.split()}
    first, *rest = (Image.fromarray(picture) for picture in pictures)
    first.save(files["moving.gif"], save_all=True, append_images=rest, duration=40)
    write(files["mirrored.mp4"], pictures, matrix=(0, True, False))
    write(files["turned.mp4"], pictures, matrix=(90, True, False))
    write(files["b_frames.avi"], pictures, gop=12)
    write(files["slow_end.mp4"], pictures, stamps=np.cumsum([0] + [12] * 34 + [90] * 5))
    write(files["dropped.avi"], pictures, stamps=np.cumsum([0] + [10, 20, 60] * 13), b_frames=0)
    write(files["late.mkv"], pictures, stamps=1200 + 20 * np.arange(40))
    with open(files["no_duration.mkv"], "wb") as file:
        write(NoSeek(file), pictures, container="matroska")
    deep = np.random.default_rng(0).integers(0, 2**16, (30, 40), np.uint16)
    files["grey.pgm"].write_bytes(b"P5 40 30 65535\n" + deep.astype(">u2").tobytes())
    Image.fromarray(deep).save(files["deep.png"])
    for name, orientation in (("large.jpg", 1), ("turned.jpg", 6)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray((deep >> 8).astype(np.uint8)).resize((400, 300)).save(files[name], exif=exif)  # some ten times what is wanted of it
    return files


class NoSeek:
    """A stream that can only be written on, as a pipe: what is known at the end alone is missing in its head."""

    def __init__(self, file):
        self.write = file.write


@pytest.mark.parametrize("task", ["clips", "stills"])
def test_odd_files_become_the_same_pixels(folder, loaded, tmp_path, task):
    module, settings = reader(folder)
    spec = clip_spec(loaded.config, task)
    for name, file in odd_files(tmp_path).items():
        media = "image" if name.endswith((".pgm", ".png", ".jpg")) or (name.endswith(".gif") and task == "stills") else "video"
        want = np.broadcast_to(views({media: str(file)}, spec, 1, 1)[0], spec.shape)  # a picture is shown all the time
        np.testing.assert_array_equal(module.read(str(file), settings[task]), want, err_msg=name)


def test_the_folder_is_one_of_weights(folder, loaded, command, tmp_path):
    """This package opens it, and exports it again: with other sizes of clips, and one task alone."""
    again = vidjoint.load(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *clip_spec(loaded.config, "clips").shape), np.uint8)
    np.testing.assert_array_equal(again.logits(pixels, "clips"), loaded.logits(pixels, "clips"))
    status, lines, errors = command("--task=clips", "--frames=2", "--image_size=16x32", "--platforms=tpu", workdir=folder)
    assert status == 0 and not errors, errors
    assert lines == ["clips: uint8[B, 2, 16, 32, 3] -> float32[B, 8], tpu: not tried, for here is cpu"]
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.stablehlo")) == ["clips.stablehlo"]
    function = jax.export.deserialize(bytearray((out / "clips.stablehlo").read_bytes()))
    assert function.platforms == ("tpu",) and str(function.in_avals[-1].shape) == "(B, 2, 16, 32, 3)"
    assert list(vidjoint.load(out).labels) == ["clips"] and vidjoint.load(out).config.tasks.clips.frames == 2


MIXERS = {
    "none": dict(pool="temporal_encoder"),
    "divided": dict(embed="separate", tubelet=2),
    "joint": {},
    "token_shift": {},
    "motion": dict(pool="class_attention", class_token=False),
    "am_flow": dict(pool="last_frame"),
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_for_every_platform(mixer):
    """Traced for a batch of unknown size and compiled nowhere: no operation may be one platform's own without a promise to stay."""
    config = base_config()
    config.model.update(variant="Ti/8", width=16, depth=1, heads=2, mlp_dim=32, frames=4, image_size=16, mixer=mixer, **MIXERS[mixer])
    config.model.am_flow.update(bottleneck=8, flow="aligned", encoder_width=8, encoder_mlp=8, encoder_heads=2, tpu="lstm", tpu_width=8)
    config.model.temporal_encoder.depth = 1
    model = build(config.model, {"a": 3})  # bfloat16, as on the devices that it is meant for
    written = export.serialise(export.scores_of(model, "a", True), model.abstract(), (4, 16, 16, 3), export.PLATFORMS)
    assert jax.export.deserialize(bytearray(written)).platforms == export.PLATFORMS


def test_onnx(run, loaded, command, tmp_path):
    pytest.importorskip("jax2onnx", reason="pip install 'vidjoint[onnx]'")
    onnxruntime = pytest.importorskip("onnxruntime")
    status, lines, _ = command("--task=clips", "--format=onnx")
    assert status == 0 and "onnx: tried here" in lines[0]
    out = tmp_path / "out"
    assert not list(out.glob("*.stablehlo")) and not (out / "run.py").exists()
    pixels = np.random.default_rng(0).integers(0, 256, (5, *clip_spec(loaded.config, "clips").shape), np.uint8)
    scores = onnxruntime.InferenceSession(out / "clips.onnx").run(None, {"pixels": pixels})[0]
    np.testing.assert_allclose(scores, jax.nn.softmax(loaded.logits(pixels, "clips")), atol=1e-4)
    np.save(tmp_path / "x.npy", pixels[0])
    result = subprocess.run([sys.executable, out / "run_onnx.py", "clips", tmp_path / "x.npy"], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0 and json.loads(result.stdout)["labels"][0] == loaded.labels["clips"][scores[0].argmax()], result.stderr


def test_mistakes_are_one_line_each(command, tmp_path, run):
    full = tmp_path / "full"
    shutil.copytree(run / "labels", full)
    cases = {
        ("--task=cups",): "--task=cups: there is no such task, choose one of clips, stills",
        ("--frames=0",): "--frames=0: at least 1",
        ("--image_size=7",): "frames of 7 x 7 pixels cannot be cut into patches of 8",
        ("--image_size=-8",): "--image_size=-8",
        ("--platforms=cpu,gpu",): "--platforms=cpu,gpu: write one or more of cpu, cuda, tpu, rocm",
        ("--format=pb",): "--format=pb",
        ("--step=7",): "no checkpoint of step 7",
    }
    for arguments, line in cases.items():
        status, lines, errors = command(*arguments)
        assert status == 2 and not lines and len(errors) == 1 and line in errors[0], (arguments, errors)
    assert "not empty" in command(out=full)[2][0] and "config.json" in command(workdir=full)[2][0]
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_function_that_is_not_the_model_is_refused(command, tmp_path, monkeypatch):
    """And nothing is left of the folder."""
    monkeypatch.setattr(export, "_write_stablehlo", lambda *_: np.zeros((2, len(tiny.CLIPS)), np.float32))
    status, lines, errors = command("--task=clips")
    assert status == 2 and not lines and "differ from the model's" in errors[0] and not list(tmp_path.iterdir())
