"""Hugging Face's ViViT (model 1, joint attention): `VivitModel` and `VivitForVideoClassification`."""

from vidjoint.weights.formats.hf_vit import BLOCK, GELU, IN_MEMORY
from vidjoint.weights.formats.tubelets import FIRST, grid_of, image_projection
from vidjoint.weights.translate import CONV3D, TABLE, TASK, TOKEN, Arrays, Format, Rule, block_rules

PROJECTION = "embeddings.patch_embeddings.projection.weight"
POSITION = "embeddings.position_embeddings"


def derive(theirs: Arrays, ours: Arrays, config: dict) -> dict:
    table = ours["embed/video_position"]
    _, rows, columns = grid_of(theirs[PROJECTION], config, len(table) - 1)
    return image_projection(theirs, ours, PROJECTION) | {"embed/position": (table[: 1 + rows * columns], FIRST.format(POSITION))}


def settings(theirs: Arrays, ours: Arrays, config: dict) -> dict:
    tubelet = theirs[PROJECTION].shape[2]
    times, *_ = grid_of(theirs[PROJECTION], config, len(ours["embed/video_position"]) - 1)
    return {
        "mixer": "joint",
        "embed": "separate",
        "video_position": "space_time",
        "tubelet": tubelet,
        "frames": times * tubelet,
        "position_resize": "bicubic",
        "gelu": GELU[config.get("hidden_act", "gelu_fast")],
        "norm_eps": config.get("layer_norm_eps", 1e-6),
    }


VIVIT = Format(
    name="vivit",
    what="Hugging Face's ViViT",
    model_type="vivit",
    prefixes=("vivit.",),
    renames=IN_MEMORY,
    marks=(r"embeddings\.cls_token", r"embeddings\.position_embeddings", r"encoder\.layer\.0\.layernorm_before\.weight"),
    axes={PROJECTION: 5},
    rules=(
        Rule("embed/class_token", ("embeddings.cls_token",), TOKEN),
        Rule("embed/video_position", (POSITION,), TABLE),
        *block_rules("embed/", "embeddings.patch_embeddings.", {"video_proj": "projection"}, {"video_proj": CONV3D}),
        *block_rules("blocks/{i}/", "encoder.layer.{i}.", BLOCK),
        *block_rules("", "", {"norm": "layernorm"}),
        *block_rules("heads/", "", {TASK: "classifier"}),
    ),
    ignored={r"pooler\..*": "a layer of its own training, which no classifier reads"},
    derive=derive,
    settings=settings,
    video=True,
)
