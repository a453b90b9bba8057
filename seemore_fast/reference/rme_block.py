"""RME, the Rank Modulating Expert: the first half of a residual group.

In the paper: "Rank Modulating Expert".
"""

from collections.abc import Sequence

from torch import Tensor

from .. import reference


def channel_shuffle(x: Tensor, groups: int = 2) -> Tensor:
    """Interleave the channels of `groups` equal groups: channel g * C + c becomes c * groups + g.

    x has the channels in dimension 1; also used with dimension 1 of weights seen as (1, D, ...).
    """
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def rme_block(
    x: Tensor,
    norm_1_weight: Tensor,
    norm_1_bias: Tensor,
    weight_conv: Tensor,
    bias_conv: Tensor,
    weight_expand: Tensor,
    bias_expand: Tensor,
    weight_agg: Tensor,
    bias_agg: Tensor,
    weight_dw: Tensor,
    bias_dw: Tensor,
    weight_pw: Tensor,
    bias_pw: Tensor,
    weight_row: Tensor,
    bias_row: Tensor,
    weight_col: Tensor,
    bias_col: Tensor,
    weight_router: Tensor,
    weight_a: Tensor,
    bias_a: Tensor,
    weight_k: Tensor,
    bias_k: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
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
    ranks: Sequence[int],
    top_k: int,
    recursive: int,
    use_shuffle: bool,
    parts=None,
) -> Tensor:
    """Mixture of rank experts, then a gated feed-forward network, each behind a LayerNorm and a residual.

        u    = weight_expand @ GELU(conv_3x3(LN(x))) + bias_expand;   if use_shuffle: channel_shuffle(u)
        a, k = chunk(u, 2);   a = GELU(striped_3(a));   k = calibrate(k)
        x    = x + weight_proj @ low_rank_experts(a, k, *router(a)) + bias_proj
        y    = gated_ffn(x)

    | tensor                         | shape         |
    |--------------------------------|---------------|
    | x, returns                     | (B, C, H, W)  |
    | weight_conv                    | (C, C, 3, 3)  |
    | weight_expand                  | (2C, C, 1, 1) |
    | weight_agg .. bias_pw          | as `calibrate`        |
    | weight_row .. bias_col         | as `striped_conv`     |
    | weight_router                  | (E, C)        |
    | weight_a .. bias_out           | as `low_rank_experts` |
    | weight_proj                    | (C, C, 1, 1)  |
    | norm_2_weight .. bias_2        | as `gated_ffn`        |

    Shuffling the channels of u is the same as shuffling the rows of weight_expand and bias_expand, which is done
    here: it costs no pass over the image.

    `parts` is the module whose operators it is made of: this package, or `seemore_fast.ops`, which picks kernels.
    """
    parts = parts or reference
    if use_shuffle:
        weight_expand, bias_expand = (channel_shuffle(p[None])[0] for p in (weight_expand, bias_expand))
    a, k = parts.norm_conv3x3(
        x, norm_1_weight, norm_1_bias, weight_conv, bias_conv, weight_expand, bias_expand, activation="gelu"
    ).chunk(2, dim=1)
    a, expert_index, expert_weight = parts.striped_conv_router(
        a, weight_row, bias_row, weight_col, bias_col, weight_router, top_k, activation="gelu"
    )
    k = parts.calibrate(k, weight_agg, bias_agg, weight_dw, bias_dw, weight_pw, bias_pw, recursive)
    experts = (weight_a, bias_a, weight_k, bias_k, weight_out, bias_out, ranks)
    x = parts.low_rank_experts(
        a, k, expert_index, expert_weight, *experts, weight_proj=weight_proj, bias_proj=bias_proj, residual=x
    )
    del a, k  # and with them their memory
    return parts.gated_ffn(x, norm_2_weight, norm_2_bias, weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2)
