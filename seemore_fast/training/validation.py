"""Quality of a network on folders of images."""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from ..errors import ImageError
from ..evaluation import psnr_y, ssim_y
from ..evaluation.pairs import PairError, find_pairs
from ..io.atomic import replacing
from ..upscale import Upscaler
from .config import ConfigError
from .group import Group


class Validation:
    """Data sets as `find_pairs` takes them, shared out among the processes.

    All are read at once, lest a run fails over one of them after hours: ConfigError names what cannot be used.
    """

    def __init__(self, folders: dict[str, str], scale: int, group: Group, lr_folders: dict[str, str] | None = None):
        self.scale, self.group = scale, group
        self.sets = {}
        for name, folder in folders.items():
            try:
                lr = (lr_folders or {}).get(name)
                pairs = find_pairs(Path(folder), scale, lr and Path(lr))[group.rank :: group.world]
                self.sets[name] = [(pair.name, *pair.read()) for pair in pairs]
            except (PairError, ImageError) as error:
                raise ConfigError(f"validation.data.{name}: {error}") from None

    def measure(
        self,
        model: nn.Module,
        samples: int = 0,
        folder: Path | None = None,
        say: Callable[[str], None] = print,
        must_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, tuple[float, float]] | None:
        """Return the mean Y-PSNR and SSIM of each set; write the first `samples` pictures of each into `folder`.

        Where the disk does not take them, `say` is told. None where one of the processes must stop before the end.
        """
        if not self.sets:
            return {}
        upscaler, results = Upscaler(model, device=str(self.group.device)), {}
        for name, images in self.sets.items():
            sums = torch.zeros(4, dtype=torch.float64)
            for i, (picture_name, lr, hr) in enumerate(images):
                if must_stop():
                    sums[3] = 1
                    break
                picture = upscaler(lr)
                if folder and i * self.group.world + self.group.rank < samples:
                    file = folder / name / f"{picture_name}.png"
                    try:
                        file.parent.mkdir(parents=True, exist_ok=True)
                        with replacing(file) as temporary:
                            Image.fromarray(picture).save(temporary)
                    except OSError as error:
                        say(f"{file} cannot be written: {error.strerror or error}")
                measured = [psnr_y(picture, hr, crop=self.scale), ssim_y(picture, hr, crop=self.scale), 1, 0]
                sums += torch.tensor(measured, dtype=torch.float64)
            psnr, ssim, count, stopped = self.group.total(sums.to(self.group.device)).tolist()
            if stopped:
                return None
            results[name] = psnr / count, ssim / count
        return results
