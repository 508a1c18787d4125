"""Shows what a trained model looks at in a video or image.

python -m vidjoint.visualize --workdir=DIR FILE --what=am_flow|am_flow_grid|attention|rollout|motion --out=FILE.png|.gif|.mp4
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from vidjoint import sharding
from vidjoint.classifier import Answer, Classifier, parse_step
from vidjoint.data.clips import view_times
from vidjoint.data.decode import DecodeError
from vidjoint.data.examples import ClipSpec
from vidjoint.data.files import has_extension
from vidjoint.data.image import read_image
from vidjoint.data.prediction import Window, decoded, whole_files
from vidjoint.data.tasks import clip_spec
from vidjoint.data.transforms import Geometry, view_geometry
from vidjoint.data.video import Video
from vidjoint.drawing.maps import Layer, grid_png, moving, scaled, sheet_png, write_moving
from vidjoint.errors import Paragraphs, UserError, command
from vidjoint.maps.attention import Maps, Stage, looks, maps_of, neighbours
from vidjoint.maps.flow import am_flow, flow_of_heads
from vidjoint.maps.rollout import rollout

SHARPER = 288  # pixels of the frames drawn, at most, where the file has them
MOST_BLOCKS = 12  # that are drawn unless they are named
RATE = 12.5  # pictures a second of what moves, at most
MOST_PICTURES = 150
TITLES = {
    "am_flow": "AM flow",
    "am_flow_grid": "AM flow of all blocks",
    "attention": "Attention",
    "rollout": "Attention rollout",
    "motion": "Attention of a patch",
}
EPILOG = """
am_flow: a row for each block that computes attention-map flow: bright patches are those whose attention changes most up to the next frame.

am_flow_grid: figure 5 of the AM Flow paper: two frames (from --frame to the next), and for every block the flow of its heads between them, as the
colours of their first three principal components. For any model that attends within frames, to choose blocks for AM flow by.

attention: where the class token looks, in every block (mean over the heads; --block=N: each head of that block), or the mean of the patches where
the model pools patches. Divided and motion attention have a row for time, too: the attention that a place gets from the other frames.

rollout: attention rollout: how much each patch stands behind the result, through all blocks, in space and time, and the share of each frame.

motion: motion and other attention of one patch (--frame, --patch): its neighbours in space and time that it looks at, block by block.

