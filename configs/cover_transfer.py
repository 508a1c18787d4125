"""CoVeR's transfer to a new dataset (sections 3.2 and 4.3, figure 3): a trained model learns SSv2 or Kinetics-400, in full or with frozen features.

python -m vidjoint.main --config=configs/cover_transfer.py:ssv2,full --config.data_root=/data --config.init_from=runs/cover_ablations_kinetics+ssv2

Target: ssv2 | k400. full: everything is trained; frozen: a new head on frozen features. The head is new even where the earlier run had the target.
Your own dataset: replace the task, as in the README.

Hardware: that of cover_jft.py; frozen, half of it. Published: co-training improves on training for K400 alone, then SSv2, by 1.8 points.
Frozen features of K400 reach 19.5 % of SSv2.
"""

from configs.cover_base import cover
from vidjoint.config import choose


def get_config(argument: str = ""):
    target, how, resolution = choose(argument, ("ssv2", "k400"), ("full", "frozen"), ("high_res", "standard"))
    other = {"ssv2": "kinetics", "k400": "ssv2"}[target]
    config = cover(resolution, init_from=f"runs/cover_ablations_{other}", tasks=("kinetics" if target == "k400" else target,))
    config.init_heads = "new"
    if how == "frozen":
        config.optim.freeze = ("embed/.*", "blocks/.*", "norm/.*")
    return config
