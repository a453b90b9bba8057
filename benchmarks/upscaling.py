"""Compare `upscale` with the network it runs: folders of small images, and a large image that is streamed.

    seemore-fast benchmark upscaling         (or: python benchmarks/upscaling.py)

T for scale 2, in turns. The network alone enlarges the folder's images as arrays, one after another; the others read
and write files. A large image is computed whole, and streamed (stream=True), to the same bits; on a CPU, some of its
features go through a file then. step_mb: by how much the resident memory grows meanwhile at most, the result in it. A
complete run writes upscaling.json.
"""

import argparse
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from seemore_fast.benchmarks import command, harness
from seemore_fast.demo import PHOTO
from seemore_fast.devices import find_device

COUNT, SIDE, LARGE = 200, 128, (6000, 4000)
QUICK = 6, 24, (64, 48)
TURNS = 3
LEAST, MOST = 0.95, 1.25  # of the network's speed in a folder; times the whole image's time when streamed
ALONE, WHOLE, STREAMED = (f"{harness.OURS} {how}" for how in ("network alone", "whole", "streamed"))


def crops(count: int, side: int) -> list[Image.Image]:
    """Return so many squares of a photo."""
    photo = Image.open(PHOTO).convert("RGB")
    places = [(37 * i % (photo.width - side + 1), 53 * i % (photo.height - side + 1)) for i in range(count)]
    return [photo.crop((x, y, x + side, y + side)) for x, y in places]


def folder_turns(upscaler, folder: Path, count: int, side: int) -> dict[str, Callable]:
    """Return what enlarges the same images alone, as PNG files and as JPEG files; the folder holds what they need."""
    from seemore_fast.upscale.batch import BatchOptions, upscale_files
    from seemore_fast.upscale.jobs import Jobs

    images = crops(count, side)

    def alone():
        for image in arrays:
            upscaler(image)

    def as_files(source: Path):
        target = folder / "out"
        failures = [o.error for o in upscale_files([upscaler], Jobs([source], f"{target}/"), BatchOptions()) if o.error]
        if failures or len(list(target.iterdir())) != count:
            raise SystemExit(f"not all of {source} came out: {failures[:1]}")
        shutil.rmtree(target)

    arrays, turns = [np.asarray(image) for image in images], {ALONE: alone}
    for name, ending in (("PNG", ".png"), ("JPEG", ".jpg")):
        source = folder / name
        source.mkdir()
        for i, image in enumerate(images):
            image.save(source / f"{i}{ending}", quality=95)
        turns[f"{harness.OURS} folder of {name}"] = partial(as_files, source)
    return turns


def large_turns(device: torch.device, size: tuple[int, int]) -> dict[str, Callable]:
    """Return what enlarges one image whole and streamed; the results were compared, and have to be the same."""
    from seemore_fast.upscale import Upscaler

    image = np.asarray(Image.open(PHOTO).convert("RGB").resize(size, Image.Resampling.BICUBIC))
    turns = {
        name: partial(Upscaler("seemore_t_x2", device=device, stream=stream), image)
        for name, stream in ((WHOLE, False), (STREAMED, True))
    }
    if device.type == "cpu" and not np.array_equal(turns[WHOLE](), turns[STREAMED]()):
        raise SystemExit("the streamed result is another than the whole image's")
    return turns


def main(arguments: list[str] | None = None, prog: str | None = None):
    from seemore_fast.upscale import Upscaler

    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="default: a GPU if there is one")
    parser.add_argument("--turns", type=int, default=TURNS, help="of each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few and small images, to see that it runs")
    parser.add_argument("--results", type=Path, help="folder to write to (default: only a run of full length writes)")
    options = parser.parse_args(arguments)
    if options.turns < 1:
        parser.error(f"--turns is {options.turns}, expected at least 1")
    try:
        device = find_device(options.device)
    except ValueError as error:
        parser.error(f"--{error}")
    count, side, size = QUICK if options.quick else (COUNT, SIDE, LARGE)
    with tempfile.TemporaryDirectory() as folder:
        turns = folder_turns(Upscaler("seemore_t_x2", device=device), Path(folder), count, side)
        few = command.time_in_turns(turns, options.turns, count)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # where memory is short, the whole image would be streamed, too
        try:
            turns = large_turns(device, size)
            many = command.time_in_turns(turns, options.turns)
            for name, take in turns.items():
                many[name]["step_mb"] = harness.grown_megabytes(take)
        except UserWarning as warning:
            raise SystemExit(str(warning)) from None
    cases = {f"T x2 {count} images {side}x{side}": few, f"T x2 {size[0]}x{size[1]}": many}
    for title, lines in cases.items():
        command.print_table(title, lines)
    print()
    for name in list(few)[1:]:
        share = few[ALONE]["ms"] / few[name]["ms"]
        print(
            f"{name.removeprefix(harness.OURS).strip()}: {share:.1%} of the network's own speed, expected {LEAST:.0%}"
        )
    print(f"streamed: {many[STREAMED]['ms'] / many[WHOLE]['ms']:.2f} times the whole image's time, expected {MOST}")
    if options.results or (options.turns, options.quick) == (TURNS, False):
        command.write_tables("upscaling", options.results, device, options.turns, cases)


if __name__ == "__main__":
    main()
