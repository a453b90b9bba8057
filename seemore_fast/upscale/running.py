"""Computation of one image: whole where it fits into memory, else streamed."""

import math
import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import memory
from ..errors import first_line
from ..memory import check_memory, folder_of_large_files, gpu_memory_needed, in_a_file
from ..network import engine
from ..network.streaming import stream
from ..reference.model import body_dtype

NO_NUMBERS = "the network returned NaN or infinity: the image, the weights or the dtype is to blame"
POLL_SECONDS = 0.1
AT_A_TIME = 512  # lines of a result that are rounded
HALF_OF_THE_REST = 0.5  # share of a device's free memory that a band may take: the estimate is a rough one


@dataclass
class Way:
    """How images are to be computed.

    stream      always streamed, not only where the memory does not suffice
    scratch     folder of the file where a streamed image's features wait if they do not fit into memory
    progress    is told the share of an image that is done, from 0 to 1, now and then
    """

    stream: bool = False
    scratch: Path | None = None
    progress: Callable[[float], None] | None = None

    def __post_init__(self):
        if not (self.progress is None or callable(self.progress)):
            raise ValueError(f"progress is {self.progress!r}, expected a function of a number, or None")

    def tell(self, share: float):
        if self.progress:
            self.progress(share)

    def part(self, index: int, count: int) -> "Way":
        """Return the way of one of `count` equal parts of an image: its share is told as one of the whole."""
        tell = self.progress
        return replace(self, progress=tell and (lambda share: tell((index + share) / count)))

    @property
    def folder(self) -> Path:
        return Path(self.scratch) if self.scratch else folder_of_large_files()


def must_stream(model, shape: tuple[int, ...], itemsize: int, way: Way, beside: int = 0) -> bool:
    """Tell whether images of `shape` (B, in_chans, H, W) and `itemsize` bytes a value are to be streamed.

    beside: the bytes that the caller needs on the host besides the result. Raises MemoryError where what is needed does
    not fit there, before anything is allocated.
    """
    size = f"an image of {shape[3]}x{shape[2]} pixels, enlarged {model.scale} times,"
    if engine.why_not(model, model.mean) is not None:
        check_memory(beside + itemsize * math.prod(shape) * model.scale**2, size)
        return way.stream or not _fits(gpu_memory_needed(model, shape), model.mean.device)
    beside += 4 * math.prod(shape) if itemsize == 4 else 0  # floats are not read where they are
    whole = engine.needs(model, shape, itemsize=itemsize).memory + beside
    if not way.stream and _fits(whole, model.mean.device):
        return False
    check_memory(engine.needs(model, shape, itemsize=itemsize, streamed=True).memory + beside, size)
    if not way.stream:
        warnings.warn(
            f"{size} needs {whole / 2**30:,.1f} GiB of memory, which are not there: its features go through a file "
            f"in {way.folder}",
            stacklevel=2,
        )
    return True


def run(model, x: Tensor, y: Tensor, way: Way, streamed: bool = False):
    """Write model(x) to y, both on the host, (B, in_chans, H, W) of any strides, float32, uint8 or uint16.

    The largest integer stands for 1; results are bounded to [0, 1] and rounded to it. `streamed` is what `must_stream`
    told.

    Raises RuntimeError where results are no numbers, torch.OutOfMemoryError where nothing fits on a GPU, OSError where
    the disk has no room.
    """
    if engine.why_not(model, model.mean) is None:
        with _polled(way.progress) as counts:
            finite = engine.run_into(model, x, y, way.folder if streamed else None, progress=counts)
        finite = finite and (y.dtype != torch.float32 or bool(y.isfinite().all()))
    else:
        parts = [(x[i : i + 1], y[i : i + 1], way.part(i, len(x))) for i in range(len(x))]
        finite = all([_one(model, *part, streamed) for part in parts])
    if not finite:
        raise RuntimeError(NO_NUMBERS)


@contextmanager
def _polled(progress: Callable[[float], None] | None):
    """Give two numbers for the engine to count in, and tell `progress` of them meanwhile; None where nobody asks."""
    if progress is None:
        yield None
        return
    counts, ended, failures = torch.zeros(2, dtype=torch.int64), threading.Event(), []

    def poll():
        try:
            while not ended.wait(POLL_SECONDS):
                done, of = counts.tolist()
                progress(done / of if of else 0)
        except Exception as error:  # the user's, for the thread that asked
            failures.append(error)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield counts
    finally:
        ended.set()
        thread.join()
    if failures:
        raise failures[0]
    progress(1)  # for images that are done before anyone looks


