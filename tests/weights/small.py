"""What the tests of whole commands share: a few pictures and clips of three classes, an experiment on them, and a foreign file made by hand."""

import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import save_file

from tests.tiny import write_clip
from vidjoint.config import base_config, task_config
from vidjoint.models.build import build
from vidjoint.weights.formats.hf_vit import HF_VIT
from vidjoint.weights.pretrained import flat
from vidjoint.weights.translate import TASK, Sizes, back

CLASSES = ("cat", "dog", "1 été")  # the order of the head, which is not that of the alphabet
MODEL = dict(variant="Ti/8", width=16, depth=2, heads=2, mlp_dim=32, frames=2, image_size=16, dtype="float32")
# The same for Hugging Face's configs
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8)


def write_data(folder: Path) -> Path:
    """`pictures.csv` and `clips.csv` with two files of each class, `labels.json`, and `others.csv`, the same pictures with other labels."""
    lines = {"pictures": [], "clips": [], "others": []}
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 5, 3), np.uint8)
        Image.fromarray(pixels).resize((20, 16), Image.Resampling.NEAREST).save(folder / f"{i}.png")
        write_clip(folder / f"{i}.mp4", i, frames=4, size=(16, 24))
        lines["pictures"].append(f'{i}.png;"{CLASSES[i % 3]}"\n')
        lines["others"].append(f"{i}.png;{'xy'[i % 2]}\n")
        lines["clips"].append(f'{i}.mp4;"{CLASSES[i % 3]}"\n')
    for name, rows in lines.items():
        (folder / f"{name}.csv").write_text("".join(rows), encoding="utf-8")
    (folder / "labels.json").write_text(json.dumps(CLASSES), encoding="utf-8")
    return folder


def task_of(data: Path, media: str = "image", **changes) -> ConfigDict:
    train = "pictures.csv" if media == "image" else "clips.csv"
    return task_config(**dict(train=train, media=media, labels="labels.json", sampler="segments") | changes)


def config_of(data: Path, media: str = "image", **model) -> ConfigDict:
    """One update, large enough to be seen, on one task."""
    config = base_config()
    config.update(total_steps=1, batch_size=8, data_root=str(data))
    config.model.update(MODEL | model)
    config.optim.update(name="sgd", schedule="constant", lr=0.05)
    config.data.threads = 1
    config.tasks.animals = task_of(data, media)
    return config


def random_params(config: ConfigDict, classes: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """name -> float32 array, for all parameters of a model; not too large for logits that can be compared at 1e-5."""
    rng = np.random.default_rng(seed)
    shapes = flat(build(config.model, classes).abstract())
    return {name: rng.normal(0.0, 0.2, x.shape).astype(np.float32) + (name.endswith("scale")) for name, x in shapes.items()}


def foreign_arrays(classes: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays of Hugging Face's ViT, with names as its files have them. Its model is MODEL, and its norms have an epsilon of 1e-12."""
    config = base_config()
    config.model.update(MODEL)
    params = random_params(config, {TASK: classes} if classes else {}, seed)
    return back(HF_VIT, params, Sizes(2, 8), lambda name: name if name.startswith("classifier") else f"vit.{name}")


def write_foreign(folder: Path, labels=CLASSES, **config) -> Path:
    """A folder as `ViTForImageClassification.save_pretrained` leaves it; `labels` None: no classifier."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(foreign_arrays(len(labels or ())), folder / "model.safetensors", {"format": "pt"})
    named = {"id2label": {str(i): name for i, name in enumerate(labels)}} if labels else {}
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_act": "gelu_new", **SIZES, **named, **config}))
    return folder
