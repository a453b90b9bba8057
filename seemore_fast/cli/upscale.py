"""``seemore-fast upscale``: image files in, larger image files out."""

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

from .exits import DONE, FAILED, UsageError

HELP = "Upscale PNG, JPEG, WebP and TIFF files."


def add_arguments(parser: argparse.ArgumentParser):
    """Declare the command's arguments."""
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="an image file")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT",
        help="a file for one input; or a folder, existing or written with a slash at its end: NAME_x2.ext go there",
    )  # fmt: skip
    parser.add_argument("--model", default="seemore_t", metavar="NAME|PATH", help="shipped model or weights file")
    parser.add_argument("--scale", type=int, choices=(2, 3, 4), help="default: the model's own")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="default: auto; also cuda:N")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="default: fp32")
    parser.add_argument(
        "--max-megapixels", type=_positive, metavar="N", default=argparse.SUPPRESS,
        help="refuse inputs of more pixels, which a small file can declare to exhaust the memory (default: 50)",
    )  # fmt: skip


def _positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def run(options: argparse.Namespace) -> int:
    """Upscale every input that can be; report the others at the end."""
    from tqdm import tqdm

    from ..backends import chosen_backend
    from ..checkpoint import CheckpointError
    from ..upscale import Upscaler
    from ..upscale.images import ImageError, upscale_file

    with warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always", UserWarning)
        try:
            upscaler = Upscaler(options.model, options.scale, options.device, options.dtype)
        except CheckpointError as error:
            print(f"seemore-fast upscale: {error}", file=sys.stderr)
            return FAILED
        except (ValueError, FileNotFoundError) as error:
            raise UsageError(error) from None
    notes = [str(doubt.message) for doubt in doubts]
    jobs = plan_outputs(options.inputs, options.output, upscaler.scale)

    limit = {"max_megapixels": options.max_megapixels} if "max_megapixels" in options else {}
    failures, start = [], time.perf_counter()
    for source, target in tqdm(jobs, unit="image", desc="upscaling"):
        with warnings.catch_warnings(record=True) as doubts:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            try:
                upscale_file(upscaler, source, target, **limit)
            except ImageError as error:
                failures.append(str(error))
            except (MemoryError, RuntimeError, OSError) as error:  # out of memory on a device is a RuntimeError
                failures.append(f"{source}: {str(error).splitlines()[0] if str(error) else 'out of memory'}")
        notes += [f"{source}: {str(doubt.message).splitlines()[0]}" for doubt in doubts]
    seconds = time.perf_counter() - start

    done = len(jobs) - len(failures)
    where = f"{upscaler.device}, {options.dtype}, backend {chosen_backend(upscaler.device)}"
    print(f"{done} of {len(jobs)} upscaled {upscaler.scale} times in {seconds:.1f} s ({where}), in {options.output}")
    for note in dict.fromkeys(notes):
        print(f"warning: {note}", file=sys.stderr)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return FAILED if failures else DONE


def plan_outputs(inputs: list[Path], output: str, scale: int) -> list[tuple[Path, Path]]:
    """Return (input, output) pairs; create the output folder where it is asked for by a slash.

    Raises UsageError where an output could not be told from another output or from an input.
    """
    from ..upscale.images import FORMATS

    if not output:
        raise UsageError("OUT is empty: give a file or a folder")
    folder = Path(output)
    if output.endswith(("/", os.sep)) or os.path.isdir(folder):
        targets = [folder / f"{source.stem}_x{scale}{source.suffix}" for source in inputs]
        _create(folder)
    elif len(inputs) > 1:
        raise UsageError(f"{output} is one file for {len(inputs)} inputs: give a folder, existing or ending in a slash")
    elif folder.suffix.lower() not in FORMATS:
        raise UsageError(
            f"{output} ends in {folder.suffix!r}, expected one of {', '.join(FORMATS)}, or a slash to make it a folder"
        )
    else:
        targets = [folder]
    taken = {os.path.realpath(source): source for source in inputs}
    for source, target in zip(inputs, targets, strict=True):
        place = os.path.realpath(target)
        if place in taken:
            raise UsageError(f"{target}, the output of {source}, is also read or written for {taken[place]}")
        taken[place] = source
    if not os.path.isdir(folder.parent):
        raise UsageError(f"the folder {folder.parent} does not exist: create it, or write elsewhere")
    return list(zip(inputs, targets, strict=True))


def _create(folder: Path):
    try:
        folder.mkdir(exist_ok=True)
    except FileNotFoundError:
        raise UsageError(f"the folder {folder.parent} does not exist: create it, or write elsewhere") from None
    except OSError as error:
        raise UsageError(f"{folder} cannot be made a folder: {os.strerror(error.errno)}") from None
