"""AM Flow against NumPy (eqs. 1-6), and what the paper says of it: a frozen image model, branches, parameter counts, and memory.

Parts are tested by themselves where they can be: they compile faster than models.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import am_flow_k400, am_flow_smarthome, am_flow_ssv2
from configs.am_flow_base import FROZEN
from tests.models import oracles
from tests.models import oracles_am_flow as oracle
from vidjoint import optim
from vidjoint.config import base_config, task_config
from vidjoint.models.adapters import ADAPTERS
from vidjoint.models.build import Model, build, count_parameters, spec_from_config
from vidjoint.models.mixers.am_flow import KEYS, AMFlow, attention_map, each_frame, received, vanilla_flow
from vidjoint.models.spec import AMFlowSpec, ViTSpec
from vidjoint.models.tpu import TPU, EncoderLayer, linear_attention
from vidjoint.step import init_state, make_train_step

SMALL = AMFlowSpec(bottleneck=8, hyper_width=4, encoder_width=12, encoder_mlp=20, encoder_heads=3, tpu_width=6, tpu_layers=2, tpu_mlp=12, tpu_heads=2)
TINY = ViTSpec(width=16, depth=2, heads=2, mlp_dim=24, patch=8, frames=4, image_size=16, mixer="am_flow", pool="last_frame")


def settings(**changes) -> AMFlowSpec:
    return dataclasses.replace(SMALL, **changes)


def tiny(spec: dict | None = None, **changes) -> Model:
    return Model(dataclasses.replace(TINY, am_flow=settings(**changes), **(spec or {})), (("actions", 5),))


def random_like(tree, seed: int = 0):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [rng.normal(scale=0.3, size=x.shape).astype(np.float32) for x in leaves])


def made(make):
    """The module that `make(rngs)` builds, with every parameter random, and these parameters for the oracle."""
    graph, state = nnx.eval_shape(lambda: nnx.split(make(nnx.Rngs(0))))
    module = nnx.merge(graph, random_like(state))
    return module, oracles.params_of(module)


def run(module, *inputs):
    """Compiled whole: one by one, the operations take far longer to compile."""
    return np.asarray(jax.jit(lambda *inputs: module(*inputs))(*inputs))


def normal(*shape, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


FLOWS = [  # settings, and the number of registers
    (dict(flow="vanilla"), 0),
    (dict(flow="vanilla", flow_heads="each", flow_tokens="patches", flow_softmax="queries", flow_last="repeat"), 0),
    (dict(flow="vanilla"), 2),
    (dict(flow="vanilla", flow_tokens="patches"), 2),
    (dict(flow="aligned"), 0),
    (dict(flow="aligned", flow_heads="each", flow_tokens="patches", flow_softmax="queries"), 2),
    (dict(flow="aligned", flow_heads="each", flow_map="logits", encoder_input="tokens", flow_last="repeat"), 2),
    (dict(flow="aligned", flow_tokens="patches", encoder_input="tokens"), 2),
]


@pytest.mark.parametrize(("changes", "registers"), FLOWS, ids=lambda x: "-".join(x.values()) if isinstance(x, dict) else f"{x} registers")
def test_flow_equals_its_definition(changes, registers):
    """Equations 2 to 5."""
    spec = dataclasses.replace(TINY, registers=registers, am_flow=settings(**changes))
    mixer, params = made(lambda rngs: AMFlow(spec, 0, rngs))
    special = 1 + registers
    q, k = (normal(2, 4, special + 4, 2, 8, seed=seed) for seed in (1, 2))
    flow = run(mixer.flow, q, k)
    assert flow.shape == (2, 4, special + 4, 2 if changes.get("flow_heads") == "each" else 1) and flow.dtype == jnp.float32
    np.testing.assert_allclose(flow, oracle.flow(q, k, spec.am_flow, special, params.get("encoder")), atol=1e-5)
    assert not flow[:, :, :special].any() and not np.any(mixer.flow(q[:, :1], k[:, :1]))  # class token and registers; a clip of one frame


def test_flow_is_where_the_picture_changes():
    q, k = normal(1, 1, 5, 2, 8, seed=1).repeat(3, 1), normal(1, 1, 5, 2, 8, seed=2).repeat(3, 1)
    k[:, 2, 3] = -k[:, 2, 3]  # token 3 changes between the second and the third frame
    spec = dataclasses.replace(TINY, am_flow=settings(flow="vanilla"))
    flow = run(made(lambda rngs: AMFlow(spec, 1, rngs))[0].flow, q, k)[0, ..., 0]
    np.testing.assert_allclose(flow[0], [0, 1, 1, 1, 1], atol=1e-6)  # a softmax over zeros, summed over the queries
    assert flow[1, 3] > 1.2 and (flow[1, [1, 2, 4]] < 1).all()
    spec = dataclasses.replace(TINY, am_flow=settings(flow="aligned"))
    flow = run(made(lambda rngs: AMFlow(spec, 1, rngs))[0].flow, q, k)[0, ..., 0]
    assert not flow[0].any() and flow[1, 1:].all()


def directional(function, arguments, step=1e-6):
    """Gradient along a random direction: by differentiation, and by central differences."""
    directions = random_like(arguments, seed=7)
    gradient = jax.tree.map(np.asarray, jax.jit(jax.grad(function, argnums=tuple(range(len(arguments)))))(*arguments))
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, directions)))
    ends = [function(*jax.tree.map(lambda a, d, sign=sign: a + sign * step * d, arguments, directions)) for sign in (1, -1)]
    return slope, (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize("axis", [-1, -2])
def test_gradient_of_vanilla_flow(axis):
    with jax.enable_x64():
        q, k, weights = (np.float64(normal(*shape, seed=i)) for i, shape in enumerate([(4, 2, 5, 3), (4, 2, 5, 3), (3, 2, 5)]))
        slope, expected = directional(jax.jit(lambda q, k: (vanilla_flow(q, k, 0.7, axis) * weights).sum()), (q, k))
        assert slope.dtype == jnp.float64 and abs(expected) > 0.01
        np.testing.assert_allclose(slope, expected, rtol=1e-7)


def test_gradient_of_what_is_done_to_each_frame():
    def mixed(params, q, k):
        return jnp.tanh(received(attention_map(q, k, 0.7), KEYS) @ params["a"] + params["b"])

    with jax.enable_x64():
        params = {"a": np.float64(normal(5, 5)), "b": np.float64(normal(5, seed=2))}
        q, k, weights = (np.float64(normal(*shape, seed=i)) for i, shape in enumerate([(4, 2, 5, 3), (4, 2, 5, 3), (4, 2, 5)]))
        slope, expected = directional(jax.jit(lambda *arguments: (each_frame(mixed, *arguments) * weights).sum()), (params, q, k))
        assert abs(expected) > 0.01
        np.testing.assert_allclose(slope, expected, rtol=1e-7)


@pytest.mark.parametrize("kind", ["vanilla", "aligned"])
def test_flow_keeps_no_map_for_the_backward_pass(kind):
    """As many frames as one likes: the memory is that of a few maps of one frame."""
    frames, tokens = 32, 128

    def loss(q, k):
        flow = vanilla_flow(q, k, 1.0, KEYS) if kind == "vanilla" else each_frame(lambda _, q, k: received(attention_map(q, k, 1.0), KEYS), (), q, k)
        return (flow**2).sum()

    inputs = [jax.ShapeDtypeStruct((frames, 1, tokens, 8), jnp.float32)] * 2
    memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*inputs).compile().memory_analysis().temp_size_in_bytes
    assert memory < 12 * 4 * tokens**2 < frames * 4 * tokens**2


def test_linear_attention_equals_its_definition():
    q, k, v = (normal(2, 5, 3, 4, seed=i) for i in range(3))
    out = jax.jit(linear_attention)(q, k, v)
    expected = [[oracle.linear_attention(q[s, :, h], k[s, :, h], v[s, :, h]) for h in range(3)] for s in range(2)]
    np.testing.assert_allclose(out, np.moveaxis(expected, 1, 2), atol=1e-5)


def test_encoder_layer_equals_its_definition():
    layer, params = made(lambda rngs: EncoderLayer(12, 3, 20, linear_attention, jnp.float32, rngs))
    x = normal(2, 5, 12)
    np.testing.assert_allclose(run(layer, x), [oracle.encoder_layer(s, params, 3, oracle.linear_attention) for s in x], atol=1e-5)


UNITS = [
    (dict(tpu="transformer"), 5),
    (dict(tpu="transformer", tpu_squeeze="last", tpu_sequence="tokens"), 3),
    (dict(tpu="tcn", tpu_layers=3), 5),
    (dict(tpu="tcn", tpu_width=8, tpu_squeeze="mean", tpu_sequence="tokens"), 1),
    (dict(tpu="lstm"), 5),
    (dict(tpu="lstm", tpu_squeeze="mean", tpu_sequence="tokens"), 1),
]


@pytest.mark.parametrize(
    ("changes", "frames"), UNITS, ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else f"{value}"
)
def test_temporal_processing_units_equal_their_definition(changes, frames):
    spec = dataclasses.replace(TINY, am_flow=settings(**changes))
    unit, params = made(lambda rngs: TPU(spec, rngs))
    embedding = np.maximum(normal(2, frames, 3, 8), 0)
    output = run(unit, embedding)
    assert output.shape == (2, unit.width)
    np.testing.assert_allclose(output, oracle.tpu(embedding, params, spec.am_flow), atol=1e-5)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_equal_their_definition(kind):
    """Equations 1 and 6, with the flow of two heads, and without; hyperformer and compacter with what they share."""
    spec = dataclasses.replace(TINY, am_flow=settings(adapter=kind, flow_heads="each", double_residual=kind in ("serial", "compacter")))
    shared, common = made(lambda rngs: ADAPTERS[kind].make_shared(spec, rngs)) if kind in ("hyperformer", "compacter") else (None, None)
    parts = [made(lambda rngs, i=i: ADAPTERS[kind](spec, (1, i), 2 - 2 * i, rngs)) for i in (0, 1)]
    residual, x, flow = normal(2, 3, 5, 16, seed=1), normal(2, 3, 5, 16, seed=2), np.abs(normal(2, 3, 5, 2, seed=3))
    results = jax.jit(lambda: [parts[0][0](residual, x, flow, shared), parts[1][0](residual, x, None, shared)])()
    for i, (result, (_, params)) in enumerate(zip(results, parts, strict=True)):
        expected = oracle.adapter(residual, x, None if i else flow, params, common, spec.am_flow, (1, i))
        for found, wanted in zip(result, expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5)


features = jax.jit(Model.features, static_argnums=0)


def clip(frames: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, frames, 16, 16, 3), dtype=np.uint8)


MODELS = [
    (dict(mixer_blocks=(-1,), layer_scale=0.1), dict(flow="vanilla", tpu="transformer"), 4),
    (dict(depth=1, layer_scale=0.1), dict(flow="none", adapter="serial", tpu="lstm"), 3),
    ({}, dict(flow="aligned", adapter="hyperformer", tpu="tcn"), 3),
    (dict(depth=1), dict(flow="aligned", flow_last="repeat", adapter="compacter", tpu="transformer"), 1),
]


@pytest.mark.parametrize(("spec", "changes", "frames"), MODELS, ids=["vanilla", "serial without flow", "hyperformer aligned", "compacter one frame"])
def test_whole_models_equal_their_definition(spec, changes, frames):
    model = tiny(spec, **changes)
    params = random_like(model.abstract())
    found = features(model, params, clip(frames))
    blocks = sum(model.spec.mixes(i) for i in range(model.spec.depth))
    width = 8 if changes["tpu"] == "transformer" else 6
    assert found.shape == (2, 16 + 2 * blocks * width)  # two units in each AM block, and the image model's last frame
    np.testing.assert_allclose(found, oracle.features(clip(frames), oracles.numpy_tree(params), model.spec), atol=1e-5)


def test_logits_are_the_mean_of_the_branches_logits():
    """Classification head: of the image model's last frame and of two units in each AM block, with a kernel for each of them."""
    model = Model(dataclasses.replace(TINY, mixer_blocks=(-1,), am_flow=settings(flow="vanilla", tpu="tcn")), (("actions", 5), ("digits", 3)))
    params = random_like(model.abstract())
    tree = oracles.numpy_tree(params)
    parts = np.split(oracle.features(clip(3), tree, model.spec), [16, 22], axis=-1)
    assert [part.shape for part in parts] == [(2, 16), (2, 6), (2, 6)]
    logits = jax.jit(model.logits)(params, clip(3))
    assert set(logits) == {"actions", "digits"}
    for task, found in logits.items():
        head = tree["heads"][task]
        each = [part @ kernel for part, kernel in zip(parts, np.split(head["kernel"], [16, 22]), strict=True)]
        np.testing.assert_allclose(found, np.mean(each, axis=0) + head["bias"], atol=1e-5)


