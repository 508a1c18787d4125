"""DINOv2 with and without registers: Hugging Face's models and classifiers, and the backbones of the official code (.pth)."""

from vidjoint.weights.formats.hf_vit import IN_MEMORY
from vidjoint.weights.formats.timm_vit import BLOCK, LAYER_SCALES, SWIGLU
from vidjoint.weights.translate import CONV, GELU, TABLE, TASK, TOKEN, VECTOR, Arrays, Format, Rule, block_rules

HF_BLOCK = {
    "norm1": "norm1",
    "attn/qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn/proj": "attention.output.dense",
    "norm2": "norm2",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}
MASK = "for masked pretraining alone"
REGISTERS = Rule("embed/registers", ("embeddings.register_tokens",), TABLE)


def _pool(ours: Arrays) -> str:
    """Published classifiers see the class token and the mean of the patches; a backbone alone gives the class token."""
    return "class_and_average" if f"heads/{TASK}/kernel" in ours else "class_token"


def hf_settings(theirs: Arrays, ours: Arrays, config: dict) -> dict:
    return {
        "pool": _pool(ours),
        "gelu": GELU[config.get("hidden_act", "gelu")],
        "norm_eps": config.get("layer_norm_eps", 1e-6),
        "position_resize": "bicubic_antialias" if "embed/registers" in ours else "bicubic",
        "interpolation": "bicubic",
    }


def settings(theirs: Arrays, ours: Arrays, config: dict) -> dict:
    resize = "bicubic_antialias" if "embed/registers" in ours else "bicubic_offset"
    return {"pool": _pool(ours), "gelu": "exact", "norm_eps": 1e-6, "position_resize": resize, "interpolation": "bicubic"}


def _hugging_face(name: str, what: str, model_type: str, registers: bool) -> Format:
    marks = (r"embeddings\.position_embeddings", r"encoder\.layer\.0\.layer_scale1\.lambda1")
    return Format(
        name=name,
        what=what,
        model_type=model_type,
        prefixes=(f"{model_type}.",),
        renames=tuple(rename for rename in IN_MEMORY if "attention" in rename[1]),
        marks=(*marks, r"embeddings\.register_tokens") if registers else marks,
        unmarks=() if registers else (r"embeddings\.register_tokens",),
        axes={"embeddings.patch_embeddings.projection.weight": 4},
        rules=(
            Rule("embed/class_token", ("embeddings.cls_token",), TOKEN),
            Rule("embed/position", ("embeddings.position_embeddings",), TABLE),
            *(REGISTERS,) * registers,
            *block_rules("embed/", "embeddings.patch_embeddings.", {"proj": "projection"}, {"proj": CONV}),
            *block_rules("blocks/{i}/", "encoder.layer.{i}.", HF_BLOCK),
            *(Rule(f"blocks/{{i}}/scale{n}/gamma", (f"encoder.layer.{{i}}.layer_scale{n}.lambda1",), VECTOR) for n in (1, 2)),
            *block_rules("", "", {"norm": "layernorm"}),
            *block_rules("heads/", "", {TASK: "classifier"}),
        ),
        ignored={r"embeddings\.mask_token": MASK},
        refused={r"encoder\.layer\.\d+\.mlp\.(weights_in|weights_out|gate_proj|up_proj|down_proj)\..*": SWIGLU},
        settings=hf_settings,
        normalisation="imagenet",
    )


HF_DINOV2 = _hugging_face("hf_dinov2", "Hugging Face's DINOv2", "dinov2", registers=False)
HF_DINOV2_REGISTERS = _hugging_face("hf_dinov2_registers", "Hugging Face's DINOv2 with registers", "dinov2_with_registers", registers=True)

DINOV2 = Format(
    name="dinov2",
    what="the official DINOv2",
    prefixes=("module.", "teacher.", "backbone."),
    renames=((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),),  # a training run's checkpoints have blocks in chunks, with numbers that run through all
    marks=(r"mask_token", r"pos_embed", r"blocks\.0\.ls1\.gamma"),
    axes={"patch_embed.proj.weight": 4},
    rules=(
        Rule("embed/class_token", ("cls_token",), TOKEN),
        Rule("embed/position", ("pos_embed",), TABLE),
        Rule("embed/registers", ("register_tokens",), TABLE),
        *block_rules("embed/", "patch_embed.", {"proj": "proj"}, {"proj": CONV}),
        *block_rules("blocks/{i}/", "blocks.{i}.", BLOCK),
        *LAYER_SCALES,
        *block_rules("", "", {"norm": "norm"}),
    ),
    ignored={
        r"mask_token": MASK,
        r"(dino|ibot)_head\..*": "a head of the pretraining",
        r"student\..*": "the student of the pretraining; the teacher is what is used afterwards",
    },
    refused={r"blocks\.\d+\.mlp\.(w12|w3)\..*": SWIGLU},
    settings=settings,
    normalisation="imagenet",
)
