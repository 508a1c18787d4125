"""Pretrained weights of other projects: says what a file is, takes it in, and gives trained models out.

python -m vidjoint.weights inspect SRC [--config=FILE]
python -m vidjoint.weights import SRC OUT [--format=NAME] [--labels=FILE] [--task=NAME]
python -m vidjoint.weights export --workdir=DIR OUT [--format=NAME] [--task=NAME]
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vidjoint import config as config_module
from vidjoint import validate
from vidjoint.classifier import parse_step
from vidjoint.config import base_config
from vidjoint.data.labels import read_labels, unusable_names
from vidjoint.errors import UserError, command, printable
from vidjoint.models.build import OF_WEIGHTS, build, count_parameters, spec_from_config
from vidjoint.weights.export import TARGETS, to_hugging_face
from vidjoint.weights.formats import FORMATS
from vidjoint.weights.init_from import plan, starred
from vidjoint.weights.pretrained import Pretrained, adopt, keep_task, open_weights, rename_task, swap_colours, write_folder
from vidjoint.weights.translate import TASK

DESCRIPTION = "Pretrained weights of other projects, in and out. Which file comes from where, and how each kind was checked: docs/weights.md."
KINDS = "kinds: " + "; ".join(f"{format.name}: {format.what}" for format in FORMATS)


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m vidjoint.weights", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("source", metavar="SRC", help="a file (.safetensors, .npz, .pth, .pyth, .pt, .bin) or a folder with one, or a run's folder")
    source.add_argument("--format", default="", metavar="NAME", help="kind of file (default: recognised by the names in it)")
    source.add_argument(
        "--bgr", action="store_true", help="the weights expect blue, green, red (TimeSformer's own for Something-Something): swap them"
    )
    source.add_argument("--model.KEY", dest="_", metavar="VALUE", help="a setting of config.model that the file does not tell, as --model.heads=6")

    text = "say what a file is, and with --config what a training would take over of it"
    inspect = commands.add_parser("inspect", parents=[source], help=text, description=text, epilog=KINDS)
    inspect.add_argument("--config", metavar="FILE", help="an experiment; any --config.KEY=VALUE may follow")
    text = "turn a file or folder of another project into a folder that predict, evaluate, export and init_from take"
    take = commands.add_parser("import", parents=[source], help=text, description=text, epilog=KINDS)
    take.add_argument("out", metavar="OUT", help="folder to write: config.json, labels/TASK.txt, weights.safetensors")
    take.add_argument(
        "--labels", metavar="FILE", help="class names of the classifier, one per line or JSON (default: those of the file's config.json)"
    )
    take.add_argument("--task", default="", metavar="NAME", help=f"name of the classifier (default: {TASK})")
    take.add_argument("--allow_unused", default="", metavar="REGEX", help="names in the file that may be left out though nothing is known of them")
    text = "write a trained model as a self-contained folder, or for Hugging Face's transformers"
    give = commands.add_parser("export", help=text, description=text)
    give.add_argument("--workdir", required=True, metavar="DIR", help="folder of a training run or of weights")
    give.add_argument("out", metavar="OUT", help="folder to write")
    give.add_argument("--format", default="vidjoint", metavar="NAME", help=f"vidjoint (default), hf (whichever fits), {', '.join(TARGETS)}")
    give.add_argument("--task", default="", metavar="NAME", help="whose classifier goes along (default: the only one; vidjoint: all)")
    give.add_argument("--step", metavar="N", help="checkpoint to export, a number or best (default: the newest)")

    settings = [word for word in argv if re.match(r"--model\.", word)]
    overrides = [word for word in argv if re.match(r"--?(no)?config\.", word)]
    args = parser.parse_args([word for word in argv if word not in settings and word not in overrides])
    if args.command == "export":
        return export(args)
    weights = open_weights(args.source, format=args.format, changes=_settings(settings))
    if args.bgr:
        weights = swap_colours(weights)
    if args.command == "inspect":
        lines = describe(weights)
        if args.config:
            lines += ["", *what_would_happen(weights, [f"--config={args.config}", *overrides])]
        print("\n".join(map(printable, lines)))
        return 0
    return take_in(args, weights)


def take_in(args: argparse.Namespace, weights: Pretrained) -> int:
    """Writes foreign weights as a folder of ours."""
    if (args.task or args.labels) and len(weights.labels) > 1:
        tasks, one = ", ".join(weights.labels), f"python -m vidjoint.weights export --workdir={args.source} FOLDER --task=NAME"
        raise UserError(f"{args.source} has several classifiers ({tasks}): export one with {one} first, and import that")
    problems = []
    try:
        odd = [name for name in weights.unexplained if not re.fullmatch(args.allow_unused, name)]
    except re.error as error:
        raise UserError(f"--allow_unused={args.allow_unused}: no regular expression ({error})") from error
    if odd:
        problems.append(f"nothing is known of {len(odd)} arrays, such as {', '.join(odd[:5])}: leave them out with --allow_unused=REGEX")
    if args.labels and not weights.labels:
        problems.append("--labels: this file has no classifier to name the classes of")
    elif args.labels:
        names, _ = read_labels(Path(args.labels).expanduser())
        (task, old), *_ = weights.labels.items()
        problems += [f"--labels: {line}" for line in unusable_names(names)]
        if len(names) != len(old):
            problems.append(f"--labels={args.labels} has {len(names)} names, and the classifier {len(old)} classes: give the file's own list")
        weights = dataclasses.replace(weights, labels={task: names}, numbered=frozenset())
    if args.task and not args.task.isidentifier():
        problems.append(f"--task={args.task}: letters, digits and underscores, for it names parameters and files")
    if problems:
        raise UserError(*problems)
    weights = rename_task(weights, args.task) if args.task else weights
    write_folder(weights, args.out)
    print("\n".join(map(printable, describe(weights))))
    if weights.numbered:
        print("note: the file has no class names, so they are numbers; give --labels=FILE to name them")
    print(f"written to {args.out}: use it as --workdir, or as init_from")
    return 0


def export(args: argparse.Namespace) -> int:
    """Writes a model of ours, for ourselves or for others."""
    weights = open_weights(args.workdir, parse_step(args.step))
    if args.task and args.task not in weights.labels:
        raise UserError(f"--task={args.task}: there is no such task, choose one of {', '.join(weights.labels) or 'none'}")
    if args.format == "vidjoint":
        write_folder(keep_task(weights, args.task) if args.task else weights, args.out)
        print(f"written to {args.out}: use it as --workdir, or vidjoint.load({args.out!r})")
    else:
        name = to_hugging_face(weights, args.out, args.format, args.task)
        print(f"written to {args.out}: transformers.{name}.from_pretrained({args.out!r})")
    return 0


def describe(weights: Pretrained) -> list[str]:
    """What weights are, in lines for people: kind, model, classifier, and every parameter with its shape and where it comes from."""
    model, spec = weights.config.model, spec_from_config(weights.config.model)
    what = next((format.what for format in FORMATS if format.name == weights.format), "this project's own")
    lines = [
        f"{weights.source}: {what} ({weights.format}), {count_parameters(weights.params) / 1e6:.2f} M parameters in {len(weights.params)} arrays"
    ]
    sizes = f"width {spec.width}, {spec.depth} blocks, {spec.heads} heads, MLP {spec.mlp_dim}, patch {spec.patch}"
    lines.append(f"model       {model.variant}: {sizes}, {spec.image_size} x {spec.image_size} pixels")
    if any(weights.config.tasks[task].media == "video" for task in weights.labels) or spec.mixer != "none":
        lines.append(f"video       {spec.frames} frames, mixer {spec.mixer}, embedding {spec.embed}, tubelet {spec.tubelet}")
    lines.append("settings    " + ", ".join(f"{key} {getattr(spec, key, model[key]) or 'none'}" for key in ("pool", *OF_WEIGHTS)))
    for task, names in weights.labels.items():
        shown = ", ".join(names[:4]) + ", ..." * (len(names) > 4)
        lines.append(f"classifier  {task}: {len(names)} classes ({'numbered' if task in weights.numbered else shown})")
    if not weights.labels:
        lines.append("classifier  none")
    lines.append("parameters")
    lines += [f"  {line}" for line in grouped(weights)]
    lines += [f"not used    {name}: {reason}" for name, reason in weights.ignored.items()]
    lines += [f"unknown     {name}" for name in weights.unexplained]
    return lines + [f"note        {line}" for line in weights.notes]


def grouped(weights: Pretrained) -> Iterable[str]:
    """A line per parameter, those of all blocks in one: name, shape, names in the file."""
    rows: dict[tuple, int] = {}
    for name, array in weights.params.items():
        star = starred(name)
        number = re.search(r"/(\d+)/", name)
        theirs = weights.made_from.get(name)
        sources = tuple(re.sub(rf"(?<=[._/]){number[1]}(?=[._/])", "*", source, count=1) if number else source for source in theirs or ())
        row = star, array.shape, sources if theirs is not None else None
        rows[row] = rows.get(row, 0) + 1
    width = max(len(star) for star, _, _ in rows)
    for (star, shape, sources), count in rows.items():
        origin = "" if sources is None else f"  <- {', '.join(sources) or 'zeros, for the file has none'}"
        yield f"{star:{width}}  {list(shape)!s:16} {f'x {count}' if count > 1 else '':5}{origin}".rstrip()


def what_would_happen(weights: Pretrained, argv: list[str]) -> list[str]:
    """What an experiment would take over, in lines; of classifiers not whether class names agree, which is known when the data is there."""
    config, name = config_module.parse(argv)
    config = adopt(config, weights.config)
    if problems := validate.check_model(config) + validate.check_start(config):
        raise UserError(*problems)
    parts = [(pattern, _headless(open_weights(path))) for pattern, _, path in (part.partition("=") for part in config.init_parts)]
    model = build(config.model, {})
    planned = plan(_headless(weights), model.abstract(), model.spec, {}, config.init_allow, parts=parts)
    kept = weights.labels and config.init_heads == "matching"
    old = f", or from {', '.join(weights.labels)} where the class names are the same" if kept else ""
    heads = [f"new       heads/{task}{old}" for task in sorted(config.tasks)]
    return [f"{name} with init_from={weights.source}:", *planned.table().splitlines(), *heads, *planned.warnings]


def _headless(weights: Pretrained) -> Pretrained:
    body = {key: value for key, value in weights.params.items() if not key.startswith("heads/")}
    return dataclasses.replace(weights, params=body, labels={})


def _settings(words: list[str]) -> dict[str, Any]:
    """--model.KEY=VALUE words as settings. Raises UserError if a key is unknown or a value of the wrong type."""
    config, changes, problems = base_config(), {}, []
    for word in words:
        key, given, _ = word.removeprefix("--model.").partition("=")
        if "." in key or not given:
            problems.append(f"{word}: write --model.KEY=VALUE" if not given else f"{word}: only settings directly in config.model can be given")
            continue
        found = config_module.override(config, f"--config.{word.lstrip('-')}")
        problems += [line.replace("--config.model.", "--model.") for line in found]
        if not found:
            changes[key] = config.model[key]
    if problems:
        raise UserError(*problems)
    return changes


if __name__ == "__main__":
    sys.exit(main())
