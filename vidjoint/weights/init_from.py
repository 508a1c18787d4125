"""Starting a model from pretrained weights: what fits is taken, what is missing is made from it, and every parameter is accounted for."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import filterfalse

import numpy as np
from flax import traverse_util

from vidjoint.errors import UserError
from vidjoint.models.build import spec_from_config
from vidjoint.models.embed import inflate
from vidjoint.models.position import resize_position, resize_space_time, resize_time
from vidjoint.models.spec import ViTSpec
from vidjoint.weights.pretrained import Pretrained, flat

SAME = ("gelu", "norm_eps", "last_norm_eps", "mean", "std", "layer_scale", "registers", "pre_norm", "pool")  # settings that the parameters rely on
OF_CLASS_TOKEN = ("class_token", "last_frame", "frame_mean")  # pools that are the same thing for one frame: a change among them is no misfit
WITH_PARAMETERS = ("class_attention", "temporal_encoder")  # pools that are told of as new parameters
KINDS = ("loaded", "resized", "inflated from the image embedding", "copied from the spatial attention", "new", "unused")
# Parameters that come and go with settings of the new run: no reason need be given for them
EXPECTED = re.compile(r"heads/.*|pool/.*|blocks/\d+/mixer/.*|embed/(time|class_token|video_.*)")

Found = dict[str, tuple[str, np.ndarray]]  # name of a parameter of the new model -> one of KINDS, value


@dataclass(frozen=True)
class Line:
    """What happens to one parameter."""

    kind: str  # one of KINDS
    name: str
    shape: tuple[int, ...]  # in the new model; of an unused one, in the weights
    was: tuple[int, ...] | None = None  # in the weights
    made_from: tuple[str, ...] = ()  # its names in another project's file

    def __str__(self) -> str:
        shape = f"{list(self.was)} -> {list(self.shape)}" if self.was and self.was != self.shape else f"{list(self.shape)}"
        return f"{self.kind:8}  {self.name}  {shape}" + (f"  <- {', '.join(self.made_from)}" if self.made_from else "")


@dataclass(frozen=True)
class Plan:
    """What a new model takes over of pretrained weights."""

    weights: Pretrained
    found: Found
    lines: tuple[Line, ...]
    warnings: tuple[str, ...]

    def apply(self, fresh: dict) -> dict:
        """`fresh` parameters, nested dict, with those of the weights put in."""
        return traverse_util.unflatten_dict(flat(fresh) | {name: value for name, (_, value) in self.found.items()}, sep="/")

    def summary(self) -> list[str]:
        """A line for each kind, and one for each setting that differs and should not."""
        step = "" if self.weights.step is None else f" (step {self.weights.step})"
        start, kinds = f"init_from={self.weights.source}", {kind: [line.name for line in self.lines if line.kind == kind] for kind in KINDS}
        lines = [f"{len(names)} parameters {kind}{'' if kind == 'loaded' else ': ' + shortened(names)}" for kind, names in kinds.items() if names]
        if kept := sorted({name.split("/")[1] for name in kinds["loaded"] if name.startswith("heads/")}):
            lines[0] += f", with the classifier of {', '.join(kept)}, whose class names are the same"
        return [f"{start}{step}: {line}" for line in lines] + [f"{start}: {line}" for line in (*self.weights.notes, *self.warnings)]

    def table(self) -> str:
        """Every parameter with its shape, one line each, ordered by kind."""
        lines = sorted(self.lines, key=lambda line: KINDS.index(line.kind))
        unread = [f"skipped   {name}  ({reason})" for name, reason in self.weights.ignored.items()]
        return "".join(f"{line}\n" for line in (*lines, *unread))


def plan(
    weights: Pretrained,
    new: Mapping,
    spec: ViTSpec,
    labels: Mapping[str, tuple[str, ...]],
    allow: tuple[str, ...] = (),
    heads: str = "matching",
    parts: Sequence[tuple[str, Pretrained]] = (),
    spare: Callable[[str], bool] = lambda name: False,
) -> Plan:
    """Says what a new model takes over.

    Position tables are stretched to the new grid by the weights' own convention, and lose or gain the row of the class token; time tables are
    stretched to the new number of time steps. A head is taken over from a head with the same class names and shape, of any task (one of the same name
    first); else it stays new. Where the new model has an embedding for videos and the weights have not, it is made from that of the images (ViViT
    3.4). Where it has temporal attention that the weights lack, as after a stage on images alone (CoVeR, eq. 1), that is a copy of the block's
    spatial attention and norm, unless `temporal_init="random"`; whether it acts at once or starts as the identity is decided by the branch's last
    layer in the fresh model. Other parameters that the weights lack stay new.

    Args:
      new: the new model's parameters or their shapes, nested dict.
      spec: that model's.
      labels: task -> class names of the new run.
      allow: regular expressions: parameters that may be new or unused though nothing explains it.
      heads: matching, or new: no head is taken over.
      parts: regular expression, other weights: what a new model would take over of those replaces the parameters whose names match.
      spare: which parameters are left out if they differ in shape, as another plan gives them.

    Raises:
      UserError: parameters differ in shape, or are new or unused without a reason; lists every one that is. Or a part has nothing that matches.
    """
    if parts:
        patterns = [re.compile(pattern) for pattern, _ in parts]
        base = plan(weights, new, spec, labels, (*allow, *patterns), heads, spare=lambda name: any(pattern.fullmatch(name) for pattern in patterns))
        others = [plan(other, new, spec, labels, (".*",), heads, spare=lambda name, own=own: not re.fullmatch(own, name)) for own, other in parts]
        return functools.reduce(_with_part, zip((pattern for pattern, _ in parts), others, strict=True), base)
    new, old, old_spec, start = flat(new), weights.params, spec_from_config(weights.config.model), f"init_from={weights.source}"
    found: Found = {name: ("loaded", value) for name, value in old.items() if name in new and not name.startswith("heads/")}
    found |= _heads(weights, new, labels) if heads == "matching" else {}
    found |= _resized(old, old_spec, spec, new)
    found |= _inflated(found, old_spec, spec)
    found |= _copied(found, spec, new)

    misfits = {name for name, (_, value) in found.items() if value.shape != new[name].shape}
    found, misfits = {name: taken for name, taken in found.items() if name not in misfits or not spare(name)}, set(filterfalse(spare, misfits))
    sizes = ("width", "depth", "heads", "mlp_dim", "patch")
    problems = []
    if old_spec.heads != spec.heads or (misfits and any(getattr(spec, key) != getattr(old_spec, key) for key in sizes)):  # no shape shows the heads
        theirs = {key: weights.config.model[key] for key in ("variant", *sizes)}
        settings = " ".join(f"--config.model.{key}={value}" for key, value in theirs.items() if value)
        problems.append(f"{start}: those weights are of a model of another size: set {settings}, or start from others")
    else:
        fault = f"{start}: {{}} is {{}} there and {{}} here: use the model settings of those weights"
        shapes = {name: (list(old.get(name, found[name][1]).shape), list(new[name].shape)) for name in misfits}
        problems += sorted({fault.format(starred(name), *shapes[name]) for name in misfits})  # a line for all blocks
    heads_there = [name for name in old if name.startswith("heads/")]
    heads_left = {name for name in heads_there if not any(value is old[name] for _, value in found.values())}
    kinds = {name: found[name][0] if name in found else "new" for name in new}
    unused = [name for name in old if name in heads_left or (name not in new and not name.startswith("heads/"))]
    if "loaded" not in kinds.values() and not problems:
        problems.append(f"{start}: no parameter of it has a name of this model's")
    elif not problems:
        allowed = [re.compile(pattern) for pattern in allow]
        for kind, names in (("new", [name for name in new if kinds[name] == "new"]), ("unused", unused)):
            odd = [name for name in names if not EXPECTED.fullmatch(name) and not any(pattern.fullmatch(name) for pattern in allowed)]
            if odd:
                lacking = "the weights lack" if kind == "new" else "this model has no place for"
                problems.append(f"{start}: {lacking} {shortened(odd)}: use their model settings, or allow it with init_allow=('REGEX',)")
    if unknown := [name for name in weights.unexplained if not any(re.fullmatch(pattern, name) for pattern in allow)]:
        problems.append(f"{start}: nothing is known of {', '.join(unknown[:5])}{', ...' * (len(unknown) > 5)}: allow it with init_allow=('REGEX',)")
    if problems:
        raise UserError(*problems)
    shape, source = {name: tuple(x.shape) for name, x in old.items()}, weights.made_from
    lines = []
    for name, x in new.items():
        taken = next((key for key in heads_there if name in found and old[key] is found[name][1]), name)  # a classifier may come from another task's
        made_from = source.get(taken) or (taken,) * (taken != name) if name in found else ()
        lines.append(Line(kinds[name], name, tuple(x.shape), shape.get(taken), made_from))
    lines += [Line("unused", name, shape[name], None, source.get(name, ())) for name in unused]
    odd = [key for key in SAME if getattr(old_spec, key) != getattr(spec, key)]
    if spec.pool in WITH_PARAMETERS or {old_spec.pool, spec.pool} <= set(OF_CLASS_TOKEN):
        odd = [key for key in odd if key != "pool"]
    warnings = [f"model.{key} was {getattr(old_spec, key)} there and is {getattr(spec, key)} here: is that meant?" for key in odd]
    return Plan(weights, found, tuple(lines), tuple(warnings))


def _with_part(start: Plan, part: tuple[str, Plan]) -> Plan:
    """The plan with parameters of another one in place of its own, where their names match."""
    pattern, other = part
    source = other.weights.source
    taken = {name: value for name, value in other.found.items() if re.fullmatch(pattern, name)}
    if not taken:
        raise UserError(f"init_parts: {source} has nothing for this model that {pattern!r} names: python -m vidjoint.weights inspect lists it")
    theirs = {line.name: replace(line, made_from=(source, *line.made_from)) for line in other.lines if line.name in taken and line.kind != "unused"}
    lines = tuple(theirs.get(line.name, line) if line.kind != "unused" else line for line in start.lines)
    told = f"{len(taken)} parameters are those of {source}: {shortened(list(taken))}"
    odd = [f"{source}: {line}" for line in other.warnings if line.startswith(("model.mean ", "model.std "))]  # whatever is taken relies on these
    return replace(start, found=start.found | taken, lines=lines, warnings=(*start.warnings, told, *odd))


def shortened(names: list[str]) -> str:
    """Parameters as one line: a star for the numbers of blocks, one entry per module, as in `blocks/*/norm1/{bias,scale}, embed/time`."""
    modules = {}
    for name in sorted(map(starred, names)):
        module, _, last = name.rpartition("/")
        modules.setdefault(module, {})[last] = None
    return ", ".join(f"{module}/{next(iter(last)) if len(last) == 1 else '{' + ','.join(last) + '}'}" for module, last in modules.items())


def starred(name: str) -> str:
    """A parameter's name with a star for the number of its block."""
    return re.sub(r"/\d+(?=/)", "/*", name)


