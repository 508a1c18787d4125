"""AM Flow on Kinetics-400 (table 2): moving cameras, so with the aligning encoder.

python -m vidjoint.main --config=configs/am_flow_k400.py:lstm,8f --config.data_root=/data --config.init_from=/checkpoints/dinov2_b14

lstm | transformer | tcn; 8f | 24f | 32f; ablations: see am_flow_base.py, as in am_flow_k400.py:lstm,8f,no_flow

Hardware: 160 GPU hours in the paper. Published top-1, 1x3 views: lstm 8f 88.8, transformer 8f 89.1, 32f 89.6; of the 88.8: no_flow 74.3,
no_encoder 72.7, scratch 78.3, hyperformer 84.2. Trained parameters: 32 M + 45 M (aligning) + 360 M (lstm).
"""

from configs import datasets
from configs.am_flow_base import ABLATIONS, am_flow
from vidjoint.config import choose


def get_config(argument: str = ""):
    tpu, frames, ablation = choose(argument, ("lstm", "transformer", "tcn"), ("8f", "24f", "32f"), ABLATIONS)
    return am_flow(tpu, int(frames[:-1]), "aligned", ablation, k400=datasets.kinetics(400, short_side=(224, 280)))
