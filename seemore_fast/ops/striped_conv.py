"""Public operator `striped_conv`; formula and shapes in `seemore_fast.reference.striped_conv`."""

from torch import Tensor

from ..backends import implementation
from .checks import check_choice, check_odd, check_tensors


def striped_conv(
    x: Tensor,
    weight_row: Tensor,
    bias_row: Tensor,
    weight_col: Tensor,
    bias_col: Tensor,
    *,
    activation: str | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Depthwise 1xK, then Kx1, then activation (None or "gelu") and product with `gate`."""
    sizes = check_tensors(
        "striped_conv",
        x=(x, "B C H W"),
        weight_row=(weight_row, "C 1 1 K"),
        bias_row=(bias_row, "C"),
        weight_col=(weight_col, "C 1 K 1"),
        bias_col=(bias_col, "C"),
        gate=(gate, "B C H W ?"),
    )
    check_odd("striped_conv", "weight_row", sizes["K"])
    check_choice("striped_conv", "activation", activation, (None, "gelu"))
    return implementation("striped_conv")(
        x, weight_row, bias_row, weight_col, bias_col, activation=activation, gate=gate
    )
