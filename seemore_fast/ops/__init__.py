"""Fused operators: arguments are checked, and the selected backend computes; usable alone in other networks."""

from .calibrate import calibrate
from .conv3x3_shuffle import conv3x3_shuffle
from .gated_ffn import gated_ffn
from .low_rank_experts import low_rank_experts
from .norm_conv3x3 import norm_conv3x3
from .norm_pointwise import norm_pointwise, pointwise
from .router import router
from .striped_conv import striped_conv
from .striped_conv_router import striped_conv_router

__all__ = [
    "calibrate",
    "conv3x3_shuffle",
    "gated_ffn",
    "low_rank_experts",
    "norm_conv3x3",
    "norm_pointwise",
    "pointwise",
    "router",
    "striped_conv",
    "striped_conv_router",
]
