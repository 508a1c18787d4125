"""A tiny run that several tests use: two tasks with real files, and a model with random parameters that answers differently for each of them."""

from collections.abc import Callable
from pathlib import Path

import av
import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vidjoint.checkpoints import Checkpoints
from vidjoint.config import base_config, task_config
from vidjoint.models.build import build
from vidjoint.run_folder import RunFolder

CLIPS = ("3 cats", "1 dogs", "0 up, then down", "2 été", "5 left", "4 right", "7 over", "6 under")  # names that label files can get wrong
STILLS = tuple("0123456789")
VALIDATION = {"clips": 11, "stills": 13}  # no batch size of the tests divides these


def write_clip(file: Path, seed: int, frames: int = 12, size: tuple[int, int] = (24, 40)) -> None:
    """An H.264 file of 12 frames a second, in which blocks of random colours drift."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=12, options={"preset": "ultrafast", "crf": "10"})
        stream.height, stream.width = size
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for t in range(frames):
            picture = np.ascontiguousarray(np.roll(blocks, (seed % 3) * t, 1)[: size[0], : size[1]] // (1 + t % 2))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


def write_data(folder: Path) -> None:
    """`clips/val.csv` (class names) with its clips, of two sizes, and `stills/{train,val}/CLASS/*.png`."""
    (folder / "clips").mkdir()
    lines = []
    for i in range(VALIDATION["clips"]):
        write_clip(folder / "clips" / f"{i:02d}.mp4", i, size=(24, 40) if i % 2 else (48, 32))
        lines.append(f'{i:02d}.mp4;"{CLIPS[i % len(CLIPS)]}"\n')
    (folder / "clips" / "val.csv").write_text("".join(lines))
    (folder / "clips" / "labels.json").write_text(str(list(CLIPS)).replace("'", '"'))
    for split in ("train", "val"):
        for i in range(VALIDATION["stills"]):
            still = folder / "stills" / split / STILLS[i % len(STILLS)]
            still.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, (4, 5, 3), np.uint8)
            Image.fromarray(pixels).resize((50, 40), Image.Resampling.NEAREST).save(still / f"{i}.png")


def share(process: int, processes: int) -> Callable[[int], range]:
    """The rows of a batch that one of several processes holds where they share it evenly."""
    return lambda size: range(size * process // processes, size * (process + 1) // processes)


def config_of(data_root: Path) -> ConfigDict:
    """Clips [4, 16, 24] and stills [1, 16, 16]."""
    config = base_config()
    config.update(total_steps=20, batch_size=24, data_root=str(data_root), task_order=("stills", "clips"), schedule="round_robin")
    config.model.update(variant="Ti/8", width=16, depth=1, heads=2, mlp_dim=32, frames=4, image_size=16, mixer="divided", dtype="float32")
    config.model.temporal_init = "random"
    config.eval.update(views="2x3", batch_size=4)
    config.data.threads = 2
    clips = dict(train="clips/val.csv", val="clips/val.csv", labels="clips/labels.json", sampler="segments", image_size=(16, 24))
    stills = dict(source="folder", media="image", train="stills/train", val="stills/val")
    config.tasks.update(clips=task_config(**clips), stills=task_config(**stills))
    return config


made: list[Path] = []  # test modules share one run


def make_run(tmp_path_factory) -> Path:
    """The folder of a run that stopped after step 20, with its data in `data`. Its best checkpoint is that of step 10. Tests leave it as it is."""
    if made:
        return made[0]
    folder = tmp_path_factory.mktemp("tiny") / "run"
    (folder / "data").mkdir(parents=True)
    write_data(folder / "data")
    config = config_of(folder / "data")
    RunFolder(folder).write(config, {"clips": CLIPS, "stills": STILLS})
    model = build(config.model, {"clips": len(CLIPS), "stills": len(STILLS)})

    @jax.jit
    def parameters(seed):
        params = model.init(jax.random.key(seed))
        return jax.tree_util.tree_map_with_path(lambda path, x: 5 * x if "kernel" in jax.tree_util.keystr(path) else x, params)

    with Checkpoints(folder, 2) as checkpoints:
        for step, metric in ((10, 0.9), (20, 0.1)):
            checkpoints.save(step, {"params": parameters(step), "frozen": {}, "ema": {}}, metric)
    made.append(folder)
    return folder
