"""Images and videos in one transformer, in miniature, on the embedded dataset: it learns still digits, what a moving digit is, and what it does.

python -m vidjoint.main --config=configs/demo.py

Hardware: a laptop; four cores, 5 to 6 minutes. Expected top-1: digits 98 %, appearance 95 %, motion 97 % forward and 1 % with frames reversed, while
appearance does not change: table 2 of the CoVeR paper in miniature (SSv2 58.8 -> 22.6, K400 78.1 -> 78.0). This is IV-ViT, which learns soonest;
the four systems on the same data, 1,300 steps of 64 examples each (README, "The four systems"):
python -m vidjoint.main --config=configs/demo.py:cover      (iv_vit, mevit)
python -m vidjoint.main --config=configs/demo.py:images && python -m vidjoint.main --config=configs/demo.py:am_flow
"""

from vidjoint.config import base_config, choose, task_config


def get_config(argument: str = ""):
    (system,) = choose(argument, ("iv_vit", "cover", "mevit", "images", "am_flow"))
    config = base_config()
    config.total_steps = 1300
    config.batch_size = 64
    config.checkpoint_every = 650
    config.eval_every = 650

    model = config.model
    model.update(variant="Ti/8", width=64, depth=2, heads=4, mlp_dim=256, frames=8, image_size=32, dtype="float32", gelu="tanh")
    model.temporal_init = "random"  # from scratch
    if system == "iv_vit":
        # All tokens, not the class token alone: from scratch that one learns nothing of motion
        config.schedule = "round_robin"
        model.update(mixer="token_shift")
        model.token_shift.update(tokens="all", fraction=0.25)
    elif system == "cover":
        model.update(mixer="divided")
    elif system == "mevit":
        model.update(mixer="motion", class_token=False, pool="class_attention")
    elif system == "images":  # the first stage: still digits alone
        model.frames = 1
    elif system == "am_flow":
        config.init_from = "runs/demo_images"
        model.update(mixer="am_flow", pool="last_frame")
        model.am_flow.update(bottleneck=64, flow="vanilla", tpu="transformer", tpu_mlp=128, tpu_heads=4)
        config.optim.freeze = ("embed/.*", r"blocks/\d+/(norm1|attn|norm2|mlp)/.*", "norm/.*")

    config.optim.update(lr=3e-3, weight_decay=0.05, warmup_steps=50, clip_norm=1.0, ema=0.99)

    video = dict(source="demo", crop="short_side", short_side=(32, 36), flip=False)  # files are 32 x 32: shifts of up to 4 pixels
    image = dict(video, media="image", short_side=(32, 40))
    config.tasks.digits = task_config(train="digits:train", val="digits:test", **image)
    if system != "images":
        config.tasks.appearance = task_config(train="appearance:train", val="appearance:test", **video)
        config.tasks.motion = task_config(train="motion:train", val="motion:test", sample_weight=2.0, **video)
    return config
