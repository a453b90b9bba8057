"""Quality of an upscaler on data sets, image by image."""

import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from .metrics import psnr_y, ssim_y
from .pairs import Pair, over_pairs


@dataclass(frozen=True)
class Result:
    """Y-PSNR in dB, SSIM and seconds of one image, or the error that prevented measuring it."""

    data: str
    name: str
    psnr: float = float("nan")
    ssim: float = float("nan")
    seconds: float = float("nan")
    error: str = ""


def evaluate(upscale: Callable[[np.ndarray], Any], data: str, pairs: list[Pair]) -> Iterator[Result]:
    """Yield the result of each pair, in order. As is customary, `scale` pixels at every border are not measured."""

    def measure(pair: Pair, lr: np.ndarray, hr: np.ndarray) -> Result:
        begin = time.perf_counter()
        image = upscale(lr)
        seconds = time.perf_counter() - begin
        return Result(data, pair.name, psnr_y(image, hr, pair.scale), ssim_y(image, hr, pair.scale), seconds)

    for pair, result in over_pairs(pairs, measure):
        yield Result(data, pair.name, error=result) if isinstance(result, str) else result


def mean(results: list[Result]) -> tuple[float, float, float]:
    """Return the means of PSNR, SSIM and seconds over the images without an error."""
    values = [(result.psnr, result.ssim, result.seconds) for result in results if not result.error]
    psnr, ssim, seconds = np.mean(values or [[np.nan] * 3], axis=0).tolist()
    return psnr, ssim, seconds


class Rows:
    """A CSV file with a row per image, flushed as soon as it is measured. The first row creates the file."""

    def __init__(self, path: Path):
        self.path = path
        self.file: TextIO | None = None

    def add(self, r: Result):
        if self.file is None:
            self.file = self.path.open("w", newline="", encoding="utf-8", errors="surrogateescape")
            csv.writer(self.file).writerow(["data", "image", "psnr_y", "ssim_y", "seconds", "error"])
        row = [r.data, r.name, f"{r.psnr:.4f}", f"{r.ssim:.6f}", f"{r.seconds:.4f}", r.error]
        csv.writer(self.file).writerow(row)
        self.file.flush()

    def close(self):
        if self.file is not None:
            self.file.close()
