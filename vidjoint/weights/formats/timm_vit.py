"""timm's Vision Transformers: plain ones, without class token, with LayerScale (DeiT-III), with registers, with a norm before the blocks (CLIP).

Official files of DeiT, DeiT-III, MAE and DINO have the same names. The arrays tell neither GELU nor epsilon; timm's config.json does, by the name of
its architecture, and some other things (heads that are not 64 wide, rotary positions, norms after attention and MLP). Without it they are taken to be
as in most of timm's models.
"""

import math
import re

import numpy as np

from vidjoint.weights.translate import CONV, GELU, NORMALISATION, TABLE, TASK, TOKEN, VECTOR, Arrays, Format, Refused, Rule, block_rules

BLOCK = {name: name.replace("/", ".") for name in ("norm1", "attn/qkv", "attn/proj", "norm2", "mlp/fc1", "mlp/fc2")}
LAYER_SCALES = tuple(Rule(f"blocks/{{i}}/scale{n}/gamma", (f"blocks.{{i}}.ls{n}.gamma",), VECTOR) for n in (1, 2))
SWIGLU = "part of a gated MLP (SwiGLU), which no model here has"
# What an architecture's name tells and the arrays do not: activation, number of heads, and why no model here is like it
SIGLIP_TANH = r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip.*|vit_large_patch16_siglip.*512"
ACTIVATIONS = {r".*quickgelu.*": "quick_gelu", SIGLIP_TANH: "gelu_tanh", r".*": "gelu"}
HEADS = {r"vit_base_patch16_gap_224": 16, r"vit_giantopt_patch16_siglip.*": 16, r"test_vit2?": 2, r".*": 0}
UNLIKE = {r".*_rpn_.*": "norms come after attention and MLP", r".*_rope_.*|vit_s?relpos.*": "positions are rotary or relative", r".*": ""}


