"""Figures drawn off screen, without pyplot and its global state, and written whole."""

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vidjoint.output_files import write_whole

DPI = 110
MOST_LABEL = 32  # characters of a name


def save(figure: Figure, path: Path, dpi: int = DPI) -> None:
    """Writes a PNG."""
    png = io.BytesIO()
    with _missing_glyphs():
        figure.savefig(png, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.12)
    write_whole(path, png.getvalue())


def pixels_of(figure: Figure, dpi: int = DPI) -> np.ndarray:
    """The figure as uint8[H, W, 3]."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with _missing_glyphs():
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def shorten(text: str) -> str:
    """Leaves out the middle of a long text: class names often differ at their ends ("... from left to right")."""
    half = MOST_LABEL // 2
    return text if len(text) <= MOST_LABEL else f"{text[: half - 1].rstrip()}…{text[-half:].lstrip()}"


@contextlib.contextmanager
def _missing_glyphs():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # names in scripts that the font lacks appear as boxes
        yield
