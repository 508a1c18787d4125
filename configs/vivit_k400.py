"""ViViT with a factorised encoder on Kinetics-400 (Arnab et al. 2021, model 2): tubelets, an image ViT per time step, then a small ViT over time.

python -m vidjoint.main --config=configs/vivit_k400.py --config.data_root=/data --config.init_from=runs/cover_images_b16

Hardware: 32 TPU v3 cores in the paper. Published top-1: 78.4 (B/16x2, 4x3 views).
"""

from configs import datasets
from vidjoint.config import base_config


def get_config():
    config = base_config()
    config.total_epochs = 30.0
    config.batch_size = 64
    config.eval_every = 10_000
    config.init_from = "runs/cover_images_b16"
    config.model.update(variant="B/16", mixer="none", frames=32, image_size=224, embed="separate", tubelet=2, pool="temporal_encoder", remat="block")
    config.model.update(gelu="tanh", drop_path=0.2)
    config.optim.update(name="sgd", lr=0.05, momentum=0.9, warmup_epochs=2.5, clip_norm=1.0)
    config.eval.update(views="4x3", average="logits")
    config.tasks.k400 = datasets.kinetics(400, sampler="window", window_seconds=32 * 2 / 25, crop="short_side", short_side=(256, 320))
    return config