def with_class_row(table: np.ndarray, lead: int, registers: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """A position table as it is here: a row for the class token, none for registers, then the patches of a square grid.

    Args:
      table: [1, M, D]. Its M rows are those of the patches alone, and the class token has no position, or those of all tokens.
      lead: 1 where the model has a class token, else 0.
      registers: [1, R, D], None where there are none.

    Returns the table and the registers, to which their positions are added.
    """
    table = np.asarray(table, np.float32)
    rows, count = table.shape[1], 0 if registers is None else registers.shape[1]
    if math.isqrt(rows) ** 2 == rows:
        return np.concatenate([np.zeros_like(table[:, :lead]), table], axis=1), registers
    if count:
        registers = registers + table[:, lead : lead + count]
        table = np.concatenate([table[:, :lead], table[:, lead + count :]], axis=1)
    return table, registers


def prepare(theirs: dict, config: dict) -> dict:
    if "pos_embed" in theirs:
        table, registers = with_class_row(theirs["pos_embed"], int("cls_token" in theirs), theirs.get("reg_token"))
        theirs["pos_embed"] = table
        if registers is not None:
            theirs["reg_token"] = registers
    pretraining = any(name.startswith("pre_logits.") for name in theirs)
    return {name: array for name, array in theirs.items() if not (pretraining and name.startswith("head."))}


def settings(theirs: Arrays, ours: Arrays, config: dict) -> dict:
    architecture, args = str(config.get("architecture", "")).partition(".")[0], config.get("model_args", {})

    def known(table):
        return next(value for pattern, value in table.items() if re.fullmatch(pattern, architecture))

    width, hidden = ours["blocks/0/mlp/fc1/kernel"].shape
    if ours["blocks/0/mlp/fc2/kernel"].shape[0] * 2 == hidden:
        raise Refused(f"has blocks.0.mlp.fc1 {[hidden, width]}, {SWIGLU}")
    if known(UNLIKE):
        raise Refused(f"is a {architecture}, whose {known(UNLIKE)}: no model here is so")
    clip = "norm_pre.weight" in theirs
    made = NORMALISATION["clip"] | {"norm_eps": 1e-5} if clip else {"norm_eps": 1e-6}
    made |= {"gelu": GELU[args.get("act_layer") or known(ACTIVATIONS)], "position_resize": "bicubic_antialias", "interpolation": "bicubic"}
    made["pool"] = _pool(theirs, config.get("global_pool") or args.get("global_pool"), bool(args.get("pool_include_prefix")))
    if heads := args.get("num_heads") or known(HEADS):
        made["heads"] = int(heads)
    return made


def _pool(theirs: Arrays, how: str | None, all_tokens: bool) -> str:
    """timm's `global_pool`; where it is not known, patches are averaged if there is no class token, or a norm for that (`fc_norm`)."""
    normed = "fc_norm.weight" in theirs
    how = how or ("token" if "cls_token" in theirs and not normed else "avg")
    if how not in ("token", "avg") or (how == "avg" and all_tokens):
        raise Refused(f"pools by {how}{' of all tokens' * all_tokens}: here it can be the class token or the mean of the patches")
    return "class_token" if how == "token" else "patch_mean" if normed else "average"


TIMM_VIT = Format(
    name="timm_vit",
    what="a ViT of timm",
    prefixes=("module.", "model."),
    renames=((r"\.gamma_([12])$", r".ls\1.gamma"),),  # DeiT-III's own files
    marks=(r"patch_embed\.(proj|backbone)\..*", r"blocks\.0\.(norm1|in_norm|attns\.0\.norm)\.weight", r"blocks\.0\.(attn|attns|in_proj)\..*"),
    unmarks=(  # of DINOv2's own code, of TimeSformer, of CaiT and XCiT
        r"mask_token|register_tokens",
        r"time_embed|blocks\.0\.temporal_.*",
        r"(blocks_token_only|cls_attn_blocks)\..*",
    ),
    axes={"patch_embed.proj.weight": 4},
    rules=(
        Rule("embed/class_token", ("cls_token",), TOKEN),
        Rule("embed/position", ("pos_embed",), TABLE),
        Rule("embed/registers", ("reg_token",), TABLE),
        *block_rules("embed/", "", {"proj": "patch_embed.proj", "norm": "norm_pre"}, {"proj": CONV}),
        *block_rules("blocks/{i}/", "blocks.{i}.", BLOCK),
        *LAYER_SCALES,
        *block_rules("", "", {"norm": "norm"}),
        *block_rules("", "", {"norm": "fc_norm"}),
        *block_rules("heads/", "", {TASK: "head"}),
    ),
    ignored={
        r"pre_logits\..*": "a layer of the pretraining between features and head; the features here are those before it",
        r"head\..*": "reads a layer of the pretraining that is left out here",
    },
    refused={
        r"dist_token|head_dist\..*": "a distillation token (DeiT), for which no model here has a place",
        r"blocks\.\d+\.attn\.[qk]_norm\..*": "a norm of queries or keys (qk_norm), which no model here has",
        r"blocks\.\d+\.(attn|mlp)\.norm\..*": "a norm within attention or MLP, which no model here has",
        r"blocks\.\d+\.mlp\.(w1|w2|w3|w12|fc1_g|fc1_x)\..*": SWIGLU,
        r"attn_pool\..*": "part of attention pooling (a MAP head), which no model here has",
        r"patch_embed\.(backbone|norm)\..*": "a network or norm of the patch embedding (hybrid), which no model here has",
        r"blocks\.\d+\.(in_norm|in_proj|mlp_bias|attns\..*|ffns\..*)(\..*)?": "part of attention and MLP in parallel, which no model here has",
        r"blocks\.\d+\.attn\.(lambda_.*|sub_norm\..*)": "part of differential attention, which no model here has",
        r"blocks\.\d+\.attn\.([qkv]_bias|rel.*)|rel_pos.*|rope.*": "part of a model with relative or rotary positions (BEiT, EVA)",
    },
    prepare=prepare,
    settings=settings,
)
