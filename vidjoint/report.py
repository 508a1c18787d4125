"""Writes `report.html`, one page about a run: results, curves, confused classes, hardest clips, calibration, config. Every run does so at its end.

python -m vidjoint.report --workdir=DIR [--out=FILE]
"""

import argparse
import collections
import contextlib
import csv
import json
import logging
import os
import sys
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from vidjoint import config as config_module
from vidjoint import metrics
from vidjoint.config import base_config, flat, task_config
from vidjoint.data.tasks import Task, open_tasks
from vidjoint.errors import UserError, command
from vidjoint.output_files import write_whole
from vidjoint.reporting import plots, predictions
from vidjoint.reporting.mistakes import PER_PAIR, Pictures, confused, hardest, wanted
from vidjoint.reporting.page import Html, count, curve_styles, line_chart, page, percent, picture, reliability_chart, table, tag
from vidjoint.reporting.predictions import Predictions
from vidjoint.run_folder import RunFolder

log = logging.getLogger(__name__)


def write(folder: RunFolder, tasks: dict[str, Task] | None = None, out: Path | None = None) -> Path:
    """Writes the page of what is in a run's folder, finished or not, and returns its path.

    Args:
      tasks: the run's datasets, which the pictures come from; None opens those of its config, and leaves pictures out where that fails.
      out: the file to write; None is the folder's `report.html`.

    Raises:
      UserError: this is no folder of a run, or the file can't be written.
    """
    config, results = folder.config, _read_json(folder.results)
    events = metrics.read_events(folder.path / "metrics.jsonl") if (folder.path / "metrics.jsonl").exists() else []
    found = {name: predictions.read(predictions.file_of(folder.path, name)) for name in predictions.tasks_in(folder.path) if name in config.tasks}
    note = ""
    if found and tasks is None:
        try:
            tasks = open_tasks(config, ("val",))
        except (UserError, OSError) as error:
            note = f"No pictures of clips: {str(error).splitlines()[0]}"
    step = f"step {results['step']:,}" if results else f"not finished; step {events[-1]['step']:,}" if events else "nothing logged yet"
    body = [
        tag("h1", folder.path.resolve().name),
        tag("p", f"{step}, {folder.path.resolve()}", class_="note"),
        tag("nav", *(tag("a", title, href=f"#{key}") for key, title in _contents(results)), aria_label="Contents"),
    ]
    body += _results(config, results, found) + _curves(events)
    with contextlib.closing(Pictures(tasks or {}, wanted(found))) as pictures:
        for name in results.get("tasks", found):
            body += _task(name, folder, found.get(name), pictures, note)
    body += _settings(config) + _about(_read_json(folder.about))
    out = out or folder.report
    try:
        write_whole(out, page(f"{folder.path.resolve().name}: vidjoint", body).encode())
    except OSError as error:
        raise UserError(f"--out={out} can't be written: {error.strerror}") from None
    return out


def write_if_possible(folder: RunFolder, tasks: dict[str, Task]) -> None:
    """`write`, for the end of a run: a report that fails is a warning, for the run's results are what matters."""
    try:
        write(folder, tasks)
    except Exception as error:
        log.warning("report.html was not written (%s: %s)", type(error).__name__, error)


# Sections


def _contents(results: dict) -> list[tuple[str, str]]:
    tasks = [(f"task-{name}", name) for name in results.get("tasks", ())]
    return [("results", "Results"), ("curves", "Curves"), *tasks, ("config", "Config"), ("data", "Data and machine")]


def _results(config: ConfigDict, results: dict, found: dict[str, Predictions]) -> list:
    lines = [tag("h2", "Results", id="results")]
    if not results:
        return [*lines, tag("p", "There are none yet: they come when the run is done.", class_="note")]
    tasks = results["tasks"]
    several = any(config.tasks[name].multilabel for name in tasks)
    titles = ["task", "#top-1", "#top-5", "#reversed", *["#mAP", "#mAP reversed"] * several, "#chance", "#ECE", "#examples", "#classes"]
    rows = []
    for name, task in tasks.items():
        ece = metrics.calibration(found[name].confidence, found[name].correct)["ece"] if name in found and not found[name].multilabel else None
        chance = None if "map" in task else 1 / task["classes"]
        shares = [task["top1"], task["top5"], task.get("top1_reversed"), *[task.get("map"), task.get("map_reversed")] * several, chance, ece]
        rows.append([tag("th", name, scope="row"), *map(percent, shares), count(task["n"]), count(task["classes"])])
    bad = [f"{name}: {task['undecodable']} files could not be decoded and are left out." for name, task in tasks.items() if task.get("undecodable")]
    return [
        *lines,
        tag(
            "p",
            f"Validation, each example once, {config.eval.views} views. Reversed: top-1 with the frames of each clip last to first.",
            class_="note",
        ),
        table(titles, rows),
        *(tag("p", line) for line in bad),
    ]


