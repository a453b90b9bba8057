"""Computation of one image: whole if it fits into memory, else streamed."""

import math
import os
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
from ..memory import check_memory, folder_of_large_files, mapped_buffer
from ..network import engine, engine_streaming
from ..network.blocks import body_dtype
from ..network.gpu_memory import gpu_memory_needed
from ..network.model import SeemoRe
from ..network.streaming import stream

NOT_FINITE = "the network returned NaN or infinity: check the image, the weights and the dtype"
POLL_SECONDS = 0.1
ROWS_AT_ONCE = 512  # of a result, to round
FREE_SHARE = 0.5  # of a device's free memory, for a band: the estimate is rough


@dataclass
class ExecutionOptions:
    """Memory and progress of a computation.

    stream      stream every image, not only those that do not fit into memory
    scratch     folder for the features of a streamed image that do not fit into memory
    progress    callback for the finished share of an image, from 0 to 1
    """

    stream: bool = False
    scratch: str | os.PathLike | None = None
    progress: Callable[[float], None] | None = None

    def __post_init__(self):
        if not (self.progress is None or callable(self.progress)):
            raise ValueError(f"progress is {self.progress!r}, expected a function of a number, or None")

    def report(self, share: float):
        """Report the finished share of an image."""
        if self.progress:
            self.progress(share)

    def part(self, index: int, count: int) -> "ExecutionOptions":
        """Return the options for one of `count` equal parts of an image: it reports its share of the whole."""
        report = self.progress
        return replace(self, progress=report and (lambda share: report((index + share) / count)))

    @property
    def scratch_folder(self) -> Path:
        """The folder given, or the system's."""
        return Path(self.scratch) if self.scratch else folder_of_large_files()


def must_stream(
    model: SeemoRe, shape: torch.Size, itemsize: int, options: ExecutionOptions, extra_bytes: int = 0
) -> bool:
    """Return whether to stream images of `shape` (B, in_chans, H, W) and `itemsize` bytes per value.

    extra_bytes: host memory that the caller needs besides the result. Raises MemoryError if the memory does not
    suffice, before anything is allocated.
    """
    task, device = f"{model.scale}x upscaling of {shape[3]}x{shape[2]} pixels", model.mean.device
    if not _by_cpu_engine(model):
        check_memory(extra_bytes + itemsize * math.prod(shape) * model.scale**2, task)
        return options.stream or not _fits(gpu_memory_needed(model, shape), device)
    extra_bytes += 4 * math.prod(shape) if itemsize == 4 else 0  # floats are copied, integers are not
    needed = engine.plan_memory(model, shape, itemsize=itemsize).memory + extra_bytes
    if not options.stream and _fits(needed, device):
        return False
    check_memory(engine.plan_memory(model, shape, itemsize=itemsize, streamed=True).memory + extra_bytes, task)
    if not options.stream:
        warnings.warn(
            f"{task} needs {needed / 2**30:,.1f} GiB of memory, more than available: streaming it through a file in "
            f"{options.scratch_folder}",
            stacklevel=2,
        )
    return True


def run(model: SeemoRe, x: Tensor, y: Tensor, options: ExecutionOptions, streamed: bool = False):
    """Write model(x) to y, both on the host, (B, in_chans, H, W) of any strides, float32, uint8 or uint16.

    The largest integer stands for 1; results are clipped to [0, 1] and rounded to integers. `streamed` is the answer
    of `must_stream`.

    Raises RuntimeError for NaN or infinite results, torch.OutOfMemoryError if nothing fits on a GPU, OSError if the
    disk is full.
    """
    if _by_cpu_engine(model):
        with _polled(options.progress) as counts:
            folder = options.scratch_folder if streamed else None
            is_finite = engine.run_out(model, x, y, folder, progress=counts)
        is_finite = is_finite and (y.dtype != torch.float32 or bool(y.isfinite().all()))
    else:
        images = [(x[i : i + 1], y[i : i + 1], options.part(i, len(x))) for i in range(len(x))]
        is_finite = all([_run_image(model, *image, streamed) for image in images])
    if not is_finite:
        raise RuntimeError(NOT_FINITE)


def _by_cpu_engine(model: SeemoRe) -> bool:
    return model.mean.device.type == "cpu" and engine.unsupported_reason(model, model.mean) is None


@contextmanager
def _polled(progress: Callable[[float], None] | None):
    """Yield two counters for the engine, and report them to `progress` meanwhile; yield None without `progress`."""
    if progress is None:
        yield None
        return
    counts, ended, failures = torch.zeros(2, dtype=torch.int64), threading.Event(), []

    def poll():
        try:
            while not ended.wait(POLL_SECONDS):
                done, of = counts.tolist()
                progress(done / of if of else 0)
        except Exception as error:  # the user's callback: raised in the calling thread below
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
    progress(1)  # also for images that are done before the first poll


def _run_image(model: SeemoRe, x: Tensor, y: Tensor, options: ExecutionOptions, streamed: bool) -> bool:
    """Compute one image with the model's own backends and device; return whether the result is finite."""
    can_stream = min(x.shape[2:]) >= model.min_size and model.is_unmodified()  # streaming would bypass hooks
    if not (streamed and can_stream):
        try:
            is_finite = _run_whole(model, x, y)
        except torch.OutOfMemoryError as error:
            if not can_stream:
                raise
            reason = first_line(error)
        else:
            options.report(1)
            return is_finite
        torch.cuda.empty_cache()  # outside the handler: the error keeps its memory alive
        warnings.warn(f"{reason}: streaming the image in bands of rows", stacklevel=2)
    return _run_streamed(model, x, y, options)


