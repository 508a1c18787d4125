"""MEViT-B/16 on Kinetics-400.

python -m vidjoint.main --config=configs/mevit_k400.py:16f --config.data_root=/data --config.init_from=runs/cover_images_b16

8f | 16f: frames per clip (8f unless said); ablations: see mevit_base.py, as in mevit_k400.py:9+3

Hardware: 8 GPUs of 32 GB. Published top-1, 1x3 views: 80.6 with 8 frames, 81.1 with 16 (table 4). With 8 frames m1, m2, m3, m7, m14: 78.6, 80.2,
80.0, 77.6, 77.9 (table 1); 9+3, 10+2, 11+1, 12+1: 79.4, 80.3, 80.5, 80.6 (table 2); lt0, lt2, lt4, lt8, lt12: 75.6, 77.5, 77.9, 80.3, 80.2 (table 3).
"""

from configs import datasets
from configs.mevit_base import ABLATIONS, mevit
from vidjoint.config import choose


def get_config(argument: str = ""):
    frames, ablation = choose(argument, ("8f", "16f"), ABLATIONS)
    return mevit(frames, ablation, k400=datasets.kinetics(400, short_side=(256, 320)))