A scale that is not given in the units of the quantity is in multiples of the even share: 1 is what each patch would get if all got the same.
PNG shows the frames side by side; GIF and MP4 play the video under the maps (am_flow_grid: PNG only).
"""


@dataclass(frozen=True)
class Clip:
    """What the model sees of a file, and what people do."""

    pixels: np.ndarray  # uint8[T, h, w, 3], the model's
    seconds: np.ndarray  # float[T]
    read: Callable[[np.ndarray], np.ndarray]  # times -> the same part of the picture in more detail, uint8[.., H, W, 3]
    duration: float  # seconds; 0 for an image


@command
def main(argv: list[str]) -> int:
    args = _parse(argv)
    step, out = parse_step(args.step), _check_out(args.out, args.what)
    sharding.keep_compiled()
    classifier = Classifier(args.workdir, step)
    _check_model(classifier, args)
    task = classifier.choose_task(args.task) if args.task or len(classifier.tasks_for(args.file)) > 1 else classifier.tasks_for(args.file)[0]
    clip = load(args.file, clip_spec(classifier.config, task))
    if args.what.startswith("am_flow") and len(clip.pixels) == 1:
        raise UserError(f"{args.file} is an image, or the task {task} of images: flow is the change from frame to frame")
    title = f"{TITLES[args.what]}: {os.path.basename(args.file)}, predicted {predicted(classifier, clip, task)}"
    if args.what == "am_flow_grid":
        count = _draw_grid(classifier, clip, args, out, title)
    else:
        layers, note, more = LAYERS[args.what](classifier, clip, args)
        count = len(layers)
        _draw(out, clip, layers, title, note, **more)
    print(f"{args.out}: {args.what}, {count} {'maps' if count != 1 else 'map'} over {len(clip.pixels)} frames")
    return 0


def load(file: str, spec: ClipSpec) -> Clip:
    """Decodes the middle view of a file as prediction does. Raises UserError."""
    (row,) = decoded(whole_files([file]), lambda path: (spec,), 1, 1, 1, 1)
    if row.pixels is None:
        raise UserError(f"{file}: {row.error}")
    pixels = row.pixels[0]
    is_image = spec.settings.media == "image" if not has_extension(file, "video") else False
    is_image = is_image or (has_extension(file, "image") and not (has_extension(file, "video") and spec.settings.media == "video"))
    if is_image:

        def sharper(height: int, width: int) -> Geometry:
            return _sharper(height, width, spec)

        return Clip(pixels, np.zeros(1), lambda times: np.repeat(read_image(file, sharper, spec.max_pixels), len(times), 0), 0.0)
    with Video(file, spec.max_pixels) as video:
        info = video.info

    def read(times: np.ndarray) -> np.ndarray:
        with Video(file, spec.max_pixels) as video:
            return video.read(times, _sharper(info.height, info.width, spec), spec.interpolation)

    return Clip(pixels, view_times(info, len(pixels), spec.settings, 0, 1), read, info.duration)


def _sharper(height: int, width: int, spec: ClipSpec) -> Geometry:
    """The part of the picture that the model sees, in as many pixels as the file has for it, but not many more than a drawing needs."""
    box = view_geometry(height, width, spec.settings, spec.size, 0, 1)
    factor = max(1, min(SHARPER // max(spec.size), round(height / box.resize[0])))
    return Geometry((factor * box.resize[0], factor * box.resize[1]), *(factor * side for side in (box.top, box.left, box.height, box.width)))


def predicted(classifier: Classifier, clip: Clip, task: str) -> str:
    """The best label of the clip, for a title."""
    scores = np.asarray(classifier._scores(classifier.params, clip.pixels[None, None], (task,))[task])[0]
    best = classifier.top(Answer(Window(""), task, scores), 1)
    return f"{best['labels'][0]} {100 * best['scores'][0]:.0f} %"


# What is shown: (classifier, clip, args) -> layers, a note, and more for `sheet_png`


def _am_flow_layers(classifier: Classifier, clip: Clip, args: argparse.Namespace) -> tuple[list[Layer], str, dict]:
    flows = jax.jit(am_flow, static_argnums=0)(classifier.model, classifier.params, clip.pixels)
    layers = []
    for number in _chosen(sorted(flows), args):
        flow = np.array(flows[number])
        flow[-1] = np.nan  # has no next frame
        layers.append(scaled(f"block {number}", flow, low=None))
    return layers, "Bright: the attention to this patch changes most up to the next frame. Each row has its own scale; 1 is no change anywhere.", {}


def _attention_layers(classifier: Classifier, clip: Clip, args: argparse.Namespace) -> tuple[list[Layer], str, dict]:
    maps = _maps(classifier, clip, args)
    patches = maps.grid[0] * maps.grid[1]
    layers = []
    for stage in _stages(maps, args, ("space", "joint", "time", "motion")):
        even = {"space": 1 / patches, "time": 1 / len(maps.reader)}.get(stage.kind, 1 / (patches * len(maps.reader)))
        for head in _heads(stage, args):
            seen = looks(maps, stage, head)
            even = seen.mean() if stage.kind == "motion" else even
            weights = stage.weights if head is None else np.take(stage.heads, head, axis=-3)
            matrix = weights.mean(axis=0) if stage.kind == "time" else None
            layers.append(scaled(_name(stage, head), seen, even, matrix))
    over_time = " Over time: what a place gets from all frames." if maps.spec.mixer in ("divided", "motion") else ""
    who = "the class token looks" if maps.reads_class else "the patches look, on average,"
    return layers, f"Bright: where {who} most. Scales: multiples of the even share." + over_time, {}


def _rollout_layers(classifier: Classifier, clip: Clip, args: argparse.Namespace) -> tuple[list[Layer], str, dict]:
    maps = _maps(classifier, clip, args)
    found = rollout(maps)[:, maps.spec.prefix :]
    share = found / found.sum()
    layer = scaled("rollout", share.reshape(-1, *maps.grid), 1 / share.size, low=None)
    note = "Bright: patches that stand behind the result most, through all blocks. Scale: multiples of the even share."
    if maps.spec.mixer == "am_flow" and maps.spec.am_flow.tpu != "none":
        note += " The temporal processing units, which see all frames, are no part of it."
    return [layer], note, {"shares": _per_frame(share.sum(axis=1), clip)} if len(share) > 1 else {}


def _motion_layers(classifier: Classifier, clip: Clip, args: argparse.Namespace) -> tuple[list[Layer], str, dict]:
    maps = _maps(classifier, clip, args)
    frame = len(maps.reader) // 2 if args.frame is None else args.frame
    if not 0 <= frame < len(maps.reader):
        raise UserError(f"--frame={args.frame}: the model sees frames 0 to {len(maps.reader) - 1}")
    row, column = args.patch or _busiest(clip, maps, frame)
    if not (0 <= row < maps.grid[0] and 0 <= column < maps.grid[1]):
        raise UserError(f"--patch={row},{column}: rows are 0 to {maps.grid[0] - 1}, columns 0 to {maps.grid[1] - 1}")
    kinds = {"motion": ("motion",), "divided": ("time",), "joint": ("joint",)}[maps.spec.mixer]
    layers = []
    for stage in _stages(maps, args, kinds):
        for head in _heads(stage, args):
            seen = neighbours(maps, stage, frame, row, column, head)
            layers.append(scaled(_name(stage, head), seen, 1 / np.isfinite(seen).sum()))
    note = f"What the framed patch (row {row}, column {column}, frame {frame}) looks at; dark frames: it can't. Scales: multiples of the even share."
    return layers, note, {"mark": (frame, row, column)}


LAYERS = {"am_flow": _am_flow_layers, "attention": _attention_layers, "rollout": _rollout_layers, "motion": _motion_layers}


def _maps(classifier: Classifier, clip: Clip, args: argparse.Namespace) -> Maps:
    return maps_of(classifier.model, classifier.params, clip.pixels, args.block is not None)


def _chosen(blocks: list[int], args: argparse.Namespace) -> list[int]:
    """The blocks to draw: all, or the one asked for, or some evenly spread."""
    if args.block is not None:
        if args.block not in blocks:
            raise UserError(f"--block={args.block}: choose one of {', '.join(map(str, blocks))}")
        return [args.block]
    places = np.linspace(0, len(blocks) - 1, min(len(blocks), MOST_BLOCKS)).round().astype(int)
    return [blocks[place] for place in places]


def _stages(maps: Maps, args: argparse.Namespace, kinds: tuple[str, ...]) -> list[Stage]:
    chosen = _chosen(sorted({stage.block for stage in maps.stages if stage.kind in kinds}), args)
    pool = [stage for stage in maps.stages if stage.kind == "class attention" and "space" in kinds and args.block is None]
    return [stage for stage in maps.stages if stage.kind in kinds and stage.block in chosen] + pool


def _heads(stage: Stage, args: argparse.Namespace) -> list[int | None]:
    return [None] if args.block is None or stage.heads is None else list(range(stage.heads.shape[-3]))


def _name(stage: Stage, head: int | None) -> str:
    kind = {"space": "", "time": "\ntime", "motion": "\nmotion", "joint": "\njoint", "class attention": "class\nattention"}[stage.kind]
    return kind.strip() if stage.block < 0 else f"block {stage.block}{kind}" + ("" if head is None else f"\nhead {head}")


def _busiest(clip: Clip, maps: Maps, frame: int) -> tuple[int, int]:
    """Row and column of the patch that changes most around a frame."""
    grey = clip.pixels.mean(axis=-1)
    step = len(grey) // len(maps.reader)  # frames of a tubelet
    around = grey[max(0, frame * step - 1) : frame * step + step + 1]
    change = np.abs(np.diff(around, axis=0)).sum(axis=0) if len(around) > 1 else np.abs(grey[0] - grey[0].mean())
    blocks = change.reshape(maps.grid[0], maps.spec.patch, maps.grid[1], maps.spec.patch).sum(axis=(1, 3))
    return tuple(int(i) for i in np.unravel_index(blocks.argmax(), blocks.shape))


def _per_frame(values: np.ndarray, clip: Clip) -> np.ndarray:
    """Values of the time steps of the tokens, spread over the frames that each of them holds."""
    each = len(clip.pixels) // len(values)
    return np.repeat(values / each, each)


def _draw(out: Path, clip: Clip, layers: list[Layer], title: str, note: str, **more) -> None:
    each = len(clip.pixels) // len(layers[0].values)
    layers = [replace(layer, values=np.repeat(layer.values, each, axis=0)) for layer in layers]
    mark = more.get("mark") and (each * more["mark"][0], *more["mark"][1:])
    try:
        if out.suffix.lower() == ".png":
            sheet_png(out, clip.read(clip.seconds), clip.seconds, layers, title, note, **(more | {"mark": mark}))
            return
        count = max(2, min(MOST_PICTURES, round(clip.duration * RATE))) if clip.duration else 1
        times = (np.arange(count) + 0.5) * clip.duration / count
        of = np.abs(times[:, None] - clip.seconds[None]).argmin(axis=1)
        write_moving(out, moving(clip.read(times), times, of, layers, title, mark), clip.duration / count if clip.duration else 1.0)
    except DecodeError as error:
        raise UserError(f"{out}: {error}") from None


def _draw_grid(classifier: Classifier, clip: Clip, args: argparse.Namespace, out: Path, title: str) -> int:
    frame = args.frame
    if frame is None:  # where most happens
        frame = int(np.abs(np.diff(clip.pixels.astype(int), axis=0)).sum(axis=(1, 2, 3)).argmax())
    if not 0 <= frame < len(clip.pixels) - 1:
        raise UserError(f"--frame={frame}: the first of two frames, 0 to {len(clip.pixels) - 2}")
    flows = np.asarray(jax.jit(flow_of_heads, static_argnums=(0, 3))(classifier.model, classifier.params, clip.pixels, frame))
    panels = np.stack([principal_colours(flow) for flow in flows])
    times = clip.seconds[frame : frame + 2]
    note = "Colours: the first three principal\ncomponents of the heads' AM flow;\ngrey: no more than elsewhere."
    grid_png(out, clip.read(times), times, panels, title, note)
    return len(panels)


def principal_colours(flow: np.ndarray) -> np.ndarray:
    """float[rows, columns, H] -> float[rows, columns, 3] in 0..1: the first three principal components, on one scale; grey is the mean."""
    values = flow.reshape(-1, flow.shape[-1])
    centred = values - values.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:3] * np.where(axes[:3].sum(axis=1, keepdims=True) < 0, -1, 1)  # more flow is brighter
    parts = np.zeros((len(values), 3))
    parts[:, : len(axes)] = centred @ axes.T
    return np.clip(0.5 + parts / (2 * max(np.abs(parts).max(), 1e-12)), 0, 1).reshape(*flow.shape[:2], 3)


def _check_out(name: str, what: str) -> Path:
    out = Path(name)
    endings = (".png",) if what == "am_flow_grid" else (".png", ".gif", ".mp4")
    if out.suffix.lower() not in endings:
        raise UserError(f"--out={name}: name a {' or '.join(endings)} file")
    if os.path.isdir(out):
        raise UserError(f"--out={name} is a folder: name a {out.suffix} file in it")
    folder = os.path.dirname(os.path.abspath(out))
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out={name}: {folder} is no folder that can be written")
    return out


def _check_model(classifier: Classifier, args: argparse.Namespace) -> None:
    spec = classifier.model.spec
    if args.what == "am_flow" and (spec.mixer != "am_flow" or spec.am_flow.flow == "none"):
        fault = "computes no AM flow: it needs model.mixer=am_flow and model.am_flow.flow=vanilla or aligned"
        raise UserError(f"the model in {args.workdir} {fault} (--what=am_flow_grid shows it for other models)")
    if args.what == "am_flow_grid" and spec.mixer == "joint":
        raise UserError(f"the model in {args.workdir} attends to all frames at once: AM flow is the change between maps of single frames")
    if args.what == "motion" and spec.mixer not in ("motion", "divided", "joint"):
        raise UserError(f"in the model in {args.workdir} no patch looks at other frames (model.mixer={spec.mixer}): --what=attention or rollout")


def _patch(text: str) -> tuple[int, int]:
    row, column = map(int, text.split(","))
    return row, column


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vidjoint.visualize",
        usage="%(prog)s --workdir=DIR FILE --what=WHAT --out=FILE.png|.gif|.mp4 [--block=N] [--frame=T] [--patch=ROW,COLUMN]",
        description=__doc__.partition("\n")[0],
        epilog=EPILOG,
        formatter_class=Paragraphs,
    )
    parser.add_argument("file", metavar="FILE", help="video or image")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of a training run, or of imported or exported weights")
    parser.add_argument(
        "--what", choices=["am_flow", "am_flow_grid", "attention", "rollout", "motion"], default="am_flow", help="what to show, see below"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="picture (.png) or moving picture (.gif, .mp4) to write")
    parser.add_argument("--block", type=int, metavar="N", help="this block only, from 0; of attention and motion each head by itself")
    parser.add_argument("--frame", type=int, metavar="T", help="of motion and am_flow_grid: which frame of those the model sees, from 0")
    parser.add_argument("--patch", type=_patch, metavar="ROW,COLUMN", help="of motion: which patch, from 0,0 at the top left (default: the busiest)")
    parser.add_argument("--task", metavar="NAME", help="task whose clip and crop to use (default: the only one for such a file)")
    parser.add_argument("--step", metavar="N", help="checkpoint to use, a number or best (default: the newest)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
