"""`model.attention=cudnn`: what is asked of cuDNN, and when. As its GPU isn't here, JAX's own attention answers, and the program is lowered only."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidjoint.config import base_config, task_config
from vidjoint.models import layers
from vidjoint.models.build import build
from vidjoint.speed.training import measure_model

ATTEND = jax.nn.dot_product_attention


@pytest.fixture
def asked(monkeypatch):
    """Stands in for a GPU: the shapes of (q, k) that cuDNN is asked for, answered by XLA."""
    shapes = []

    def attend(q, k, v, *, implementation, **others):
        assert implementation == "cudnn" and q.dtype == k.dtype == v.dtype == jnp.bfloat16
        assert q.shape[1] % 2 == k.shape[1] % 2 == 0  # else JAX refuses the gradient
        shapes.append((q.shape, k.shape))
        return ATTEND(q, k, v, implementation="xla", **others)

    monkeypatch.setattr(layers, "has_flash", lambda: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    return shapes


@pytest.mark.parametrize(("queries", "keys"), [(130, 130), (131, 131), (131, 128), (128, 133)])
def test_equals_the_other_in_value_and_gradient(asked, queries, keys):
    rng = np.random.default_rng(0)
    *arrays, weight = (jnp.asarray(rng.normal(size=(2, n, 3, 8)), jnp.bfloat16) for n in (queries, keys, keys, queries))

    def loss(*x, how):
        out = layers.dot_product_attention(*x, how=how)
        return (out * weight).sum(dtype=jnp.float32), out

    sides = [jax.jit(jax.value_and_grad(functools.partial(loss, how=how), (0, 1, 2), has_aux=True))(*arrays) for how in ("cudnn", "xla")]
    even = [n + n % 2 for n in (queries, keys)]
    assert asked == [((2, even[0], 3, 8), (2, even[1], 3, 8))]
    assert sides[0][0][1].shape == weight.shape
    for ours, theirs in zip(*(jax.tree.leaves((out, gradients)) for (_, out), gradients in sides), strict=True):
        error = np.abs(np.asarray(ours, np.float32) - np.asarray(theirs, np.float32))
        assert error.max() < 0.02 * np.abs(np.asarray(theirs, np.float32)).max()  # bfloat16 has 8 bits: 0.4 % each


@pytest.mark.parametrize("why", ["mask", "float32", "few tokens", "few queries", "channels", "wide", "xla", "no GPU"])
def test_where_it_is_not_asked(asked, monkeypatch, why):
    tokens, channels = 127 if why == "few tokens" else 130, {"channels": 12, "wide": 136}.get(why, 8)
    x = jnp.ones((1, tokens, 2, channels), jnp.float32 if why == "float32" else jnp.bfloat16)
    mask = jnp.ones((1, tokens), bool) if why == "mask" else None
    if why == "no GPU":
        monkeypatch.setattr(layers, "has_flash", lambda: False)
    queries = x[:, :1] if why == "few queries" else x
    assert layers.dot_product_attention(queries, x, x, mask, how="xla" if why == "xla" else "cudnn").shape == queries.shape
    assert asked == []


def test_no_gpu_is_here():
    assert layers.has_flash() == (jax.default_backend() == "gpu" and float(jax.local_devices()[0].compute_capability) >= 8)


@pytest.mark.parametrize(("mixer", "tokens"), [("none", 146), ("joint", 290), ("divided", 146), ("token_shift", 146)])
def test_a_model_asks_for_its_long_sequences(asked, mixer, tokens):
    """In all blocks but the last, of which only the class token is read. The operations that `benchmark` counts are those of products."""
    config = base_config()
    config.model.update(variant="Ti/8", width=16, heads=2, depth=4, mlp_dim=16, image_size=96, frames=2, mixer=mixer, attention="cudnn")
    model, pixels = build(config.model, {"a": 3}), jax.ShapeDtypeStruct((1, 2, 96, 96, 3), np.uint8)
    jax.eval_shape(model.logits, model.abstract(), pixels)
    assert [q[1] for q, _ in asked] == 3 * [tokens]
    asked.clear()
    config.tasks.a = task_config(train="x", classes=3)
    figures = measure_model(config)
    config.model.attention = "xla"
    assert asked == [] and figures == measure_model(config)


def test_it_lowers_for_a_gpu(monkeypatch):
    """JAX's names are private here: where they are others, this is skipped."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    answers = {"check_cudnn_version": 91000, "check_compute_capability": True, "is_cuda_compute_capability_equal": False}
    if not all(hasattr(fused, name) for name in answers):
        pytest.skip("this JAX asks for cuDNN's version by other names")
    for name, answer in answers.items():
        monkeypatch.setattr(fused, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(layers, "has_flash", lambda: True)
    x = jax.ShapeDtypeStruct((2, 197, 12, 64), jnp.bfloat16)
    gradient = jax.grad(lambda q, k, v: layers.dot_product_attention(q, k, v, how="cudnn").sum(dtype=jnp.float32), (0, 1, 2))
    text = jax.jit(gradient).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"@(__cudnn\$\w+)", text)) == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    assert "197x197" not in text and "198x198" not in text  # no map is written
