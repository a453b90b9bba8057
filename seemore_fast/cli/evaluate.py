"""``seemore-fast evaluate``: PSNR and SSIM of a model on image folders."""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import UsageError
from ..evaluation import evaluate as evaluation
from ..evaluation.pairs import find_sets
from ..evaluation.published import nearest_network, published
from ..io.atomic import unwritable_reason
from ..io.resize import bicubic_resize
from ..upscale import Upscaler
from .exits import DONE, FAILED

HELP = "Measure Y-PSNR and SSIM of a model on data sets."


def add_arguments(parser: argparse.ArgumentParser):
    """Declare the command's arguments."""
    parser.add_argument("--model", required=True, metavar="NAME|PATH", help='shipped model, weights file, or "bicubic"')
    parser.add_argument(
        "--data", required=True, action="append", type=Path, metavar="DIR",
        help="folder of HR images, or one that contains HR and LR_bicubic/X<scale>; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--lr", action="append", type=Path, metavar="DIR", help="folder of LR images, one for each --data"
    )
    parser.add_argument("--scale", type=int, choices=(2, 3, 4), help="default: the model's own")
    parser.add_argument("--tta", action="store_true", help="average over eight flips and rotations of each image")
    parser.add_argument("--ensemble", dest="tta", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write a row per image")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="default: auto; also cuda:N")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="default: fp32")


def run(options: argparse.Namespace) -> int:
    """Measure every image; print the means and the failures."""
    if options.lr and len(options.lr) != len(options.data):
        raise UsageError(f"got {len(options.lr)} --lr for {len(options.data)} --data, expected one for each")
    if options.csv and (reason := unwritable_reason(options.csv)):
        raise UsageError(reason)
    upscale, scale = _upscaler(options)
    sets = find_sets(options.data, scale, options.lr)
    results, rows = [], evaluation.Rows(options.csv)
    every = (result for name, pairs in sets.items() for result in evaluation.evaluate(upscale, name, pairs))
    try:
        for result in tqdm(every, "evaluating", sum(map(len, sets.values())), unit="image"):
            results.append(result)
            if options.csv:
                rows.add(result)
    finally:  # an interrupted run still reports its results
        if results:
            _print_means(options, upscale, scale, sets, results)
        rows.close()
    failed = [result for result in results if result.error]
    for result in failed:
        print(f"not measured: {result.error}", file=sys.stderr)
    return FAILED if failed else DONE


def _upscaler(options: argparse.Namespace):
    """Return the function that upscales an array, and its scale."""
    if options.model == "bicubic":
        if options.scale is None:
            raise UsageError("--model bicubic has no scale of its own: give --scale")
        if options.tta:
            raise UsageError("--model bicubic gives the same result for all orientations: leave out --tta")
        return lambda image: bicubic_resize(image, options.scale), options.scale
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            upscale = Upscaler(options.model, options.scale, options.device, options.dtype, tta=options.tta)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from None
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)
    return upscale, upscale.scale


def _print_means(options: argparse.Namespace, upscale: Any, scale: int, sets: dict[str, list], results: list):
    network = "SeemoRe-T" if options.model == "bicubic" else nearest_network(upscale.model.config)
    title = f"{options.model} x{scale}{', eight orientations' if options.tta else ''}"
    print(
        f"{title:<28} {'images':>6} {'LR':>9} {'Y-PSNR':>8} {'SSIM':>7} {'s/image':>8}   published: bicubic, {network}"
    )
    for name, pairs in sets.items():
        own = [result for result in results if result.data == name]
        psnr, ssim, seconds = evaluation.mean(own)
        lr = "generated" if pairs[0].lr is None else "provided"
        line = f"{name:<28} {sum(not r.error for r in own):>6} {lr:>9} {psnr:>8.2f} {ssim:>7.4f} {seconds:>8.3f}"
        print(line + "   " + ", ".join(published(one, scale, name) for one in ("bicubic", network)))
    if options.model == "bicubic":
        print(
            "(The published bicubic values are of luma alone; these, of 8-bit RGB, differ by up to 0.01 dB and 0.0007.)"
        )
