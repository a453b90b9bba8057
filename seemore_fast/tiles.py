"""Independent tiles, for comparison with tools that cut images: as good as tiles can be, and still not the whole image.

Each tile sees as far around itself as the network does within a group, begins where the small map of `calibrate` has a
pixel, and is blended with its neighbours over a few pixels. All of them take the experts that the mean over a first
pass asks for, in which every tile chose for itself. What a tile cannot know is left: the exact means, and the small map
beyond what it sees.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise, product

import torch
from torch import Tensor

from .network.streaming import END, Pieces, Routes, spread

FEATHER = 8  # pixels on both sides of an edge
LEAST_TILE = 2 * FEATHER  # of less, more than two would meet in a pixel


def radius(model) -> int:
    """Return how far the network looks around a pixel but for its pools, in pixels: 57 for T, 75 for B, 147 for L."""
    half = model.config["global_kernel_size"] // 2
    return 1 + model.config["num_layers"] * (4 + half) + END


def tiled(
    model,
    size: tuple[int, int],
    tile: int,
    read: Callable[[int, int, int, int], Tensor],
    write: Callable[[int, Tensor], None],
    progress: Callable[[float], None] = lambda share: None,
):
    """Compute model(image) in tiles of `tile` pixels, 16 at least, rounded up to a multiple of 4^recursive.

    size        (H, W) of the image
    read        gives lines [top, bottom) and columns [left, right), (1, in_chans, ., .), float32 on the model's device
    write       takes the result's lines from a line on, (1, in_chans, lines, scale * W)
    progress    is told the share of the work that is done
    """
    pieces, unit = Pieces(model), model.min_size
    tile = -(-max(tile, LEAST_TILE) // unit) * unit
    halo = -(-(radius(model) + FEATHER) // unit) * unit
    rows, columns = (_cuts(side, tile, unit) for side in size)
    parts = len(rows) * len(columns)
    means = 0
    for done, ((top, bottom), (left, right)) in enumerate(product(rows, columns)):
        window = _grown(top, bottom, halo, size[0]), _grown(left, right, halo, size[1])
        inner = _inside((top, bottom), window[0]), _inside((left, right), window[1])
        means = means + _run(pieces, read(*window[0], *window[1]), inner)[2]
        progress((done + 1) / parts / 2)
    experts = [pieces.choose(group, mean) for group, mean in enumerate(means / (size[0] * size[1]))]
    for top, lines in _blended(pieces, experts, size, (rows, columns), halo, read):
        write(top * model.scale, lines)
        progress(0.5 + (top + lines.shape[2] / model.scale) / size[0] / 2)


def _run(pieces: Pieces, x: Tensor, inner: tuple[slice, slice], experts: list | None = None) -> tuple[Tensor, ...]:
    """Return a tile's last and first features, and what each group's router sums up over its inside, (groups, 1, C)."""
    f = pieces.first(x)
    y, sums, routes = f.to(pieces.dtype), [], Routes()
    for group in range(len(pieces.groups)):
        a, k = pieces.widen(group, y)
        sums.append(a[:, :, inner[0], inner[1]].sum((2, 3), dtype=torch.float64))
        mean = a.mean((2, 3), dtype=torch.float32)
        pieces.route(group, mean, pieces.aggregate(group, k), routes)
        chosen = experts[group] if experts else routes.experts[group]
        k = k + spread(routes.map, k.shape[2:], 0, k.shape[2])
        y = pieces.finish(group, y, a, k, chosen)
    return y, f, torch.stack(sums)


def _blended(pieces, experts, size, cuts, halo, read) -> Iterator[tuple[int, Tensor]]:
    """Yield the lines of LR that a row of tiles completes: from which one, and the result, (1, in_chans, ., .)."""
    (rows, columns), (height, width) = cuts, size
    scale, start, kept = pieces.model.scale, 0, None
    for top, bottom in rows:
        outer = _grown(top, bottom, FEATHER, height)
        total = None
        for left, right in columns:
            window = _grown(top, bottom, halo, height), _grown(left, right, halo, width)
            x = read(*window[0], *window[1])
            inside = slice(0, x.shape[2]), slice(0, x.shape[3])
            y = pieces.last(*_run(pieces, x, inside, experts)[:2])
            across = _grown(left, right, FEATHER, width)
            y = y[:, :, _scaled(_inside(outer, window[0]), scale), _scaled(_inside(across, window[1]), scale)]
            if total is None:
                total = y.new_zeros(1, y.shape[1], y.shape[2], width * scale)
            down = _ramp(outer, (top, bottom), height, scale, y)[:, None]
            total[:, :, :, _scaled(slice(*across), scale)] += y * down * _ramp(across, (left, right), width, scale, y)
        if kept is not None:
            total[:, :, : kept.shape[2]] += kept
        done = (bottom if bottom == height else outer[1] - 2 * FEATHER) - start
        kept = total[:, :, done * scale :]
        yield start, total[:, :, : done * scale]
        start += done


def _cuts(side: int, tile: int, unit: int) -> list[tuple[int, int]]:
    """Return [begin, end) of each tile; a last one of less than `unit` pixels belongs to the one before."""
    begins = [b for b in range(0, side, tile) if b == 0 or side - b >= max(unit, LEAST_TILE)]
    return list(pairwise([*begins, side]))


def _grown(begin: int, end: int, by: int, side: int) -> tuple[int, int]:
    return max(begin - by, 0), min(end + by, side)


def _inside(part: tuple[int, int], window: tuple[int, int]) -> slice:
    return slice(part[0] - window[0], part[1] - window[0])


def _scaled(part: slice, scale: int) -> slice:
    return slice(part.start * scale, part.stop * scale)


def _ramp(outer: tuple[int, int], edges: tuple[int, int], side: int, scale: int, like: Tensor) -> Tensor:
    """Return a tile's share of the result along one axis: 1 inside, falling to 0 across edges to other tiles."""
    count = 2 * FEATHER * scale
    rise = (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) / count
    share = like.new_ones((outer[1] - outer[0]) * scale)
    if edges[0] > 0:
        share[:count] *= rise
    if edges[1] < side:
        share[-count:] *= rise.flip(0)
    return share