def _heads(weights: Pretrained, new: Mapping, labels: Mapping[str, tuple[str, ...]]) -> Found:
    """Classifiers whose class names are the same in both."""
    found = {}
    for task, names in labels.items():
        for source in sorted(weights.labels, key=lambda name: name != task):
            kernel = weights.params.get(f"heads/{source}/kernel")
            if tuple(weights.labels[source]) == tuple(names) and kernel is not None and kernel.shape == new[f"heads/{task}/kernel"].shape:
                found |= {f"heads/{task}/{part}": ("loaded", weights.params[f"heads/{source}/{part}"]) for part in ("kernel", "bias")}
                break
    return found


def _resized(old: Mapping, old_spec: ViTSpec, spec: ViTSpec, new: Mapping) -> Found:
    """The tables of the old model, stretched to the new one's grid and time steps. What has the right size already is left out."""
    found, grids, how = {}, (old_spec.grid, spec.grid), spec.position_resize
    lead = {"old": int(old_spec.class_token), "new": int(spec.class_token)}  # rows before those of the patches
    for name in ("embed/position", "embed/video_position"):
        if name not in old or name not in new:
            continue
        table = old[name]
        whole = [name == "embed/video_position" and s.video_position == "space_time" for s in (old_spec, spec)]  # a row for each token of a clip
        if whole == [True, True]:
            table = resize_space_time(table, lead["old"], (old_spec.times, *grids[0]), (spec.times, *grids[1]), how)
        elif whole[0]:
            middle = table[lead["old"] :].reshape(old_spec.times, -1, table.shape[-1]).mean(axis=0)
            table = resize_position(np.concatenate([table[: lead["old"]], middle]), lead["old"], *grids, how)
        else:
            table = np.asarray(resize_position(table, lead["old"], *grids, how))
            if whole[1]:
                table = np.concatenate([table[: lead["old"]], *[table[lead["old"] :]] * spec.times])
        table = np.asarray(table)[max(lead["old"] - lead["new"], 0) :]
        if lead["new"] > lead["old"]:  # the class token is new, and has no position
            table = np.concatenate([np.zeros((1, table.shape[-1]), table.dtype), table])
        if table.shape != old[name].shape or not np.array_equal(table, old[name]):
            found[name] = "resized", table
    for name in ("embed/time", "pool/time"):
        if name in old and name in new and len(old[name]) != len(new[name]):
            found[name] = "resized", np.asarray(resize_time(old[name], len(new[name])))
    if spec.tubelet > old_spec.tubelet == 1 and "embed/video_proj/kernel" in old:
        found["embed/video_proj/kernel"] = "resized", np.asarray(inflate(old["embed/video_proj/kernel"], spec.tubelet, spec.tubelet_init))
    return found