def test_a_fresh_model_is_the_bare_image_model():
    model, bare = (tiny(dict(depth=1, mixer=mixer), flow="vanilla", tpu="none") for mixer in ("am_flow", "none"))
    params = jax.jit(model.init)(jax.random.key(0))
    own = params["blocks"]["0"].pop("mixer")
    expected = jax.jit(lambda params: bare.bind(params).encode(clip(2))[0])(params)
    params["blocks"]["0"]["mixer"] = own
    np.testing.assert_allclose(jax.jit(lambda params: model.bind(params).encode(clip(2))[0])(params), expected, atol=1e-6)


def test_fresh_adapters_change_nothing():
    residual, x = normal(2, 3, 5, 16, seed=1), normal(2, 3, 5, 16, seed=2)

    @jax.jit
    def fresh(key):
        results = []
        for kind, adapter in ADAPTERS.items():
            spec, rngs = dataclasses.replace(TINY, am_flow=settings(adapter=kind)), nnx.Rngs(key)
            results.append(adapter(spec, (0, 0), 1, rngs)(residual, x, x[..., :1], adapter.make_shared(spec, rngs)))
        return results

    for found, embedding in fresh(jax.random.key(0)):
        np.testing.assert_array_equal(found, residual)
        assert 0.05 < embedding.std() < 2


