"""Another project's parameters as a table: their names, their layouts, and ours. Each table reads both ways, for import and export."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]


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

    An absent array of theirs, or "" in place of its name, counts as zeros of the others' shape. If all of them are absent, so is ours: with
    `zeros`, the name of another array of theirs, ours is then zeros, as many as the last axis of ours has (a bias that they do without).
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
      ignored: regular expression of names -> why nothing is lost without them.
      prepare: changes arrays of theirs beforehand: (arrays, config.json or {}) -> arrays.
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
    ignored: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[dict[str, np.ndarray], dict], dict[str, np.ndarray]] = lambda arrays, config: arrays
    model_type: str = ""
    video: bool = False

    def strip(self, name: str) -> str:
        """The name as the rules have it: without prefixes, renamed."""
        while prefix := next(filter(name.startswith, self.prefixes), ""):
            name = name.removeprefix(prefix)
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def recognises(self, names: Sequence[str]) -> bool:
        """Whether a file with arrays of these names is of this kind."""
        names = [self.strip(name) for name in names]

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
        made.append(Rule(f"{ours}{module}/bias", tuple(f"{theirs}{name}.bias" for name in names), VECTOR, zeros=f"{ours}{module}/{kernel}"))
    return tuple(made)


@dataclass
class Translated:
    """What a table made of a file.

    Attributes:
      params: name of ours -> float32 array.
      made_from: name of ours -> names in the file; () for zeros that stand for what the file lacks.
      unexplained: names in the file that no rule reads and no reason excuses.
      ignored: name in the file -> why it is not needed.
    """

    params: dict[str, np.ndarray]
    made_from: dict[str, tuple[str, ...]]
    unexplained: list[str]
    ignored: dict[str, str]
    theirs: dict[str, np.ndarray]


def translate(format: Format, arrays: Arrays, config: dict) -> Translated:
    """Reads arrays of theirs, with names as the file has them, by a format's table. Shapes are not checked here."""
    full = {format.strip(name): name for name in arrays}
    theirs = format.prepare({format.strip(name): array for name, array in arrays.items()}, config)
    params, made_from, used = {}, {}, set()
    for rule in format.rules:
        for i in _numbers(rule, theirs):
            ours, names = rule.ours.replace("{i}", i), [name.replace("{i}", i) for name in rule.theirs]
            found = [theirs[name] for name in names if name in theirs]
            if found:
                parts = [theirs[name] if name in theirs else np.zeros_like(found[0]) for name in names]
                params[ours] = np.ascontiguousarray(rule.layout.load([np.asarray(part, np.float32) for part in parts]))
                made_from[ours] = tuple(full.get(name, name) for name in names if name in theirs)
                used.update(names)
            elif rule.zeros and (source := rule.zeros.replace("{i}", i)) in params:
                params[ours], made_from[ours] = np.zeros(params[source].shape[-1], np.float32), ()
    ignored, unexplained = {}, []
    for name in full:
        if name in used:
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
        for name in params:
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
