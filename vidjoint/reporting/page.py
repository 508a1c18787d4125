"""The pieces of a self-contained HTML page: text that is escaped unless it says otherwise, tables, SVG charts, pictures as data URIs."""

import base64
import hashlib
import html
import io
import math
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

COLOURS = ("#0067a5", "#c4500a", "#007d5a", "#a8428a", "#7a5c00", "#8b1e3f", "#2f6f8f", "#555555")  # 4.5 : 1 on white, told apart by most eyes
DASHES = ("", "6 3", "2 2")  # the next eight curves are dashed
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 360, 230, 44, 26, 8, 10  # of a chart, in its own units; on a phone one unit is about one pixel

STYLE = """
:root { color: #1b1b1b; background: #fff; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 1120px; margin: 0 auto; padding: 0 16px 48px; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 20px 0 0; } h2 { font-size: 1.25rem; margin: 40px 0 4px; border-top: 1px solid #ccc; padding-top: 16px; }
h3 { font-size: 1rem; margin: 24px 0 4px; } p { margin: 4px 0 8px; max-width: 75ch; } .note { color: #595959; }
nav { margin: 8px 0; } nav a { margin-right: 14px; white-space: nowrap; } a { color: #00568a; }
.box { overflow-x: auto; max-width: 100%; margin: 8px 0; } .tall { width: fit-content; max-height: 440px; overflow-y: auto; border: 1px solid #ddd; }
table { border-collapse: collapse; overflow-wrap: break-word; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 12px 3px 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e4e4; }
.tall th, .tall td { padding-left: 8px; } .tall td:not(.number) { min-width: 6.5em; }
.tall thead th { position: sticky; top: 0; background: #f2f2f2; }
th { font-weight: 600; white-space: nowrap; } td.number, th.number { text-align: right; white-space: nowrap; } td { min-width: 3.5em; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; text-decoration: underline dotted; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 8px 32px; align-items: start; }
.grid.two { grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(250px, 100%), 1fr)); gap: 14px 20px; }
figure { margin: 8px 0; min-width: 0; } figcaption { font-size: 0.87rem; } .clips figure { margin: 0; } .clips img { display: block; }
figure h3 { margin: 0 0 4px; } svg { width: 100%; max-width: 400px; height: auto; display: block; } img { max-width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: #444; } .legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 0.87rem; }
.legend svg { width: 26px; height: 10px; display: inline-block; vertical-align: middle; margin-right: 5px; }
pre { background: #f5f5f5; padding: 10px; overflow-x: auto; font-size: 0.82rem; } summary { cursor: pointer; padding: 4px 0; color: #00568a; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)); gap: 12px 20px; }
.grid h3, .part figure h3 { margin: 12px 0 4px; } .part figure { margin-top: 0; } .part:first-child { grid-row: span 2; }
.part.large { grid-area: auto / 1 / auto / -1; }
.box.large img { min-width: 620px; max-width: none; width: min(100%, 860px); } td code { font-size: 0.87rem; }
"""

SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const heading = button.parentElement, body = heading.closest("table").tBodies[0], column = heading.cellIndex;
  const down = heading.getAttribute("aria-sort") === "ascending";
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => key(a) === "" || key(b) === "" ? (key(a) === "") - (key(b) === "")
    : (down ? -1 : 1) * key(a).localeCompare(key(b), undefined, { numeric: true });
  body.append(...[...body.rows].sort(compare));
  for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
});
"""


class Html(str):
    """Text that is HTML already."""


def escaped(value) -> Html:
    """Any text as HTML; `Html` stays as it is. Characters that nobody could see, or that turn the writing round, become escapes."""
    if isinstance(value, Html):
        return value
    seen = (char if char.isprintable() or unicodedata.category(char) == "Zs" else char.encode("unicode_escape").decode() for char in str(value))
    return Html(html.escape("".join(seen)))


def tag(name: str, *content, **attributes) -> Html:
    """An element; `class_` stands for class. Content and attributes are escaped."""
    opening = "".join(f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"' for key, value in attributes.items() if value is not None)
    return Html(f"<{name}{opening}>{join(content)}</{name}>")


def join(parts: Iterable, between: str = "") -> Html:
    return Html(between.join(map(escaped, parts)))


def page(title: str, body: Iterable) -> str:
    """A whole page. Its policy forbids browsers to fetch anything, and to run any script but ours."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        Html(f"<style>{STYLE}</style>"),
    ]
    rest = f"<body>\n{join(body, chr(10))}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{join(head)}</head>\n{rest}'


