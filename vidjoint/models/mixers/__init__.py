"""Temporal mixers: one file per idea. A new one is a file here and a line in this table."""

from vidjoint.models.mixers.am_flow import AMFlow
from vidjoint.models.mixers.base import Mixer
from vidjoint.models.mixers.motion import Motion
from vidjoint.models.mixers.spacetime import Divided, Joint
from vidjoint.models.mixers.token_shift import TokenShift

MIXERS = {"none": Mixer, "divided": Divided, "joint": Joint, "token_shift": TokenShift, "motion": Motion, "am_flow": AMFlow}
