"""timm's ViTs against timm: every block's tokens and the logits."""

import functools

import numpy as np
import pytest

from tests.weights.parity import arrays_of, block_outputs, compare, library, normalised, ours, pixels_of, randomise, read, refused_if_damaged
from vidjoint.errors import UserError
from vidjoint.weights.pretrained import from_arrays

SIZES = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=1.5, num_classes=5, dynamic_img_size=True)
CONFIG = {"architecture": "vit_tiny_patch8", "model_args": {"num_heads": 2}}
GAP = dict(class_token=False, global_pool="avg")
VARIANTS = {  # what differs from a plain ViT
    "plain": {},
    "no_bias": dict(qkv_bias=False, proj_bias=False),
    "layer_scale": dict(init_values=0.1),
    "gap": dict(**GAP, fc_norm=False),
    "gap_fc_norm": GAP,
    "class_token_fc_norm": dict(global_pool="avg"),
    "flexivit": dict(no_embed_class=True),
    "registers": dict(reg_tokens=4, no_embed_class=True, init_values=0.1),
    "registers_with_positions": dict(reg_tokens=4),
    "gap_registers": dict(**GAP, reg_tokens=1, no_embed_class=True),
    "gap_registers_with_positions": dict(**GAP, reg_tokens=4, fc_norm=False),
    "clip": dict(pre_norm=True, act_layer="quick_gelu"),
    "backbone": dict(num_classes=0),
}


def model_of(seed=0, **changes):
    timm, layers = library("timm"), library("timm.layers")
    norm = functools.partial(layers.LayerNorm, eps=1e-5) if changes.get("pre_norm") else None
    model = timm.models.vision_transformer.VisionTransformer(**SIZES | dict(norm_layer=norm) | changes).eval()
    randomise(model, seed)
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_parity(name):
    reference = model_of(**VARIANTS[name])
    config = CONFIG | ({"architecture": "vit_tiny_patch8_clip_quickgelu"} if name == "clip" else {})
    pretrained = read(arrays_of(reference), config)
    for side in (32, 48) if name != "plain" else (32, 48, 24):
        pixels = pixels_of(2, 1, side, side)
        expected, blocks = block_outputs(reference.blocks, reference, normalised(pixels, pretrained)[:, 0])
        compare(ours(pretrained, pixels), blocks, **{"features" if name == "backbone" else "logits": expected})


def test_names_of_deit_3_and_of_wrapped_models():
    plain = arrays_of(model_of(init_values=0.1))
    renamed = {"module." + name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): array for name, array in plain.items()}
    wanted, found = read(plain, CONFIG), read(renamed, CONFIG)
    assert all(np.array_equal(array, found.params[name]) for name, array in wanted.params.items())


def test_what_travels_with_the_weights():
    labels = list("abcde")
    config = CONFIG | {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}, "label_names": labels}
    pretrained = read(arrays_of(model_of()), config)
    model = pretrained.config.model
    assert (model.mean, model.std, model.interpolation) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    assert (model.gelu, model.norm_eps, model.position_resize, model.image_size) == ("exact", 1e-6, "bicubic_antialias", 32)
    assert pretrained.labels == {"pretrained": tuple("abcde")} and not pretrained.numbered
    alone = from_arrays(arrays_of(model_of()), {}, "memory")
    assert (alone.config.model.mean, alone.config.model.interpolation) == ((0.5, 0.5, 0.5), "bicubic")
    clip = from_arrays(arrays_of(model_of(pre_norm=True)), {}, "memory").config.model
    assert (round(clip.mean[0], 3), clip.norm_eps, clip.pre_norm, clip.gelu) == (0.481, 1e-5, "layer_norm", "exact")