def _curves(events: list[dict]) -> list:
    losses, rates = plots.curves_of(events, r"train/(?:(.+)/)?loss"), plots.curves_of(events, r"train/(lr)")
    scores = plots.curves_of(events, r"val/(.+)/top1") | plots.curves_of(events, r"val/(.+)/map")
    total = losses.pop(None, None)
    if total and len(losses) != 1:
        losses["all tasks, weighted"] = total
    styles = curve_styles([*sorted({*losses, *scores} - {"all tasks, weighted"}), "all tasks, weighted", "lr"])
    charts = [
        line_chart("Training loss (nats)", losses, styles, shares=False),
        line_chart("Validation top-1 (mAP of multilabel tasks)" if _has_map(events) else "Validation top-1", scores, styles, shares=True),
        line_chart("Learning rate", rates, styles, shares=False),
    ]
    return [tag("h2", "Curves", id="curves"), tag("div", *charts, class_="grid")]


def _has_map(events: list[dict]) -> bool:
    return any(key.endswith("/map") for event in events for key in event)


def _task(name: str, folder: RunFolder, found: Predictions | None, pictures: Pictures, note: str) -> list:
    overview = _per_class(name, folder)
    parts = [tag("h2", name, id=f"task-{name}")]
    if found is None:
        line = f"Without {predictions.file_of(folder.path, name).name} there are no clips here; this writes it, then run vidjoint.report again:"
        commands = f"python -m vidjoint.evaluate --workdir={folder.path} --predictions={folder.path}"
        return [*parts, *overview, tag("p", line, class_="note"), tag("pre", commands)]
    if not found.multilabel and len(found.paths):
        calibration = metrics.calibration(found.confidence, found.correct)
        ece = calibration["ece"] or 0.0
        told = (
            "How often predictions are right (upwards) that claim so much probability (to the right); dark bars hold many. On the dashed line claims "
        )
        told += f"are kept, below it the model is too sure of itself, above it not sure enough. Expected calibration error (ECE): {100 * ece:.1f} %."
        chart = reliability_chart("Calibration", calibration["bins"])
        overview.append(tag("div", chart, tag("p", told, class_="note"), class_="part"))
    parts.append(tag("div", *overview, class_="grid two"))
    if note:
        parts.append(tag("p", note, class_="note"))
    if pairs := confused(found):
        totals = collections.Counter(labels[0] for labels in found.labels)
        back = collections.Counter((found.labels[i][0], found.top[i][0]) for i in np.flatnonzero(~found.correct))
        parts += [tag("h3", "Most confused pairs"), tag("p", "With the mistakes that the model was surest of.", class_="note")]
        cards = []
        for true, taken, rows in pairs:
            share = f"{len(rows)} of {totals[true]} ({100 * len(rows) / totals[true]:.0f} %); the other way {back[taken, true]} of {totals[taken]}"
            told = ((found.paths[i], [_percent_of(found.confidence[i]), " sure: ", _short(found.paths[i])]) for i in rows[:PER_PAIR])
            shown = [pictures.figure(name, *line) for line in told]
            told = tag("p", tag("strong", true), " taken for ", tag("strong", taken), f": {share}")
            cards.append(tag("div", told, tag("div", *shown, class_="clips")))
        parts.append(tag("div", *cards, class_="pairs"))
    if worst := hardest(found):
        parts += [tag("h3", "Hardest clips"), tag("p", "The true class got the least probability: hard, mislabelled, or cut badly.", class_="note")]
        shown = []
        for i in worst:
            truth = [tag("strong", " | ".join(found.labels[i])), f" {_percent_of(found.scores[i])}, taken for ", tag("strong", found.top[i][0])]
            shown.append(pictures.figure(name, found.paths[i], [*truth, f" {_percent_of(found.confidence[i])}: ", _short(found.paths[i])]))
        parts.append(tag("div", *shown, class_="clips"))
    return parts


