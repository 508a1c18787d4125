"""The examples of docs/python.md, run as they stand in a folder that has a tiny run in place of the demo's, and a small model in place of B/16."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.tiny import write_clip
from vidjoint import models
from vidjoint.checkpoints import Checkpoints
from vidjoint.config import base_config, task_config
from vidjoint.errors import UserError
from vidjoint.models.build import build
from vidjoint.run_folder import RunFolder

BLOCKS = re.findall(r"^```python\n(.*?)^```", (Path(__file__).parents[1] / "docs" / "python.md").read_text(), re.S | re.M)


def test_examples(tmp_path, monkeypatch, capsys):
    config = base_config()
    config.model.update(variant="Ti/8", width=64, depth=1, heads=2, mlp_dim=16, frames=8, image_size=32, dtype="float32", mixer="token_shift")
    config.tasks.digits = task_config(media="image", train="x")
    config.tasks.motion = task_config(train="x")
    names = {"digits": tuple("0123456789"), "motion": tuple("abcdefgh")}
    RunFolder(tmp_path / "runs/demo").write(config, names)
    params = jax.jit(build(config.model, {"digits": 10, "motion": 8}).init)(jax.random.key(0))
    with Checkpoints(tmp_path / "runs/demo", 1) as checkpoints:
        checkpoints.save(1, {"params": params, "frozen": {}, "ema": {}}, None)
    write_clip(tmp_path / "clip.mp4", 1)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    small, made = dict(depth=1, mlp_dim=32, width=48, attention_heads=2), []
    original = models.build

    def shrunk(name, **settings):
        made.append(original(name, **settings))  # as written, too
        return original(name, **(settings | small))

    monkeypatch.setattr(models, "build", shrunk)
    values = {}
    for block in BLOCKS:
        exec(compile(block, "docs/python.md", "exec"), values)
    said = capsys.readouterr().out
    assert "{'digits': 10, 'motion': 8}" in said and "error" not in said and "model.mixer=" in said
    assert [answer["task"] for answer in values["answers"]] == ["motion", "digits"]
    assert values["same"].shape == (2, 64) and values["tokens"].shape == (1, 8, 197, 48) and values["logits"]["k400"].shape == (1, 400)
    assert jax.tree.structure(values["gradients"]) == jax.tree.structure(values["backbone"].abstract())
    assert [(model.spec.width, model.spec.depth, model.spec.mixer, model.classes) for model in made] == [(768, 12, "divided", (("k400", 400),))]


def test_settings_of_settings_and_mistakes():
    model = models.build("Ti/16", mixer="token_shift", token_shift={"tokens": "all"}, heads={"a": 2, "b": 3}, attention_heads=6)
    assert model.spec.heads == 6 and model.spec.token_shift.tokens == "all"
    assert model.classes == (("a", 2), ("b", 3)) and model.spec.dtype == "float32"
    assert models.build("S/16").classes == ()
    for settings, fault in (
        (dict(mixer="shift"), "model.mixer"),
        (dict(frame=8), "frame"),
        (dict(frames="eight"), "frames"),
        (dict(token_shift={"token": "all"}), "token"),
        (dict(mlp_dim=-1), "mlp_dim"),
        (dict(heads=12), "write task: number of classes"),
    ):
        with pytest.raises(UserError, match=fault):
            models.build("B/16", **settings)
    with pytest.raises(UserError, match="variant"):
        models.build("Q/16")
