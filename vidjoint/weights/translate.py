"""Another project's parameters as a table: their names, their layouts, and ours. Each table reads both ways, for import and export."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vidjoint.weights.files import is_float

Arrays = Mapping[str, np.ndarray]
NORMALISATION = {  # of pixels in 0..1, where no file says it
    "half": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "kinetics": {"mean": (0.45, 0.45, 0.45), "std": (0.225, 0.225, 0.225)},
    "clip": {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)},
}


MOST_BLOCKS = 1000


class Refused(Exception):
    """A file of a known kind holds what no model here has, or lacks what each must have: the rest of a sentence that begins with its name."""


class Activations(dict):
    def __missing__(self, name):
        raise Refused(f"has the activation {str(name)[:40]!r}, which no model here has: known are {', '.join(self)}")


# Names of activations in config.json (`hidden_act`; timm's `act_layer`) -> model.gelu. Any other raises Refused
GELU = Activations(gelu="exact", gelu_new="tanh", gelu_pytorch_tanh="tanh", gelu_fast="tanh", gelu_tanh="tanh", quick_gelu="quick")


@dataclass(frozen=True)
class Layout:
    """How arrays of theirs become one of ours, and back."""

    load: Callable[[Sequence[np.ndarray]], np.ndarray]
    store: Callable[[np.ndarray, int, "Sizes"], list[np.ndarray]]  # ours, number of theirs, sizes -> theirs


@dataclass(frozen=True)
class Sizes:
    """What the shape of an array of theirs hangs on besides the array of ours."""

    heads: int
    patch: int
    tubelet: int = 1


def _flax_kernel(array: np.ndarray) -> np.ndarray:
    return array.reshape(array.shape[0], -1)


def _conv(array: np.ndarray) -> np.ndarray:
    """[D, 3, (t,) p, q] -> [(t) p q 3, D]"""
    return np.moveaxis(array, (0, 1), (-1, -2)).reshape(-1, array.shape[0])


def _unconv(array: np.ndarray, *size: int) -> np.ndarray:
    return np.moveaxis(array.reshape(*size, 3, -1), (-1, -2), (0, 1))


# Those of PyTorch: a linear layer is [out, in], and what has no batch axis here may have one there
LINEAR = Layout(lambda a: np.concatenate([x.T for x in a], axis=1), lambda a, n, s: [x.T for x in np.split(a, n, axis=1)])
VECTOR = Layout(lambda a: np.concatenate(a), lambda a, n, s: np.split(a, n))
CONV = Layout(lambda a: _conv(a[0]), lambda a, n, s: [_unconv(a, s.patch, s.patch)])
CONV3D = Layout(lambda a: _conv(a[0]), lambda a, n, s: [_unconv(a, s.tubelet, s.patch, s.patch)])
TABLE = Layout(lambda a: a[0].reshape(-1, a[0].shape[-1]), lambda a, n, s: [a[None]])  # [1, N, D] <-> [N, D]
TOKEN = Layout(lambda a: a[0].reshape(-1), lambda a, n, s: [a[None, None]])  # [1, 1, D] <-> [D]
# Those of Flax's attention: kernels [D, H, d] and [H, d, D], biases [H, d]
SAME = Layout(lambda a: a[0], lambda a, n, s: [a])
FLAX_QKV = Layout(
    lambda a: np.concatenate([_flax_kernel(x) for x in a], axis=1),
    lambda a, n, s: [x.reshape(len(x), s.heads, -1) for x in np.split(a, n, axis=1)],
)
FLAX_QKV_BIAS = Layout(lambda a: np.concatenate([x.reshape(-1) for x in a]), lambda a, n, s: [x.reshape(s.heads, -1) for x in np.split(a, n)])
FLAX_OUT = Layout(lambda a: a[0].reshape(-1, a[0].shape[-1]), lambda a, n, s: [a.reshape(s.heads, -1, a.shape[-1])])
FLAX_CONV = Layout(lambda a: a[0].reshape(-1, a[0].shape[-1]), lambda a, n, s: [a.reshape(*[s.tubelet] * (s.tubelet > 1), s.patch, s.patch, 3, -1)])


@dataclass(frozen=True)
class Rule:
    """One parameter of ours. `{i}` in names stands for the number of a block.

    "" in place of a name of theirs stands for zeros of the others' shape. If all of theirs are absent, so is ours, but for biases that they do
    without in every block: with `zeros`, the name of a kernel of ours, ours is then zeros, as many as the last axis of that kernel has.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = VECTOR
    zeros: str = ""  # ours is zeros[D_out] where theirs are absent and the parameter of ours of this name is there


