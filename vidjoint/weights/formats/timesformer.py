"""TimeSformer: Hugging Face's `TimesformerModel` and `TimesformerForVideoClassification`, and the official code's files (.pyth).

All three kinds of attention: divided over space and time, joint, and space alone. Both have the same parameters under two sets of names. The official
code's space-only files have no name of their own, they look like timm's of images: `--format=timesformer` says what they are. Hugging Face's library
gives such a model's logits frame by frame; here, as in the official code, frames are averaged before the last norm.
"""

from vidjoint.weights.formats.hf_vit import GELU
from vidjoint.weights.translate import CONV, TABLE, TASK, TOKEN, Arrays, Format, Rule, block_rules

HF_BLOCK = {
    "mixer/temporal_norm": "temporal_layernorm",
    "mixer/temporal_attn/qkv": "temporal_attention.attention.qkv",
    "mixer/temporal_attn/proj": "temporal_attention.output.dense",
    "mixer/temporal_fc": "temporal_dense",
    "norm1": "layernorm_before",
    "attn/qkv": "attention.attention.qkv",
    "attn/proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
}
BLOCK = {
    "mixer/temporal_norm": "temporal_norm1",
    "mixer/temporal_attn/qkv": "temporal_attn.qkv",
    "mixer/temporal_attn/proj": "temporal_attn.proj",
    "mixer/temporal_fc": "temporal_fc",
    "norm1": "norm1",
    "attn/qkv": "attn.qkv",
    "attn/proj": "attn.proj",
    "norm2": "norm2",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}


def settings(theirs: Arrays, ours: Arrays, config: dict) -> dict:
    divided = "blocks/0/mixer/temporal_fc/kernel" in ours
    time = ours.get("embed/time")
    return {
        "mixer": "divided" if divided else "none" if time is None else "joint",
        "pool": "frame_mean" if time is None else "class_token",
        "frames": len(time) if time is not None else int(config.get("num_frames", 8)),
        "position_resize": "nearest",
        "gelu": GELU[config.get("hidden_act", "gelu")],
        "norm_eps": config.get("layer_norm_eps", 1e-6),
    }


HF_TIMESFORMER = Format(
    name="hf_timesformer",
    what="Hugging Face's TimeSformer",
    model_type="timesformer",
    prefixes=("timesformer.",),
    marks=(r"embeddings\.cls_token", r"embeddings\.position_embeddings", r"encoder\.layer\.0\.attention\.attention\.qkv\.weight"),
    axes={"embeddings.patch_embeddings.projection.weight": 4},
    rules=(
        Rule("embed/class_token", ("embeddings.cls_token",), TOKEN),
        Rule("embed/position", ("embeddings.position_embeddings",), TABLE),
        Rule("embed/time", ("embeddings.time_embeddings",), TABLE),
        *block_rules("embed/", "embeddings.patch_embeddings.", {"proj": "projection"}, {"proj": CONV}),
        *block_rules("blocks/{i}/", "encoder.layer.{i}.", HF_BLOCK),
        *block_rules("", "", {"norm": "layernorm"}),
        *block_rules("heads/", "", {TASK: "classifier"}),
    ),
    settings=settings,
    normalisation="kinetics",
    video=True,
)

TIMESFORMER = Format(
    name="timesformer",
    what="the official TimeSformer",
    prefixes=("module.", "model."),
    marks=(r"cls_token", r"pos_embed", r"time_embed", r"blocks\.0\.attn\.qkv\.weight"),
    axes={"patch_embed.proj.weight": 4},
    rules=(
        Rule("embed/class_token", ("cls_token",), TOKEN),
        Rule("embed/position", ("pos_embed",), TABLE),
        Rule("embed/time", ("time_embed",), TABLE),
        *block_rules("embed/", "patch_embed.", {"proj": "proj"}, {"proj": CONV}),
        *block_rules("blocks/{i}/", "blocks.{i}.", BLOCK),
        *block_rules("", "", {"norm": "norm"}),
        *block_rules("heads/", "", {TASK: "head"}),
    ),
    settings=settings,
    normalisation="kinetics",
    video=True,
)