def _one(model, x: Tensor, y: Tensor, way: Way, streamed: bool) -> bool:
    """One image, by whatever backends and device the model has."""
    writer, device = _Writer(y), model.mean.device
    if min(x.shape[2:]) >= model.min_size and model.is_untouched():
        if streamed:
            return _streamed(model, x, y, way)
        try:
            writer(0, model(_unit(x, device)))
        except torch.OutOfMemoryError as error:
            reason = first_line(error)
        else:
            way.tell(1)
            return writer.is_finite
        torch.cuda.empty_cache()  # not in the handler: the error holds on to what was in use
        warnings.warn(f"{reason}: streamed, group by group, in bands of lines", stacklevel=2)
        return _streamed(model, x, y, way)
    writer(0, model(_unit(x, device)))  # small, or with changes inside that streaming would not see
    way.tell(1)
    return writer.is_finite


def _streamed(model, x: Tensor, y: Tensor, way: Way) -> bool:
    device, unit = model.mean.device, model.min_size
    _, _, height, width = x.shape
    shape, dtype = (height, model.config["embedding_dim"], width), body_dtype(model.conv_1.weight)
    features, release = _waiting_room(shape, dtype, way.folder, y.nbytes)
    line = 2 * gpu_memory_needed(model, (1, x.shape[1], 1, width))  # what is widened is as large again
    free = _free(device)
    budget = engine.AT_ONCE if free is None else min(engine.AT_ONCE, int(HALF_OF_THE_REST * free))
    lines = min(max(unit, budget // line // unit * unit), -(-height // unit) * unit)

    while True:
        writer = _Writer(y)
        try:
            stream(model, features, lambda a, b: _unit(x[:, :, a:b], device), writer, lines, release, way.tell)
            return writer.is_finite
        except torch.OutOfMemoryError:
            if lines <= unit:
                raise
        torch.cuda.empty_cache()  # not in the handler: the error holds on to what was in use
        lines = max(unit, lines // 2 // unit * unit)
        warnings.warn(f"out of memory on {device}: again, in bands of {lines} lines", stacklevel=2)


def _waiting_room(shape: tuple[int, ...], dtype: torch.dtype, folder: Path, beside: int) -> tuple[Tensor, Callable]:
    """Return room for features in memory, or in a file where that does not suffice, and what releases lines of it.

    beside: bytes that will be needed besides, of a result that nobody has written to yet.
    """
    count = math.prod(shape) * dtype.itemsize
    available = memory.available_memory()
    if count < memory.SMALL or available is None or count + beside < 0.8 * available:
        return torch.empty(shape, dtype=dtype), lambda top, bottom: None
    mapped, release = in_a_file(count, folder)
    line = count // shape[0]
    return mapped.view(dtype).view(shape), lambda top, bottom: release(top * line, bottom * line)


def _unit(x: Tensor, device: torch.device) -> Tensor:
    """Return [0, 1] floats on the device, contiguous."""
    if x.dtype == torch.float32:
        return x.to(device).contiguous()
    return (x.to(device).float() / torch.iinfo(x.dtype).max).contiguous()


class _Writer:
    """Takes lines of the result, and puts them where they belong."""

    def __init__(self, y: Tensor):
        self.y = y
        self.is_finite = True

    def __call__(self, top: int, lines: Tensor):
        for few in lines.split(AT_A_TIME, dim=2):  # what is in between takes more than the result
            self.is_finite &= bool(few.isfinite().all())
            if self.y.dtype != torch.float32 and self.is_finite:
                whole = torch.iinfo(self.y.dtype).max
                few = (few.float().clamp(0, 1) * whole).round().to(torch.int32)
            self.y[:, :, top : top + few.shape[2]] = few.to("cpu").to(self.y.dtype)
            top += few.shape[2]


def _fits(needed: int, device: torch.device) -> bool:
    return needed < memory.SMALL or (free := _free(device)) is None or needed <= free


def _free(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, None where nobody knows."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return memory.available_memory() if device.type == "cpu" else None
