"""CoVeR in miniature, on the embedded dataset: one transformer learns still digits, what a moving digit is, and what it does.

python -m vidjoint.main --config=configs/demo.py

Hardware: a laptop; 2 cores, 4 minutes. Expected top-1: digits 97 %, appearance 95 %, motion 95 % forward and 2 % with frames reversed, while
appearance does not change: table 2 of the CoVeR paper (SSv2 58.8 -> 22.6, K400 78.1 -> 78.0).
"""

from vidjoint.config import base_config, task_config


def get_config():
    config = base_config()
    config.total_steps = 1000
    config.batch_size = 96
    config.checkpoint_every = 250
    config.eval_every = 250

    config.model.update(variant="Ti/8", width=64, depth=3, heads=4, mlp_dim=256, frames=8, image_size=32, dtype="float32")
    config.model.mixer = "divided"
    config.model.divided.temporal_init = "random"  # a branch that starts at zero is slow from scratch

    config.optim.update(lr=3e-3, weight_decay=0.05, warmup_steps=50, clip_norm=1.0, ema=0.99)

    clip = dict(source="demo", crop="none", flip=False)
    config.tasks.update(
        digits=task_config(train="digits:train", val="digits:test", media="image", **clip),
        appearance=task_config(train="appearance:train", val="appearance:test", **clip),
        motion=task_config(train="motion:train", val="motion:test", **clip),
    )
    return config
