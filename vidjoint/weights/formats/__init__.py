"""The kinds of weights files that can be read: one file per project, and one line here."""

from vidjoint.weights.formats.clip import CLIP
from vidjoint.weights.formats.dinov2 import DINOV2, HF_DINOV2, HF_DINOV2_REGISTERS
from vidjoint.weights.formats.flax_vit import FLAX_VIT
from vidjoint.weights.formats.hf_vit import HF_VIT
from vidjoint.weights.formats.timesformer import HF_TIMESFORMER, TIMESFORMER
from vidjoint.weights.formats.timm_vit import TIMM_VIT
from vidjoint.weights.formats.token_shift import TOKEN_SHIFT
from vidjoint.weights.formats.video_mae import VIDEO_MAE
from vidjoint.weights.formats.vivit import VIVIT
from vidjoint.weights.translate import Format

IMAGES = (HF_VIT, HF_DINOV2, HF_DINOV2_REGISTERS, DINOV2, CLIP, TIMM_VIT, FLAX_VIT)
VIDEOS = (HF_TIMESFORMER, TIMESFORMER, TOKEN_SHIFT, VIDEO_MAE, VIVIT)
FORMATS: tuple[Format, ...] = IMAGES + VIDEOS