def _inflated(found: Found, old_spec: ViTSpec, spec: ViTSpec) -> Found:
    """An embedding for videos, made from the image embedding of a model that has no other."""
    if spec.embed != "separate" or old_spec.embed == "separate":
        return {}
    kernel, bias, position = (found[f"embed/{name}"][1] for name in ("proj/kernel", "proj/bias", "position"))
    kernel = np.asarray(inflate(kernel, spec.tubelet, spec.tubelet_init))
    if spec.video_position == "space_time":
        lead = int(spec.class_token)
        position = np.concatenate([position[:lead], *[position[lead:]] * spec.times])
    made = {"embed/video_proj/kernel": kernel, "embed/video_proj/bias": bias, "embed/video_position": position}
    return {name: ("inflated from the image embedding", value) for name, value in made.items()}


def _copied(found: Found, spec: ViTSpec, new: Mapping) -> Found:
    """Temporal attention and its norm for blocks that had none, from the spatial ones of the block (TimeSformer's and ViViT's loaders do so).

    A branch without a dense layer ends in the attention's own projection: with `temporal_init="zero"` that stays zero.
    """
    copied = {}
    for name in new:
        match = re.fullmatch(r"(blocks/\d+)/mixer/temporal_(attn|norm)/(.+)", name)
        if match is None or name in found or spec.temporal_init == "random":
            continue
        block, part, rest = match.groups()
        source = f"{block}/{'attn' if part == 'attn' else 'norm1'}/{rest}"
        ends_branch = part == "attn" and rest.startswith("proj/") and f"{block}/mixer/temporal_fc/kernel" not in new
        if source in found and not (ends_branch and spec.temporal_init == "zero"):
            copied[name] = "copied from the spatial attention", found[source][1]
    return copied