@pytest.mark.parametrize("kind", ["hyperformer", "compacter"])
def test_what_adapters_share_is_there_once(kind):
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tiny(adapter=kind).abstract())]
    shared = [name for name in names if "/shared/" in name]
    assert shared and all(name.startswith("blocks/0/mixer/shared/") for name in shared)
    assert ("blocks/0/mixer/shared/rules" in shared) == (kind == "compacter")


def test_aligning_encoder_takes_any_number_of_tokens_one_by_one_but_not_all_together():
    spec = dataclasses.replace(TINY, am_flow=settings(flow="aligned", encoder_input="tokens"))
    queries = [jax.ShapeDtypeStruct((1, 3, 7, 2, 8), jnp.float32)] * 2  # a class token and 2 x 3 patches
    with pytest.raises(ValueError, match=r"takes 5 numbers per frame and got 7: use frames of model\.image_size"):
        jax.eval_shape(made(lambda rngs: AMFlow(spec, 1, rngs))[0].flow, *queries)
    spec = dataclasses.replace(TINY, am_flow=settings(flow="aligned"))
    assert jax.eval_shape(made(lambda rngs: AMFlow(spec, 1, rngs))[0].flow, *queries).shape == (1, 3, 7, 1)


def test_flow_is_float32_where_the_model_is_bfloat16():
    mixer, _ = made(lambda rngs: AMFlow(dataclasses.replace(TINY, dtype="bfloat16", am_flow=settings(flow="aligned")), 0, rngs))
    x, q = jax.ShapeDtypeStruct((1, 3, 5, 16), jnp.bfloat16), jax.ShapeDtypeStruct((1, 3, 5, 2, 8), jnp.bfloat16)
    assert jax.eval_shape(mixer.flow, q, q).dtype == jnp.float32
    tokens, (branch,) = jax.eval_shape(mixer.after_attention, x, x, q, q)
    assert tokens.dtype == jnp.bfloat16 and branch.dtype == jnp.float32


