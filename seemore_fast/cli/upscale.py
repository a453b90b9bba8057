"""``seemore-fast upscale``: super-resolution of image files and folders."""

import argparse
import os
import time
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from ..errors import CheckpointError, ImageError, UsageError, first_line, os_reason
from ..io.atomic import unwritable_reason
from ..torchrun import position
from ..upscale import Upscaler
from ..upscale.batch import upscale_files
from ..upscale.compare import MAX_IMAGES, write_page
from ..upscale.files import FileOptions
from ..upscale.jobs import Jobs, is_share
from ..upscale.upscaler import shipped_scales
from .exits import DONE
from .processes import gathered, own_device
from .progress import ImageBars
from .signals import stop_on_signals
from .summary import Summary

HELP = "Upscale PNG, JPEG, WebP and TIFF files, and folders of them."


def add_arguments(parser: argparse.ArgumentParser):
    """Declare the command's arguments."""
    parser.add_argument("inputs", nargs="+", type=_path, metavar="INPUT", help="an image file or a folder of images")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT",
        help="a file, for one input file; or a folder, existing or with a slash at its end, for files NAME_x2.EXT "
        "(subfolders are kept)",
    )  # fmt: skip
    parser.add_argument("--model", default="seemore_t", metavar="NAME|PATH", help="shipped model or weights file")
    parser.add_argument(
        "--scale", type=int, choices=(2, 3, 4),
        help="default: the model's own; for a shipped name without one, 2 or the smallest that reaches --outscale",
    )  # fmt: skip
    files = parser.add_argument_group("files")
    files.add_argument("--suffix", metavar="TEXT", help="appended to file names in a folder (default: _x2)")
    files.add_argument("--ext", metavar="EXT", help="output format: png, jpg, webp or tif (default: the input's)")
    files.add_argument("--quality", type=int, metavar="N", help="of JPEG and WebP, 1 to 100 (default: 95)")
    files.add_argument("--overwrite", action="store_true", help="redo existing files in a folder (default: skip them)")
    files.add_argument(
        "--compare", type=_path, metavar="PAGE.html", help="also write a page with a before/after slider per image"
    )
    files.add_argument("--json", action="store_true", help="print the summary as JSON")
    files.add_argument(
        "--max-megapixels", type=_positive, metavar="N", default=argparse.SUPPRESS,
        help="refuse larger inputs: a small file can declare pixels that exhaust the memory (default: 50)",
    )  # fmt: skip
    size = parser.add_argument_group("output size, resampled from the network's result")
    size.add_argument("--outscale", type=_positive, metavar="F", help="as a multiple of the input, such as 1.7")
    size.add_argument("--width", type=_pixels, metavar="W", help="in pixels; without --height, keeps the aspect ratio")
    size.add_argument("--height", type=_pixels, metavar="H", help="in pixels; without --width, keeps the aspect ratio")
    computing = parser.add_argument_group("computing")
    devices = computing.add_mutually_exclusive_group()
    devices.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="default: auto; also cuda:N")
    devices.add_argument("--devices", metavar="A,B,...", help="several, which share the files: cuda:0,cuda:1")
    computing.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="default: fp32")
    computing.add_argument(
        "--tta", action="store_true", help="average over eight flips and rotations: better, but 8x slower"
    )
    computing.add_argument(
        "--alpha", default="bicubic", choices=("bicubic", "network"),
        help="how to upscale the alpha channel (default: bicubic)",
    )  # fmt: skip
    computing.add_argument(
        "--stream", action="store_true", help="bound the memory of every image, not only of those that do not fit"
    )
    computing.add_argument("--tile", dest="stream", type=_exact, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    computing.add_argument(
        "--scratch", type=_path, metavar="DIR", help="for what does not fit into memory (default: TMPDIR, or /var/tmp)"
    )


def _path(text: str) -> Path:
    if not text:  # such as an unset shell variable; as a path it would be the current folder
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _pixels(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of pixels")
    return int(text)


def _exact(text: str) -> bool:
    if text != "exact":
        raise argparse.ArgumentTypeError(
            "independent tiles would change the result: use --stream, which bounds the memory and keeps the result"
        )
    return True


def run(options: argparse.Namespace) -> int:
    """Upscale the inputs, print a summary with the failures, and return the exit status."""
    batch = _batch_options(options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        bars = ImageBars()
        upscalers = _upscalers(options, bars)
        jobs = _jobs(options, batch.size, upscalers[0].scale)
        begin = time.perf_counter()
        files, counts, stopped = _upscale_all(options, upscalers, jobs, batch, bars)
    summary = Summary(
        scale=upscalers[0].scale,
        output=options.output,
        seconds=time.perf_counter() - begin,
        device=", ".join(str(upscaler.device) for upscaler in upscalers),
        stopped=stopped,
        files=files,
        failures=jobs.failures,
        notes=[*jobs.notes, *dict.fromkeys(first_line(warning.message) for warning in caught)],
        counts=counts,
    )
    with gathered(summary) as summaries:
        if summaries is None:
            return DONE
        summary = Summary.merged(summaries)
        if options.compare:
            _compare(options.compare, summary, batch.max_megapixels)
        if options.json:
            summary.print_json()
        else:
            summary.print_text(options.dtype)
        return summary.exit_status


def _batch_options(options: argparse.Namespace) -> FileOptions:
    size = {name: getattr(options, name) for name in ("outscale", "width", "height") if getattr(options, name)}
    if "outscale" in size and len(size) > 1:
        raise UsageError("--outscale is given with --width or --height: expected only one of them")
    if options.quality is not None and not 1 <= options.quality <= 100:
        raise UsageError(f"--quality is {options.quality}, expected 1 to 100")
    limit = {"max_megapixels": options.max_megapixels} if "max_megapixels" in options else {}
    return FileOptions(**limit, overwrite=options.overwrite, quality=options.quality, size=size)


def _upscalers(options: argparse.Namespace, bars: ImageBars) -> list[Upscaler]:
    devices = options.devices.split(",") if options.devices else [options.device]
    if len(devices) == 1:
        devices = [own_device(devices[0])]
    if options.scratch and not os.path.isdir(options.scratch):
        raise UsageError(f"--scratch: the folder {options.scratch} does not exist")
    scale = options.scale
    if scale is None and options.outscale and (scales := shipped_scales(options.model)):
        scale = next((scale for scale in scales if scale >= options.outscale), scales[-1])
    arguments = {
        "stream": options.stream,
        "scratch": options.scratch,
        "tta": options.tta,
        "alpha": options.alpha,
        "progress": bars.show if len(devices) == 1 else None,
    }
    try:
        return [Upscaler(options.model, scale, device, options.dtype, **arguments) for device in devices]
    except CheckpointError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(error) from None


def _jobs(options: argparse.Namespace, size: dict, scale: int) -> Jobs:
    """Return the jobs; create the folder of their results."""
    suffix = _suffix(size, scale) if options.suffix is None else options.suffix
    extension = options.ext and f".{options.ext.removeprefix('.')}"
    jobs = Jobs(options.inputs, options.output, suffix, extension)
    if jobs.into_folder:
        try:
            Path(options.output).mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(f"{options.output}: cannot create the folder: {os_reason(error)}") from None
    _check_page(options.compare)  # which may be in this folder
    return jobs


def _suffix(size: dict, scale: int) -> str:
    if "outscale" in size:
        return f"_x{size['outscale']:g}"
    return "_" + "x".join(f"{name[0]}{value}" for name, value in size.items()) if size else f"_x{scale}"


def _check_page(page: Path | None):
    if page and page.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--compare is {page}, expected a name that ends in .html")
    if page and (reason := unwritable_reason(page)):
        raise UsageError(f"--compare: {page} cannot be written: {reason}")


def _upscale_all(
    options: argparse.Namespace, upscalers: list[Upscaler], jobs: Jobs, batch: FileOptions, bars: ImageBars
) -> tuple[list[dict], Counter, bool]:
    """Return the outcomes worth reporting, in the order of the jobs, the counts of all, and whether it was stopped."""
    rank, world, _ = position()
    own = [job for job in jobs if is_share(job, rank, world)]
    files, counts = [], Counter()
    with stop_on_signals() as stopped, bars.over(len(own)) as bar:
        for outcome in upscale_files(upscalers, own, batch, stopped.is_set):
            bar.update()
            counts["failed" if outcome.error else "skipped" if outcome.skipped else "done"] += 1
            if options.json or options.compare or outcome.error or outcome.notes:  # there may be a million others
                files.append(asdict(outcome))
    files.sort(key=lambda file: file.pop("number"))
    return files, counts, stopped.is_set()


def _compare(page: Path, summary: Summary, max_megapixels: float):
    """Write the comparison page of all results, new or old; add its failures and warnings to the summary."""
    if summary.stopped:
        summary.notes.append(f"{page} was not written because the run was stopped: run it again")
        return
    pairs = [(Path(file["source"]), Path(file["target"])) for file in summary.files if not file["error"]]
    try:
        with tqdm(total=min(len(pairs), MAX_IMAGES), unit="image", desc="comparing") as bar:
            summary.notes += write_page(page, pairs, max_megapixels, bar.update)
        summary.page = str(page)
    except ImageError as error:
        summary.failures.append(str(error))
