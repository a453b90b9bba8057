"""Patches of image pairs, cut, flipped and turned where the pixels lie: in a memory-mapped file or on the GPU.

The patches of a step depend on the seed and the step alone, not on the number of processes or on where a run stopped.
"""

import functools
import signal
from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from .dataset import PairDataset


class Patches:
    """Patch number n = 0, 1, ...: a place and one of eight orientations that follow from the seed and n."""

    def __init__(
        self, pairs: PairDataset, patch: int, seed: int, augment: bool = True, device: str | torch.device = "cpu"
    ):
        self.pairs, self.patch, self.seed, self.augment = pairs, patch, seed, augment
        places = (pairs.sizes - patch + 1).prod(axis=1)
        self._ends = np.cumsum(places)  # every place of every image is equally likely
        self.device = torch.device(device)
        self._side = torch.arange(pairs.scale * patch, device=self.device)
        self._colour = torch.arange(3, device=self.device)[:, None, None]

    @functools.cached_property
    def pixels(self) -> Tensor:
        """Bytes of all images, on the device that cuts them."""
        return torch.from_numpy(self.pairs.pixels).to(self.device)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "pixels"}

    def draw(self, first: int, count: int) -> np.ndarray:
        """Return (count, 4) int64: image, top, left and orientation of the patches from number `first` on."""
        drawn = np.empty((count, 4), np.int64)
        for row, number in enumerate(range(first, first + count)):
            stream = np.random.Philox(key=self.seed, counter=[0, 0, 0, number])  # one for each patch
            place, orientation = np.random.Generator(stream).random(2)
            place = int(place * self._ends[-1])
            image = int(np.searchsorted(self._ends, place, side="right"))
            place -= int(self._ends[image - 1]) if image else 0
            columns = int(self.pairs.sizes[image, 1]) - self.patch + 1
            drawn[row] = image, place // columns, place % columns, int(8 * orientation) if self.augment else 0
        return drawn

    def names(self, first: int, count: int) -> list[str]:
        """Return the files that the patches are cut from."""
        return [self.pairs.names[image] for image in self.draw(first, count)[:, 0]]

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return patches as uint8: LR (count, 3, patch, patch) and HR, `scale` times as large."""
        drawn = self.draw(first, count)
        walks = torch.from_numpy(np.stack([self._walks(drawn, 0, 1), self._walks(drawn, 1, self.pairs.scale)]))
        if self.device.type == "cuda":  # of pageable memory, the host would wait for a copy
            walks = walks.pin_memory().to(self.device, non_blocking=True)
        lr, hr = walks
        return self._cut(lr, self.patch), self._cut(hr, self.pairs.scale * self.patch)

    def _walks(self, drawn: np.ndarray, resolution: int, scale: int) -> np.ndarray:
        """Return (3, count): first address of each patch of LR (0) or HR (1), and distances of its rows and columns.

        A pixel's address is linear in its row and column, however turned.
        """
        image, top, left, orientation = drawn.T
        row_stride, last = 3 * scale * self.pairs.sizes[image, 1], scale * self.patch - 1
        begin = self.pairs.offsets[image, resolution] + top * scale * row_stride + left * scale * 3
        along_rows, along_columns = row_stride.copy(), np.full_like(row_stride, 3)
        for bit, along in ((1, along_rows), (2, along_columns)):  # upside down, left to right
            flipped = orientation & bit != 0
            begin[flipped] += last * along[flipped]
            along[flipped] *= -1
        turned = orientation & 4 != 0
        along_rows[turned], along_columns[turned] = along_columns[turned], along_rows[turned]
        return np.stack([begin, along_rows, along_columns])

    def _cut(self, walks: Tensor, size: int) -> Tensor:
        """Return patches (count, 3, size, size), with few launches."""
        begin, along_rows, along_columns = walks[:, :, None, None, None]
        side = self._side[:size]
        rows = torch.addcmul(self._colour, along_rows, side[:, None])
        return self.pixels[rows + torch.addcmul(begin, along_columns, side)]


class Batches(torch.utils.data.Dataset):
    """This process's share of the batch of each step, by step."""

    def __init__(self, patches: Patches, batch: int, rank: int = 0, world_size: int = 1):
        self.patches, self.batch, self.share, self.rank = patches, batch, batch // world_size, rank

    def first(self, step: int) -> int:
        """Return the number of the first patch of this process in a step."""
        return step * self.batch + self.rank * self.share

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        return self.patches.batch(self.first(step), self.share)

    def names(self, step: int) -> list[str]:
        return self.patches.names(self.first(step), self.share)


def load_batches(batches: Batches, begin: int, end: int, workers: int, pin: bool) -> Generator[tuple[Tensor, Tensor]]:
    """Yield LR and HR of the steps from `begin` to `end`, in order, cut by `workers` processes.

    Without workers, or with images on a GPU, which forked processes cannot use, this process cuts them.
    """
    if workers == 0 or batches.patches.device.type != "cpu":
        for step in range(begin, end):
            yield batches[step]
        return
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(begin, end), num_workers=workers, pin_memory=pin, prefetch_factor=4,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # not the default one, whose state is in checkpoints
    )  # fmt: skip
    yield from loader  # the workers end with this iterator


def _ignore_signals(worker: int):
    """Keep a worker alive when all processes get SIGINT or SIGTERM: the training process saves first, then ends it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
