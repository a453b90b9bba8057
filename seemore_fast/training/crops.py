"""Patches of image pairs, cut, flipped and turned where the pixels lie: in a memory-mapped file or on the GPU.

Which patches a step sees depends on the seed and on the step alone: not on the number of processes, nor on where a run
was stopped.
"""

import functools
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .images import Images


class Crops:
    """Patch number n, n = 0, 1, ...: a place, and one of eight orientations, that follow from the seed and n."""

    def __init__(self, images: Images, patch: int, seed: int, augment: bool = True, device: str | torch.device = "cpu"):
        self.images, self.patch, self.seed, self.augment = images, patch, seed, augment
        places = (images.sizes - patch + 1).prod(axis=1)
        self._ends = np.cumsum(places)  # every place of every image is as likely as any other
        self.device = torch.device(device)

    @functools.cached_property
    def pixels(self) -> Tensor:
        """All images' bytes, where they are cut."""
        return torch.from_numpy(self.images.pixels).to(self.device)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "pixels"}

    def draw(self, first: int, count: int) -> np.ndarray:
        """Return (count, 4) int64: image, top, left and orientation of the patches from `first` on."""
        drawn = np.empty((count, 4), np.int64)
        for row, number in enumerate(range(first, first + count)):
            stream = np.random.Philox(key=self.seed, counter=[0, 0, 0, number])  # one for each patch
            place, orientation = np.random.Generator(stream).random(2)
            place = int(place * self._ends[-1])
            image = int(np.searchsorted(self._ends, place, side="right"))
            place -= int(self._ends[image - 1]) if image else 0
            columns = int(self.images.sizes[image, 1]) - self.patch + 1
            drawn[row] = image, place // columns, place % columns, int(8 * orientation) if self.augment else 0
        return drawn

    def names(self, first: int, count: int) -> list[str]:
        """Return the files that patches are of."""
        return [self.images.names[image] for image in self.draw(first, count)[:, 0]]

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return the patches from `first` on: LR (count, 3, patch, patch) and HR, `scale` times as large, uint8."""
        drawn = self.draw(first, count)
        return self._cut(drawn, 0, 1), self._cut(drawn, 1, self.images.scale)

    def _cut(self, drawn: np.ndarray, which: int, scale: int) -> Tensor:
        """Return patches of LR or HR: a pixel's address is linear in its row and column, whatever the orientation."""
        image, top, left, orientation = drawn.T
        line, last = 3 * scale * self.images.sizes[image, 1], scale * self.patch - 1
        begin = self.images.offsets[image, which] + top * scale * line + left * scale * 3
        along_rows, along_columns = line.copy(), np.full_like(line, 3)
        for bit, along in ((1, along_rows), (2, along_columns)):  # upside down, left to right
            flipped = orientation & bit != 0
            begin[flipped] += last * along[flipped]
            along[flipped] *= -1
        turned = orientation & 4 != 0
        along_rows[turned], along_columns[turned] = along_columns[turned], along_rows[turned]
        told = torch.from_numpy(np.stack([begin, along_rows, along_columns])).to(self.device, non_blocking=True)
        begin, along_rows, along_columns = told[:, :, None, None, None]
        side = torch.arange(last + 1, device=self.device)
        colour = torch.arange(3, device=self.device)[:, None, None]
        return self.pixels[begin + colour + along_rows * side[:, None] + along_columns * side]


class Steps(torch.utils.data.Dataset):
    """A process's share of the batches of all steps, as a map that workers read."""

    def __init__(self, crops: Crops, batch: int, rank: int = 0, world: int = 1):
        self.crops, self.batch, self.share, self.rank = crops, batch, batch // world, rank

    def first(self, step: int) -> int:
        """Return the number of the first patch of this process in a step."""
        return step * self.batch + self.rank * self.share

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        return self.crops.batch(self.first(step), self.share)

    def names(self, step: int) -> list[str]:
        return self.crops.names(self.first(step), self.share)


def batches(steps: Steps, begin: int, end: int, workers: int, pin: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield LR and HR of the steps from `begin` to `end`, in order, cut by `workers` processes or by this one.

    By this one too where the images are on a GPU, which a forked process cannot use.
    """
    if workers == 0 or steps.crops.device.type != "cpu":
        for step in range(begin, end):
            yield steps[step]
        return
    loader = torch.utils.data.DataLoader(
        steps, batch_size=None, sampler=range(begin, end), num_workers=workers, pin_memory=pin, prefetch_factor=4,
        worker_init_fn=_leave_signals_to_the_first,
        generator=torch.Generator(),  # else it would draw from the one whose state is in checkpoints
    )  # fmt: skip
    yield from loader  # nobody else has that iterator: its workers end with this one


def _leave_signals_to_the_first(worker: int):
    """Have a worker outlive SIGINT and SIGTERM to all processes: the one that trains saves first, and then ends it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
