"""CoVeR in miniature, on the embedded dataset: one transformer learns still digits, what a moving digit is, and what it does.

python -m vidjoint.main --config=configs/demo.py

Hardware: a laptop; 2 cores, 6 minutes. Expected top-1: digits 98 %, appearance 96 %, motion 88 % forward and 8 % with frames reversed, while
appearance does not change: table 2 of the CoVeR paper in miniature (SSv2 58.8 -> 22.6, K400 78.1 -> 78.0).
"""

from vidjoint.config import base_config, task_config


def get_config():
    config = base_config()
    config.total_steps = 1300
    config.batch_size = 64
    config.checkpoint_every = 650
    config.eval_every = 650

    config.model.update(variant="Ti/8", width=64, depth=2, heads=4, mlp_dim=256, frames=8, image_size=32, dtype="float32", gelu="tanh")
    # IV-ViT's mixer under CoVeR's schedule. From scratch, shifting all tokens learns the sense of a motion within minutes; divided attention at this
    # budget learned its axis only (51 % of motion)
    config.model.update(mixer="token_shift", pool="average")
    config.model.token_shift.update(tokens="all", fraction=0.25)

    config.optim.update(lr=3e-3, weight_decay=0.05, warmup_steps=50, clip_norm=1.0, ema=0.99)

    video = dict(source="demo", crop="short_side", short_side=(32, 36), flip=False)  # files are 32 x 32: shifts of up to 4 pixels
    image = dict(video, media="image", short_side=(32, 40))
    config.tasks.update(
        digits=task_config(train="digits:train", val="digits:test", **image),
        appearance=task_config(train="appearance:train", val="appearance:test", **video),
        motion=task_config(train="motion:train", val="motion:test", sample_weight=2.0, **video),
    )
    return config
