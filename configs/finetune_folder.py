"""Your own videos: a folder with one sub-folder per class becomes a classifier.

python -m vidjoint.main --config=configs/finetune_folder.py --config.data_root=MY_VIDEOS

MY_VIDEOS/CLASS/*.mp4 (any format that FFmpeg reads). A fifth of each class is held out for validation. If left and right matter in your classes, add
--config.tasks.videos.flip=False. To start from an earlier run or from other projects' weights (docs/weights.md): --config.init_from=PATH, with
their patch size, as in --config.model.variant=B/14. Have separate folders? Set
--config.tasks.videos.train=train --config.tasks.videos.val=val --config.tasks.videos.fold=''. A list of files: --config.tasks.videos.source=csv.

Hardware: one GPU with 16 GB for the B/16 of 8 x 224 x 224; on a CPU try --config.model.variant=Ti/16 --config.model.image_size=96
--config.model.dtype=float32 --config.model.remat=none. From scratch, a small set of videos teaches little: init_from matters more than anything
else here.
"""

from vidjoint.config import base_config, task_config


def get_config():
    config = base_config()
    config.total_epochs = 30.0
    config.batch_size = 16
    config.eval_every = 500
    config.checkpoint_every = 500
    config.model.update(variant="B/16", mixer="divided", frames=8, image_size=224, drop_path=0.1, remat="block")
    config.optim.update(lr=1e-4, weight_decay=0.05, warmup_epochs=2.0, clip_norm=1.0, ema=0.999)
    config.loss.label_smoothing = 0.1
    config.eval.views = "1x3"
    config.tasks.videos = task_config(source="folder", train=".", fold="1/5", sampler="segments", crop="area", area=(0.3, 1.0))
    return config
