"""CoVeR's ablations (tables 5 and 6): which datasets are trained together, and what the images weigh.

python -m vidjoint.main --config=configs/cover_ablations.py:kinetics+ssv2 --config.data_root=/data --config.init_from=runs/cover_images

Which sets: kinetics | ssv2 | mit (each by itself), kinetics+ssv2, kinetics+ssv2+mit, kinetics+ssv2+mit+imagenet. Kinetics is
k400 | k600 | k700; input high_res | standard; weight of the images' loss w0.5 | w0.75 | w0, as in
cover_ablations.py:kinetics+ssv2+mit+imagenet,k600,w0.75

Hardware: that of cover_jft.py. Published top-1 from JFT-3B, K400 / SSv2 / MiT: by itself 85.0 / 67.2 / 44.9; kinetics+ssv2 86.4 / 69.9;
+mit 87.2 / 70.6 / 45.9; +imagenet 87.2 / 70.8 / 46.1. Weight 0: 87.2 / 70.6 / 45.9; 0.5: 87.2 / 70.8 / 46.1, ImageNet 86.1; 0.75:
87.2 / 70.6 / 45.8, ImageNet 86.6.
"""

from configs.cover_base import EVERYTHING, cover
from vidjoint.config import choose
from vidjoint.errors import UserError

SETS = ("kinetics+ssv2", "kinetics", "ssv2", "mit", "kinetics+ssv2+mit", "+".join(EVERYTHING))
WEIGHTS = ("w0.5", "w0.75", "w0")


def get_config(argument: str = ""):
    sets, kinetics, resolution, weight = choose(argument, SETS, ("k400", "k600", "k700"), ("high_res", "standard"), WEIGHTS)
    config = cover(resolution, kinetics, init_from="checkpoints/vit_l16_jft", tasks=tuple(sets.split("+")))
    if "imagenet" in config.tasks:
        config.tasks.imagenet.loss_weight = float(weight[1:])
    elif weight != WEIGHTS[0]:
        raise UserError(f"config argument {weight} weighs the loss of images, and {sets} has none: choose {SETS[-1]} with it")
    return config
