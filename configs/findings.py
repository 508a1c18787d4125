"""The papers' findings in miniature, on the embedded dataset: a word for the finding, a word for the arm, each a small difference from demo.py.

python -m vidjoint.main --config=configs/findings.py:motion_block,m4      (one arm; python -m vidjoint.findings motion_block: all, and the table)

Hardware: a laptop; with one seed all arms of a finding take five to twelve minutes on four cores (estimated). Published figures:
vidjoint/findings.py and docs/findings.md, which also says what stands for what. The first arm of a finding is the one that the others are compared
with; `source` and `images` are first stages.
"""

from configs.demo import get_config as demo
from vidjoint.config import choose

ALL, VIDEOS, MOTION = ("digits", "appearance", "motion"), ("appearance", "motion"), ("motion",)
FROM_SCRATCH = {"init_from": "", "optim.freeze": ()}
FEATURES = ("embed/.*", "blocks/.*", "norm/.*")
CLASS_TOKEN = {"model.class_token": True, "model.pool": "class_token"}
SMALL_ENCODER = {"model.am_flow.encoder_width": 64, "model.am_flow.encoder_mlp": 128, "model.am_flow.encoder_heads": 4}

# Finding -> (what its arms share, arm -> what it changes): `system` of demo.py, `tasks`, and keys of the schema
FINDINGS = {
    # CoVeR tables 5 and 6. An epoch is one pass over the union, so every arm sees as many examples of each of its sets; images weigh 0.5
    "datasets": (
        {"system": "cover", "tasks": ALL, "total_epochs": 8.0, "tasks.digits.loss_weight": 0.5},
        {"all": {}, "videos": {"tasks": VIDEOS}, "appearance": {"tasks": ("appearance",)}, "motion": {"tasks": MOTION}},
    ),
    # The same examples in the same order
    "image_weight": (
        {"system": "cover", "tasks": ALL, "total_epochs": 8.0},
        {f"w{weight}": {"tasks.digits.loss_weight": weight} for weight in (0.5, 0.0, 0.75)},
    ),
    # CoVeR 3.2: the same motion clips in the same order
    "transfer": (
        {"system": "cover", "tasks": MOTION, "total_steps": 200, "init_from": "runs/findings_transfer_source"},
        {
            "full": {},
            "frozen": {"optim.freeze": FEATURES},
            "scratch": {"init_from": ""},
            "source": {"tasks": ("digits", "appearance"), "total_steps": 0, "total_epochs": 20.0, "init_from": ""},
        },
    ),
    # IV-ViT table 1: a round is a step of each set, 300 rounds for all
    "joint": (
        {"system": "iv_vit", "tasks": ALL, "total_steps": 900},
        {
            "shared": {},
            "separate": {"model.embed": "separate"},
            "videos": {"tasks": VIDEOS, "total_steps": 600},
            "images": {"tasks": ("digits",), "total_steps": 300},
        },
    ),
    # IV-ViT table 1, from scratch: the same examples in the same order. There PolyViT has twice as many frames in half as large batches; here as many
    "polyvit": (
        {"system": "iv_vit", "tasks": ALL, "total_steps": 900},
        {"iv_vit": {}, "no_shift": {"model.mixer": "none"}, "polyvit": {"model.mixer": "joint", "model.embed": "separate", "model.tubelet": 2}},
    ),
    # MEViT tables 1 to 3: the same motion clips in the same order, from scratch. The grid has 4 x 4 patches: m4 is joint attention, m1 divided.
    # Table 1 and 3 have a class token in all blocks: their best figures are those of one model, and table 2's with class-attention is another
    "motion_block": (
        {"system": "mevit", "tasks": MOTION, "total_steps": 450} | CLASS_TOKEN,
        {f"m{side}": {"model.motion.block": side} for side in (2, 1, 4)},
    ),
    # Three blocks in all (the paper: twelve). With class-attention motion is learned late, so more steps
    "class_attention": (
        {"system": "mevit", "tasks": MOTION, "total_steps": 800},
        {"sa2_ca1": {}, "sa1_ca2": {"model.depth": 1, "model.class_attention.blocks": 2}, "sa3_ca0": {"model.depth": 3} | CLASS_TOKEN},
    ),
    # How many of three blocks see time (the paper: of twelve), the last ones
    "top_heavy": (
        {"system": "mevit", "tasks": MOTION, "total_steps": 450, "model.depth": 3} | CLASS_TOKEN,
        {
            "last2": {"model.mixer_blocks": (1, 2)},
            "last3": {"model.mixer_blocks": (0, 1, 2)},
            "last1": {"model.mixer_blocks": (2,)},
            "none": {"model.mixer": "none"},
        },
    ),
    # AM Flow table 4: the same motion clips in the same order
    "am_flow": (
        {"system": "am_flow", "tasks": MOTION, "total_steps": 250, "init_from": "runs/findings_am_flow_images", "model.am_flow.flow": "aligned"}
        | SMALL_ENCODER,
        {
            "aligned": {},
            "vanilla": {"model.am_flow.flow": "vanilla"},
            "no_flow": {"model.am_flow.flow": "none"},
            "scratch": FROM_SCRATCH,
            "hyperformer": {"model.am_flow.adapter": "hyperformer"},
            "serial": {"model.am_flow.adapter": "serial"},
            "images": {"system": "images", "tasks": ("digits",), "total_steps": 600, "init_from": "", "model.am_flow.flow": "vanilla"},
        },
    ),
}


def get_config(argument: str = ""):
    finding, _, arm = argument.partition(",")
    (finding,) = choose(finding, tuple(FINDINGS))
    shared, arms = FINDINGS[finding]
    (arm,) = choose(arm, tuple(arms))
    changes = shared | arms[arm]
    config, tasks = demo(changes.pop("system")), changes.pop("tasks")
    for name in set(config.tasks) - set(tasks):
        del config.tasks[name]
    if "motion" in tasks:
        config.tasks.motion.sample_weight = 1.0  # sets count by their size
    config.update(total_steps=0, eval_every=0, checkpoint_every=100)
    config.update_from_flattened_dict({key: value for key, value in changes.items() if key.split(".")[0] != "tasks" or key.split(".")[1] in tasks})
    return config
