"""Train a SeemoRe-T on a folder of photos in about an hour on two CPU cores.

    python -m seemore_fast.training --data DIR --out seemore_t_x2.safetensors --scale 2 --minutes 60

L1 loss and Adam on random crops of HR images and of their MATLAB-bicubic LR images. The learning rate follows the
share of the time that has passed, so the schedule ends when the time does, whatever the machine. What is written is
the exponential moving average of the weights.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..checkpoint import save_model
from ..presets import seemore_t
from ..resize import bicubic_resize

WARM_UP_STEPS = 200
SAVE_EVERY = 500


def load_pairs(folder: Path, scale: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (LR, HR) uint8 RGB arrays of every image under `folder`; LR is made of the whole image."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".png", ".webp", ".jpg", ".jpeg"})
    if not files:
        raise SystemExit(f"{folder} holds no PNG, WebP or JPEG image")
    pairs = []
    for file in tqdm(files, desc="low resolution images"):
        hr = np.asarray(Image.open(file).convert("RGB"))
        height, width = (size // scale * scale for size in hr.shape[:2])
        hr = hr[:height, :width]
        pairs.append((bicubic_resize(hr, 1 / scale), hr))
    return pairs


def random_batch(pairs, batch: int, patch: int, scale: int, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """Return LR (batch, 3, patch, patch) and its HR, float32 in [0, 1]: random places, flips and quarter turns.

    Images are drawn in proportion to their size, so that every pixel is as likely as any other.
    """
    sizes = np.array([lr.shape[0] * lr.shape[1] for lr, _ in pairs], dtype=np.float64)
    crops = []
    for index in rng.choice(len(pairs), size=batch, p=sizes / sizes.sum()):
        lr, hr = pairs[index]
        y, x = (int(rng.integers(size - patch + 1)) for size in lr.shape[:2])
        turns, flip = int(rng.integers(4)), 1 - 2 * int(rng.integers(2))
        for image, s in ((lr, 1), (hr, scale)):
            crop = image[s * y : s * (y + patch), s * x : s * (x + patch)]
            crops.append(torch.from_numpy(np.rot90(crop, turns)[::flip].copy()))
    to_batch = [torch.stack(crops[i::2]).permute(0, 3, 1, 2).float() / 255 for i in (0, 1)]
    return to_batch[0], to_batch[1]


@torch.no_grad()
def start_from_interpolation(model: nn.Module):
    """Set the first and the last layer so that the untrained network interpolates bilinearly.

    The first channels of conv_1 pass the image through, conv_2 (which closes the body) starts at zero, and the
    upsampler reads bilinear weights off the passed channels. Saves the first thousand steps.
    """
    scale, channels = model.scale, model.in_chans
    for parameter in (model.conv_2.weight, model.conv_2.bias, model.upsampler[0].bias):
        parameter.zero_()
    model.conv_1.weight[:channels] = 0
    model.conv_1.bias[:channels] = 0
    model.upsampler[0].weight *= 0.1
    impulses = torch.eye(9).view(9, 1, 3, 3)
    blown_up = F.interpolate(impulses, scale_factor=scale, mode="bilinear", align_corners=False)
    taps = blown_up[:, 0, scale : 2 * scale, scale : 2 * scale].reshape(9, scale**2).t().reshape(-1, 3, 3)
    for channel in range(channels):
        model.conv_1.weight[channel, channel, 1, 1] = 1
        rows = slice(channel * scale**2, (channel + 1) * scale**2)
        model.upsampler[0].weight[rows, :channels] = 0
        model.upsampler[0].weight[rows, channel] = taps


def train(args: argparse.Namespace):
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    pairs = load_pairs(args.data, args.scale)
    model = seemore_t(args.scale).train()
    start_from_interpolation(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.99))

    start, step, smooth_loss = time.monotonic(), 0, None
    progress = tqdm(total=100, desc="training", unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
    while (done := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        step += 1
        rate = args.lr * min(1, step / WARM_UP_STEPS) * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        lr, hr = random_batch(pairs, args.batch, args.patch, args.scale, rng)
        loss = F.l1_loss(model(lr), hr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        smooth_loss = loss.item() if smooth_loss is None else 0.99 * smooth_loss + 0.01 * loss.item()
        progress.update(round(100 * done, 2) - progress.n)
        progress.set_postfix(step=step, loss=f"{smooth_loss:.5f}", lr=f"{rate:.1e}")
        if step % SAVE_EVERY == 0:
            save_model(average.module, args.out, step=step)
    save_model(average.module, args.out, step=step)
    progress.close()
    print(f"{step} steps of {args.batch} patches of {args.patch}x{args.patch}, weights in {args.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m seemore_fast.training", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of HR images, read with its subfolders")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--scale", type=int, default=2, choices=(2, 3, 4))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--patch", type=int, default=48, help="side of an LR patch in pixels")
    parser.add_argument("--lr", type=float, default=1e-3, help="the highest learning rate")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the average of the weights")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())
