"""SME, the Spatial Modulating Expert: the second half of a residual group.

In the paper: "Spatial Modulating Expert".
"""

from torch import Tensor

from .. import reference


def sme_block(
    x: Tensor,
    norm_1_weight: Tensor,
    norm_1_bias: Tensor,
    weight_qv: Tensor,
    bias_qv: Tensor,
    weight_row: Tensor,
    bias_row: Tensor,
    weight_col: Tensor,
    bias_col: Tensor,
    weight_proj: Tensor,
    bias_proj: Tensor,
    norm_2_weight: Tensor,
    norm_2_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_gate: Tensor,
    bias_gate: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    *,
    parts=None,
) -> Tensor:
    """Spatial enhancement (SEE), then a gated feed-forward network, each behind a LayerNorm and a residual.

        q, v = chunk(GELU(weight_qv @ LN(x) + bias_qv), 2)
        x    = x + weight_proj @ (striped_conv(q) * v) + bias_proj
        y    = gated_ffn(x)

    | tensor                  | shape             |
    |-------------------------|-------------------|
    | x, returns              | (B, C, H, W)      |
    | weight_qv               | (2C, C, 1, 1)     |
    | weight_row .. bias_col  | as `striped_conv` |
    | weight_proj             | (C, C, 1, 1)      |
    | norm_2_weight .. bias_2 | as `gated_ffn`    |

    `parts` is the module whose operators it is made of: this package, or `seemore_fast.ops`, which picks kernels.
    """
    parts = parts or reference
    x = see(
        x, norm_1_weight, norm_1_bias, weight_qv, bias_qv, weight_row, bias_row, weight_col, bias_col,
        weight_proj, bias_proj, parts,
    )  # fmt: skip
    return parts.gated_ffn(x, norm_2_weight, norm_2_bias, weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2)


def see(
    x, norm_weight, norm_bias, weight_qv, bias_qv, weight_row, bias_row, weight_col, bias_col, weight_proj, bias_proj,
    parts,
) -> Tensor:  # fmt: skip
    """Spatial enhancement with its LayerNorm and residual: the first half of `sme_block`, arguments as there."""
    q, v = parts.norm_pointwise(x, norm_weight, norm_bias, weight_qv, bias_qv, activation="gelu").chunk(2, dim=1)
    q = parts.striped_conv(q, weight_row, bias_row, weight_col, bias_col, gate=v)
    del v  # and with it the memory of both halves
    return parts.pointwise(q, weight_proj, bias_proj, residual=x)
