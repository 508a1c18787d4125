"""IV-ViT (table 1): one frame-wise ViT with token shift on two image sets and two video sets, in turn.

python -m vidjoint.main --config=configs/iv_vit.py --config.data_root=/data --config.init_from=/checkpoints/tokenshift_b16_k400

Files under data_root:
  tiny-imagenet/  train/CLASS/*.JPEG and val/CLASS/*.JPEG (sort the validation pictures into class folders first)
  cifar100 prepared by TFDS
  ucf101/  trainlist01.csv, testlist01.csv (lines: path label), clips beside them
  mini-kinetics/  train.csv, val.csv (lines: path label), clips beside them

Hardware: one GPU. 20,000 rounds of four steps. Published top-1: Tiny-ImageNet 83.22, CIFAR-100 88.69, UCF101 90.08, mini-Kinetics 62.83.
"""

from vidjoint.config import base_config, task_config


def get_config():
    config = base_config()
    config.total_steps = 80_000
    config.batch_size = 6  # per step, of the one dataset whose turn it is
    config.schedule = "round_robin"
    config.task_order = ("tiny_imagenet", "cifar100", "ucf101", "mini_kinetics")
    config.eval_every = 8_000
    config.init_from = "checkpoints/tokenshift_b16_k400"

    config.model.update(variant="B/16", mixer="token_shift", frames=16, image_size=224)
    config.model.token_shift.fraction = 0.125  # their code; the paper gives none
    config.model.update(mean=(0.45, 0.45, 0.45), std=(0.225, 0.225, 0.225))
    # The paper's constant rate. Their code drops it to 1e-7 after 250 iterations: optim.schedule=step, milestone_steps=(800,1000).
    config.optim.update(name="adamw", lr=1e-5, schedule="constant", weight_decay=5e-5, decay="all")

    image = dict(media="image", crop="area", area=(0.08, 1.0), aspect=(3 / 4, 4 / 3))
    video = dict(sampler="window", window_seconds=2.67, crop="short_side", short_side=(224, 320))
    config.tasks.update(
        tiny_imagenet=task_config(source="folder", train="tiny-imagenet/train", val="tiny-imagenet/val", classes=200, **image),
        cifar100=task_config(source="tfds", train="cifar100:train", val="cifar100:test", classes=100, **image),
        ucf101=task_config(train="ucf101/trainlist01.csv", val="ucf101/testlist01.csv", classes=101, **video),
        mini_kinetics=task_config(train="mini-kinetics/train.csv", val="mini-kinetics/val.csv", classes=200, **video),
    )
    return config
