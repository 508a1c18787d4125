"""CoVeR with a backbone pretrained on JFT-3B (tables 4 and 7), co-trained on Kinetics-400 + SSv2 + MiT + ImageNet.

python -m vidjoint.main --config=configs/cover_jft.py:high_res --config.data_root=/data --config.init_from=/checkpoints/vit_l16_jft
python -m vidjoint.main --config=configs/cover_jft.py:standard ...      (k600 or k700 in place of K400: cover_jft.py:high_res,k600; base: ViT-B)

Hardware: the paper gives none; 20 epochs are 388,000 steps of 128 examples. Published top-1, high_res: K400 87.2, SSv2 70.8, MiT 46.1; with K600
87.9, 70.9, 45.9; with K700 79.8, 70.6, 45.9; standard: 85.1, 67.4, 44.2. From JFT-300M, high_res: 86.3, 69.3, 45.0. Neither JFT is public:
init_from may name any run of the same model (such as cover_images.py's), or be '' to start from scratch.
"""

from configs.cover_base import SIZES, cover
from vidjoint.config import choose


def get_config(argument: str = ""):
    resolution, kinetics, size = choose(argument, ("high_res", "standard"), ("k400", "k600", "k700"), SIZES)
    return cover(resolution, kinetics, init_from="checkpoints/vit_b16_jft" if size else "checkpoints/vit_l16_jft", size=size)
