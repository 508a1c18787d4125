"""CoVeR with a backbone pretrained on ImageNet-21k (tables 1 and 3), co-trained on Kinetics-400 + SSv2 + MiT + ImageNet.

python -m vidjoint.main --config=configs/cover_in21k.py:high_res --config.data_root=/data --config.init_from=runs/cover_images

Hardware: the paper gives none; 20 epochs are 388,000 steps of 128 examples. Published top-1: K400 83.1, SSv2 64.2,
MiT 41.3; with K600 84.5, 64.7, 41.5; with K700 74.9, 64.7, 41.5 (cover_in21k.py:high_res,k600 and ,k700). The paper does not say at which input size.
The backbone is that of cover_images.py, or any run of the same model. base: ViT-B in place of ViT-L, from cover_images.py:b16 (figure 4).
"""

from configs.cover_base import SIZES, cover
from vidjoint.config import choose


def get_config(argument: str = ""):
    resolution, kinetics, size = choose(argument, ("high_res", "standard"), ("k400", "k600", "k700"), SIZES)
    return cover(resolution, kinetics, init_from="runs/cover_images_b16" if size else "runs/cover_images", size=size)
