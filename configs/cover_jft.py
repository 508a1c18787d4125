"""CoVeR with a backbone pretrained on JFT-3B (tables 4 and 7), co-trained on Kinetics-400 + SSv2 + MiT + ImageNet.

python -m vidjoint.main --config=configs/cover_jft.py:high_res --config.data_root=/data --config.init_from=/checkpoints/vit_l16_jft
python -m vidjoint.main --config=configs/cover_jft.py:standard ...      (k600 or k700 in place of K400: cover_jft.py:high_res,k600)

Hardware: the paper gives none; 20 epochs are 388,000 steps of 128 examples. Published top-1, high_res: K400 87.2, SSv2 70.8, MiT 46.1;
standard: 85.1, 67.4, 44.2. JFT-3B is not public: init_from may name any run of the same model, or be '' to start from scratch.
"""

from configs.cover_base import cover


def get_config(argument: str = "high_res"):
    return cover(argument, init_from="checkpoints/vit_l16_jft")
