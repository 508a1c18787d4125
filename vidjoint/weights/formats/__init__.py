"""The kinds of weights files that can be read: one file per project, and one line here."""

from vidjoint.weights.formats.hf_vit import HF_VIT
from vidjoint.weights.translate import Format

FORMATS: tuple[Format, ...] = (HF_VIT,)
