"""What the tables of models with tubelets share: sizes that the position table alone does not tell, and an embedding for still images.

Such files know videos only. A picture is to them a clip of one time step that stands still: its projection is that of the video summed over the
tubelet's frames, its position table that of the first time step. So the model makes of a picture exactly what it makes of such a clip.
"""

import numpy as np

from vidjoint.weights.translate import Arrays

SUMMED = "{} summed over the tubelet's frames, for still images"
FIRST = "the first time step of {}, for still images"


def grid_of(projection: np.ndarray, config: dict, tokens: int | None = None) -> tuple[int, int, int]:
    """Time steps, rows and columns of the tokens of a clip.

    Args:
      projection: [D, 3, t, p, p], the kernel of theirs.
      config: config.json or {}: without it pictures have 224 pixels, and clips as many frames as `tokens` ask for.
      tokens: rows of the position table of theirs, without the class token; None if the file has none.

    Raises:
      ValueError: these do not go together.
    """
    tubelet, patch, width = projection.shape[2:]
    size = config.get("image_size", 224)
    height, across = size if isinstance(size, list | tuple) else (size, size)
    if patch != width or height != across:
        raise ValueError(f"patches of {patch} x {width} or pictures of {height} x {across} pixels are not square")
    side = height // patch
    default = 16 if tokens is None else tubelet * max(tokens // side**2, 1)
    times = int(config.get("num_frames") or default) // tubelet
    if tokens not in (None, times * side**2):
        raise ValueError(
            f"a position table of {tokens} patches is not of {times} x {side} x {side}: its config.json must say image_size and num_frames"
        )
    return times, side, side


def image_projection(theirs: Arrays, ours: Arrays, name: str) -> dict[str, tuple[np.ndarray, str]]:
    """`embed/proj`, made from `embed/video_proj`; `name` is what the kernel is called in the file."""
    tubelet, *_ = theirs[name].shape[2:]
    kernel = ours["embed/video_proj/kernel"]
    summed = kernel.reshape(tubelet, -1, kernel.shape[-1]).sum(axis=0)
    bias = ours["embed/video_proj/bias"], name.removesuffix("weight") + "bias"
    return {"embed/proj/kernel": (summed, SUMMED.format(name)), "embed/proj/bias": bias}