def test_settings_of_timms_own_architectures():
    """Heads, GELU, epsilon and pool that only the architecture's name can tell, where they are not the usual ones."""
    timm, torch = library("timm"), library("torch")
    names = timm.list_models(
        ["vit_giantopt*_siglip_gap*", "vit_*siglip_gap_512", "vit_base_patch16_gap*", "vit_so400m*_gap_224", "vit_base*_clip_*224"]
    )
    assert len(names) > 5
    for name in [
        *names,
        "test_vit",
        "test_vit2",
        "vit_huge_patch14_224",
        "deit3_small_patch16_224",
        "eva_large_patch14_196",
        "vit_xsmall_patch16_clip_224",
    ]:
        with torch.device("meta"):
            reference = timm.create_model(name, depth=1)
        arrays = {key: np.broadcast_to(np.float32(0), x.shape) for key, x in reference.state_dict().items()}
        found = from_arrays(arrays, {"config": {"architecture": name, "global_pool": reference.global_pool}}, name).config.model
        first = reference.blocks[0]
        gelu = {"GELU": "exact", "GELUTanh": "tanh", "QuickGELU": "quick"}[type(first.mlp.act).__name__]
        pool = "class_token" if reference.global_pool == "token" else "average" if hasattr(reference.norm, "weight") else "patch_mean"
        heads = found.heads or {"Ti": 3, "S": 6, "B": 12, "L": 16, "H": 16}[found.variant.split("/")[0]]
        assert (heads, found.gelu, found.norm_eps, found.pool) == (first.attn.num_heads, gelu, first.norm1.eps, pool), name


def test_a_head_behind_a_layer_of_the_pretraining_is_left_out():
    arrays = arrays_of(model_of()) | {"pre_logits.fc.weight": np.zeros((32, 32), np.float32), "pre_logits.fc.bias": np.zeros(32, np.float32)}
    pretrained = read(arrays, CONFIG)
    assert not pretrained.labels and sorted(pretrained.ignored) == ["head.bias", "head.weight", "pre_logits.fc.bias", "pre_logits.fc.weight"]


def test_damaged_files():
    arrays = arrays_of(model_of(init_values=0.1, reg_tokens=4, no_embed_class=True))
    refused_if_damaged(arrays, CONFIG, optional=r"reg_token|patch_embed\.proj\.bias|head\.(weight|bias)|cls_token")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(qk_norm=True), "q_norm"),
        (dict(scale_mlp_norm=True), "mlp.norm"),
        (dict(global_pool="map"), "attn_pool"),
        (dict(pos_embed="none"), "pos_embed"),
        (dict(final_norm=False), "norm.weight"),
        (dict(norm_layer="rmsnorm"), "norm1.bias"),
    ],
)
def test_models_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(UserError, match=r"memory.*" + words):
        from_arrays(arrays_of(model_of(**changes)), {"config": CONFIG}, "memory")


def test_gated_parallel_and_distilled_models_are_refused():
    timm, layers = library("timm"), library("timm.layers")
    vits = timm.models.vision_transformer
    blocks = {block: dict(block_fn=getattr(vits, block)) for block in ("ParallelScalingBlock", "ParallelThingsBlock")}
    for changes in (dict(mlp_layer=layers.SwiGLUPacked), dict(mlp_layer=layers.SwiGLU), *blocks.values()):
        with pytest.raises(UserError, match=r"gated|parallel") as caught:
            from_arrays(arrays_of(model_of(**changes)), {"config": CONFIG}, "memory")
        assert len(caught.value.lines) == 1
    distilled = timm.models.deit.VisionTransformerDistilled(**SIZES | dict(dynamic_img_size=False))
    with pytest.raises(UserError, match=r"dist_token.*distillation"):
        from_arrays(arrays_of(distilled), {}, "memory")
    for more in ({"global_pool": "avgmax"}, {"architecture": "vit_base_patch16_rope_ape_224"}, {"model_args": {"act_layer": "silu"}}):
        with pytest.raises(UserError, match=r"avgmax|rotary|silu"):
            from_arrays(arrays_of(model_of()), {"config": CONFIG | more}, "memory")
