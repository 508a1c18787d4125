"""CoVeR's first stage (eq. 1): the spatial part of the model, which is an image ViT, learns from ImageNet-21k.

python -m vidjoint.main --config=configs/cover_images.py --config.data_root=/data
python -m vidjoint.main --config=configs/cover_images.py:b16 ...      (ViT-B/16, for TimeSformer, MEViT and IV-ViT)

Hardware: a TPU pod slice or many GPUs: 90 passes over 14 million images. The second stage takes the run over by init_from=runs/cover_images; its
temporal branches start at zero. CoVeR gives no recipe: this is Dosovitskiy et al. 2021, table 3, with AdamW and crops as in Steiner et al. 2022.
"""

from configs import datasets
from vidjoint.config import base_config, choose


def get_config(argument: str = ""):
    (variant,) = choose(argument, ("l16", "b16"))
    config = base_config()
    config.total_epochs = 90.0
    config.batch_size = 4096
    config.eval_every = 20_000
    config.model.update(variant={"l16": "L/16", "b16": "B/16"}[variant], mixer="none", frames=1, image_size=224, remat="block", dropout=0.1)
    config.optim.update(lr=1e-3, weight_decay=0.03, warmup_steps=10_000, clip_norm=1.0)
    config.tasks.imagenet21k = datasets.imagenet21k(crop="area", area=(0.05, 1.0))
    return config
