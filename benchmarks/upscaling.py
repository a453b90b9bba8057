"""Time `upscale` beside the network that it runs: folders of small images, and a large image that is streamed.

    seemore-fast benchmark upscaling         (or: python benchmarks/upscaling.py)

T for scale 2, in turns. The network alone upscales the folder's images as arrays, one after another; the others read
and write files. A large image is computed whole and streamed, with bit-identical results; on a CPU, streaming keeps
some features in a file. step_mb: the largest growth of resident memory in a call, which includes the result. A complete
run writes upscaling.json.
"""

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
from seemore_fast.benchmarks.machine import grown_megabytes
from seemore_fast.demo import PHOTO
from seemore_fast.devices import find_device

COUNT, SIDE, LARGE = 200, 128, (6000, 4000)
QUICK = 6, 24, (64, 48)
TURNS = 3
EXPECTED_SHARE, EXPECTED_RATIO = 0.95, 1.25  # of the network's speed in a folder; of the whole image's time, streamed
ALONE, WHOLE, STREAMED = (f"{harness.OURS} {how}" for how in ("network alone", "whole", "streamed"))


def crops(count: int, side: int) -> list[Image.Image]:
    """Return square crops of a photo."""
    photo = Image.open(PHOTO).convert("RGB")
    places = [(37 * i % (photo.width - side + 1), 53 * i % (photo.height - side + 1)) for i in range(count)]
    return [photo.crop((x, y, x + side, y + side)) for x, y in places]


def folder_turns(upscaler, folder: Path, count: int, side: int) -> dict[str, Callable]:
    """Return calls that upscale the same images alone, as PNG files and as JPEG files in `folder`."""
    from seemore_fast.upscale.batch import upscale_files
    from seemore_fast.upscale.files import FileOptions
    from seemore_fast.upscale.jobs import Jobs

    images = crops(count, side)

    def alone():
        for image in arrays:
            upscaler(image)

    def as_files(source: Path):
        target = folder / "out"
        failures = [o.error for o in upscale_files([upscaler], Jobs([source], f"{target}/"), FileOptions()) if o.error]
        if failures or len(list(target.iterdir())) != count:
            raise SystemExit(f"not all images of {source} were upscaled: {failures[:1]}")
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
    """Return calls that upscale one image whole and streamed, after a check that the results are the same."""
    from seemore_fast.upscale import Upscaler

    image = np.asarray(Image.open(PHOTO).convert("RGB").resize(size, Image.Resampling.BICUBIC))
    turns = {
        name: partial(Upscaler("seemore_t_x2", device=device, stream=stream), image)
        for name, stream in ((WHOLE, False), (STREAMED, True))
    }
    if device.type == "cpu" and not np.array_equal(turns[WHOLE](), turns[STREAMED]()):
        raise SystemExit("the streamed result differs from the whole image's")
    return turns


def main(arguments: list[str] | None = None, prog: str | None = None):
    from seemore_fast.upscale import Upscaler

    parser = command.parser(__doc__, prog)
    command.add_turn_options(parser, TURNS)
    options = parser.parse_args(arguments)
    command.check_counts(parser, options)
    try:
        device = find_device(options.device or "auto")
    except ValueError as error:
        parser.error(f"--{error}")
    count, side, size = QUICK if options.quick else (COUNT, SIDE, LARGE)
    with tempfile.TemporaryDirectory() as folder:
        turns = folder_turns(Upscaler("seemore_t_x2", device=device), Path(folder), count, side)
        small = command.time_in_turns(turns, options.turns, count)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # with too little memory, the whole image would be streamed, too
        try:
            turns = large_turns(device, size)
            large = command.time_in_turns(turns, options.turns)
            for name, take in turns.items():
                large[name]["step_mb"] = grown_megabytes(take)
        except UserWarning as warning:
            raise SystemExit(str(warning)) from None
    cases = {f"T x2 {count} images {side}x{side}": small, f"T x2 {size[0]}x{size[1]}": large}
    for title, rows in cases.items():
        command.print_table(title, rows)
    print()
    for name in list(small)[1:]:
        share, what = small[ALONE]["ms"] / small[name]["ms"], name.removeprefix(harness.OURS).strip()
        print(f"{what}: {share:.1%} of the network's own speed, expected {EXPECTED_SHARE:.0%}")
    ratio = large[STREAMED]["ms"] / large[WHOLE]["ms"]
    print(f"streamed: {ratio:.2f}x the whole image's time, expected {EXPECTED_RATIO}x")
    if options.results or (options.turns, options.quick) == (TURNS, False):
        command.write_tables("upscaling", options.results, device, options.turns, cases)


if __name__ == "__main__":
    main()
