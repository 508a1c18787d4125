"""Hugging Face's ViT: `ViTModel` and `ViTForImageClassification`."""

from vidjoint.weights.translate import CONV, GELU, TABLE, TASK, TOKEN, Arrays, Format, Rule, block_rules

BLOCK = {
    "norm1": "layernorm_before",
    "attn/qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn/proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
}
IN_MEMORY = (  # names of the same arrays in a running model of transformers 5
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def settings(theirs: Arrays, ours: Arrays, config: dict) -> dict:
    return {"gelu": GELU[config.get("hidden_act", "gelu")], "norm_eps": config.get("layer_norm_eps", 1e-12), "position_resize": "bicubic"}


HF_VIT = Format(
    name="hf_vit",
    what="Hugging Face's ViT",
    model_type="vit",
    prefixes=("vit.",),
    renames=IN_MEMORY,
    marks=(r"embeddings\.cls_token", r"embeddings\.position_embeddings", r"encoder\.layer\.0\.layernorm_before\.weight"),
    unmarks=(r"embeddings\.time_embeddings", r".*layer_scale.*", r".*\.qkv\..*"),
    axes={"embeddings.patch_embeddings.projection.weight": 4},
    rules=(
        Rule("embed/class_token", ("embeddings.cls_token",), TOKEN),
        Rule("embed/position", ("embeddings.position_embeddings",), TABLE),
        *block_rules("embed/", "embeddings.patch_embeddings.", {"proj": "projection"}, {"proj": CONV}),
        *block_rules("blocks/{i}/", "encoder.layer.{i}.", BLOCK),
        *block_rules("", "", {"norm": "layernorm"}),
        *block_rules("heads/", "", {TASK: "classifier"}),
    ),
    ignored={r"pooler\..*": "a layer of its own training, which no classifier reads", r"embeddings\.mask_token": "for masked pretraining alone"},
    settings=settings,
)