@dataclass(frozen=True)
class Format:
    """A kind of weights file.

    Attributes:
      name: as `--format` takes it.
      what: whose it is, in a line for people.
      marks: regular expressions; a file is of this kind if each matches the whole of some name, once the prefixes are gone.
      rules: the table. The classifier is `heads/{task}/...` of the placeholder TASK.
      settings: (arrays of theirs, of ours, config.json or {}) -> keys of `config.model` that these parameters fix, besides the sizes.
      prefixes: of names, dropped wherever they stand first (tried in this order, again and again).
      renames: (regular expression, replacement): other names for the same arrays, as later versions of a library have in memory.
      unmarks: regular expressions of names that such a file never has.
      axes: name -> number of axes of that array, where names alone do not tell a model of images from one of videos.
      ignored: regular expression of names -> why nothing is lost without them.
      refused: regular expression of names -> what it is that such a model has and none here.
      stacked: (regular expression, replacement with {i}) of arrays that hold one for each block along their first axis, and the names of these.
      prepare: changes arrays of theirs beforehand: (arrays, config.json or {}) -> arrays.
      derive: what a model of ours has and the file lacks: (arrays of theirs, of ours, config.json or {}) -> name of ours -> array, and in words
        what it is made from.
      normalisation: of the pixels, one of NORMALISATION, where no file beside the weights says it.
      model_type: `model_type` of Hugging Face's config.json.
      video: whether the model is one of videos.
    """

    name: str
    what: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...]
    settings: Callable[[Arrays, Arrays, dict], dict[str, Any]]
    prefixes: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    unmarks: tuple[str, ...] = ()
    axes: Mapping[str, int] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    stacked: tuple[str, str] | None = None
    prepare: Callable[[dict[str, np.ndarray], dict], dict[str, np.ndarray]] = lambda arrays, config: arrays
    derive: Callable[[Arrays, Arrays, dict], Mapping[str, tuple[np.ndarray, str]]] = lambda theirs, ours, config: {}
    normalisation: str = "half"
    model_type: str = ""
    video: bool = False

    def strip(self, name: str) -> str:
        """The name as the rules have it: without prefixes, renamed."""
        while prefix := next(filter(name.startswith, self.prefixes), ""):
            name = name.removeprefix(prefix)
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def recognises(self, arrays: Arrays) -> bool:
        """Whether a file with these arrays is of this kind."""
        names = {self.strip(name): array for name, array in arrays.items()}
        if any(name in names and np.ndim(names[name]) != axes for name, axes in self.axes.items()):
            return False

        def some(pattern):
            return any(re.fullmatch(pattern, name) for name in names)

        return all(some(mark) for mark in self.marks) and not any(some(mark) for mark in self.unmarks)


TASK = "pretrained"  # task of a classifier whose file gives it no name


def block_rules(ours: str, theirs: str, rules: Mapping[str, tuple[str, ...] | str], layouts: Mapping[str, Layout] | None = None) -> tuple[Rule, ...]:
    """Rules of modules with `weight` and `bias` in PyTorch's manner.

    Args:
      ours, theirs: what begins all names, with `{i}`.
      rules: module of ours -> module(s) of theirs; modules of ours that are called norm or scale are norms, others linear layers.
      layouts: of kernels that are not LINEAR.
    """
    made = []
    for module, names in rules.items():
        names = (names,) if isinstance(names, str) else names
        norm = "norm" in module.rpartition("/")[2]
        kernel = "scale" if norm else "kernel"
        layout = (layouts or {}).get(module, VECTOR if norm else LINEAR)
        made.append(Rule(f"{ours}{module}/{kernel}", tuple(f"{theirs}{name}.weight" for name in names), layout))
        zeros = "" if norm else f"{ours}{module}/{kernel}"  # a norm without bias is another kind of norm
        made.append(Rule(f"{ours}{module}/bias", tuple(f"{theirs}{name}.bias" for name in names), VECTOR, zeros))
    return tuple(made)


@dataclass
class Translated:
    """What a table made of a file.

    Attributes:
      params: name of ours -> float32 array.
      made_from: name of ours -> names in the file, or in words what it was made from; () for zeros that stand for what the file lacks.
      unexplained: names in the file that no rule reads and no reason excuses.
      ignored: name in the file -> why it is not needed.
    """

    params: dict[str, np.ndarray]
    made_from: dict[str, tuple[str, ...]]
    unexplained: list[str]
    ignored: dict[str, str]
    theirs: dict[str, np.ndarray]


