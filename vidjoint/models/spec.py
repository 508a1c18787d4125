"""Sizes and choices of one model: the keys of `config.model`, explained in `vidjoint/config.py`, with the variant resolved; hashable."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DividedSpec:
    image_temporal: str = "affine"


@dataclass(frozen=True)
class TokenShiftSpec:
    tokens: str = "class"
    fraction: float = 0.125
    direction: str = "next_first"


@dataclass(frozen=True)
class MotionSpec:
    block: int = 2
    order: str = "time_space"
    temporal_fc: bool = True


@dataclass(frozen=True)
class AMFlowSpec:
    adapter: str = "parallel"
    bottleneck: int = 684
    hyper_width: int = 16
    flow: str = "vanilla"
    flow_heads: str = "mean"
    flow_last: str = "zeros"
    flow_tokens: str = "all"
    flow_softmax: str = "keys"
    flow_map: str = "softmax"
    encoder_width: int = 684
    encoder_mlp: int = 1368
    encoder_heads: int = 12
    encoder_input: str = "scalar"
    tpu: str = "transformer"
    tpu_sequence: str = "frames"
    tpu_squeeze: str = "auto"
    tpu_width: int = 684
    tpu_layers: int = 1
    tpu_mlp: int = 1368
    tpu_heads: int = 12
    double_residual: bool = False


@dataclass(frozen=True)
class ClassAttentionSpec:
    blocks: int = 1
    keys: str = "patches"


@dataclass(frozen=True)
class TemporalEncoderSpec:
    depth: int = 4


@dataclass(frozen=True)
class ViTSpec:
    width: int
    depth: int
    heads: int
    mlp_dim: int
    patch: int  # pixels
    frames: int = 8  # frames of the clips that the time table is made for
    image_size: int = 224  # pixels; gives the grid of the position table
    embed: str = "shared"
    tubelet: int = 1
    tubelet_init: str = "central_frame"
    mixer: str = "none"
    mixer_blocks: tuple[int, ...] = ()
    temporal_init: str = "zero"
    pool: str = "class_token"
    class_token: bool = True
    dtype: str = "float32"
    attention: str = "xla"
    remat: str = "none"
    scan: bool = False
    drop_path: float = 0.0
    dropout: float = 0.0
    gelu: str = "exact"
    norm_eps: float = 1e-6
    last_norm_eps: float = 0.0  # of the norm before the pool; 0: norm_eps
    layer_scale: float = 0.0  # initial value; 0: none
    registers: int = 0  # tokens per frame after the class token
    pre_norm: str = "none"
    position_resize: str = "bicubic"
    video_position: str = "grid"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    divided: DividedSpec = DividedSpec()
    token_shift: TokenShiftSpec = TokenShiftSpec()
    motion: MotionSpec = MotionSpec()
    am_flow: AMFlowSpec = AMFlowSpec()
    class_attention: ClassAttentionSpec = ClassAttentionSpec()
    temporal_encoder: TemporalEncoderSpec = TemporalEncoderSpec()

    @property
    def prefix(self) -> int:
        """Tokens before the patches of each frame: class token, then registers."""
        return int(self.class_token) + self.registers

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches that the position table was made for."""
        return self.image_size // self.patch, self.image_size // self.patch

    @property
    def times(self) -> int:
        """Time steps of the tokens of a clip of `frames` frames: rows of tables over time."""
        return self.frames // self.tubelet

    def mixes(self, block: int) -> bool:
        """Whether frames talk in block number `block` (from 0)."""
        return not self.mixer_blocks or block in {number % self.depth for number in self.mixer_blocks}
