"""MEViT-B/16 on Kinetics-600.

python -m vidjoint.main --config=configs/mevit_k600.py:8f --config.data_root=/data --config.init_from=runs/cover_images_b16

8f | 16f: frames per clip (16f unless said). Hardware: 8 GPUs of 32 GB. Published top-1, 1x3 views: 85.6 with 16 frames (table 5).
"""

from configs import datasets
from configs.mevit_base import mevit
from vidjoint.config import choose


def get_config(argument: str = ""):
    (frames,) = choose(argument, ("16f", "8f"))
    return mevit(frames, k600=datasets.kinetics(600, short_side=(256, 320)))
