"""``seemore-fast upscale``: image files and folders in, larger image files out."""

import argparse
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from ..errors import CheckpointError, UsageError
from ..torchrun import position
from .exits import DONE, FAILED, INTERRUPTED

HELP = "Upscale PNG, JPEG, WebP and TIFF files, and folders of them."
PATIENCE_WITH_OTHERS = timedelta(days=365)  # the processes of torchrun, whose share may take longer
PATIENCE = 1.5  # seconds that an image may take before it gets a progress bar of its own


def add_arguments(parser: argparse.ArgumentParser):
    """Declare the command's arguments."""
    parser.add_argument("inputs", nargs="+", type=_path, metavar="INPUT", help="an image file, or a folder of them")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT",
        help="a file for one input; or a folder, existing or written with a slash at its end: NAME_x2.ext go there, "
        "those of a folder's subfolders into the same ones",
    )  # fmt: skip
    parser.add_argument("--model", default="seemore_t", metavar="NAME|PATH", help="shipped model or weights file")
    parser.add_argument(
        "--scale", type=int, choices=(2, 3, 4),
        help="default: the model's own; of several, the least that reaches --outscale, or 2",
    )  # fmt: skip
    files = parser.add_argument_group("files")
    files.add_argument("--suffix", metavar="TEXT", help="between name and ending in a folder (default: _x2)")
    files.add_argument("--ext", metavar="EXT", help="write png, jpg, webp or tif files (default: as the input)")
    files.add_argument("--quality", type=int, metavar="N", help="of JPEG and WebP, 1 to 100 (default: 95)")
    files.add_argument("--overwrite", action="store_true", help="also what exists in the folder (default: skip it)")
    files.add_argument(
        "--compare", type=_path, metavar="PAGE.html", help="also write a page that shows them before and after"
    )
    files.add_argument("--json", action="store_true", help="print the summary as JSON")
    files.add_argument(
        "--max-megapixels", type=_positive, metavar="N", default=argparse.SUPPRESS,
        help="refuse inputs of more pixels, which a small file can declare to exhaust the memory (default: 50)",
    )  # fmt: skip
    size = parser.add_argument_group("size of the result, other than the network's: resampled, antialiased")
    size.add_argument("--outscale", type=_positive, metavar="F", help="so many times the input, such as 1.7")
    size.add_argument("--width", type=_pixels, metavar="W", help="in pixels; the height follows, unless it is given")
    size.add_argument("--height", type=_pixels, metavar="H", help="in pixels; the width follows, unless it is given")
    how = parser.add_argument_group("computing")
    devices = how.add_mutually_exclusive_group()
    devices.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="default: auto; also cuda:N")
    devices.add_argument("--devices", metavar="A,B,...", help="several, which share the files: cuda:0,cuda:1")
    how.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="default: fp32")
    how.add_argument("--tta", action="store_true", help="the mean over eight orientations: better, eight times as long")
    how.add_argument("--alpha", default="bicubic", choices=("bicubic", "network"), help="default: bicubic")
    how.add_argument(
        "--stream",
        action="store_true",
        help="bound the memory of every image, not only of those that do not fit into it",
    )
    how.add_argument("--tile", dest="stream", type=_exact, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    how.add_argument(
        "--scratch", type=_path, metavar="DIR", help="for what does not fit into memory (default: TMPDIR, or /var/tmp)"
    )


def _path(text: str) -> Path:
    if not text:  # a variable of the shell that is not set; as a path it would be the current folder
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _pixels(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of pixels")
    return int(text)


def _exact(text: str) -> bool:
    if text != "exact":
        raise argparse.ArgumentTypeError(
            "independent tiles would change the result: use --stream, which bounds the memory and does not"
        )
    return True


def run(options: argparse.Namespace) -> int:
    """Upscale every input that can be; report the others at the end."""
    from ..upscale.folder import Options, upscale_files
    from ..upscale.jobs import Jobs, is_share

    size = {name: getattr(options, name) for name in ("outscale", "width", "height") if getattr(options, name)}
    if "outscale" in size and len(size) > 1:
        raise UsageError("--outscale and --width or --height are given: expected one way to tell the size")
    if options.quality is not None and not 1 <= options.quality <= 100:
        raise UsageError(f"--quality is {options.quality}, expected 1 to 100")
    rank, world, _ = position()
    bar = _ImageBar()
    with warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        upscalers = _upscalers(options, bar)
        suffix = _suffix(size, upscalers[0].scale) if options.suffix is None else options.suffix
        extension = options.ext and f".{options.ext.removeprefix('.')}"
        jobs = Jobs(options.inputs, options.output, suffix, extension)
        total = jobs.check()
        if jobs.into_folder:
            _create(Path(options.output))
        _check_page(options.compare)  # which may lie in the folder of results
        limit = {"max_megapixels": options.max_megapixels} if "max_megapixels" in options else {}
        how = Options(**limit, overwrite=options.overwrite, quality=options.quality, size=size)
        begin = time.perf_counter()
        own = (job for job in jobs if is_share(job, rank, world))
        counts, files = Counter(), []
        with _stopped_by_signals() as stopped, bar.over(total if world == 1 else None):
            for outcome in upscale_files(upscalers, own, how, stopped.is_set):
                bar.update()
                counts["failed" if outcome.error else "skipped" if outcome.skipped else "done"] += 1
                # Of a million files that went well, only who asks gets to know each.
                if options.json or options.compare or outcome.error or outcome.notes:
                    files.append(outcome.as_dict())
        files.sort(key=lambda file: file.pop("number"))  # as they are listed, not as they were done
    summary = {
        "scale": upscalers[0].scale,
        "output": options.output,
        "seconds": time.perf_counter() - begin,
        "device": ", ".join(str(upscaler.device) for upscaler in upscalers),
        "stopped": stopped.is_set(),
        "counts": counts,
        "files": files,
        "failures": jobs.failures,
        "notes": [*jobs.notes, *dict.fromkeys(str(doubt.message).splitlines()[0] for doubt in doubts)],
    }
    with _joined(world) as group:
        if group:
            summary = _merged(summary, rank, world, group)
        return _report(summary, options, how) if rank == 0 else DONE


def _report(summary: dict, options: argparse.Namespace, how) -> int:
    """Print what was done, here and elsewhere; return the command's exit status."""
    if options.compare:
        if summary["stopped"]:
            summary["notes"].append(f"{options.compare} was not written, since it stopped: run it again")
        else:
            _compare(options.compare, summary, how)
    _print(summary, options)
    if summary["stopped"]:
        return INTERRUPTED
    return FAILED if summary["failures"] or summary["counts"]["failed"] else DONE


def _upscalers(options: argparse.Namespace, bar: "_ImageBar") -> list:
    from ..upscale import Upscaler
    from ..upscale.upscaler import shipped_scales

    local = position().local_rank
    devices = options.devices.split(",") if options.devices else [options.device]
    if local is not None and devices in (["auto"], ["cuda"]):  # each process its own
        import torch

        devices = [f"cuda:{local}"] if torch.cuda.is_available() or devices == ["cuda"] else ["cpu"]
    how = {"stream": options.stream, "scratch": options.scratch, "tta": options.tta, "alpha": options.alpha}
    if len(devices) == 1:
        how["progress"] = bar.show
    if options.scratch and not os.path.isdir(options.scratch):
        raise UsageError(f"--scratch: the folder {options.scratch} does not exist")
    scale = options.scale
    if scale is None and options.outscale and (scales := shipped_scales(options.model)):
        scale = next((scale for scale in scales if scale >= options.outscale), scales[-1])
    try:
        return [Upscaler(options.model, scale, device, options.dtype, **how) for device in devices]
    except CheckpointError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(error) from None


def _suffix(size: dict, scale: int) -> str:
    if "outscale" in size:
        return f"_x{size['outscale']:g}"
    return "_" + "x".join(f"{name[0]}{value}" for name, value in size.items()) if size else f"_x{scale}"


def _check_page(page: Path | None):
    from ..io.atomic import why_not_writable

    if page and page.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--compare is {page}, expected a name that ends in .html")
    if page and (reason := why_not_writable(page)):
        raise UsageError(f"--compare: {page} cannot be written: {reason}")


def _compare(page: Path, summary: dict, how):
    """Write the page of all that was done, now or before; add to the summary what it has to say."""
    from tqdm import tqdm

    from ..errors import ImageError
    from ..upscale.compare import MOST_IMAGES, write_page

    pairs = [(Path(file["source"]), Path(file["target"])) for file in summary["files"] if not file["error"]]
    try:
        with tqdm(total=min(len(pairs), MOST_IMAGES), unit="image", desc="comparing") as bar:
            summary["notes"] += write_page(page, pairs, how.max_megapixels, bar.update)
        summary["page"] = str(page)
    except ImageError as error:
        summary["failures"].append(str(error))


def _create(folder: Path):
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made a folder: {os.strerror(error.errno)}") from None


@contextmanager
def _stopped_by_signals():
    """Give an event that SIGINT and SIGTERM set: what was begun is finished. A second one is a KeyboardInterrupt."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def handle(number, frame):
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        print("\nfinishing what is being computed; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _ImageBar:
    """A progress bar over files, and below it one of an image that takes its time."""

    def __init__(self):
        self.files = self.image = None
        self.last = self.begin = 0.0

    @contextmanager
    def over(self, total: int | None):
        from tqdm import tqdm

        with tqdm(total=total, unit="image", desc="upscaling") as self.files:
            try:
                yield
            finally:
                self._close()

    def update(self):
        self.files.update()

    def show(self, share: float):
        from tqdm import tqdm

        now = time.perf_counter()
        if share < self.last or not self.begin:
            self._close()
            self.begin = now
        self.last = share
        if self.image is None and now - self.begin > PATIENCE and share < 1:
            self.image = tqdm(
                total=100, desc="this image", position=1, leave=False, bar_format="{l_bar}{bar}| {remaining}"
            )
        if self.image is not None:
            self.image.update(100 * share - self.image.n)
        if share >= 1:
            self._close()
            self.begin = self.last = 0.0

    def _close(self):
        if self.image is not None:
            self.image.close()
            self.image = None


@contextmanager
def _joined(world: int):
    """Give torch.distributed with the group of torchrun's processes, which all leave together; None for one process."""
    if world == 1:
        yield None
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=PATIENCE_WITH_OTHERS)
    yield dist
    dist.barrier()  # whoever leaves early with a failure has torchrun end the others
    dist.destroy_process_group()


def _merged(summary: dict, rank: int, world: int, group) -> dict:
    """Return what all processes have to tell, on the first of them."""
    summaries = [None] * world if rank == 0 else None
    group.gather_object(summary, summaries)
    if rank > 0:
        return summary
    whole = {**summary, "seconds": max(one["seconds"] for one in summaries)}
    whole["stopped"] = any(one["stopped"] for one in summaries)
    whole["device"] = ", ".join(one["device"] for one in summaries)
    whole["files"] = [file for one in summaries for file in one["files"]]
    whole["counts"] = sum((one["counts"] for one in summaries), Counter())
    for key in ("failures", "notes"):
        whole[key] = list(dict.fromkeys(line for one in summaries for line in one[key]))
    return whole


def _print(summary: dict, options: argparse.Namespace):
    from ..backends import chosen_backend

    files, counts = summary["files"], summary["counts"]
    failures = summary["failures"] + [file["error"] for file in files if file["error"]]
    done, skipped = counts["done"], counts["skipped"]
    if options.json:
        told = {name: value for name, value in summary.items() if name != "counts"}
        print(json.dumps({**told, "done": done, "skipped": skipped, "failed": len(failures)}, indent=2))
        return
    where = f"{summary['device']}, {options.dtype}, backend {chosen_backend(summary['device'].split(', ')[0])}"
    print(
        f"{done} of {counts.total()} upscaled {summary['scale']} times in {summary['seconds']:.1f} s ({where}), in "
        f"{summary['output']}"
    )
    if "page" in summary:
        print(f"before and after: {summary['page']}")
    if skipped:
        print(f"{skipped} were there already: --overwrite does them again")
    if summary["stopped"]:
        print("stopped: run it again for the rest")
    notes = [f"{file['source']}: {note}" for file in files for note in file["notes"]]
    for note in summary["notes"] + notes:
        print(f"warning: {note}", file=sys.stderr)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
