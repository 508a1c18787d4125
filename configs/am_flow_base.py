"""What all AM Flow experiments share: a frozen image ViT, scaled parallel adapters with attention-map flow, and temporal processing units (TPUs).

Not run by itself: see am_flow_k400.py, am_flow_ssv2.py and am_flow_smarthome.py. Ablations (table 4) are words of their arguments:
  no_flow: adapters without AM flow; no_encoder: AM flow without the aligning encoder; scratch: nothing pretrained, nothing frozen;
  hyperformer, compacter, serial: other adapters;
  large, clip, imagenet: other backbones in place of DINOv2's ViT-B/14, its ViT-L/14, CLIP's ViT-B/16 (table 1), or a ViT-B/16 of ImageNet-21k
"""

from vidjoint.config import base_config

ABLATIONS = ("", "no_flow", "no_encoder", "scratch", "hyperformer", "compacter", "serial", "large", "clip", "imagenet")
BACKBONES = {
    "large": ("L/14", "checkpoints/dinov2_l14"),
    "clip": ("B/16", "checkpoints/clip_b16"),  # such as Hugging Face's openai/clip-vit-base-patch16
    "imagenet": ("B/16", "runs/cover_images_b16"),
}
TPUS = {  # layers and widths that give the paper's parameters: TCN 54 M, LSTM 360 M; transformer 90 M (the paper's 103 M fits no equal width)
    "transformer": dict(tpu="transformer", tpu_layers=1),
    "tcn": dict(tpu="tcn", tpu_layers=3, tpu_width=384),
    "lstm": dict(tpu="lstm", tpu_layers=4),
}
FROZEN = ("embed/.*", r"blocks/\d+/(norm1|attn|scale1|norm2|mlp|scale2)/.*", "norm/.*")


def am_flow(tpu: str, frames: int, flow: str, ablation: str = "", **tasks):
    config = base_config()
    config.total_epochs = 10.0  # the paper: a tenth of full fine-tuning
    config.batch_size = 64
    config.eval_every = 5_000
    config.init_from = "checkpoints/dinov2_b14"  # a folder with DINOv2's dinov2_vitb14_pretrain.pth, or Hugging Face's facebook/dinov2-base
    config.model.update(variant="B/14", mixer="am_flow", pool="last_frame", frames=frames, image_size=224)
    config.model.am_flow.update(flow=flow, **TPUS[tpu])
    # The paper's recipe is in an appendix that is not published
    config.optim.update(lr=3e-4, weight_decay=0.05, warmup_epochs=1.0, clip_norm=1.0, freeze=FROZEN)
    config.eval.views = "1x3"
    config.tasks.update(tasks)
    if ablation == "no_flow":
        config.model.am_flow.flow = "none"
    elif ablation == "no_encoder":
        config.model.am_flow.flow = "vanilla"
    elif ablation == "scratch":
        config.init_from, config.optim.freeze = "", ()
        config.model.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), layer_scale=1e-5)  # DINOv2's model
    elif ablation in BACKBONES:
        config.model.variant, config.init_from = BACKBONES[ablation]
    elif ablation:
        config.model.am_flow.adapter = ablation
    return config
