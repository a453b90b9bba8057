"""Choices of experts by group, and their trend with depth (the paper's claim: deeper groups prefer lower ranks)."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..evaluation.pairs import Pair, over_pairs
from ..network.inspection import expert_usage
from ..network.model import SeemoRe


class Choice(NamedTuple):
    """Experts chosen for one image: usage int64 (groups, experts), or the error that prevented it."""

    data: str
    name: str
    usage: Tensor | None
    error: str = ""


def usage_by_set(choices: list[Choice]) -> dict[str, Tensor]:
    """Return the share of each expert in the choices of a data set, float64 (groups, experts), by data set."""
    sums = {}
    for choice in choices:
        if choice.usage is not None:
            sums[choice.data] = sums.get(choice.data, 0) + choice.usage
    return {name: usage.double() / usage.sum(dim=1, keepdim=True) for name, usage in sums.items()}


def mean_rank(share: Tensor, ranks: list[int]) -> Tensor:
    """Return the mean rank of the experts that each group chose, (groups,), of shares (groups, experts)."""
    return share @ torch.tensor(ranks, dtype=share.dtype)


def trend(share: Tensor, ranks: list[int]) -> float:
    """Return Pearson's correlation of a group's depth with its mean rank: below 0, deeper groups prefer lower ranks.

    NaN for a single group, or equal ranks.
    """
    rank = mean_rank(share, ranks)
    depth = torch.arange(len(rank), dtype=rank.dtype)
    return torch.corrcoef(torch.stack([depth, rank]))[0, 1].item() if len(rank) > 1 else float("nan")


def write_csv(path: Path, choices: list[Choice], ranks: list[int]):
    """Write a row per image and group with the count of each expert."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["data", "image", "group", *(f"rank_{rank}" for rank in ranks)])
        for choice in choices:
            for i, row in enumerate([] if choice.usage is None else choice.usage.tolist(), start=1):
                writer.writerow([choice.data, choice.name, i, *row])


def choices_of(model: SeemoRe, data: str, pairs: list[Pair]) -> Iterator[Choice]:
    """Yield the model's choices for the LR image of each pair, in order."""
    for pair, usage in over_pairs(pairs, lambda pair, lr, hr: expert_usage(model, as_batch(lr))):
        yield Choice(data, pair.name, None, usage) if isinstance(usage, str) else Choice(data, pair.name, usage)


def as_batch(image: np.ndarray) -> Tensor:
    """Return float32 (1, 3, H, W) in [0, 1] of a uint8 image (H, W, 3) or (H, W)."""
    planes = torch.tensor(image, dtype=torch.float32) / 255
    return (planes if planes.dim() == 3 else planes[:, :, None].expand(-1, -1, 3)).permute(2, 0, 1)[None].contiguous()
