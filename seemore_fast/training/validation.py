"""Validation during training: Y-PSNR and SSIM on folders of images."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import ConfigError, ImageError, PairError
from ..evaluation import psnr_y, ssim_y
from ..evaluation.pairs import find_pairs
from ..io.atomic import replacing
from ..network.model import SeemoRe
from ..upscale import Upscaler
from .distributed import World


class Validation:
    """Data sets as `find_pairs` reads them, shared out among the processes.

    All images are read at the start, so that a run does not fail on one after hours; ConfigError names unusable ones.
    """

    def __init__(self, folders: dict[str, str], scale: int, world: World, lr_folders: dict[str, str] | None = None):
        self.scale, self.world = scale, world
        self.sets = {}
        for name, folder in folders.items():
            try:
                lr = (lr_folders or {}).get(name)
                pairs = find_pairs(Path(folder), scale, Path(lr) if lr else None)[world.rank :: world.size]
                self.sets[name] = [(pair.name, *pair.read()) for pair in pairs]
            except (PairError, ImageError) as error:
                raise ConfigError(f"validation.data.{name}: {error}") from None

    def measure(
        self,
        model: SeemoRe,
        samples: int = 0,
        folder: Path | None = None,
        report: Callable[[str], None] = print,
        must_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, tuple[float, float]] | None:
        """Return the mean Y-PSNR and SSIM of each set; write the first `samples` pictures of each into `folder`.

        Failures to write are reported. Returns None if one of the processes must stop before the end.
        """
        if not self.sets:
            return {}
        upscaler, results = Upscaler(model, device=str(self.world.device)), {}
        for name, images in self.sets.items():
            sums = torch.zeros(4, dtype=torch.float64)
            for i, (picture_name, lr, hr) in enumerate(images):
                if must_stop():
                    sums[3] = 1
                    break
                picture = np.asarray(upscaler(lr))
                if folder and i * self.world.size + self.world.rank < samples:
                    _write_sample(picture, folder / name / f"{picture_name}.png", report)
                measured = [psnr_y(picture, hr, crop=self.scale), ssim_y(picture, hr, crop=self.scale), 1, 0]
                sums += torch.tensor(measured, dtype=torch.float64)
            psnr, ssim, count, stopped = self.world.sum(sums.to(self.world.device)).tolist()
            if stopped:
                return None
            results[name] = psnr / count, ssim / count
        return results


def _write_sample(picture: np.ndarray, file: Path, report: Callable[[str], None]):
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            Image.fromarray(picture).save(temporary)
    except OSError as error:
        report(f"{file} cannot be written: {error.strerror or error}")
