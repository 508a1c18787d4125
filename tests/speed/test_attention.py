"""`benchmark --what=attention`: the shapes are the model's, and both kinds are timed where both are there."""

import jax
import numpy as np
import pytest

from vidjoint.benchmark import as_rows
from vidjoint.config import base_config, task_config
from vidjoint.models import layers
from vidjoint.models.build import build
from vidjoint.speed.attention import attention_shapes, measure_attention


def config_of(mixer: str):
    config = base_config()
    config.batch_size = 2 * jax.device_count()
    config.model.update(variant="Ti/8", width=16, heads=2, depth=3, mlp_dim=16, image_size=16, frames=4, mixer=mixer, remat="block", scan=True)
    config.tasks.a = task_config(train="x", classes=3)
    return config


@pytest.mark.parametrize(
    ("mixer", "shapes"),
    [
        ("none", {(8, 5, 5): 2, (8, 1, 5): 1}),  # the last block's class tokens alone
        ("divided", {(8, 5, 5): 2, (8, 1, 5): 1, (8, 4, 4): 3}),  # and four patches of two clips over time
        ("joint", {(2, 17, 17): 2, (2, 1, 17): 1}),
    ],
)
def test_shapes(mixer, shapes):
    model = build(config_of(mixer).model, {"a": 3})
    found = attention_shapes(model, jax.ShapeDtypeStruct((2, 4, 16, 16, 3), np.uint8))
    assert found == {(*shape, 2, 8): count for shape, count in shapes.items()}


@pytest.mark.parametrize("gpu", [False, True])
def test_figures(gpu, monkeypatch):
    attend, times = jax.nn.dot_product_attention, iter(range(1, 100))
    monkeypatch.setattr(layers, "FLASH", 4)
    monkeypatch.setattr("vidjoint.speed.attention.seconds_per_call", lambda call: (jax.block_until_ready(call()), next(times))[1])
    for module in ("models.layers", "speed.attention"):
        monkeypatch.setattr(f"vidjoint.{module}.has_flash", lambda: gpu)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, implementation, **others: attend(*x, implementation="xla", **others))
    figures = measure_attention(config_of("divided"))
    assert figures["examples"] == 2
    assert [(row["sequences"], row["queries"], row["keys"], row["calls"]) for row in figures["rows"]] == [(8, 5, 5, 2), (8, 4, 4, 3), (8, 1, 5, 1)]
    both = [gpu, gpu, False]  # one query is too few
    assert [("cudnn_forward_ms" in row, "cudnn_train_ms" in row) for row in figures["rows"]] == [(there, there) for there in both]
    assert (figures["rows"][0]["xla_forward_ms"], figures["rows"][0]["xla_train_ms"]) == (1000.0, 2000.0)
    lines = as_rows("attention", figures)
    assert lines[1].endswith("timed where it fits" if gpu else "not on this device: it takes an A100 or newer")
    assert lines[2].split() == "2 x 8 sequences, 5 of 5 tokens, 2 heads of 8 ms forward, with gradients".split()
    assert lines[3].split() == ["xla", "1000.000", "2000.000"] and sum("  cudnn " in line for line in lines) == sum(both)
