"""PolyViT as IV-ViT's baseline (table 1): images and videos have embeddings of their own (videos in tubelets), all blocks are shared.

python -m vidjoint.main --config=configs/polyvit.py --config.data_root=/data
python -m vidjoint.main --config=configs/polyvit.py:weighted ...

Schedules (Likhosherstov et al. 2021, 3.3): alternating | task_by_task | uniform | weighted | accumulated. What it starts from: k400 | k400_i21k |
scratch. k400: as IV-ViT, from a ViT with token shift trained on Kinetics-400, but for the embedding of videos, which is that of a ViViT (the run of
vivit_k400.py; Hugging Face's google/vivit-b-16x2-kinetics400 will do). k400_i21k: besides, the embedding of images is that of an ImageNet-21k model.
From an image model alone: --config.init_from=WEIGHTS "--config.init_parts=()"; videos' embedding is made from its.

Hardware: one GPU. Published top-1 on Tiny-ImageNet, CIFAR-100, UCF101, mini-Kinetics, alternating: k400 80.8, 86.3, 92.2, 71.5; k400_i21k 80.3,
86.4, 91.9, 71.7; scratch 14.9, 24.3, 32.1, 10.5.
"""

from configs.iv_vit import SETS, four_sets
from vidjoint.config import choose

SCHEDULES = ("alternating", "task_by_task", "uniform", "weighted", "accumulated")


def get_config(argument: str = ""):
    schedule, start = choose(argument, SCHEDULES, ("k400", "k400_i21k", "scratch"))
    config = four_sets(SETS["all"], batch_size=3)
    config.schedule = schedule
    config.model.update(mixer="joint", frames=32, embed="separate", tubelet=2, remat="block")
    if start != "scratch":
        config.init_from = "checkpoints/tokenshift_b16_k400"
        config.init_parts = ("embed/video_.*=runs/vivit_k400",)
    if start == "k400_i21k":
        config.init_parts += (r"embed/(proj/.*|position|class_token)=runs/cover_images_b16",)
    if schedule in ("task_by_task", "weighted"):
        for task in config.tasks.values():
            task.steps = 20_000
    if schedule == "accumulated":
        config.total_steps = 20_000
        for task in config.tasks.values():
            task.batch_size = task.batch_size or config.batch_size
    if schedule != "alternating":
        config.optim.per_task = "shared"  # one optimiser, as PolyViT has it
    return config
