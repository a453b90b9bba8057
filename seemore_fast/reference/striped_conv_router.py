"""The end of MoRE's first half: a striped convolution, and the router that pools its result.

In the paper: "Rank Modulating Expert".
"""

from torch import Tensor

from .router import router
from .striped_conv import striped_conv


def striped_conv_router(
    x: Tensor,
    weight_row: Tensor,
    bias_row: Tensor,
    weight_col: Tensor,
    bias_col: Tensor,
    weight_router: Tensor,
    top_k: int,
    *,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `striped_conv` does, and route each image by the result, which a kernel pools while it is made.

        y = striped_conv(x);   index, weight = router(y)

    | tensor                 | shape                         |
    |------------------------|-------------------------------|
    | x, returns y           | (B, C, H, W)                  |
    | weight_row .. bias_col | as `striped_conv`             |
    | weight_router          | (E, C)                        |
    | returns indices        | (B, top_k) int64              |
    | returns weights        | (B, top_k) as `router` has it |
    """
    y = striped_conv(x, weight_row, bias_row, weight_col, bias_col, activation=activation)
    return y, *router(y, weight_router, top_k)
