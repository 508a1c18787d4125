"""Heat maps over the frames of a clip: as a sheet (PNG) or moving (GIF, MP4)."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from vidjoint.drawing.figures import pixels_of, save

COLOURS = "inferno"  # even steps look even, also to the colour-blind and in grey
OPACITY = 0.62
MOST_COLUMNS = 16  # frames side by side
MARK = "#56B4E9"
WIDTH = 256  # pixels of a panel that moves, at least


@dataclass(frozen=True)
class Layer:
    """A row of heat maps.

    Attributes:
      name: a short one.
      values: float[T, rows, columns] over the patches, NaN where there is nothing; or colours float[T, rows, columns, 3] in 0..1.
      low, high: ends of the colour scale, which the row has for itself.
      matrix: float[T, T] to stand at the end of the row, if any: from frame (row) to frame (column).
    """

    name: str
    values: np.ndarray
    low: float
    high: float
    matrix: np.ndarray | None = None


def scaled(name: str, values: np.ndarray, unit: float = 1.0, matrix: np.ndarray | None = None, low: float | None = 0.0) -> Layer:
    """A layer of values / unit whose scale goes from `low` (None: the least) to the largest, a hundredth of outliers aside."""
    values = values / unit
    low = float(np.nanmin(values)) if low is None else low
    return Layer(name, values, low, max(float(np.nanquantile(values, 0.99)), low + 1e-6), matrix)


def overlaid(frame: np.ndarray, layer: Layer, t: int) -> np.ndarray:
    """uint8[H, W, 3]: the frame in grey under the colours of the patches."""
    values = layer.values[t]
    colours = (
        values if values.ndim == 3 else matplotlib.colormaps[COLOURS](Normalize(layer.low, layer.high, clip=True)(np.nan_to_num(values)))[..., :3]
    )
    there = np.isfinite(values if values.ndim == 2 else values[..., 0])
    height, width = frame.shape[:2]
    rows, columns = (np.arange(height) * values.shape[0] // height), (np.arange(width) * values.shape[1] // width)
    grey = frame @ np.array([0.299, 0.587, 0.114]) / 255
    alpha = np.where(there, OPACITY, 0.0)[rows][:, columns][..., None]
    base = np.where(alpha > 0, grey[..., None], 0.45 * grey[..., None])
    return np.round(255 * ((1 - alpha) * base + alpha * colours[rows][:, columns])).astype(np.uint8)


def sheet_png(
    path: Path,
    frames: np.ndarray,
    seconds: np.ndarray,
    layers: list[Layer],
    title: str,
    note: str,
    shares: np.ndarray | None = None,
    mark: tuple[int, int, int] | None = None,
) -> None:
    """Draws the frames in a row, labelled with their time, below them each layer over the same frames, and the scale of each at its end.

    Args:
      path: the PNG to write.
      frames: uint8[T, H, W, 3].
      seconds: float[T].
      title, note: lines above and below.
      shares: float[T] to draw as bars below the frames.
      mark: frame, row and column of a patch that is framed.
    """
    count, height, width, _ = frames.shape
    shown = np.unique(np.linspace(0, count - 1, min(count, MOST_COLUMNS)).round().astype(int))
    side = max(0.75, min(1.5, 13 / len(shown)))  # inches
    tall = side * height / width
    matrices = any(layer.matrix is not None for layer in layers)
    heights = [tall] * (1 + len(layers)) + ([0.7] if shares is not None else [])
    columns = len(shown) + matrices
    figure = Figure(figsize=(side * columns + 1.7, sum(heights) + 0.03 * len(heights) + 1), layout="compressed")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    cells = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights, width_ratios=[side] * len(shown) + [tall] * matrices)
    for row, layer in enumerate([None, *layers]):
        for t, axes in zip(shown, cells[row], strict=False):
            axes.imshow(frames[t] if layer is None else overlaid(frames[t], layer, t), interpolation="nearest" if height >= 64 else "bicubic")
            _bare(axes)
            if layer is None:
                axes.set_title(f"{seconds[t]:.2f} s", fontsize=8, pad=3)
            if mark and t == mark[0]:
                _frame_patch(axes, mark[1:], (height, width), layers[0].values.shape[1:3])
        cells[row, 0].set_ylabel("frames" if layer is None else layer.name, fontsize=8, rotation=0, ha="right", va="center", parse_math=False)
        if matrices:
            _draw_matrix(cells[row, -1], layer and layer.matrix)
        if layer is not None:
            _draw_scale(figure, cells[row], layer)
    if shares is not None:
        _draw_shares(cells[-1], shares[shown])
    figure.suptitle(shorten_title(title), x=0.01, ha="left", fontsize=10, parse_math=False)
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color="0.35", parse_math=False)
    save(figure, path)


def grid_png(path: Path, pair: np.ndarray, seconds: np.ndarray, panels: np.ndarray, title: str, note: str) -> None:
    """Draws two frames, uint8[2, H, W, 3], and below them a panel for each block, row by row: float[blocks, rows, columns, 3] in 0..1."""
    columns = min(4, max(2, len(panels)))
    rows = 1 + -(-len(panels) // columns)
    ratio = pair.shape[1] / pair.shape[2]
    figure = Figure(figsize=(1.7 * columns, (1.7 * ratio + 0.25) * rows + 0.7), layout="compressed")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.0, hspace=0.0)
    cells = figure.subplots(rows, columns, squeeze=False)
    blank = [np.ones((1, 1, 3))] * (columns - 2)
    names = [f"{second:.2f} s" for second in seconds] + [""] * (columns - 2) + [f"block {number}" for number in range(len(panels))]
    for axes in cells.flat:
        axes.set_visible(False)
    for axes, picture, name in zip(cells.flat, [*pair, *blank, *panels], names, strict=False):
        axes.set_visible(bool(name))
        axes.imshow(picture, interpolation="nearest", extent=(0, pair.shape[2], pair.shape[1], 0))
        axes.set_title(name, fontsize=8, pad=3)
        _bare(axes)
    figure.suptitle(shorten_title(title), x=0.02, ha="left", fontsize=9, parse_math=False)
    figure.supxlabel(note, x=0.02, ha="left", fontsize=8, color="0.35", parse_math=False)
    save(figure, path)


def moving(
    frames: np.ndarray, seconds: np.ndarray, of: np.ndarray, layers: list[Layer], title: str, mark: tuple[int, int, int] | None = None
) -> Iterator:
    """Yields pictures uint8[h, w, 3], one for each of `frames` uint8[F, H, W, 3] shown at `seconds`: the frame and beside it every layer.

    `of` int[F] says which frame of the layers is nearest in time.
    """
    _, height, width, _ = frames.shape
    columns = min(1 + len(layers), 4)
    rows = -(-(1 + len(layers)) // columns)
    side = max(WIDTH, width) / 110
    figure = Figure(figsize=(columns * side + 0.1, rows * (side * height / width + 0.25) + 0.35))
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=dict(wspace=0.04, hspace=0.1, left=0.01, right=0.99, bottom=0.01))
    figure.subplots_adjust(top=1 - 0.45 / figure.get_figheight())
    images = []
    for place, ax in enumerate(axes.flat):
        _bare(ax)
        ax.set_visible(place <= len(layers))
        if place <= len(layers):
            images.append(ax.imshow(np.zeros((height, width, 3), np.uint8), interpolation="nearest"))
            ax.set_title("" if place == 0 else layers[place - 1].name, fontsize=9, pad=3, parse_math=False)
    letters = int(13 * figure.get_figwidth())
    figure.text(0.012, 0.985, title if len(title) <= letters else title[: letters - 1] + "…", fontsize=9, va="top", parse_math=False)
    if mark:
        _frame_patch(axes.flat[0], mark[1:], (height, width), layers[0].values.shape[1:3])
    for frame, second, t in zip(frames, seconds, of, strict=True):
        axes.flat[0].set_title(f"{second:.2f} s", fontsize=9, pad=3)
        for image, picture in zip(images, [frame, *(overlaid(frame, layer, t) for layer in layers)], strict=True):
            image.set_data(picture)
        yield pixels_of(figure)


def write_moving(path: Path, pictures: Iterator, seconds_each: float) -> None:
    """Writes pictures uint8[h, w, 3] as an endless GIF or as an MP4 (H.264), by the ending."""
    if path.suffix.lower() == ".gif":
        images = [Image.fromarray(picture).quantize(256, dither=Image.Dither.NONE) for picture in pictures]
        images[0].save(path, save_all=True, append_images=images[1:], duration=max(20, round(1000 * seconds_each)), loop=0, optimize=True)
        return
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as out:
        stream = None
        for picture in pictures:
            picture = np.ascontiguousarray(picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2])
            if stream is None:
                stream = out.add_stream(
                    "libx264", rate=Fraction(1 / seconds_each).limit_denominator(1001), options={"crf": "18", "preset": "veryfast"}
                )
                stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        out.mux(stream.encode())


def shorten_title(title: str) -> str:
    return title if len(title) <= 110 else f"{title[:54]}…{title[-55:]}"


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _frame_patch(axes: Axes, patch: tuple[int, int], size: tuple[int, int], grid: tuple[int, int]) -> None:
    height, width = size[0] / grid[0], size[1] / grid[1]
    corner = patch[1] * width - 0.5, patch[0] * height - 0.5
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=MARK, linewidth=1.8))


def _draw_scale(figure: Figure, row: np.ndarray, layer: Layer) -> None:
    if layer.values.ndim == 4:
        return
    bar = figure.colorbar(ScalarMappable(Normalize(layer.low, layer.high), COLOURS), ax=row.tolist(), pad=0.01, aspect=9, fraction=0.02)
    bar.set_ticks([layer.low, layer.high], labels=[f"{layer.low:.3g}", f"{'≥ ' * bool(layer.high < np.nanmax(layer.values))}{layer.high:.3g}"])
    for label, place in zip(bar.ax.get_yticklabels(), ("bottom", "top"), strict=True):
        label.set_verticalalignment(place)
    bar.ax.tick_params(labelsize=7, length=0, pad=3)
    bar.outline.set_visible(False)


def _draw_matrix(axes: Axes, matrix: np.ndarray | None) -> None:
    """From frame (rows) to frame (columns)."""
    _bare(axes)
    if matrix is None:
        axes.set_visible(False)
        return
    axes.imshow(matrix, cmap=COLOURS, vmin=0, interpolation="nearest")
    axes.set_title("from ↓ to → frame", fontsize=6, pad=2)


def _draw_shares(row: np.ndarray, shares: np.ndarray) -> None:
    for axes in row:
        axes.set(xlim=(-0.6, 0.6), ylim=(0, 1.35 * shares.max()), xticks=[], yticks=[])
        axes.spines[["top", "left", "right"]].set_visible(False)
    for axes, share in zip(row, shares, strict=False):
        axes.bar([0], [share], color="#0072B2", width=0.6)
        axes.text(0, share, f"{100 * share:.0f} %", ha="center", va="bottom", fontsize=8)
    row[0].set_ylabel("share of\nthe frame", fontsize=8, rotation=0, ha="right", va="center")
