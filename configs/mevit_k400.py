"""MEViT-B/16 on Kinetics-400.

python -m vidjoint.main --config=configs/mevit_k400.py:16f --config.data_root=/data --config.init_from=runs/cover_images_b16

8f | 16f: frames per clip (8f unless said). Hardware: 8 GPUs of 32 GB. Published top-1, 1x3 views: 80.6 with 8 frames, 81.1 with 16 (table 4).
Ablations on it, 8 frames: M = 1, 2, 3, 7, 14: 78.6, 80.2, 80.0, 77.6, 77.9 (table 1).
"""

from configs import datasets
from configs.mevit_base import mevit
from vidjoint.config import choose


def get_config(argument: str = ""):
    (frames,) = choose(argument, ("8f", "16f"))
    return mevit(frames, k400=datasets.kinetics(400, short_side=(256, 320)))