def test_every_setting_comes_from_the_config():
    config = base_config()
    for field in dataclasses.fields(AMFlowSpec):
        value = config.model.am_flow[field.name]
        assert value == field.default
        config.model.am_flow[field.name] = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else f"other {value}"
        assert getattr(spec_from_config(config.model).am_flow, field.name) == config.model.am_flow[field.name] != field.default
    assert set(config.model.am_flow) == {field.name for field in dataclasses.fields(AMFlowSpec)}


def test_the_image_model_stays_frozen():
    """No gradient, no optimiser state, and after two steps the same bits."""
    config = base_config()
    config.tasks.actions = task_config()
    config.model.update(variant="Ti/8", width=16, depth=1, heads=2, mlp_dim=24, image_size=16, mixer="am_flow", pool="last_frame", dtype="float32")
    config.model.am_flow.update(flow="aligned", tpu="tcn", bottleneck=8, tpu_width=6)
    config.model.am_flow.update(encoder_width=12, encoder_mlp=20)
    config.optim.update(name="sgd", lr=0.1, weight_decay=0.1, decay="all", schedule="constant", freeze=FROZEN)
    model = build(config.model, {"actions": 5})
    optimizer = optim.make_optimizer(config.optim, optim.make_schedule(config.optim, 10, 10))
    before = state = jax.jit(functools.partial(init_state, config, optimizer=optimizer))(random_like(model.abstract()))
    batch = {"pixels": clip(3), "label": np.array([1, 3]), "task": np.zeros(2, np.int32), "mask": np.ones(2, bool)}
    train_step = jax.jit(make_train_step(config, model, optimizer))
    for _ in range(2):
        state, _ = train_step(state, (batch,))

    bare = Model(dataclasses.replace(model.spec, mixer="none"), ()).abstract()
    bare = {name: bare[name] for name in ("blocks", "embed", "norm")}
    assert jax.tree.map(np.shape, before.frozen) == jax.tree.map(lambda x: x.shape, bare)
    assert set(before.params) == {"blocks", "heads"} and set(before.params["blocks"]["0"]) == {"mixer"}
    chex.assert_trees_all_equal(state.frozen, before.frozen)
    moved = jax.tree.map(lambda old, new: (old != new).any(), before.params, state.params)
    assert all(jax.tree.leaves(moved)), moved
    moments = sum(x.nbytes for x in jax.tree.leaves(state.opt_state) if x.ndim)
    scalars = sum(x.ndim == 0 for x in jax.tree.leaves(state.params))
    assert moments == 4 * (count_parameters(state.params) - scalars)  # one float32 of momentum for each trained number


