"""Pictures of the analysis, drawn by matplotlib (pip install 'seemore-fast[analyze]')."""

from pathlib import Path

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..io.atomic import replacing
from .features import Maps


def save(figure: Figure, path: Path):
    """Write a figure atomically."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, metadata={"Software": None} if path.suffix == ".png" else None)


def heat_map(shares: dict[str, Tensor], ranks: list[int], title: str) -> Figure:
    """Draw the share of each expert by group, one panel per data set."""
    groups = len(next(iter(shares.values())))
    figure = Figure(figsize=(1.4 + 2.1 * len(shares), 1.6 + 0.36 * groups), layout="constrained")
    axes = figure.subplots(1, len(shares), sharey=True, squeeze=False)[0]
    images = []
    for axis, (name, share) in zip(axes, shares.items(), strict=True):
        images.append(axis.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto"))
        for (i, j), value in np.ndenumerate(share.numpy()):
            axis.text(j, i, f"{value:.0%}", ha="center", va="center", color="white" if value > 0.6 else "black")
        axis.set(title=name, xlabel="rank of the expert", xticks=range(len(ranks)), xticklabels=ranks)
    axes[0].set(ylabel="group, from the first", yticks=range(groups), yticklabels=range(1, groups + 1))
    figure.colorbar(images[-1], ax=list(axes), label="share of the images")
    figure.suptitle(title)
    return figure


def grid(maps: dict[str, Maps], title: str) -> Figure:
    """Draw maps before and after each expert, one column per group, each with its own scale."""
    rows = [(f"{when}\n{name}", name, i) for name in maps for i, when in enumerate(("before", "after"))]
    groups = len(next(iter(maps.values())).before)
    height, width = next(iter(maps.values())).before[0].shape
    figure = Figure(figsize=(1.9 * groups + 0.6, 1.9 * len(rows) * height / width + 0.9), layout="constrained")
    axes = figure.subplots(len(rows), groups, squeeze=False)
    for row, (label, name, i) in zip(axes, rows, strict=True):
        row[0].set_ylabel(label)
        for group, axis in enumerate(row):
            drawn = maps[name][i][group].numpy()
            low, high = np.percentile(drawn, (0.5, 99.5))  # outliers at the borders would hide the rest
            axis.imshow(drawn, cmap="magma", vmin=low, vmax=high)
            axis.set(xticks=[], yticks=[])
    for group, axis in enumerate(axes[0], start=1):
        axis.set_title(f"group {group}")
    figure.suptitle(title)
    return figure


def field_picture(field: Tensor, sides: dict[float, int], title: str) -> Figure:
    """Draw a receptive field, on a logarithmic scale of five decades below its largest value."""
    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    axis = figure.subplots()
    relative = (field / field.max()).numpy()
    drawn = axis.imshow(relative.clip(1e-5), cmap="magma", norm=LogNorm(1e-5, 1))
    height, width = relative.shape
    for (share, side), line in zip(sides.items(), ("-", "--", ":"), strict=True):
        corner = (width - 1) / 2 - side / 2, (height - 1) / 2 - side / 2
        label = f"{share:.0%} of it: {side}x{side}"
        axis.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="white", linestyle=line, label=label))
    axis.legend(loc="upper right", facecolor="#444", labelcolor="white", fontsize=8)
    axis.set(title=title, xlabel="column of the input", ylabel="row of the input")
    figure.colorbar(drawn, label="gradient of the middle pixel, relative")
    return figure
