"""From a config to a model that plain JAX can call: parameters are nested dicts of arrays with stable names (`blocks/3/attn/qkv/kernel`)."""

import dataclasses
import functools
from dataclasses import dataclass

import jax
from flax import nnx

from vidjoint.models.spec import ViTSpec
from vidjoint.models.vit import ViT

PRESETS = {  # width, depth, heads, MLP width (Dosovitskiy et al. 2021, table 1; Touvron et al. 2021 for Ti and S)
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}


# Keys of `config.model` that pretrained weights decide, with the value that stands for "not set"
OF_WEIGHTS = {
    "gelu": "",
    "norm_eps": 0.0,
    "last_norm_eps": 0.0,
    "mean": (),
    "std": (),
    "interpolation": "",
    "layer_scale": -1.0,
    "registers": -1,
    "pre_norm": "",
    "position_resize": "",
    "video_position": "",
}


def sizes_of(model) -> dict[str, int]:
    """Width, depth, heads, mlp_dim and patch of `config.model`: the variant's, but for those that are set."""
    size, patch = model.variant.split("/")
    width, depth, heads, mlp_dim = PRESETS[size]
    sizes = {"width": width, "depth": depth, "heads": heads, "mlp_dim": mlp_dim, "patch": int(patch)}
    return {key: model[key] or value for key, value in sizes.items()}


def spec_from_config(model) -> ViTSpec:
    """Resolves `config.model` (variant plus overrides; what is not set has ViTSpec's default). Assumes that `vidjoint.validate` has accepted it."""
    settings = sizes_of(model)
    for field in dataclasses.fields(ViTSpec):
        if field.name not in settings and not (field.name in OF_WEIGHTS and model[field.name] == OF_WEIGHTS[field.name]):
            value = model[field.name]
            settings[field.name] = field.type(**value) if dataclasses.is_dataclass(field.type) else value
    return ViTSpec(**settings)


@dataclass(frozen=True)
class Model:
    """A model as pure functions of its parameters. Holds no arrays, so it can be closed over by `jax.jit`."""

    spec: ViTSpec
    classes: tuple[tuple[str, int], ...]  # (task, number of classes)
    kinds: tuple | None = None  # with spec.scan: blocks of unlike kinds are not in one loop, though they be equal

    def init(self, key: jax.Array) -> dict:
        """Fresh float32 parameters; jit-able."""
        return _string_keys(nnx.to_pure_dict(_split(self, Keys(key))[1]))

    def abstract(self) -> dict:
        """Shapes and dtypes of the parameters, without computing them."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def bind(self, params: dict) -> ViT:
        """The NNX module with these parameters, for calling its methods: `model.bind(params).features(pixels)`."""
        graph, state = _skeleton(self)
        state = jax.tree.map(lambda x: x, state)  # a copy of the tree: the next line fills it
        nnx.replace_by_pure_dict(state, nnx.restore_int_paths(params))
        vit = nnx.merge(graph, state)
        vit.kinds = self.kinds
        return vit

    def logits(self, params: dict, pixels: jax.Array, key: jax.Array | None = None) -> dict[str, jax.Array]:
        """uint8 or float[B, T, height, width, 3] in 0..255 -> {task: logits float32[B, C]}. A key turns stochastic depth and dropout on."""
        return self.bind(params)(pixels, key)

    def features(self, params: dict, pixels: jax.Array) -> jax.Array:
        """Features before the heads: float32[B, D], D more than the width where a mixer has branches (AM Flow)."""
        return self.bind(params).features(pixels)


def build(model, classes: dict[str, int]) -> Model:
    """The model of `config.model` with one head per task; `classes` maps task to number of classes."""
    return Model(spec_from_config(model), tuple(sorted(classes.items())))


def count_parameters(params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


class Keys:
    """Draws the keys of `nnx.Rngs(key)`, counted in Python.

    Rngs keeps its count in an array and compares shardings at every draw. Under a trace that question ends in an error message that lists all
    operations so far, so that the time to trace a model would grow with the square of its size (AM Flow on B/14: 25 s, three times at each start).
    """

    def __init__(self, key: jax.Array):
        self.key, self.count = key, 0

    def params(self) -> jax.Array:
        self.count += 1
        return jax.random.fold_in(self.key, self.count - 1)


def _split(model: Model, rngs: Keys):
    return nnx.split(ViT(model.spec, dict(model.classes), rngs))


@functools.lru_cache(maxsize=16)
def _skeleton(model: Model):
    """The module's structure and the shapes of its state. Building a module takes a second or two, and every trace needs it."""
    return nnx.eval_shape(lambda: _split(model, Keys(jax.random.key(0))))


def _string_keys(tree):
    return {str(k): _string_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree
