"""Reference: every operator and the network in plain PyTorch. The tests compare with it; it runs where no kernel does.

It imports nothing of the package.
"""

from .calibrate import calibrate
from .conv3x3_shuffle import conv3x3_shuffle
from .gated_ffn import gated_ffn
from .layer_norm import layer_norm
from .low_rank_experts import low_rank_experts
from .model import SeemoRe
from .norm_conv3x3 import norm_conv3x3
from .norm_pointwise import norm_pointwise
from .pointwise import pointwise
from .router import router
from .striped_conv import striped_conv
from .striped_conv_router import striped_conv_router

__all__ = [
    "SeemoRe",
    "calibrate",
    "conv3x3_shuffle",
    "gated_ffn",
    "layer_norm",
    "low_rank_experts",
    "norm_conv3x3",
    "norm_pointwise",
    "pointwise",
    "router",
    "striped_conv",
    "striped_conv_router",
]
