"""Which experts each group chooses: does a deeper group prefer lower ranks (the paper's question)?"""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..evaluation.pairs import Pair


@contextmanager
def listening(modules: list[nn.Module], hear) -> Iterator[None]:
    """Call `hear(module, inputs, output)` after each of the modules; a fused network calls them for as long."""
    handles = [module.register_forward_hook(hear) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def expert_usage(model: nn.Module, x: Tensor) -> Tensor:
    """Return how often each group chooses each expert for the images x, int64 (groups, experts)."""
    chosen = []

    def count(gate: nn.Module, inputs: tuple, outputs: tuple[Tensor, Tensor]):
        chosen.append(torch.bincount(outputs[0].flatten(), minlength=gate.body[2].out_features))

    with listening([group.local_block.block.moe_layer.gate for group in model.body], count):
        model(x)
    return torch.stack(chosen)


class Choice(NamedTuple):
    """What was chosen for one image: usage int64 (groups, experts); or why it was not looked at."""

    data: str
    name: str
    usage: Tensor | None
    error: str = ""


def usage_by_set(choices: list[Choice]) -> dict[str, Tensor]:
    """Return for each data set the share of its images' choices that each expert has, float64 (groups, experts)."""
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

    NaN where there is one group, or where all prefer the same.
    """
    rank = mean_rank(share, ranks)
    depth = torch.arange(len(rank), dtype=rank.dtype)
    return torch.corrcoef(torch.stack([depth, rank]))[0, 1].item() if len(rank) > 1 else float("nan")


def write_csv(path: Path, choices: list[Choice], ranks: list[int]):
    """Write a row for each image and group: how often each expert was chosen (once or never for one image)."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["data", "image", "group", *(f"rank_{rank}" for rank in ranks)])
        for choice in choices:
            for i, row in enumerate([] if choice.usage is None else choice.usage.tolist(), start=1):
                writer.writerow([choice.data, choice.name, i, *row])


def choices_of(model: nn.Module, data: str, pairs: list[Pair]) -> Iterator[Choice]:
    """Yield what the model chooses for the LR image of each pair, in order."""
    from ..errors import ImageError, first_line

    for pair in pairs:
        try:
            lr, _ = pair.read()
        except ImageError as error:
            yield Choice(data, pair.name, None, str(error))
            continue
        try:
            usage, error = expert_usage(model, as_batch(lr)), ""
        except (MemoryError, RuntimeError) as failure:  # too large: this one's
            usage, error = None, f"{pair.hr}: {first_line(failure)}"
        yield Choice(data, pair.name, usage, error)


def as_batch(image) -> Tensor:
    """Return float32 (1, 3, H, W) in [0, 1] of a uint8 image (H, W, 3) or (H, W)."""
    planes = torch.tensor(image, dtype=torch.float32) / 255
    return (planes if planes.dim() == 3 else planes[:, :, None].expand(-1, -1, 3)).permute(2, 0, 1)[None].contiguous()
