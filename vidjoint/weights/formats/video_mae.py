"""Hugging Face's VideoMAE: `VideoMAEForVideoClassification`, `VideoMAEModel`, and the encoder of `VideoMAEForPreTraining`.

Its position table, a sinusoid over all tokens of a clip, is in no file. Keys have no bias: it would change nothing, for the softmax over keys does
not see it.
"""

import numpy as np

from vidjoint.models.position import sinusoid
from vidjoint.weights.formats.hf_vit import BLOCK, GELU
from vidjoint.weights.formats.tubelets import grid_of, image_projection
from vidjoint.weights.translate import CONV3D, LINEAR, TASK, Arrays, Format, Rule, block_rules

PROJECTION = "embeddings.patch_embeddings.projection.weight"
ATTENTION = "encoder.layer.{i}.attention.attention."
DECODER = "the decoder of masked pretraining"


def derive(theirs: Arrays, ours: Arrays, config: dict) -> dict:
    width, (times, rows, columns) = theirs[PROJECTION].shape[0], grid_of(theirs[PROJECTION], config)
    table, words = sinusoid(times * rows * columns, width), "a fixed sinusoid"
    made = {"embed/video_position": (table, words), "embed/position": (table[: rows * columns], f"{words}, of the first time step")}
    if "norm/scale" not in ours:  # `VideoMAEModel` with `use_mean_pooling`, whose classifier would bring it
        made |= {"norm/scale": (np.ones(width), "ones, for the file has no last norm"), "norm/bias": (np.zeros(width), "zeros, likewise")}
    return image_projection(theirs, ours, PROJECTION) | made


def settings(theirs: Arrays, ours: Arrays, config: dict) -> dict:
    """The pool is the library's: the mean of all patches and then a norm, or a norm and then, for its classifier, the first patch."""
    tubelet, (times, *_) = theirs[PROJECTION].shape[2], grid_of(theirs[PROJECTION], config)
    normed = "layernorm.weight" in theirs
    return {
        "mixer": "joint",
        "embed": "separate",
        "video_position": "space_time",
        "tubelet": tubelet,
        "frames": times * tubelet,
        "pool": "patch_mean" if not normed else "first_token" if "classifier.weight" in theirs else "average",
        "position_resize": "sinusoid",
        "gelu": GELU[config.get("hidden_act", "gelu")],
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "last_norm_eps": 1e-5 if "fc_norm.weight" in theirs else 0.0,  # torch's default, which the library leaves it at
    }


VIDEO_MAE = Format(
    name="video_mae",
    what="Hugging Face's VideoMAE",
    model_type="videomae",
    prefixes=("videomae.",),
    renames=((r"\.q_bias$", ".query.bias"), (r"\.v_bias$", ".value.bias")),
    marks=(r"embeddings\.patch_embeddings\.projection\.weight", r"encoder\.layer\.0\.attention\.attention\.query\.weight"),
    unmarks=(r"embeddings\.cls_token", r"embeddings\.position_embeddings"),
    axes={PROJECTION: 5},
    rules=(
        *block_rules("embed/", "embeddings.patch_embeddings.", {"video_proj": "projection"}, {"video_proj": CONV3D}),
        Rule("blocks/{i}/attn/qkv/kernel", tuple(f"{ATTENTION}{name}.weight" for name in ("query", "key", "value")), LINEAR),
        Rule("blocks/{i}/attn/qkv/bias", (f"{ATTENTION}query.bias", "", f"{ATTENTION}value.bias"), zeros="blocks/{i}/attn/qkv/kernel"),
        *block_rules("blocks/{i}/", "encoder.layer.{i}.", {ours: theirs for ours, theirs in BLOCK.items() if ours != "attn/qkv"}),
        *block_rules("", "", {"norm": "layernorm"}),
        *block_rules("", "", {"norm": "fc_norm"}),
        *block_rules("heads/", "", {TASK: "classifier"}),
    ),
    ignored={r"(decoder|encoder_to_decoder)\..*": DECODER, r"mask_token": DECODER},
    derive=derive,
    settings=settings,
    video=True,
)