def test_parameters_are_those_of_the_paper():
    """Tables 1 and 2, within 1 %: backbone 86.58 M; adapters and heads 28 and 32 M; 12 aligning encoders 45 M; units 90, 54 and 360 M."""
    settings = am_flow_k400.get_config("transformer").model
    settings.image_size = 518  # the size that DINOv2's position table is for

    def millions(depth: int) -> np.ndarray:
        """Backbone, adapters, aligning encoders, units, heads."""
        settings.depth = depth
        trained, frozen = optim.split_frozen(build(settings, {"ssv2": 174, "k400": 400}).abstract(), FROZEN)
        mixers = [block["mixer"] for block in trained["blocks"].values()]
        groups = [[mixer[name] for mixer in mixers for name in mixer if kind in name] for kind in ("adapter", "encoder", "tpu")]
        return np.array([count_parameters(x) / 1e6 for x in (frozen, *groups, trained["heads"]["ssv2"], trained["heads"]["k400"])])

    one, two = millions(1), millions(2)
    backbone, adapters, encoders, transformers, ssv2, k400 = one + 11 * (two - one)
    expected = dict(backbone=86.58, ssv2=28.29, k400=32.18, encoders=45.0, transformers=90.0)
    found = dict(backbone=backbone, ssv2=adapters + ssv2, k400=adapters + k400, encoders=encoders, transformers=transformers)

    spec = dataclasses.replace(spec_from_config(settings), depth=12)

    def count(make, **changes) -> float:
        changed = dataclasses.replace(spec, am_flow=dataclasses.replace(spec.am_flow, **changes))
        return count_parameters(nnx.eval_shape(lambda: nnx.state(make(changed, nnx.Rngs(0))))) / 1e6

    assert found == pytest.approx(expected, rel=0.01)
    for module in (am_flow_k400, am_flow_smarthome, am_flow_ssv2):
        found = {unit: 24 * count(TPU, **module.get_config(unit).model.am_flow) for unit in ("transformer", "tcn", "lstm")}
        assert found == pytest.approx(dict(transformer=90.0, tcn=54.0, lstm=359.84), rel=0.01)
    for kind in ("hyperformer", "compacter"):  # fewer parameters
        assert count(ADAPTERS[kind].make_shared, adapter=kind) < 0.8 * adapters
    small = dataclasses.replace(TINY, depth=12, mixer_blocks=(0, -1), am_flow=SMALL)  # AM/2(1, 12), table 3
    widths = [made(lambda rngs, i=i: AMFlow(small, i, rngs))[0].branch_widths for i in (0, 1, 10, 11)]
    assert widths == [(8, 8), (), (), (8, 8)]