def translate(format: Format, arrays: Arrays, config: dict) -> Translated:
    """Reads arrays of theirs, with names as the file has them, by a format's table. Whether the model is complete is not checked here.

    Raises:
      Refused: no model here could hold what the file has, or arrays that belong together are not all there or differ in shape.
    """
    full = {}
    for whole in arrays:
        name = format.strip(whole)
        if name in full:
            raise Refused(f"has both {full[name]} and {whole}, which are the same array of a model")
        if reason := next((reason for pattern, reason in format.refused.items() if re.fullmatch(pattern, name)), ""):
            raise Refused(f"has {whole}, {reason}")
        full[name] = whole
    theirs = {name: arrays[full[name]] for name in full}
    if format.stacked:
        pattern, replacement = format.stacked
        for name in [name for name in theirs if re.match(pattern, name)]:
            if len(theirs[name]) > MOST_BLOCKS:
                raise Refused(f"has {full[name]}, of {len(theirs[name])} blocks: that is no ViT")
            for i, array in enumerate(theirs.pop(name)):
                single = re.sub(pattern, replacement.replace("{i}", str(i)), name)
                theirs[single], full[single] = array, full[name]
    theirs = format.prepare(theirs, config)
    params, made_from, used = {}, {}, set()
    for rule in format.rules:
        numbers = _numbers(rule, theirs)
        never = not any(name.replace("{i}", i) in theirs for name in rule.theirs for i in numbers)
        for i in numbers:
            ours, names = rule.ours.replace("{i}", i), [name.replace("{i}", i) for name in rule.theirs]
            found = [theirs[name] for name in names if name in theirs]
            if found:
                if missing := [name for name in names if name and name not in theirs]:
                    raise Refused(f"lacks {missing[0]}")
                for name in filter(None, names):
                    if not is_float(theirs[name].dtype):
                        raise Refused(f"has {full.get(name, name)} as {theirs[name].dtype}, and parameters are floating-point numbers")
                parts = [np.asarray(theirs[name] if name else np.zeros_like(found[0]), np.float32) for name in names]
                try:
                    params[ours] = np.ascontiguousarray(rule.layout.load(parts))
                except (ValueError, IndexError) as error:
                    shapes = ", ".join(f"{full.get(name, name)} {list(theirs[name].shape)}" for name in names if name)
                    raise Refused(f"has an impossible shape: {shapes}") from error
                made_from[ours] = tuple(dict.fromkeys(full.get(name, name) for name in names if name))
                used.update(full.get(name, name) for name in names)
            elif never and rule.zeros and (source := rule.zeros.replace("{i}", i)) in params:
                params[ours], made_from[ours] = np.zeros(params[source].shape[-1], np.float32), ()
    for ours, (array, words) in format.derive(theirs, dict(params), config).items():
        params[ours], made_from[ours] = np.ascontiguousarray(array, np.float32), (words,)
    ignored, unexplained = {}, []
    for name in map(format.strip, arrays):
        if full[name] in used:
            continue
        reason = next((reason for pattern, reason in format.ignored.items() if re.fullmatch(pattern, name)), None)
        if reason is None:
            unexplained.append(full[name])
        else:
            ignored[full[name]] = reason
    return Translated(params, made_from, unexplained, ignored, theirs)


def back(format: Format, params: Arrays, sizes: Sizes, prefixes: Callable[[str], str] = lambda name: name) -> dict[str, np.ndarray]:
    """The arrays of theirs for parameters of ours: float32, with the names of the table, to which `prefixes` gives those of whole files.

    Raises:
      KeyError: the table has no place for some parameters of ours; names them.
    """
    arrays, used = {}, set()
    for rule in format.rules:
        pattern = re.compile(re.escape(rule.ours).replace(r"\{i\}", r"(\d+)"))
        for name in [name for name in params if name not in used]:  # of two rules for one parameter the first is the one to write
            if match := pattern.fullmatch(name):
                used.add(name)
                names = [theirs.replace("{i}", match[1] if match.groups() else "") for theirs in rule.theirs]
                parts = rule.layout.store(np.asarray(params[name], np.float32), len(names), sizes)
                arrays |= {prefixes(theirs): np.ascontiguousarray(part) for theirs, part in zip(names, parts, strict=True) if theirs}
    if missing := sorted(params.keys() - used):
        raise KeyError(*missing)
    return arrays


def _numbers(rule: Rule, theirs: Arrays) -> list[str]:
    """The numbers that `{i}` stands for among arrays of theirs: those of all blocks that have any array with the rule's beginning."""
    if "{i}" not in rule.ours:
        return [""]
    start = next(name for name in rule.theirs if name).partition("{i}")[0]
    pattern = re.compile(re.escape(start) + r"(\d+)[./_]")
    return sorted({match[1] for name in theirs if (match := pattern.match(name))}, key=int)
