"""Pipelined batch upscaling; a failing file does not affect the others."""

import copy
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from .. import memory
from ..errors import file_error
from ..io.images import write_image
from .files import FileOptions, read
from .jobs import Job
from .upscaler import Upscaler

MIN_WORKERS, MAX_WORKERS = 2, 8  # per device; each holds an image
WORKER_BYTES = 2**29  # memory of a small image: L takes about 2 KB per pixel
SMALL, SMALL_RESULT = 2**18, 2**22  # pixels up to which images are computed side by side


@dataclass
class Outcome:
    """Result of the `number`th job: done, skipped, or failed with an error."""

    source: str
    target: str
    number: int = 0
    seconds: float = 0.0
    skipped: bool = False
    error: str = ""
    notes: list[str] = field(default_factory=list)


def upscale_files(
    upscalers: list[Upscaler],
    jobs: Collection[Job],
    options: FileOptions,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Outcome]:
    """Yield the outcome of each job when it is done, in any order; after `stop()`, only of images in progress.

    Worker threads take one job after another, so that some read and write while others compute. On a CPU, small images
    are computed side by side, one core each, which is faster than all cores on one image. Large images are read,
    computed and written one at a time. Closing the generator stops, too.
    """
    queued, lock, outcomes, ended = enumerate(jobs), threading.Lock(), queue.SimpleQueue(), threading.Event()
    threads = torch.get_num_threads()
    devices = {upscaler.model.mean.device for upscaler in upscalers}  # with their index: "cuda" may be "cuda:0"
    slots = {device: DeviceSlots(threads if device.type == "cpu" else 1) for device in devices}

    def is_over() -> bool:
        return ended.is_set() or stop()

    def take() -> tuple[int, Job] | None:
        with lock:
            return None if is_over() else next(queued, None)

    def work(worker: Worker):
        torch.get_num_threads()  # a thread's first call resets the number of all threads: before any is set
        try:
            while taken := take():
                number, job = taken
                if outcome := worker.upscale(job, is_over):
                    outcomes.put(replace(outcome, number=number))
        except BaseException as error:
            outcomes.put(error)
        finally:
            outcomes.put(None)

    count = min(_worker_count(threads), len(jobs))
    workers = [Worker(one, slots[one.model.mean.device], options) for one in upscalers for _ in range(count)]
    # Each in a copy of this context, which holds the choice of `use_backend`.
    running = [threading.Thread(target=copy_context().run, args=(work, worker), daemon=True) for worker in workers]
    try:
        for thread in running:
            thread.start()
        left = len(running)
        while left:
            outcome = outcomes.get()
            if outcome is None:
                left -= 1
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                yield outcome
    except KeyboardInterrupt:  # abort without waiting for the workers
        running.clear()
        raise
    finally:
        ended.set()
        for thread in running:
            thread.join()
        torch.set_num_threads(threads)  # the workers' own settings apply to new threads, too


def _worker_count(threads: int) -> int:
    """Return the number of workers per device: one per thread as far as memory allows, but at least two."""
    available = memory.available_memory()
    room = MAX_WORKERS if available is None else available // WORKER_BYTES
    return max(MIN_WORKERS, min(threads, room, MAX_WORKERS))


class DeviceSlots:
    """Compute threads of a device, shared by its workers."""

    def __init__(self, threads: int):
        self.free = self.threads = threads
        self.entrance, self.changed = threading.Lock(), threading.Condition()
        # While a large image is computed, one more is read ahead, and one written.
        self.reading_or_computing, self.writing = threading.BoundedSemaphore(2), threading.Lock()
        self.images = 0  # in progress: they share the threads

    @contextmanager
    def image(self):
        """Count an image as in progress."""
        with self.changed:
            self.images += 1
        try:
            yield
        finally:
            with self.changed:
                self.images -= 1

    @contextmanager
    def computing(self, is_small: bool) -> Iterator[bool]:
        """Wait for all threads for a large image, for its share for a small one; yield whether it computes alone."""
        with self.entrance, self.changed:
            count = max(1, round(self.threads / self.images)) if is_small else self.threads
            self.changed.wait_for(lambda: self.free >= count)
            self.free -= count
        try:
            if self.threads > 1:
                torch.set_num_threads(count)
            yield count == self.threads
        finally:
            with self.changed:
                self.free += count
                self.changed.notify_all()


class Worker:
    """Reader, upscaler and writer of one image at a time."""

    def __init__(self, upscaler: Upscaler, slots: DeviceSlots, options: FileOptions):
        self.upscaler, self.slots, self.options = upscaler, slots, options
        self.silent_upscaler = copy.copy(upscaler)  # for images side by side, whose progress would be mixed up
        self.silent_upscaler.options = replace(upscaler.options, progress=None)

    def upscale(self, job: Job, stop: Callable[[], bool]) -> Outcome | None:
        """Return the outcome of a job, or None if it was stopped before its computation."""
        with self.slots.image():
            try:
                if not (self.options.overwrite or job.is_named) and os.path.isfile(job.target):
                    return Outcome(job.source, job.target, skipped=True)
                return self._upscale(job, stop)
            except Exception as error:
                return Outcome(job.source, job.target, error=file_error(job.source, error))

    def _upscale(self, job: Job, stop: Callable[[], bool]) -> Outcome | None:
        slots, size = self.slots, self.options.size
        with ExitStack() as until_written:
            with ExitStack() as until_computed:
                until_computed.enter_context(slots.reading_or_computing)
                picture, (width, height) = read(self.upscaler.size_of, Path(job.source), Path(job.target), self.options)
                is_small = math.prod(picture.size) <= SMALL and width * height <= SMALL_RESULT
                if is_small:
                    until_computed.close()
                with slots.computing(is_small) as is_alone:
                    if stop():
                        return None
                    begin = time.perf_counter()
                    upscaler = self.upscaler if is_alone else self.silent_upscaler
                    picture.image = upscaler(picture.image, **size)
                    seconds = time.perf_counter() - begin
                    if not is_small:
                        until_written.enter_context(slots.writing)
            write_image(picture, Path(job.target), self.options.quality)
        return Outcome(job.source, job.target, seconds=seconds, notes=picture.notes)
