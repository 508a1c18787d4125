"""Pictures of a run: confusion matrices and learning curves, as PNG. Figures are drawn off screen, without pyplot and its global state."""

import io
import re
import warnings

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vidjoint.output_files import write_whole

DPI = 150
LABEL_LENGTH = 32  # characters of a class name that a tick label shows
WRITTEN_IN = 20  # classes up to which the cells hold their values
SMALLEST_LABEL = 0.11  # inches per class below which names would overlap, and class numbers stand in their place


def confusion_png(path, matrix: np.ndarray, labels, title: str = "") -> None:
    """Draws a confusion matrix, each row divided by its number of examples.

    Class names are shown where they fit (up to about 80 classes, class numbers beyond). Up to 20 classes the values are written in, in percent, and
    the colour scale is even; beyond, it spreads the small values, so that single confused pairs can be seen. A true class without examples is grey.

    Args:
      path: the PNG to write.
      matrix: int[C, C], rows are true classes.
      labels: C class names.
      title: one line above the picture.
    """
    classes = len(matrix)
    examples = np.asarray(matrix).sum(axis=1, keepdims=True)
    share = np.where(examples > 0, matrix / np.maximum(examples, 1), np.nan)  # [C, C]

    side = min(max(0.5 * classes, 2.5), 9)  # inches
    if side * DPI / 4 < classes <= side * DPI:
        side = classes * round(side * DPI / classes) / DPI  # small cells all get the same number of pixels
    cell = side / classes
    figure = Figure(figsize=(side, side), dpi=DPI)  # savefig makes room for what stands around the axes
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_facecolor("0.8")
    norm = PowerNorm(1 if classes <= WRITTEN_IN else 0.4, vmin=0, vmax=1)
    image = axes.imshow(share, cmap="Blues", norm=norm, interpolation="nearest" if cell * DPI >= 1 else "hanning")
    bar = figure.colorbar(image, cax=figure.add_axes((1 + 0.15 / side, 0, 0.15 / side, 1)), format=PercentFormatter(1))
    bar.set_label("share of the true class", size=9)
    bar.ax.tick_params(labelsize=8)

    if cell >= SMALLEST_LABEL:
        names = [_shorten(str(label)) for label in labels]
        if len(set(names)) < classes:
            names = [f"{number} {name}" for number, name in enumerate(names)]
        counted = [f"{name} ({count})" for name, count in zip(names, examples[:, 0], strict=True)]
        size = min(9, cell * 72 * 0.8)
        upright = max(map(len, names)) * size * 0.6 / 72 > cell
        axes.set_xticks(range(classes), names, fontsize=size, rotation=90 if upright else 0, parse_math=False)
        axes.set_yticks(range(classes), counted, fontsize=size, parse_math=False)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class (examples)")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.set_xlabel("number of the predicted class")
        axes.set_ylabel("number of the true class")
    if classes <= WRITTEN_IN:
        for row, column in np.argwhere(np.asarray(matrix) > 0):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, f"{100 * share[row, column]:.0f}", ha="center", va="center", size=min(10, cell * 72 * 0.35), color=colour)
    axes.set_title(title, size=11, parse_math=False)
    _save(figure, path)


def learning_curves_png(path, events) -> None:
    """Draws the training loss and the validation top-1 (of a multilabel task the mAP) of every task over the steps.

    Args:
      path: the PNG to write.
      events: dicts as `metrics.read_events` returns them; uses "train/loss", "train/NAME/loss", "val/NAME/top1" and "val/NAME/map" (0..1). A
        null interrupts its curve.
    """
    losses = curves_of(events, r"train/(?:(.+)/)?loss")
    precisions = curves_of(events, r"val/(.+)/map")
    accuracies = curves_of(events, r"val/(.+)/top1") | precisions
    metric = "top-1" if not precisions else "top-1 or mAP"
    tasks = sorted({*losses, *accuracies} - {None})
    styles = {task: {"color": f"C{i % 10}", "linestyle": ("-", "--", ":", "-.")[i // 10 % 4]} for i, task in enumerate(tasks)}
    styles[None] = {"color": "0.4", "linestyle": "--"}

    figure = Figure(figsize=(11, 4.4), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    handles = {}
    for axes, curves, title in ((left, losses, "training loss (nats)"), (right, accuracies, f"validation {metric}")):
        for task in sorted(curves, key=lambda task: (task is not None, task)):
            if task is None and len(tasks) == 1:
                continue  # the total repeats the only task
            steps, values = curves[task]
            marker = "o" if len(steps) <= 30 else None
            name = "all tasks, weighted" if task is None else f"{task} (mAP)" if task in precisions else task
            (handles[name],) = axes.plot(steps, values, marker=marker, markersize=4, linewidth=1.5, **styles[task])
        if not curves:
            axes.text(0.5, 0.5, "none so far", transform=axes.transAxes, ha="center", color="0.4")
        axes.set_title(title, size=11)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.grid(alpha=0.3)
    highest = np.nanmax([0, *(value for _, values in losses.values() for value in values)])
    left.set_ylim(0, 1.05 * highest or 1)
    right.set_ylim(0, 1.02)
    right.yaxis.set_major_formatter(PercentFormatter(1))
    if handles:
        legend = figure.legend(handles.values(), map(_shorten, handles), loc="outside lower center", ncols=min(len(handles), 5), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    _save(figure, path)


def curves_of(events, pattern: str) -> dict:
    """Returns task (None: all together) -> (steps, values), with NaN for null."""
    curves = {}
    for event in events:
        for name, value in event.items():
            if match := re.fullmatch(pattern, name):
                steps, values = curves.setdefault(match[1], ([], []))
                steps.append(event["step"])
                values.append(np.nan if value is None else value)
    return curves


def _shorten(text: str) -> str:
    """Leaves out the middle of a long text: class names often differ at their ends ("... from left to right")."""
    half = LABEL_LENGTH // 2
    return text if len(text) <= LABEL_LENGTH else f"{text[: half - 1].rstrip()}…{text[-half:].lstrip()}"


def _save(figure: Figure, path) -> None:
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # class names in scripts that the font lacks appear as boxes
        figure.savefig(png, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.15)
    write_whole(path, png.getvalue())
