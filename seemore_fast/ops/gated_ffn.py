"""Operator `gated_ffn`: the feed-forward half of both experts."""

import torch

from .. import reference
from .allocation import empty_like
from .operator import Operator

CONVOLUTIONS = {
    "weight_1": "2C C 1 1", "bias_1": "2C", "weight_gate": "C 1 3 3 stencil", "bias_gate": "C", "weight_2": "C C 1 1",
    "bias_2": "C",
}  # fmt: skip

# Under autocast x is normalised and added in its own dtype, and the result has the wider one of the two.
gated_ffn = Operator(
    reference.gated_ffn,
    {"x": "B C H W", "norm_weight": "C", "norm_bias": "C", **CONVOLUTIONS},
    {"eps": "float"},
    results=lambda v: (empty_like(v["x"], torch.promote_types(v["x"].dtype, v["weight_2"].dtype)),),
    autocast=CONVOLUTIONS,
    size=lambda values: values["x"].shape[1],
)
