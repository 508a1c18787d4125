"""What all MEViT experiments share (section 4): ViT-B/16 in 4 space-only blocks, 7 with motion attention, and one of class-attention.

Not run by itself: see mevit_k400.py, mevit_k600.py and mevit_ssv2.py. Ablations are words of mevit_k400.py's argument. The paper does not say what
each was made on; its figures agree (M = 2 of table 1 is L_t = 12 of table 3) where all blocks not spoken of have motion attention:
  m1, m2, m3, m7, m14: table 1, side of the blocks of motion attention, in each of 12 blocks with a class token
  9+3, 10+2, 11+1, 12+1: table 2, blocks of self-attention + class-attention, all of the first with motion attention
  lt0, lt2, lt4, lt8, lt12: table 3, how many of 12 blocks, the last ones, see time
"""

from vidjoint.config import base_config

BLOCK_SIDES = tuple(f"m{side}" for side in (1, 2, 3, 7, 14))
CLASS_ATTENTION = ("9+3", "10+2", "11+1", "12+1")
SEE_TIME = tuple(f"lt{blocks}" for blocks in (0, 2, 4, 8, 12))
ABLATIONS = ("", *BLOCK_SIDES, *CLASS_ATTENTION, *SEE_TIME)


def mevit(frames: str, ablation: str = "", **tasks):
    """`frames`: 8f or 16f; `ablation`: one of ABLATIONS."""
    config = base_config()
    config.total_epochs = 15.0
    config.batch_size = 64
    config.eval_every = 10_000
    config.init_from = "runs/cover_images_b16"  # the paper: ImageNet weights for the spatial part
    model = config.model
    model.update(variant="B/16", depth=11, frames=int(frames[:-1]), image_size=224, remat="block", drop_path=0.1)
    model.update(mixer="motion", mixer_blocks=tuple(range(4, 11)), class_token=False, pool="class_attention")
    if ablation in CLASS_ATTENTION:
        model.depth, model.class_attention.blocks = map(int, ablation.split("+"))
        model.mixer_blocks = ()
    elif ablation:  # table 1 or 3
        model.update(depth=12, class_token=True, pool="class_token", mixer_blocks=())
    if ablation in BLOCK_SIDES:
        model.motion.block = int(ablation[1:])
    elif ablation == "lt0":
        model.update(mixer="none", pool="frame_mean")
    elif ablation in SEE_TIME:
        model.mixer_blocks = tuple(range(12 - int(ablation[2:]), 12))
    if model.depth < 12:  # of the image model's twelve blocks, those that are more than ours stay unused
        config.init_allow = (rf"blocks/({'|'.join(map(str, range(model.depth, 12)))})/.*",)
    # The paper gives no recipe; TimeSformer's, on which it builds
    config.optim.update(name="sgd", lr=5e-3, schedule="step", milestone_epochs=(11.0, 14.0), decay_factor=0.1, momentum=0.9)
    config.optim.update(weight_decay=1e-4, decay="all")
    config.eval.views = "1x3"
    config.tasks.update(tasks)
    return config
