"""Makes a folder in which a trained model runs without vidjoint: StableHLO or ONNX, labels, preprocessing, and a script that has JAX alone.

python -m vidjoint.export --workdir=DIR --out=FOLDER [--task=NAME] [--frames=T --image_size=S] [--platforms=cpu,cuda,tpu] [--format=stablehlo,onnx]
"""

import argparse
import dataclasses
import importlib.util
import json
import logging
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from vidjoint import __version__, exported
from vidjoint.classifier import parse_step
from vidjoint.data.examples import ClipSpec
from vidjoint.data.tasks import clip_spec
from vidjoint.errors import UserError, command
from vidjoint.models.build import Model, build
from vidjoint.sharding import memory_errors
from vidjoint.step import multilabel_tasks, probabilities
from vidjoint.weights.files import whole_folder
from vidjoint.weights.pretrained import Pretrained, keep_task, open_weights, write_folder

PLATFORMS = ("cpu", "cuda", "tpu", "rocm")
DEVICES = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "tpu": "tpu", "rocm": "rocm"}  # what a device calls its platform -> its name in an export
PACKAGES = {  # format -> what writes it, and how to get that
    "stablehlo": {"flatbuffers": "flatbuffers"},
    "onnx": {"jax2onnx": "'vidjoint[onnx]'", "onnxruntime": "'vidjoint[onnx]'"},
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}  # of probabilities: how far the exported function may be from the model
README = """A trained model that runs without vidjoint, made by vidjoint {version} with JAX {jax}.

{tasks}

{runs}

TASK is one of the tasks above, a CLIP a .npy file with uint8[T, H, W, 3] in RGB, cut as preprocessing.json says, or a video or picture file (for
these pip install av pillow). Each gives a JSON object: path, task, labels, and their scores, the best first.

{files}
labels/TASK.txt       the C class names, one per line
preprocessing.json    how files become pixels
video.py              does that, for the scripts
weights.safetensors   the weights, float32
config.json           with weights.safetensors and labels/, what vidjoint itself needs to open this folder (--workdir)
"""
OF_FORMAT = {  # format -> its lines under "runs" and "files" in the README
    "stablehlo": (
        """    pip install jax               # or 'jax[cuda12]' on a GPU, 'jax[tpu]' on a TPU
    python run.py TASK CLIP...""",
        """TASK.stablehlo        the model for one task, in the format of jax.export: (weights, pixels uint8[B, T, H, W, 3]) -> scores float32[B, C],
                      for any B; weights is a dict, name -> array. It runs with JAX {jax} and releases of the half year after it; later ones may
                      refuse it: then make it anew: python -m vidjoint.export --workdir=THIS_FOLDER --out=NEW
flatbuffers/          the reader of that format, which JAX does not bring (by Google, Apache-2.0)
run.py                the script, to use or to read""",
    ),
    "onnx": (
        """    pip install onnxruntime numpy
    python run_onnx.py TASK CLIP...""",
        """TASK.onnx             the model for one task with its weights: pixels uint8[B, T, H, W, 3] -> scores float32[B, C], for any B
run_onnx.py           the script, to use or to read""",
    ),
}


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vidjoint.export",
        usage="%(prog)s --workdir=DIR --out=FOLDER [--task=NAME] [--frames=T --image_size=S] [--platforms=cpu,cuda,tpu] [--format=stablehlo,onnx]",
        description=__doc__.partition("\n")[0],
        epilog="FOLDER gets TASK.stablehlo for each task, weights.safetensors, labels/, preprocessing.json, run.py (python run.py TASK CLIP... needs "
        "JAX alone) and README.txt, which says the rest. It is a folder of weights as well, for --workdir of predict, evaluate and export, for "
        "init_from and vidjoint.load.",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of a training run or of weights, or another project's weights")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--task", metavar="NAME", help="export this task's classifier alone (default: all)")
    parser.add_argument("--frames", type=int, metavar="T", help="frames of a clip (default: the task's; pictures have one)")
    parser.add_argument("--image_size", metavar="S", help="height and width in pixels, S or HxW (default: the task's)")
    parser.add_argument(
        "--platforms",
        default="cpu,cuda,tpu",
        metavar="LIST",
        help="of StableHLO: cpu, cuda, tpu, rocm; none need be here (default: cpu,cuda,tpu)",
    )
    parser.add_argument("--format", default="stablehlo", metavar="LIST", help="stablehlo, onnx or both, comma-separated (default: stablehlo)")
    parser.add_argument("--step", metavar="N", help="checkpoint to export, a number or best (default: the newest)")
    args = parser.parse_args(argv)
    platforms, formats = _words("--platforms", args.platforms, PLATFORMS), _words("--format", args.format, tuple(PACKAGES))
    needed = {package: source for name in formats for package, source in PACKAGES[name].items()}
    if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
        raise UserError(*(f"the package {package} is missing: pip install {needed[package]}" for package in missing))
    out = Path(args.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={args.out} is there and not empty: give a new folder")
    weights = _shaped(_open(args.workdir, args.step, args.task), args.frames, args.image_size)
    print("\n".join(export(weights, out, platforms, formats)))
    return 0


def export(weights: Pretrained, out: Path, platforms: tuple[str, ...], formats: tuple[str, ...] = ("stablehlo",)) -> list[str]:
    """Writes the folder, whole or not at all; returns a line for each task.

    Each function is read back and run on two random clips, if this machine has one of its platforms.

    Raises:
      UserError: the model cannot take clips of that size, what was written differs from it, or the folder cannot be written.
    """
    config, params = weights.config, traverse_util.unflatten_dict(weights.params, sep="/")
    model = build(config.model, {task: len(names) for task, names in weights.labels.items()})
    model = dataclasses.replace(model, spec=dataclasses.replace(model.spec, attention="xla"))  # which all platforms have
    clips = {task: clip_spec(config, task) for task in weights.labels}
    for clip in clips.values():
        _check_shape(model, clip)
    lines = []
    with whole_folder(out) as part:
        write_folder(weights, part)
        for task, clip in tqdm(clips.items(), "export", disable=None, delay=2, leave=False, unit=" tasks"):
            scores, notes = scores_of(model, task, task in multilabel_tasks(config)), []
            pixels = np.random.default_rng(0).integers(0, 256, (2, *clip.shape), np.uint8)
            with memory_errors("lower --frames or --image_size"):
                wanted = np.asarray(jax.jit(scores)(params, pixels))
                if "stablehlo" in formats:
                    found = _write_stablehlo(part / f"{task}.stablehlo", scores, params, pixels, platforms)
                    notes.append(f"{', '.join(platforms)}: {_compared(task, found, wanted, config.model.dtype)}")
                if "onnx" in formats:
                    found = _write_onnx(part / f"{task}.onnx", scores, params, pixels)
                    notes.append(f"onnx: {_compared(task, found, wanted, config.model.dtype)}")
            lines.append(f"{task}: uint8[B, {', '.join(map(str, clip.shape))}] -> float32[B, {wanted.shape[1]}], {'; '.join(notes)}")
        settings = {task: _preprocessing(clip, task in multilabel_tasks(config)) for task, clip in clips.items()}
        made = {"vidjoint": __version__, "jax": jax.__version__, "formats": formats, "platforms": platforms}
        (part / "preprocessing.json").write_text(json.dumps({"made_with": made, "tasks": settings}, indent=2) + "\n", encoding="utf-8")
        runs, files = ("\n".join(OF_FORMAT[name][i] for name in formats).format(jax=jax.__version__) for i in (0, 1))
        (part / "README.txt").write_text(
            README.format(version=__version__, jax=jax.__version__, tasks="\n".join(lines), runs=runs, files=files), encoding="utf-8"
        )
        for name in ("video.py", *({"stablehlo": "run.py", "onnx": "run_onnx.py"}[name] for name in formats)):
            shutil.copyfile(Path(exported.__file__).with_name(name), part / name)
        if "stablehlo" in formats:
            source = Path(importlib.util.find_spec("flatbuffers").origin).parent
            shutil.copytree(source, part / "flatbuffers", ignore=shutil.ignore_patterns("__pycache__"))
    return lines


def scores_of(model: Model, task: str, multilabel: bool) -> Callable[[dict, jax.Array], jax.Array]:
    """The function that is exported: (parameters, pixels uint8[B, T, H, W, 3]) -> probabilities float32[B, C]."""
    return lambda params, pixels: probabilities(model.logits(params, pixels)[task], multilabel)


def serialise(scores: Callable, params: dict, shape: tuple[int, ...], platforms: tuple[str, ...]) -> bytes:
    """`scores` for clips uint8[B, *shape] with any B as jax.export writes it; its first argument there is flat, {"blocks/0/...": array}."""
    flat = {name: jax.ShapeDtypeStruct(array.shape, jnp.float32) for name, array in traverse_util.flatten_dict(params, sep="/").items()}
    (batch,) = jax.export.symbolic_shape("B")
    function = jax.jit(lambda weights, pixels: scores(traverse_util.unflatten_dict(weights, sep="/"), pixels))
    return bytes(jax.export.export(function, platforms=platforms)(flat, jax.ShapeDtypeStruct((batch, *shape), jnp.uint8)).serialize())


def _write_stablehlo(file: Path, scores: Callable, params: dict, pixels: np.ndarray, platforms: tuple[str, ...]) -> np.ndarray | None:
    """Returns what the written function gives for `pixels`; None if it is not for the device here."""
    file.write_bytes(serialise(scores, params, pixels.shape[1:], platforms))
    if DEVICES.get(jax.devices()[0].platform) not in platforms:
        return None
    function = jax.export.deserialize(bytearray(file.read_bytes()))
    return np.asarray(jax.jit(function.call)(traverse_util.flatten_dict(params, sep="/"), pixels))


def _write_onnx(file: Path, scores: Callable, params: dict, pixels: np.ndarray) -> np.ndarray:
    """Likewise; the file holds the weights."""
    import jax2onnx
    import onnxruntime

    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it has a line for every shape
    (batch,) = jax.export.symbolic_shape("B")
    inputs = [jax.ShapeDtypeStruct((batch, *pixels.shape[1:]), jnp.uint8)]
    names = dict(input_names=["pixels"], output_names=["scores"], model_name=file.stem)
    with mock.patch.object(jax.lax, "platform_dependent", _one_platform), warnings.catch_warnings(action="ignore"):
        jax2onnx.to_onnx(lambda pixels: scores(params, pixels), inputs, return_mode="file", output_path=file, **names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file, options).run(["scores"], {"pixels": pixels})[0]


def _one_platform(*args, default: Callable, **platforms: Callable):
    """In place of jax.lax.platform_dependent: ONNX has one form for all devices. What is made for XLA's CPUs would be no good to other runtimes."""
    return default(*args)


def _compared(task: str, found: np.ndarray | None, wanted: np.ndarray, dtype: str) -> str:
    """What is said of scores that a written function gives. Raises UserError if they are not the model's."""
    if found is None:
        return f"not tried, for here is {jax.devices()[0].platform}"
    difference = float(np.abs(found - wanted).max())
    if not difference <= TOLERANCE[dtype]:
        raise UserError(f"{task}: the exported scores differ from the model's by {difference:.1e}: report this, with the run's config.json")
    return f"tried here, scores within {difference:.0e} of the model's" if difference else "tried here, the model's scores to the bit"


def _words(flag: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(word.strip().lower() for word in text.split(",") if word.strip()))
    if not chosen or set(chosen) - set(known):
        raise UserError(f"{flag}={text}: write one or more of {', '.join(known)}, comma-separated")
    return chosen


def _open(workdir: str, step: str | None, task: str | None) -> Pretrained:
    """The weights with the classifier of one task, or with all. Raises UserError if there is no such one, or none."""
    weights = open_weights(workdir, parse_step(step))
    if weights.unexplained:
        raise UserError(f"{workdir}: nothing is known of {weights.unexplained[0]}: turn it into a folder with python -m vidjoint.weights import")
    if not weights.labels:
        raise UserError(f"{workdir} has no classifier: train one with --config.init_from={workdir}")
    if task and task not in weights.labels:
        raise UserError(f"--task={task}: there is no such task, choose one of {', '.join(weights.labels)}")
    return keep_task(weights, task) if task else weights


def _shaped(weights: Pretrained, frames: int | None, image_size: str | None) -> Pretrained:
    """The same with another clip shape in its tasks' settings, where one is given."""
    if frames is not None and frames < 1:
        raise UserError(f"--frames={frames}: at least 1")
    if image_size is not None and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", image_size):
        raise UserError(f"--image_size={image_size}: write the side of a square in pixels, or height x width, as in 224 or 224x320")
    for task in weights.labels:
        settings = weights.config.tasks[task]
        if frames is not None and settings.media == "video":
            settings.frames = frames
        if image_size is not None:
            height, _, width = image_size.partition("x")
            settings.image_size = int(height), int(width or height)
    return weights


def _check_shape(model: Model, clip: ClipSpec) -> None:
    """Raises UserError if the model cannot take such clips."""
    try:
        jax.eval_shape(model.logits, model.abstract(), jax.ShapeDtypeStruct((1, *clip.shape), jnp.uint8))
    except ValueError as error:
        raise UserError(f"{error}: choose other --frames or --image_size") from error


def _preprocessing(clip: ClipSpec, multilabel: bool) -> dict:
    """How a file becomes the function's input: one view, in words and numbers that video.py follows."""
    settings, (height, width) = clip.settings, clip.size
    return {
        "media": settings.media,
        "frames": clip.frames,
        "height": height,
        "width": width,
        "channels": "RGB, 0..255; normalisation is in the function",
        # T frames, from the middles of T equal parts of the video (null) or of so many seconds in its middle
        "window_seconds": settings.window_seconds if settings.sampler == "window" else None,
        "crop": "none" if settings.crop == "none" else "middle",  # of the picture scaled to cover the input; none: it is scaled to the input
        "interpolation": clip.interpolation,
        "scores": "sigmoid of each class" if multilabel else "softmax",
    }


if __name__ == "__main__":
    sys.exit(main())
