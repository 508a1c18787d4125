"""What all MEViT experiments share (section 4): ViT-B/16 in 4 space-only blocks, 7 with motion attention, and one of class-attention.

Not run by itself: see mevit_k400.py, mevit_k600.py and mevit_ssv2.py. Ablations, on the command line:
  table 1, size of the blocks: --config.model.motion.block=1 (2, 3, 7, 14)
  table 2, self-attention + class-attention blocks: --config.model.depth=10 --config.model.mixer_blocks=4,5,6,7,8,9
    --config.model.class_attention.blocks=2
  table 3, how many of the last blocks see time: --config.model.mixer_blocks=9,10
"""

from vidjoint.config import base_config


def mevit(frames: str, **tasks):
    """`frames`: 8f or 16f."""
    config = base_config()
    config.total_epochs = 15.0
    config.batch_size = 64
    config.eval_every = 10_000
    config.init_from = "runs/cover_images_b16"  # the paper: ImageNet weights for the spatial part
    config.init_allow = (r"blocks/1[01]/.*",)  # of the image model's twelve blocks, those that are more than ours stay unused
    config.model.update(variant="B/16", depth=11, frames=int(frames[:-1]), image_size=224, remat="block", drop_path=0.1)
    config.model.update(mixer="motion", mixer_blocks=tuple(range(4, 11)), class_token=False, pool="class_attention")
    # The paper gives no recipe; TimeSformer's, on which it builds
    config.optim.update(name="sgd", lr=5e-3, schedule="step", milestone_epochs=(11.0, 14.0), decay_factor=0.1, momentum=0.9)
    config.optim.update(weight_decay=1e-4, decay="all")
    config.eval.views = "1x3"
    config.tasks.update(tasks)
    return config
