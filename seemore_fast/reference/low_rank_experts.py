"""The mixture of low-rank experts: MoRE's modulation, per image.

In the paper: "Rank Modulating Expert".
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def low_rank_experts(
    a: Tensor,
    k: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    weight_a: Tensor,
    bias_a: Tensor,
    weight_k: Tensor,
    bias_k: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    ranks: Sequence[int],
    *,
    weight_proj: Tensor | None = None,
    bias_proj: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Add to a what its image's chosen experts make of a and k.

        m = a + sum over chosen e of p_e * (Wout_e @ ((Wk_e @ k + bk_e) * (Wa_e @ a + ba_e)) + bout_e)
        y = m  or, with a projection,  residual + weight_proj @ m + bias_proj

    | tensor             | shape        |                                                        |
    |--------------------|--------------|--------------------------------------------------------|
    | a, k, returns      | (B, C, H, W) |                                                        |
    | expert_index       | (B, top_k)   | int64, from `router`                                   |
    | expert_weight      | (B, top_k)   | p_e                                                    |
    | weight_a, weight_k | (R, C)       | R = sum(ranks): the experts' rows, one after another   |
    | bias_a, bias_k     | (R,)         |                                                        |
    | weight_out         | (C, R)       | the experts' columns, one after another                |
    | bias_out           | (E, C)       |                                                        |
    | ranks              | E integers   | rank of each expert                                    |
    | weight_proj        | (C, C, 1, 1) | this and the next two: given together or not at all    |
    | bias_proj          | (C,)         |                                                        |
    | residual           | (B, C, H, W) |                                                        |

    Experts that no image chose cost nothing and get zero gradients. The experts are padded with zero rows to the
    largest rank, so that each image can gather its own by index: the choice is data, never a branch.
    """
    ranks = list(ranks)

    def gather(packed: Tensor) -> Tensor:
        """Rows (R, ...) of all experts -> rows (B, top_k * max(ranks), ...) of each image's."""
        rank_max = max(ranks)
        no_padding = [0, 0] * (packed.dim() - 1)
        experts = [F.pad(rows, [*no_padding, 0, rank_max - len(rows)]) for rows in packed.split(ranks)]
        return torch.stack(experts)[expert_index].flatten(1, 2)

    flat_a, flat_k = a.flatten(2), k.flatten(2)
    rank_a = torch.baddbmm(gather(bias_a)[:, :, None], gather(weight_a), flat_a)
    rank_k = torch.baddbmm(gather(bias_k)[:, :, None], gather(weight_k), flat_k)
    probability = expert_weight.repeat_interleave(max(ranks), dim=1)[:, :, None]
    modulated = (rank_a * rank_k * probability).to(rank_a.dtype)
    bias = (expert_weight[:, :, None] * bias_out[expert_index]).sum(dim=1)[:, :, None]
    out = gather(weight_out.t()).transpose(1, 2) @ modulated + bias.to(rank_a.dtype)
    m = a + out.unflatten(2, a.shape[2:])
    if weight_proj is None:
        return m
    assert residual is not None  # given together
    return residual + F.conv2d(m, weight_proj, bias_proj)