def percent(share: float | None) -> Html:
    """A share of 0..1 as a table's cell that sorts by its value."""
    text = "" if share is None or math.isnan(share) else f"{100 * share:.1f} %"
    return tag("td", text or "-", class_="number", data_value=f"{share:.6f}" if text else "")


def count(number: float | None) -> Html:
    """A number as a table's cell."""
    return tag("td", "-" if number is None else f"{number:,}", class_="number", data_value="" if number is None else number)


def table(titles: Sequence[str], rows: Iterable[Sequence], sortable: bool = False, tall: bool = False) -> Html:
    """A table that scrolls inside its own box. Cells are text, or `td` elements; a title that starts with # is of a column of numbers."""

    def heading(title: str) -> Html:
        name = title.lstrip("#")
        return tag("th", tag("button", name, type="button") if sortable else name, scope="col", class_="number" if title != name else None)

    body = (tag("tr", *(cell if isinstance(cell, Html) else tag("td", cell) for cell in row)) for row in rows)
    inner = tag("table", tag("thead", tag("tr", *map(heading, titles))), tag("tbody", join(body)))
    return tag("div", inner, class_="box tall" if tall else "box", tabindex="0")


def picture(png: bytes, alt: str, kind: str = "png") -> Html:
    """An image inside the page."""
    return Html(f'<img src="data:image/{kind};base64,{base64.b64encode(png).decode()}" alt="{escaped(alt)}">')


