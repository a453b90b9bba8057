"""Operator `striped_conv`: the large receptive field of SEE at the price of two one-dimensional convolutions."""

from .. import reference
from .checks import check_odd
from .operator import Operator

STRIPES = {"weight_row": "C 1 1 K", "bias_row": "C", "weight_col": "C 1 K 1", "bias_col": "C"}

# Under autocast all of it is computed in autocast's dtype, as a convolution of torch is.
striped_conv = Operator(
    reference.striped_conv,
    {"x": "B C H W", **STRIPES, "gate": "B C H W ?"},
    {"activation": "str?"},
    autocast=("x", *STRIPES, "gate"),
    one_dtype=True,
    size=lambda values: values["weight_row"].shape[3],
    validate=lambda values, sizes: check_odd("striped_conv", "weight_row", sizes["K"]),
)