def _run_whole(model: SeemoRe, x: Tensor, y: Tensor) -> bool:
    device = model.mean.device
    if engine.unsupported_reason(model, model.mean) is not None:
        writer = _ResultWriter(y)
        writer(0, model(_to_unit(x, device)))
        return writer.is_finite
    result = torch.empty_like(y, device=device)  # integers travel to the GPU and back as they are
    is_finite = engine.run_out(model, x.to(device), result)
    y.copy_(result)
    return is_finite and (y.dtype != torch.float32 or bool(y.isfinite().all()))


def _run_streamed(model: SeemoRe, x: Tensor, y: Tensor, options: ExecutionOptions) -> bool:
    if engine.unsupported_reason(model, model.mean) is None:
        return _run_streamed_by_engine(model, x, y, options)
    device, unit = model.mean.device, model.min_size
    _, _, height, width = x.shape
    shape, dtype = (height, model.config["embedding_dim"], width), body_dtype(model.conv_1.weight)
    features, release = _feature_buffer(shape, dtype, options.scratch_folder, y.nbytes)
    row = 2 * gpu_memory_needed(model, torch.Size((1, x.shape[1], 1, width)))  # the widened features are as large again

    def in_bands(rows: int) -> bool:
        writer = _ResultWriter(y)
        stream(model, features, lambda a, b: _to_unit(x[:, :, a:b], device), writer, rows, release, options.report)
        return writer.is_finite

    return _in_bands_that_fit(in_bands, height, unit, row, device)


def _run_streamed_by_engine(model: SeemoRe, x: Tensor, y: Tensor, options: ExecutionOptions) -> bool:
    device, (height, width) = model.mean.device, x.shape[2:]
    needed = engine_streaming.part_memory(model, height, width)
    buffer = (needed.features,), torch.uint8, options.scratch_folder, y.nbytes
    features, release = _feature_buffer(*buffer, pinned=device.type == "cuda")
    row = needed.band // needed.unit + 4 * x.shape[1] * width * (1 + model.scale**2)

    def in_bands(rows: int) -> bool:
        return engine_streaming.stream(model, x, y, features, rows, release, options.report)

    is_finite = _in_bands_that_fit(in_bands, height, needed.unit, row, device)
    return is_finite and (y.dtype != torch.float32 or bool(y.isfinite().all()))


def _in_bands_that_fit(
    compute: Callable[[int], bool], height: int, unit: int, row_bytes: int, device: torch.device
) -> bool:
    """Return compute(rows) of a band's rows, a multiple of `unit`: as many as fit into the device's memory."""
    free = _free(device)
    budget = engine.MAX_BANDS if free is None else min(engine.MAX_BANDS, int(FREE_SHARE * free))
    rows = min(max(unit, budget // row_bytes // unit * unit), -(-height // unit) * unit)
    while True:
        try:
            return compute(rows)
        except torch.OutOfMemoryError:
            if rows <= unit:
                raise
        torch.cuda.empty_cache()  # outside the handler: the error keeps its memory alive
        rows = max(unit, rows // 2 // unit * unit)
        warnings.warn(f"out of memory on {device}: trying again in bands of {rows} rows", stacklevel=2)


def _feature_buffer(
    shape: tuple[int, ...], dtype: torch.dtype, folder: Path, result_bytes: int, pinned: bool = False
) -> tuple[Tensor, Callable]:
    """Return a buffer in memory, or in a file if the memory does not suffice, and a function that releases its rows.

    result_bytes: memory of the result, which is allocated but not yet in use. pinned: in memory, of pages that a GPU
    reads by itself.
    """
    count = math.prod(shape) * dtype.itemsize
    available = memory.available_memory()
    if count < memory.SMALL or available is None or count + result_bytes < 0.8 * available:
        return torch.empty(shape, dtype=dtype, pin_memory=pinned), lambda top, bottom: None
    mapped, release = mapped_buffer(count, folder)
    row = count // shape[0]
    return mapped.view(dtype).view(shape), lambda top, bottom: release(top * row, bottom * row)


def _to_unit(x: Tensor, device: torch.device) -> Tensor:
    """Return [0, 1] floats on the device, contiguous."""
    if x.dtype == torch.float32:
        return x.to(device).contiguous()
    return (x.to(device).float() / torch.iinfo(x.dtype).max).contiguous()


class _ResultWriter:
    """Function that writes rows of the result to `y`, and notes whether all of them are finite."""

    def __init__(self, y: Tensor):
        self.y = y
        self.is_finite = True

    def __call__(self, top: int, rows: Tensor):
        for part in rows.split(ROWS_AT_ONCE, dim=2):  # intermediate values take more memory than the result
            self.is_finite &= bool(part.isfinite().all())
            if self.y.dtype != torch.float32 and self.is_finite:
                max_value = torch.iinfo(self.y.dtype).max
                part = (part.float().clamp(0, 1) * max_value).round().to(torch.int32)
            self.y[:, :, top : top + part.shape[2]] = part.to("cpu").to(self.y.dtype)
            top += part.shape[2]


def _fits(needed: int, device: torch.device) -> bool:
    return needed < memory.SMALL or (free := _free(device)) is None or needed <= free


def _free(device: torch.device) -> int | None:
    """Return the free bytes of a device, None if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return memory.available_memory() if device.type == "cpu" else None
