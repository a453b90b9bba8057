"""Demonstration: downscale a photo by 2, upscale it again, and compare with the original."""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..backends import backend_for_device
from ..evaluation import psnr_y
from ..io.atomic import replacing
from ..io.resize import bicubic_resize
from ..network.model import SeemoRe
from ..reference import SeemoRe as PlainSeemoRe
from ..upscale import Upscaler
from . import PHOTO

DETAIL = (110, 75, 260, 175)  # left, top, right, bottom in the photo: an eye
ZOOM = 3
CAPTION = 26
RUNS = 5


def main():
    parser = argparse.ArgumentParser(prog="python -m seemore_fast.demo", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo_output"), help="folder for the pictures")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)

    upscaler = Upscaler("seemore_t_x2", device="cpu")
    original = np.asarray(Image.open(PHOTO))
    small = bicubic_resize(original, 1 / upscaler.scale)
    pictures = {
        "nearest": small.repeat(2, axis=0).repeat(2, axis=1),
        "bicubic": bicubic_resize(small, upscaler.scale),
        "SeemoRe-T": upscaler(small),
    }
    quality = {name: psnr_y(picture, original, crop=upscaler.scale) for name, picture in pictures.items()}
    ours, plain = time_against_reference(upscaler.model, small)

    save(Image.fromarray(pictures["SeemoRe-T"]), output / "chelsea_x2.png")
    captions = {f"{name}  {quality[name]:.2f} dB": picture for name, picture in pictures.items()}
    save(side_by_side({**captions, "original": original}), output / "side_by_side.png")

    height, width = small.shape[:2]
    print(f"{width}x{height} photo upscaled to {2 * width}x{2 * height}")
    for name, value in quality.items():
        print(f"  {name:10s} {value:6.2f} dB")
    print(f"gain over bicubic: {quality['SeemoRe-T'] - quality['bicubic']:+.2f} dB (PSNR on Y)")
    print(
        f"time: {1000 * ours:.0f} ms, plain PyTorch reference {1000 * plain:.0f} ms: {plain / ours:.2f}x as fast "
        f"(backend {backend_for_device()}, {torch.get_num_threads()} threads, medians of {RUNS})"
    )
    print(f"wrote {output / 'side_by_side.png'} and {output / 'chelsea_x2.png'}")


@torch.inference_mode()
def time_against_reference(model: SeemoRe, image: np.ndarray) -> tuple[float, float]:
    """Return the median seconds of `model` and of the plain reference on an image, in alternating runs."""
    plain = PlainSeemoRe(**model.config).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    times = {model: [], plain: []}
    for _ in range(RUNS + 1):
        for network, seconds in times.items():
            start = time.perf_counter()
            network(x)
            seconds.append(time.perf_counter() - start)
    return tuple(statistics.median(seconds[1:]) for seconds in times.values())


def side_by_side(pictures: dict[str, np.ndarray]) -> Image.Image:
    """Return the detail of each picture, zoomed without smoothing, under its caption, two per row."""
    font = ImageFont.load_default(size=17)
    left, top, right, bottom = DETAIL
    width, height = ZOOM * (right - left), ZOOM * (bottom - top)
    page = Image.new("RGB", (2 * width, (height + CAPTION) * ((len(pictures) + 1) // 2)), "white")
    draw = ImageDraw.Draw(page)
    for i, (caption, picture) in enumerate(pictures.items()):
        x, y = i % 2 * width, i // 2 * (height + CAPTION)
        draw.text((x + 6, y + 2), caption, fill="black", font=font)
        detail = Image.fromarray(picture).crop(DETAIL).resize((width, height), Image.Resampling.NEAREST)
        page.paste(detail, (x, y + CAPTION))
    return page


def save(image: Image.Image, path: Path):
    with replacing(path) as temporary:
        image.save(temporary)


if __name__ == "__main__":
    main()