def strip(frames: np.ndarray, height: int = 84) -> bytes:
    """Frames uint8[T, H, W, 3] side by side as a JPEG, small pictures enlarged by whole numbers so that their pixels stay crisp."""
    gap = np.full((frames.shape[1], max(1, frames.shape[1] // 40), 3), 255, np.uint8)
    image = Image.fromarray(np.concatenate([part for frame in frames for part in (frame, gap)][:-1], axis=1))
    factor = height / image.height
    size = (round(image.width * factor), height) if factor < 1 else (image.width * round(factor), image.height * round(factor))
    out = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST).save(out, "JPEG", quality=82)
    return out.getvalue()


# Charts


def line_chart(title: str, curves: dict[str, tuple[list, list]], styles: dict[str, str], shares: bool) -> Html:
    """Curves over steps: name -> (steps, values), NaN interrupts; `styles` are SVG attributes of each name. The axis of shares runs to 100 %."""
    numbers = [(x, y) for xs, ys in curves.values() for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    if not numbers:
        return tag("figure", tag("h3", title), tag("p", "none so far", class_="note"))
    last = max(x for x, _ in numbers)
    highest = 1.0 if shares else max(1e-9, max(y for _, y in numbers))
    x_ticks, y_ticks = ticks(last), [0, 0.25, 0.5, 0.75, 1] if shares else ticks(highest)
    across, up = _scale(max(last, 1), LEFT, WIDTH - RIGHT), _scale(max(highest, y_ticks[-1]), HEIGHT - BOTTOM, TOP)
    parts = [
        _axes(
            [(across(x), f"{x / 1000:g}k" if last >= 10_000 and x else f"{x:g}") for x in x_ticks],
            [(up(y), f"{y:.0%}" if shares else f"{y:g}") for y in y_ticks],
        )
    ]
    for name, (xs, ys) in curves.items():
        runs, told = [[]], ""
        for x, y in zip(xs, ys, strict=True):
            if math.isfinite(y):
                runs[-1].append(f"{across(x):.1f},{up(y):.1f}")
                told = f"{100 * y:.1f} %" if shares else f"{y:.4g}"
            elif runs[-1]:
                runs.append([])
        tip = tag("title", f"{name}: {told} at the end")
        parts += [Html(f'<polyline points="{" ".join(run)}" fill="none" stroke-width="1.8" {styles[name]}>{tip}</polyline>') for run in runs if run]
        if len(xs) <= 12:
            spots = [spot.split(",") for run in runs for spot in run]
            parts += [Html(f'<circle cx="{x}" cy="{y}" r="3" {styles[name]} fill="#fff">{tip}</circle>') for x, y in spots]
    if len(curves) == 1:
        return tag("figure", tag("h3", title), _svg(f"{title} over the steps", parts))
    sample = '<svg viewBox="0 0 26 10" aria-hidden="true"><path d="M0 5H26" stroke-width="3" {}/></svg>'
    legend = [tag("span", Html(sample.format(styles[name])), name) for name in curves]
    return tag("figure", tag("h3", title), _svg(f"{title} over the steps", parts), tag("div", *legend, class_="legend"))


def curve_styles(names: Iterable[str]) -> dict[str, str]:
    """SVG attributes that tell curves apart, the same for a name in every chart."""
    styles = {}
    for i, name in enumerate(names):
        dash = DASHES[i // len(COLOURS) % len(DASHES)]
        styles[name] = f'stroke="{COLOURS[i % len(COLOURS)]}"' + (f' stroke-dasharray="{dash}"' if dash else "")
    return styles


def reliability_chart(title: str, bins: list[dict]) -> Html:
    """The bars of `metrics.calibration`: how often predictions of each confidence are right, beside the diagonal of those that keep their word."""
    across, up = _scale(1, LEFT, WIDTH - RIGHT), _scale(1, HEIGHT - BOTTOM, TOP)
    marks = [0, 0.25, 0.5, 0.75, 1]
    parts = [_axes([(across(x), f"{x:.0%}") for x in marks], [(up(y), f"{y:.0%}") for y in marks])]
    most = max((bar["examples"] for bar in bins), default=1)
    for bar in bins:
        x, y = across(bar["from"]) + 1, up(bar["accuracy"])
        tip = f"{bar['examples']} predictions of {bar['from']:.0%} to {bar['to']:.0%}: {bar['accuracy']:.1%} right, {bar['confidence']:.1%} claimed"
        size = f'x="{x:.1f}" y="{y:.1f}" width="{across(bar["to"]) - x - 1:.1f}" height="{up(0) - y:.1f}"'
        opacity = 0.35 + 0.65 * math.sqrt(bar["examples"] / most)  # many examples: dark
        parts.append(Html(f'<rect {size} fill="{COLOURS[0]}" fill-opacity="{opacity:.2f}"><title>{escaped(tip)}</title></rect>'))
    parts.append(Html(f'<path d="M{across(0)} {up(0)}L{across(1)} {up(1)}" stroke="#1b1b1b" stroke-dasharray="4 3"/>'))
    return tag("figure", tag("h3", title), _svg(f"{title}: share that is right over confidence", parts))


def ticks(highest: float) -> list[float]:
    """About five round numbers from 0 up to `highest`."""
    size = 10 ** math.floor(math.log10(max(highest, 1e-9) / 4))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor * 5 >= highest)
    return [round(step * i, 10) for i in range(int(highest / step + 1e-9) + 1)]


def _scale(highest: float, start: float, end: float):
    return lambda value: start + (end - start) * value / highest


def _axes(x_marks: list[tuple[float, str]], y_marks: list[tuple[float, str]]) -> Html:
    parts = []
    for y, text in y_marks:
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/><text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for x, text in x_marks:
        where = "middle" if x < WIDTH - 30 else "end"
        parts.append(f'<text x="{min(x, WIDTH - 2):.1f}" y="{HEIGHT - 8}" text-anchor="{where}">{text}</text>')
    return Html("".join(parts) + f'<path d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}" stroke="#777"/>')


def _svg(label: str, parts: list) -> Html:
    return Html(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(label)}">{join(parts)}</svg>')
