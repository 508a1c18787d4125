"""AM Flow on Toyota Smarthome, cross-subject (table 3): a still camera, so vanilla AM flow, in the first and the last block only.

python -m vidjoint.main --config=configs/am_flow_smarthome.py --config.data_root=/data --config.init_from=/checkpoints/dinov2_b14

lstm | transformer | tcn; 8f | 24f; ablations: see am_flow_base.py (there is no aligning encoder to leave out)

Hardware: one GPU with 24 GB. Published mean class accuracy on cross-subject: 70.2 (lstm, 8 frames); `eval/smarthome/per_class.csv` has ours.
"""

from configs import datasets
from configs.am_flow_base import ABLATIONS, am_flow
from vidjoint.config import choose


def get_config(argument: str = ""):
    tpu, frames, ablation = choose(argument, ("lstm", "transformer", "tcn"), ("8f", "24f"), tuple(word for word in ABLATIONS if word != "no_encoder"))
    config = am_flow(tpu, int(frames[:-1]), "vanilla", ablation, smarthome=datasets.smarthome(short_side=(224, 280)))
    config.total_epochs = 30.0  # a small set
    config.model.mixer_blocks = (0, -1)
    return config
