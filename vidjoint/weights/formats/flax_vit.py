"""Google's Vision Transformers in Flax (.npz): google-research/vision_transformer (augreg), big_vision and scenic, under the names of the first."""

import numpy as np

from vidjoint.weights.formats.timm_vit import with_class_row
from vidjoint.weights.translate import FLAX_CONV, FLAX_OUT, FLAX_QKV, FLAX_QKV_BIAS, SAME, TABLE, TASK, TOKEN, Arrays, Format, Layout, Rule

POSITION = "Transformer/posembed_input/pos_embedding"
BLOCK = "Transformer/encoderblock_{i}/"
ATTENTION = BLOCK + "MultiHeadDotProductAttention_1/"


def _rules(ours: str, theirs: str, kernel: str = "kernel", layout: Layout = SAME) -> tuple[Rule, Rule]:
    return Rule(f"{ours}/{kernel}", (f"{theirs}/{kernel}",), layout), Rule(f"{ours}/bias", (f"{theirs}/bias",), SAME)


def prepare(theirs: dict, config: dict) -> dict:
    if POSITION in theirs:
        theirs[POSITION], _ = with_class_row(np.asarray(theirs[POSITION]), int("cls" in theirs))
    pretraining = any(name.startswith(("pre_logits/", "txt/")) for name in theirs)
    return {name: array for name, array in theirs.items() if not (pretraining and name.startswith("head/"))}


def settings(theirs: Arrays, ours: Arrays, config: dict) -> dict:
    heads = theirs[f"{ATTENTION}query/kernel".replace("{i}", "0")].shape[1]
    return {"heads": heads, "gelu": "tanh", "norm_eps": 1e-6, "position_resize": "bilinear_corners", "interpolation": "bilinear"}


FLAX_VIT = Format(
    name="flax_vit",
    what="a ViT of Google's Flax code",
    prefixes=("opt/target/", "optimizer/target/", "params/", "img/"),
    renames=(  # big_vision's and scenic's
        (r"^pos_embedding$", POSITION),
        (r"^output_projection/", "head/"),
        (r"^(Transformer/encoderblock\w*/)LayerNorm_1/", r"\1LayerNorm_2/"),
        (r"^(Transformer/encoderblock\w*/)MultiHeadDotProductAttention_0/", r"\1MultiHeadDotProductAttention_1/"),
        (r"^(Transformer/encoderblock\w*/)MlpBlock_0/", r"\1MlpBlock_3/"),
    ),
    marks=(r"embedding/kernel", r"Transformer/encoderblock(_0)?/LayerNorm_0/scale"),
    axes={"embedding/kernel": 4},
    rules=(
        Rule("embed/class_token", ("cls",), TOKEN),
        Rule("embed/position", (POSITION,), TABLE),
        *_rules("embed/proj", "embedding", layout=FLAX_CONV),
        *_rules("blocks/{i}/norm1", f"{BLOCK}LayerNorm_0", "scale"),
        Rule("blocks/{i}/attn/qkv/kernel", tuple(f"{ATTENTION}{name}/kernel" for name in ("query", "key", "value")), FLAX_QKV),
        Rule("blocks/{i}/attn/qkv/bias", tuple(f"{ATTENTION}{name}/bias" for name in ("query", "key", "value")), FLAX_QKV_BIAS),
        *_rules("blocks/{i}/attn/proj", f"{ATTENTION}out", layout=FLAX_OUT),
        *_rules("blocks/{i}/norm2", f"{BLOCK}LayerNorm_2", "scale"),
        *_rules("blocks/{i}/mlp/fc1", f"{BLOCK}MlpBlock_3/Dense_0"),
        *_rules("blocks/{i}/mlp/fc2", f"{BLOCK}MlpBlock_3/Dense_1"),
        *_rules("norm", "Transformer/encoder_norm", "scale"),
        *_rules("heads/" + TASK, "head"),
    ),
    ignored={
        r"pre_logits/.*": "a layer of the pretraining between features and head; the features here are those before it",
        r"head/.*": "reads what is left out here: a layer of the pretraining, or texts",
        r"txt/.*|[tb]": "of the texts",
        r"(opt|optimizer)/.*": "state of the optimiser",
    },
    refused={
        r"MAPHead_0/.*": "part of attention pooling (MAPHead), which no model here has",
        r"(conv_root|gn_root|block\d+)/.*": "part of a ResNet before the blocks (hybrid), which no model here has",
    },
    stacked=(r"^Transformer/encoderblock/", "Transformer/encoderblock_{i}/"),
    prepare=prepare,
    settings=settings,
)