def _per_class(name: str, folder: RunFolder) -> list:
    """The confusion matrix and the table of classes, as the last evaluation left them."""
    parts, rows, image = [], [], folder.path / f"confusion_{name}.png"
    with contextlib.suppress(OSError, ValueError), open(folder.path / "eval" / name / "per_class.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if image.exists():
        drawing = tag("figure", picture(image.read_bytes(), f"confusion matrix of {name}: share of each true class in each predicted one"))
        large = " large" if len(rows) > 12 else ""
        parts.append(tag("div", tag("h3", "Confusion matrix"), tag("div", drawing, class_=f"box{large}", tabindex="0"), class_=f"part{large}"))
    if not rows:
        return parts
    key = "top1" if "top1" in rows[0] else "average_precision"
    rows.sort(key=lambda row: float(row[key] or 2))
    cells = [
        [row["label"], percent(float(row[key]) if row[key] else None), count(int(row["examples"]))]
        + ([row["taken_for"], count(int(row["taken_for_examples"]))] if key == "top1" else [])
        for row in rows
    ]
    titles = ["class", "#top-1", "#examples", "taken for", "#times"] if key == "top1" else ["class", "#average precision", "#examples"]
    known = [float(row[key]) for row in rows if row[key]]
    mean = f", worst first; their mean is {100 * np.mean(known):.1f} %" if known else ""
    return [*parts, tag("div", tag("h3", f"Classes{mean}"), table(titles, cells, sortable=True, tall=True), class_="part")]


def _settings(config: ConfigDict) -> list:
    plain, rows = flat(base_config().to_dict()), []
    for key, value in flat({key: value for key, value in config.to_dict().items() if key != "tasks"}).items():
        if value != plain.get(key):
            rows.append([tag("td", tag("code", key)), _shown(value), _shown(plain.get(key))])
    usual = flat(task_config().to_dict())
    for name, task in config.tasks.items():
        changed = [(key, value) for key, value in flat(task.to_dict()).items() if value != usual[key]]
        rows += [[tag("td", tag("code", f"tasks.{name}.{key}")), _shown(value), _shown(usual[key])] for key, value in changed]
    return [
        tag("h2", "Config", id="config"),
        tag("p", "What differs from the base config; each key is explained in vidjoint/config.py.", class_="note"),
        table(["key", "value", "base"], rows),
        tag("details", tag("summary", "The whole config"), tag("pre", config_module.as_json(config), tabindex="0")),
    ]


def _about(about: dict) -> list:
    parts = [tag("h2", "Data and machine", id="data")]
    if not about:
        return [*parts, tag("p", "Not recorded: this run was started by an older version.", class_="note")]
    titles = ["task", "media", "#training", "#validation", "#classes", "clip", "#share", "#loss weight", "training data", "validation data"]
    rows = [
        [tag("th", name, scope="row"), task["media"], *(count(task[key]) for key in ("train", "val", "classes")), "x".join(map(str, task["clip"]))]
        + [percent(task["share"]), count(task["loss_weight"]), task["train_from"], task["val_from"]]
        for name, task in about["data"].items()
    ]
    model, memory, devices = about["model"], about["memory_per_device"], about["devices"]
    facts = [
        ["batches", about["batches"]],
        ["epoch", f"{about['epoch']['steps']:.1f} steps, {about['epoch']['examples']:,.0f} examples"],
        ["model", model["name"]],
        ["parameters", f"{model['trained']:,} trained, {model['frozen']:,} frozen"],
        ["multiply-accumulates", f"{model['macs_per_view']:,} per view of {'x'.join(map(str, model['view']))}"],
        ["memory per device", ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in memory.items()) + "; activations besides"],
        ["devices", f"{devices['count']} {devices['kind']}, {devices['processes']} process{'es' * (devices['processes'] > 1)}"],
        ["started", about["started"]],
        ["versions", ", ".join(f"{name} {version}" for name, version in about["versions"].items())],
    ]
    return [*parts, table(titles, rows), table(["what", "value"], facts)]


def _percent_of(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 or not share else f"{100 * share:.1g} %"


def _short(path: str) -> Html:
    """The end of a path, whole on hovering."""
    return tag("span", "/".join(path.split("/")[-2:]), title=path)


def _shown(value) -> Html:
    return tag("td", tag("code", repr(value)))


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vidjoint.report",
        description=__doc__.partition("\n")[0],
        epilog="The page needs no network and no other file. Its pictures are decoded from the validation files, if they are where the run found "
        "them (or below --data_root); without them it has all else. What each part means: docs/report.md.",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of a training run, finished or not")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page to write (default: DIR/report.html)")
    parser.add_argument("--data_root", metavar="FOLDER", help="where the run's data is, if it has moved since")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    folder = RunFolder(Path(args.workdir).expanduser())
    if args.data_root is not None:
        folder.config.data_root = args.data_root
    if args.out and (args.out.is_dir() or not os.access(args.out.absolute().parent, os.W_OK)):
        raise UserError(f"--out={args.out} can't be written: name a file in a folder that exists and is yours")
    print(write(folder, out=args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
