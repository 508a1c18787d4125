"""What all CoVeR experiments share (section 4.1): TimeSformer-L on Kinetics, Something-Something v2, Moments in Time and ImageNet, co-trained.

Not run by itself: see cover_jft.py and cover_in21k.py. Files are looked for under data_root:
  kinetics400/  (kinetics600/, kinetics700/)  train.csv and validate.csv as published (label, youtube_id, time_start, ...), and the clips in folders
    below, as LABEL/ID_START_END.mp4 or flat
  something-v2/  labels/train.json, labels/validation.json, labels/labels.json as published, and videos/ID.webm
  moments/  trainingSet.csv, validationSet.csv, moments_categories.txt as published, and folders training/ and validation/
  imagenet/  train/CLASS/*.JPEG and val/CLASS/*.JPEG
"""

from vidjoint.config import base_config, task_config

INPUT = {  # frames, pixels, random short side (table 7; TimeSformer's jitter)
    "standard": (8, 224, (256, 320)),
    "high_res": (16, 448, (448, 512)),
}


def cover(argument: str, init_from: str):
    """The recipe in full. `argument`: standard or high_res, and optionally k600 or k700 in place of k400, as in `high_res,k600`."""
    words = set(argument.split(",")) - {""}
    (resolution,) = words & set(INPUT) or {"high_res"}
    (kinetics,) = words & {"k400", "k600", "k700"} or {"k400"}
    if words - {resolution, kinetics}:
        raise ValueError(f"unknown config argument {', '.join(sorted(words - {resolution, kinetics}))}: use {', '.join(INPUT)}, k400, k600 or k700")
    frames, side, short_side = INPUT[resolution]

    config = base_config()
    config.total_epochs = 20.0
    config.batch_size = 128  # 62 videos and 66 images with K400, in proportion to the sets' sizes
    config.eval_every = 20_000
    config.checkpoint_every = 1_000
    config.init_from = init_from
    config.model.update(variant="L/16", mixer="divided", frames=frames, image_size=side, remat="block")
    config.optim.update(name="sgd", lr=5e-3, schedule="step", milestone_epochs=(11.0, 15.0), decay_factor=0.1, momentum=0.9)
    config.optim.update(weight_decay=1e-4, decay="all")  # not in the paper; TimeSformer's
    config.eval.views = "1x3"

    common = dict(sampler="uniform", crop="short_side", short_side=short_side)
    number = kinetics[1:]
    config.tasks.update(
        {
            kinetics: task_config(train=f"kinetics{number}/train.csv", val=f"kinetics{number}/validate.csv", classes=int(number), **common),
            "ssv2": task_config(  # "from left to right" is a class: no flip
                train="something-v2/labels/train.json",
                val="something-v2/labels/validation.json",
                root="something-v2/videos",
                classes=174,
                flip=False,
                **common,
            ),
            "mit": task_config(
                train="moments/trainingSet.csv",
                val="moments/validationSet.csv",
                labels="moments/moments_categories.txt",
                classes=339,
                **common,
            ),
            "imagenet": task_config(source="folder", media="image", train="imagenet/train", val="imagenet/val", classes=1000, **common),
        }
    )
    return config
