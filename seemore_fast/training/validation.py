"""Quality of a network on folders of images, and which experts it chooses."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..evaluation import psnr_y, ssim_y
from ..resize import bicubic_resize
from ..upscale import Upscaler
from ..upscale.images import read_image
from .group import Group
from .images import list_images


class Validation:
    """HR images of some folders, with LR made of them once, shared out among the processes."""

    def __init__(self, folders: dict[str, str], scale: int, group: Group):
        self.scale, self.group = scale, group
        self.sets = {name: list_images(Path(folder), f"validation.data.{name}") for name, folder in folders.items()}
        self._pairs: dict[Path, tuple[np.ndarray, np.ndarray]] = {}

    def pair(self, file: Path) -> tuple[np.ndarray, np.ndarray]:
        """Return LR and HR, uint8 (H, W, 3), or (H, W) of a grey image, whose values are its luma."""
        if file not in self._pairs:
            image = read_image(file).image
            hr = np.asarray(image.convert("L" if image.mode in ("L", "LA") else "RGB"))
            height, width = (n // self.scale * self.scale for n in hr.shape[:2])
            hr = np.ascontiguousarray(hr[:height, :width])
            self._pairs[file] = bicubic_resize(hr, 1 / self.scale), hr
        return self._pairs[file]

    def measure(self, model: nn.Module, samples: int = 0, folder: Path | None = None) -> dict[str, tuple[float, float]]:
        """Return the mean Y-PSNR and SSIM of each set; write the first `samples` pictures of each into `folder`."""
        upscaler, results = Upscaler(model, device=str(self.group.device)), {}
        for name, files in self.sets.items():
            sums = torch.zeros(3, dtype=torch.float64)
            for i in range(self.group.rank, len(files), self.group.world):
                lr, hr = self.pair(files[i])
                picture = upscaler(lr)
                if folder and i < samples:
                    (folder / name).mkdir(parents=True, exist_ok=True)
                    Image.fromarray(picture).save(folder / name / f"{files[i].stem}.png")
                measured = [psnr_y(picture, hr, crop=self.scale), ssim_y(picture, hr, crop=self.scale), 1]
                sums += torch.tensor(measured, dtype=torch.float64)
            psnr, ssim, count = self.group.total(sums.to(self.group.device)).tolist()
            results[name] = psnr / count, ssim / count
        return results


@torch.no_grad()
def expert_usage(model: nn.Module, x: Tensor) -> Tensor:
    """Return how often each group chooses each expert for the images x, int64 (groups, experts)."""
    chosen = []

    def count(gate: nn.Module, inputs: tuple, outputs: tuple[Tensor, Tensor]):
        chosen.append(torch.bincount(outputs[0].flatten(), minlength=gate.body[2].out_features))

    gates = [group.local_block.block.moe_layer.gate for group in model.body]
    handles = [gate.register_forward_hook(count) for gate in gates]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(chosen)
