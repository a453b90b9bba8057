"""Operator `low_rank_experts`: MoRE's modulation by the chosen experts of each image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from .allocation import empty_image
from .checks import check_together
from .operator import Operator, Values

EXPERTS = {
    "weight_a": "R C", "bias_a": "R", "weight_k": "R C", "bias_k": "R", "weight_out": "C R", "bias_out": "E C",
}  # fmt: skip
PROJECTION = {"weight_proj": "C C 1 1 ?", "bias_proj": "C ? unread"}


def check_ranks(operator: str, ranks: Sequence[int], total: int, num_experts: int):
    """Raise ValueError unless `ranks` are those of `num_experts` experts with `total` packed rows."""
    whole = isinstance(ranks, Sequence) and all(type(rank) is int and rank > 0 for rank in ranks)
    if not whole or len(ranks) != num_experts or sum(ranks) != total:
        raise ValueError(
            f"{operator}: ranks are {ranks!r}, expected {num_experts} positive integers (the rows of bias_out) "
            f"that add up to {total} (the rows of weight_a)"
        )


def _validate(values: Values, sizes: dict[str, int]):
    check_ranks("low_rank_experts", values["ranks"], sizes["R"], sizes["E"])
    check_together("low_rank_experts", **{name: values[name] for name in (*PROJECTION, "residual")})


def _results(values: Values) -> tuple[Tensor]:
    a, residual = values["a"], values["residual"]
    dtype = torch.promote_types((a if residual is None else residual).dtype, values["weight_out"].dtype)
    return (empty_image(a, a.shape[1], dtype),)


# `expert_index` is not read on the host: it lives on the device. Kernels leave out an index that is no expert's; the
# reference has torch refuse it. Under autocast products are of autocast's dtype; a and the residual are added in their
# own, which is that of the result if it is the wider one.
low_rank_experts = Operator(
    reference.low_rank_experts,
    {
        "a": "B C H W", "k": "B C H W", "expert_index": "B T int64", "expert_weight": "B T mixed", **EXPERTS,
        **PROJECTION, "residual": "B C H W ?",
    },
    {"ranks": "int[]"},
    results=_results,
    autocast=(*EXPERTS, *PROJECTION),
    size=lambda values: max(values["a"].shape[1], *values["ranks"]),
    validate=_validate,
    outside={"residual": lambda dy: dy},
)  # fmt: skip
