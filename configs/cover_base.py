"""What all CoVeR experiments share (sections 3 and 4): TimeSformer-L on Kinetics, Something-Something v2, Moments in Time and ImageNet, co-trained.

On 256 TPUs: --config.mesh.data=64 --config.mesh.tensor=4, for 62 videos and 66 images a step divide over no more; high_res then takes 8 of the 16 GiB
of a v5e chip (docs/performance.md). With less memory: --config.model.remat=block.

Not run by itself: see cover_jft.py, cover_in21k.py, cover_ablations.py and cover_transfer.py. How to lay out the files: datasets.py.
"""

from configs import datasets
from vidjoint.config import base_config

INPUT = {  # frames, pixels, random short side (table 7; TimeSformer's jitter)
    "standard": (8, 224, (256, 320)),
    "high_res": (16, 448, (448, 512)),
}
SIZES = ("", "base")  # ViT-L, or ViT-B (figure 4)
EVERYTHING = ("kinetics", "ssv2", "mit", "imagenet")


def cover(resolution: str = "high_res", kinetics: str = "k400", init_from: str = "", tasks: tuple[str, ...] = EVERYTHING, size: str = ""):
    """The recipe in full. `tasks`: which of EVERYTHING; `kinetics`: k400, k600 or k700; `size`: one of SIZES."""
    frames, side, short_side = INPUT[resolution]
    config = base_config()
    config.total_epochs = 20.0
    config.batch_size = 128  # of all four sets with K400: 62 videos and 66 images, in proportion to the sets' sizes
    config.eval_every = 20_000
    config.checkpoint_every = 1_000
    config.init_from = init_from
    config.model.update(variant="B/16" if size else "L/16", mixer="divided", frames=frames, image_size=side, remat="dots", scan=True)
    config.optim.update(name="sgd", lr=5e-3, schedule="step", milestone_epochs=(11.0, 15.0), decay_factor=0.1, momentum=0.9)
    config.optim.update(weight_decay=1e-4, decay="all")  # not in the paper; TimeSformer's
    config.eval.views = "1x3"

    common = dict(sampler="uniform", crop="short_side", short_side=short_side)
    sets = {
        "kinetics": lambda: datasets.kinetics(int(kinetics[1:]), **common),
        "ssv2": lambda: datasets.ssv2(**common),
        "mit": lambda: datasets.moments(**common),
        "imagenet": lambda: datasets.imagenet(loss_weight=0.5, **common),  # table 6: images 0.5, videos 1
    }
    for name in tasks:
        config.tasks[kinetics if name == "kinetics" else name] = sets[name]()
    return config
