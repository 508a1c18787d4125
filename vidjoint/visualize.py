"""Shows what a trained model sees in a video.

python -m vidjoint.visualize --workdir=DIR VIDEO --what=am_flow --out=FILE.png
"""

import argparse
import os
import sys
from pathlib import Path

import jax
import numpy as np

from vidjoint import plots
from vidjoint.classifier import Classifier, parse_step
from vidjoint.data.prediction import Window, decoded
from vidjoint.data.tasks import clip_spec
from vidjoint.errors import UserError, command
from vidjoint.models.build import Model


def am_flow(model: Model, params: dict, pixels: jax.Array) -> dict[int, jax.Array]:
    """AM flow of one clip (AM Flow, eqs. 2-5): {number of a block: float32[T, rows, columns]}, for every block that computes it.

    The value of a patch in frame t is the change of the attention it receives, from t to t + 1 (mean over heads where each has its own).

    Args:
      pixels: uint8[T, H, W, 3].
    """
    vit = model.bind(params)
    rows, columns = pixels.shape[1] // model.spec.patch, pixels.shape[2] // model.spec.patch
    x, flows = vit.embed(pixels[None]), {}
    for number, block in enumerate(vit.blocks):
        if block.mixer.numbers:
            _, q, k = block.mixer.attend(block.attn, block.norm1(x))
            patches = block.mixer.flow(q, k)[0, :, model.spec.prefix :].mean(axis=-1)
            flows[number] = patches.reshape(len(patches), rows, columns)
        x, _ = block(x, None, (rows, columns))
    return flows


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vidjoint.visualize",
        usage="%(prog)s --workdir=DIR VIDEO --what=am_flow --out=FILE.png",
        description=__doc__.partition("\n")[0],
        epilog="am_flow: a row of the clip's frames, then a row for each block that computes attention-map flow: bright patches are those whose "
        "attention changes most up to the next frame (figure 5 of the paper). The scale of each row is its own.",
    )
    parser.add_argument("video", metavar="VIDEO", help="video file")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of a training run")
    parser.add_argument("--what", choices=["am_flow"], default="am_flow", help="what to show (default: am_flow)")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="picture to write")
    parser.add_argument(
        "--task", metavar="NAME", help="task whose clip and crop to use (default: the run's only one, or else its only one of videos)"
    )
    parser.add_argument("--step", metavar="N", help="checkpoint to use, a number or best (default: the newest)")
    args = parser.parse_args(argv)
    step = parse_step(args.step)
    if Path(args.out).suffix.lower() != ".png":
        raise UserError(f"--out={args.out}: name a .png file")
    if os.path.isdir(args.out):
        raise UserError(f"--out={args.out} is a folder: name a .png file in it")
    folder = os.path.dirname(os.path.abspath(args.out))
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out={args.out}: {folder} is no folder that can be written")
    classifier = Classifier(args.workdir, step)
    spec, config = classifier.model.spec, classifier.config
    if spec.mixer != "am_flow" or spec.am_flow.flow == "none":
        raise UserError(f"the model in {args.workdir} computes no AM flow: it needs model.mixer=am_flow and model.am_flow.flow=vanilla or aligned")
    task = classifier.choose_task(args.task)
    if config.tasks[task].media == "image":
        raise UserError(f"task {task} is of images, and flow is the change from frame to frame: name a task of videos by --task")
    (row,) = decoded([Window(args.video)], clip_spec(config, task), 1, 1, 1, 1)
    if row.pixels is None:
        raise UserError(f"{args.video}: {row.error}")
    frames = row.pixels[0]
    if len(frames) == 1:
        raise UserError(f"{args.video} is an image: flow is the change from frame to frame")
    flows = jax.jit(am_flow, static_argnums=0)(classifier.model, classifier.params, frames)
    plots.flow_png(Path(args.out), frames, {f"block {number}": np.asarray(flow) for number, flow in flows.items()})
    print(f"{args.out}: {len(flows)} blocks, {len(frames)} frames")
    return 0


if __name__ == "__main__":
    sys.exit(main())
