"""PolyViT as IV-ViT's baseline (table 1): images and videos have embeddings of their own (videos in tubelets), all blocks are shared.

python -m vidjoint.main --config=configs/polyvit.py --config.data_root=/data --config.init_from=runs/cover_images_b16
python -m vidjoint.main --config=configs/polyvit.py:weighted ...

Schedules (Likhosherstov et al. 2021, 3.3): alternating | task_by_task | uniform | weighted | accumulated; pretrained | scratch.

Hardware: one GPU. Published top-1 on Tiny-ImageNet, CIFAR-100, UCF101, mini-Kinetics, alternating: 80.3, 86.4, 91.9, 71.7 with ImageNet-21k
images, 80.8, 86.3, 92.2, 71.5 with Kinetics-400; scratch 14.9, 24.3, 32.1, 10.5.
"""

from configs.iv_vit import SETS, four_sets
from vidjoint.config import choose

SCHEDULES = ("alternating", "task_by_task", "uniform", "weighted", "accumulated")


def get_config(argument: str = ""):
    schedule, start = choose(argument, SCHEDULES, ("pretrained", "scratch"))
    config = four_sets(SETS["all"], batch_size=3)
    config.schedule = schedule
    config.model.update(mixer="joint", frames=32, embed="separate", tubelet=2, remat="block")
    config.init_from = "runs/cover_images_b16" if start == "pretrained" else ""
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
