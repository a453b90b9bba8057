"""Progress bars of the command line."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

PROGRESS_DELAY_S = 1.5  # after which an image gets a progress bar of its own


class ImageBars:
    """A progress bar over files, and below it one for an image that takes long."""

    def __init__(self):
        self.image = None
        self.last = self.begin = 0.0

    @contextmanager
    def over(self, total: int | None) -> Iterator[tqdm]:
        """Yield the bar over files."""
        with tqdm(total=total, unit="image", desc="upscaling") as files:
            try:
                yield files
            finally:
                self._close()

    def show(self, share: float):
        """Show the finished share of an image; a smaller one than before begins another image."""
        now = time.perf_counter()
        if share < self.last or not self.begin:
            self._close()
            self.begin = now
        self.last = share
        if self.image is None and now - self.begin > PROGRESS_DELAY_S and share < 1:
            self.image = tqdm(
                total=100, desc="this image", position=1, leave=False, bar_format="{l_bar}{bar}| {remaining}"
            )
        if self.image is not None:
            self.image.update(100 * share - self.image.n)
        if share >= 1:
            self._close()
            self.begin = self.last = 0.0

    def _close(self):
        if self.image is not None:
            self.image.close()
            self.image = None
