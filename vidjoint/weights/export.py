"""A trained model as files of Hugging Face's transformers, whose own classes then load it and give the same logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from vidjoint.data.examples import ClipSpec
from vidjoint.data.tasks import clip_spec
from vidjoint.errors import UserError
from vidjoint.models.build import spec_from_config
from vidjoint.models.spec import ViTSpec
from vidjoint.weights.files import whole_folder, write_safetensors
from vidjoint.weights.formats.dinov2 import HF_DINOV2, HF_DINOV2_REGISTERS
from vidjoint.weights.formats.hf_vit import HF_VIT
from vidjoint.weights.formats.timesformer import HF_TIMESFORMER
from vidjoint.weights.pretrained import PILLOW, Pretrained
from vidjoint.weights.translate import TASK, Format, Sizes, back

ACTS = {"exact": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}
ATTENTION = {"divided": "divided_space_time", "joint": "joint_space_time"}
TARGETS = {  # --format -> the class that loads it, and its image processor
    "hf_vit": ("ViTForImageClassification", "ViTImageProcessor"),
    "hf_dinov2": ("Dinov2ForImageClassification", "BitImageProcessor"),
    "hf_dinov2_registers": ("Dinov2WithRegistersForImageClassification", "BitImageProcessor"),
    "hf_timesformer": ("TimesformerForVideoClassification", "VideoMAEImageProcessor"),
}


def obstacles(spec: ViTSpec, target: str, clip: ClipSpec | None = None) -> list[str]:
    """What a model, and the task of its classifier with clips of this shape, have that the target's class cannot hold, a few words each; [] if it
    can be exported."""
    wanted: dict[str, Any] = {"embed": ("shared",), "pre_norm": ("none",), "class_token": (True,), "last_norm_eps": (0.0, spec.norm_eps)}
    if target == "hf_timesformer":
        wanted |= {"mixer": ("divided", "joint"), "pool": ("class_token",), "layer_scale": (0.0,), "registers": (0,)}
    elif target == "hf_vit":
        wanted |= {"mixer": ("none",), "pool": ("class_token",), "layer_scale": (0.0,), "registers": (0,)}
    else:
        wanted |= {"mixer": ("none",), "pool": ("class_and_average",)}
    lines = [
        f"model.{key}={getattr(spec, key)}, not {' or '.join(map(str, values))}" for key, values in wanted.items() if getattr(spec, key) not in values
    ]
    if spec.mixer != "none" and not all(map(spec.mixes, range(spec.depth))):
        lines.append(f"model.mixer_blocks={spec.mixer_blocks}, not all blocks")
    if target.startswith("hf_dinov2"):
        lines += [] if spec.layer_scale else ["no LayerScale"]
        lines += [f"{spec.registers} registers"] if (spec.registers > 0) != target.endswith("registers") else []
        lines += [f"an MLP of {spec.mlp_dim}, no multiple of the width"] if spec.mlp_dim % spec.width else []
    if clip and clip.size != (spec.image_size,) * 2:
        lines.append(f"a task of {clip.size[0]} x {clip.size[1]} pixels, not model.image_size={spec.image_size}")
    if clip and target == "hf_timesformer" and clip.frames != spec.frames:
        lines.append(f"a task of {clip.frames} frames, not model.frames={spec.frames}")
    return lines


def choose_target(spec: ViTSpec, target: str, clip: ClipSpec | None = None) -> str:
    """The name in TARGETS: `target` itself, or for "hf" the first that can hold the model and a task of such clips. Raises UserError if it cannot."""
    if target != "hf" and target not in TARGETS:
        raise UserError(f"--format={target} is unknown: choose vidjoint, hf, {', '.join(TARGETS)}")
    found = {name: obstacles(spec, name, clip) for name in (TARGETS if target == "hf" else [target])}
    fitting = [name for name, lines in found.items() if not lines]
    if fitting:
        return fitting[0]
    raise UserError(*(f"{TARGETS[name][0]} cannot hold this model: it has {'; '.join(lines)}" for name, lines in found.items()))


def to_hugging_face(weights: Pretrained, path: str | Path, target: str = "hf", task: str = "") -> str:
    """Writes a folder that `from_pretrained` loads: model.safetensors, config.json, preprocessor_config.json.

    Args:
      target: one of TARGETS, or "hf" for the first that can hold the model.
      task: whose classifier goes along; "" for the only one.

    Returns:
      The name of the class that loads it.

    Raises:
      UserError: no such class can hold the model, there is no such task, or the folder can't be written.
    """
    spec, path = spec_from_config(weights.config.model), Path(path).expanduser()
    if not weights.labels:
        name = TARGETS[choose_target(spec, target)][0]
        raise UserError(f"{weights.source} has no classifier, and {name} is one: train one with --config.init_from={weights.source}")
    if not task and len(weights.labels) != 1:
        raise UserError(f"--task is missing: these weights have {len(weights.labels)} classifiers ({', '.join(weights.labels)}), and one goes along")
    task = task or next(iter(weights.labels))
    if task not in weights.labels:
        raise UserError(f"--task={task}: there is no such task, choose one of {', '.join(weights.labels)}")
    target = choose_target(spec, target, clip_spec(weights.config, task))
    format = {known.name: known for known in (HF_VIT, HF_DINOV2, HF_DINOV2_REGISTERS, HF_TIMESFORMER)}[target]
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there and not empty: give a new folder")
    body = {name: array for name, array in weights.params.items() if not name.startswith("heads/")}
    head = {f"heads/{TASK}/{part}": weights.params[f"heads/{task}/{part}"] for part in ("kernel", "bias")}
    arrays = back(
        format, body | head, Sizes(spec.heads, spec.patch), lambda name: name if name.startswith("classifier") else format.prefixes[0] + name
    )
    if target.startswith("hf_dinov2"):
        arrays[f"{format.prefixes[0]}embeddings.mask_token"] = np.zeros((1, spec.width), np.float32)  # the classes have one, for pretraining
    with whole_folder(path) as part:
        (part / "config.json").write_bytes(_text(_config(weights, spec, format, task)))
        (part / "preprocessor_config.json").write_bytes(_text(_preprocessor(weights, spec, target, task)))
        write_safetensors(part / "model.safetensors", arrays, {"format": "pt"})
    return TARGETS[target][0]


def _config(weights: Pretrained, spec: ViTSpec, format: Format, task: str) -> dict[str, Any]:
    labels = weights.labels[task]
    config = {
        "architectures": [TARGETS[format.name][0]],
        "model_type": format.model_type,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "hidden_act": ACTS[spec.gelu],
        "layer_norm_eps": spec.norm_eps,
        "image_size": spec.image_size,
        "patch_size": spec.patch,
        "num_channels": 3,
        "qkv_bias": True,
        "torch_dtype": "float32",
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
        "problem_type": "multi_label_classification" if weights.config.tasks[task].multilabel else "single_label_classification",
    }
    if format.name.startswith("hf_dinov2"):
        config |= {"mlp_ratio": spec.mlp_dim // spec.width, "use_swiglu_ffn": False}
        return config | ({"num_register_tokens": spec.registers} if spec.registers else {})
    config["intermediate_size"] = spec.mlp_dim
    if format is HF_TIMESFORMER:
        config |= {"num_frames": spec.frames, "attention_type": ATTENTION[spec.mixer]}
    return config


def _preprocessor(weights: Pretrained, spec: ViTSpec, target: str, task: str) -> dict[str, Any]:
    """What the model expects of pictures, as here in evaluation: scaled until they just cover the input, of which the centre is cut out."""
    size, whole = {"height": spec.image_size, "width": spec.image_size}, weights.config.tasks[task].crop == "none"
    interpolation = weights.config.model.interpolation or "bilinear"
    return {
        "image_processor_type": TARGETS[target][1],
        "do_resize": True,
        "size": size if whole else {"shortest_edge": spec.image_size},
        "resample": next(number for number, name in PILLOW.items() if name == interpolation),
        "do_center_crop": not whole,
        "crop_size": size,
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def _text(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
