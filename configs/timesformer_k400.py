"""TimeSformer on Kinetics-400 (Bertasius et al. 2021), the model that CoVeR trains: divided, joint or space-only attention.

python -m vidjoint.main --config=configs/timesformer_k400.py --config.data_root=/data --config.init_from=runs/cover_images_b16

divided | joint | space_only; base (8 x 224^2) | hr (16 x 448^2) | long (96 x 224^2): timesformer_k400.py:divided,hr

Hardware: 8 GPUs of 32 GB for two days (base). Published top-1, 1x3 views: divided 77.9, hr 79.6, long 80.6; by others: joint 77.0, space-only 76.9.
"""

from configs import datasets
from vidjoint.config import base_config, choose

INPUT = {  # frames, stride at 30 fps, pixels, random short side
    "base": (8, 32, 224, (256, 320)),
    "hr": (16, 16, 448, (448, 512)),
    "long": (96, 4, 224, (256, 320)),
}


def get_config(argument: str = ""):
    attention, size = choose(argument, ("divided", "joint", "space_only"), tuple(INPUT))
    frames, stride, side, short_side = INPUT[size]
    config = base_config()
    config.total_epochs = 15.0
    config.batch_size = 64
    config.eval_every = 10_000
    config.init_from = "runs/cover_images_b16"
    config.model.update(variant="B/16", mixer=attention, frames=frames, image_size=side, remat="block", drop_path=0.1)
    if attention == "space_only":
        config.model.update(mixer="none", pool="frame_mean")
    config.model.update(mean=(0.45, 0.45, 0.45), std=(0.225, 0.225, 0.225))
    config.optim.update(name="sgd", lr=5e-3, schedule="step", milestone_epochs=(11.0, 14.0), decay_factor=0.1, momentum=0.9)
    config.optim.update(weight_decay=1e-4, decay="all")
    config.eval.views = "1x3"
    config.eval.average = "logits"
    config.tasks.k400 = datasets.kinetics(400, sampler="window", window_seconds=frames * stride / 30, crop="short_side", short_side=short_side)
    return config
