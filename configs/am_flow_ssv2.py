"""AM Flow on Something-Something v2 (table 1), with the aligning encoder, 24 frames.

python -m vidjoint.main --config=configs/am_flow_ssv2.py:tcn,24f --config.data_root=/data --config.init_from=/checkpoints/dinov2_b14

tcn | transformer | lstm; 24f | 8f | 32f; ablations: see am_flow_base.py, as in am_flow_ssv2.py:tcn,24f,clip

Hardware: 8 GPUs of 32 GB. Published top-1, 1x3 views: tcn 24f 74.8 (from CLIP 73.5), transformer 24f 74.6, lstm 8f 58.3.
Trained parameters: 28 M + 45 M (aligning) + 54 M (tcn).
"""

from configs import datasets
from configs.am_flow_base import ABLATIONS, am_flow
from vidjoint.config import choose


def get_config(argument: str = ""):
    tpu, frames, ablation = choose(argument, ("tcn", "transformer", "lstm"), ("24f", "8f", "32f"), ABLATIONS)
    ssv2 = datasets.ssv2(sampler="segments", short_side=(224, 280))
    return am_flow(tpu, int(frames[:-1]), "aligned", ablation, ssv2=ssv2)
