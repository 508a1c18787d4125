"""What a long video shows when: as rows for a spreadsheet, and as a picture with thumbnails, coloured bands and curves."""

import csv
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from vidjoint.data.transforms import Geometry
from vidjoint.data.video import Video
from vidjoint.drawing.figures import save, shorten

# Okabe and Ito's colours, which the colour-blind tell apart; classes beyond share the grey
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7F7F7F")
OTHERS = "0.8"
INCHES = 12
THUMBNAILS = 12
THUMBNAIL = 150  # pixels, height


def header(topk: int) -> list[str]:
    return ["path", "start", "end", "task", *(name for i in range(1, topk + 1) for name in (f"label_{i}", f"score_{i}"))]


def csv_row(answer: dict) -> list:
    """An answer as `Classifier.iter_predict` gives it -> the fields of `header`; seconds with a point, empty where a file was not cut."""
    pairs = [field for label, score in zip(answer["labels"], answer["scores"], strict=True) for field in (label, f"{score:.6f}")]
    return [answer["path"], answer.get("start", ""), answer.get("end", ""), answer["task"], *pairs]


def write_csv(path: Path, topk: int, answers: Iterable[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header(topk))
        writer.writerows(csv_row(answer) for answer in answers)


def timeline_png(path: Path, video: str, max_pixels: int, spans: np.ndarray, scores: dict[str, np.ndarray], labels: dict[str, tuple]) -> None:
    """Draws thumbnails of a video and, for each task, a band of its best label over time and the scores of the labels that matter most.

    Args:
      path: the PNG to write.
      spans: float[n, 2], start and end of each window in seconds, rising.
      scores: task -> float[n, C] in 0..1.
      labels: task -> C class names.

    Raises:
      DecodeError: the video can't be decoded.
    """
    thumbnails, duration, aspect = _thumbnails(video, max_pixels)
    strip = INCHES / len(thumbnails) / aspect
    heights = [strip] + [height for _ in scores for height in (0.35, 1.5)]
    figure = Figure(figsize=(INCHES, sum(heights) + 0.5 + 0.55 * len(scores)), layout="constrained")
    figure.get_layout_engine().set(hspace=0.02, h_pad=0.03)
    rows = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for i, thumbnail in enumerate(thumbnails):
        part = duration / len(thumbnails)
        rows[0].imshow(thumbnail, extent=(i * part, (i + 1) * part, 0, 1), aspect="auto")
    rows[0].set(yticks=[], ylim=(0, 1))
    rows[0].set_title(Path(video).name, fontsize=10, loc="left", parse_math=False)
    for (task, values), band, curves in zip(scores.items(), rows[1::2], rows[2::2], strict=True):
        _draw_task(band, curves, spans, values, labels[task], task if len(scores) > 1 else "")
    for axes in rows:
        axes.set_xlim(0, duration)
        axes.tick_params(labelsize=8, bottom=axes is rows[-1])
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    rows[-1].xaxis.set_major_locator(MaxNLocator(12, steps=[1, 2, 3, 6, 10]))
    rows[-1].xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: clock(seconds, duration)))
    save(figure, path)


def clock(seconds: float, duration: float) -> str:
    """Seconds as 7.5 s, 1:05 or 1:02:05, by how long the whole lasts."""
    if duration < 90:
        return f"{seconds:g} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if duration >= 3600 else f"{rest // 60}:{rest % 60:02d}"


def _draw_task(band: Axes, curves: Axes, spans: np.ndarray, scores: np.ndarray, labels: tuple, task: str) -> None:
    best = scores.argmax(axis=1)
    # Those that are best for the longest time come first, then those with the highest peaks
    ranked = np.lexsort((-scores.max(axis=0), -np.bincount(best, minlength=scores.shape[1])))[: len(PALETTE)]
    colours = {c: PALETTE[i] for i, c in enumerate(ranked)}
    edges = borders(spans)
    for (start, end), label in runs(best, edges):
        colour = colours.get(label, OTHERS)
        band.axvspan(start, end, color=colour, linewidth=0)
        room = int((end - start) / (edges[-1, 1] - edges[0, 0]) * INCHES / 0.085)  # characters
        if room >= 3:
            dark = np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) < 0.55
            name = str(labels[label])
            name = name if len(name) <= room else name[: room - 1] + "…"
            band.text(
                (start + end) / 2, 0.5, name, ha="center", va="center", size=8, color="white" if dark else "black", clip_on=True, parse_math=False
            )
    band.set(yticks=[], ylim=(0, 1))
    band.set_ylabel(task, fontsize=8, rotation=0, ha="right", va="center", parse_math=False)
    middles = spans.mean(axis=1)
    for c in reversed(ranked):
        marker = "o" if len(spans) <= 40 else None
        curves.plot(middles, scores[:, c], color=colours[c], linewidth=1.6, marker=marker, markersize=3, label=shorten(str(labels[c])))
    curves.set_ylim(0, 1.03)
    curves.yaxis.set_major_formatter(PercentFormatter(1))
    curves.set_yticks([0, 0.5, 1])
    curves.grid(alpha=0.3)
    handles, names = curves.get_legend_handles_labels()
    legend = curves.legend(
        handles[::-1], names[::-1], loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=min(4, len(names)), fontsize=8, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def borders(spans: np.ndarray) -> np.ndarray:
    """float[n, 2]: the time for which each window stands. Where windows overlap they meet half way; gaps stay gaps."""
    edges = spans.astype(float).copy()
    for i in range(len(edges) - 1):
        if edges[i, 1] > spans[i + 1, 0]:
            edges[i, 1] = edges[i + 1, 0] = (spans[i].mean() + spans[i + 1].mean()) / 2
    return edges


def runs(best: np.ndarray, edges: np.ndarray) -> list[tuple[tuple[float, float], int]]:
    """Stretches of time with one label: neighbours that touch are joined."""
    found: list[tuple[tuple[float, float], int]] = []
    for label, (start, end) in zip(best.tolist(), edges.tolist(), strict=True):
        if found and found[-1][1] == label and math.isclose(found[-1][0][1], start, abs_tol=1e-6):
            found[-1] = (found[-1][0][0], end), label
        else:
            found.append(((start, end), label))
    return found


def _thumbnails(file: str, max_pixels: int) -> tuple[np.ndarray, float, float]:
    """uint8[n, h, w, 3], evenly spread; the duration in seconds; width / height."""
    with Video(file, max_pixels) as video:
        aspect = video.info.width / video.info.height
        count = max(3, min(30, round(THUMBNAILS * (16 / 9) / aspect)))
        height, width = THUMBNAIL, max(1, round(THUMBNAIL * aspect))
        times = (np.arange(count) + 0.5) * video.info.duration / count
        return video.read(times, Geometry((height, width), 0, 0, height, width)), video.info.duration, aspect
