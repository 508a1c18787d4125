"""TokenShift (VideoNetworks/TokShift-Transformer): the official code's files, and those of its plain ViT, which have the same names.

The file knows neither that there is a shift nor of how many channels or frames: a quarter each way, as in all published models, and 8 frames. For the
plain ViT set `mixer=none`.
"""

from vidjoint.weights.translate import CONV, TABLE, TASK, TOKEN, Arrays, Format, Rule, block_rules

BLOCK = {
    "norm1": "attention_norm",
    "attn/qkv": ("attn.query", "attn.key", "attn.value"),
    "attn/proj": "attn.out",
    "norm2": "ffn_norm",
    "mlp/fc1": "ffn.fc1",
    "mlp/fc2": "ffn.fc2",
}


def settings(theirs: Arrays, ours: Arrays, config: dict) -> dict:
    return {
        "mixer": "token_shift",
        "token_shift": {"tokens": "class", "fraction": 0.25, "direction": "next_first"},
        "pool": "class_token",
        "frames": 8,
        "position_resize": "bilinear_corners",
        "gelu": "exact",
        "norm_eps": 1e-6,
    }


TOKEN_SHIFT = Format(
    name="token_shift",
    what="the official TokenShift",
    prefixes=("module.", "base_model.", "transformer."),
    marks=(
        r"embeddings\.cls_token",
        r"encoder\.layer\.0\.attention_norm\.weight",
        r"encoder\.layer\.0\.attn\.query\.weight",
        r"encoder\.encoder_norm\.weight",
    ),
    axes={"embeddings.patch_embeddings.weight": 4},
    rules=(
        Rule("embed/class_token", ("embeddings.cls_token",), TOKEN),
        Rule("embed/position", ("embeddings.position_embeddings",), TABLE),
        *block_rules("embed/", "embeddings.", {"proj": "patch_embeddings"}, {"proj": CONV}),
        *block_rules("blocks/{i}/", "encoder.layer.{i}.", BLOCK),
        *block_rules("", "", {"norm": "encoder.encoder_norm"}),
        *block_rules("heads/", "", {TASK: "head"}),
    ),
    settings=settings,
    video=True,
)
