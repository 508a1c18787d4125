"""CLIP's image tower as Hugging Face has it: `CLIPVisionModel`, `CLIPVisionModelWithProjection`, and within a whole `CLIPModel`."""

from vidjoint.weights.translate import CONV, GELU, SAME, Arrays, Format, Rule, block_rules

BLOCK = {
    "norm1": "layer_norm1",
    "attn/qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn/proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}


def settings(theirs: Arrays, ours: Arrays, config: dict) -> dict:
    config = config.get("vision_config") or config  # a whole CLIPModel's has one for each tower
    made = {"gelu": GELU[config.get("hidden_act", "quick_gelu")], "norm_eps": config.get("layer_norm_eps", 1e-5)}
    if heads := config.get("num_attention_heads"):
        made["heads"] = int(heads)
    return made | {"position_resize": "bicubic", "interpolation": "bicubic"}


CLIP = Format(
    name="hf_clip",
    what="Hugging Face's CLIP",
    model_type="clip_vision_model",
    prefixes=("vision_model.",),
    marks=(r"embeddings\.class_embedding", r"pre_layrnorm\.weight", r"encoder\.layers\.0\.layer_norm1\.weight"),
    axes={"embeddings.patch_embedding.weight": 4},
    rules=(
        Rule("embed/class_token", ("embeddings.class_embedding",), SAME),
        Rule("embed/position", ("embeddings.position_embedding.weight",), SAME),
        *block_rules("embed/", "", {"proj": "embeddings.patch_embedding", "norm": "pre_layrnorm"}, {"proj": CONV}),
        *block_rules("blocks/{i}/", "encoder.layers.{i}.", BLOCK),
        *block_rules("", "", {"norm": "post_layernorm"}),
    ),
    ignored={
        r"visual_projection\.weight": "leads to the space that pictures share with texts; the features here are those before it",
        r"text_(model|projection)\..*|logit_scale": "of the texts",
        r"embeddings\.position_ids": "the numbers 0, 1, 2 and so on",
    },
    refused={r"classifier\..*": "of CLIPForImageClassification, which averages the patches without the last norm: no model here does"},
    settings=settings,
    normalisation="clip",
)
