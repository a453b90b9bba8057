"""Many files, several at hand at once, on several devices; what fails costs the others nothing."""

import copy
import math
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from .. import memory
from ..errors import ImageError
from ..io.images import MAX_MEGAPIXELS, Picture, check_output, naming, read_image, write_image
from .jobs import Job
from .upscaler import Upscaler

LEAST_LANES, MOST_LANES = 2, 8  # of a device: what is read ahead and written behind takes memory
MEMORY_OF_A_LANE = 2**29  # bytes for a small image: L takes some 2 KB per pixel of it
SMALL, SMALL_RESULT = 2**18, 2**22  # pixels of images that are computed several at once


@dataclass(frozen=True)
class Options:
    """How files are read and written; `size` are `Upscaler`'s keywords."""

    max_megapixels: float = MAX_MEGAPIXELS
    overwrite: bool = False
    quality: int | None = None
    size: dict = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of a file, the `number`th: done, or skipped, or failed with a reason."""

    source: str
    target: str
    number: int = 0
    seconds: float = 0.0
    skipped: bool = False
    error: str = ""
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict:
        return asdict(self)


def upscale_files(
    upscalers: list[Upscaler],
    jobs: Iterable[Job],
    options: Options,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Outcome]:
    """Yield the outcome of each job as it is done, in any order; after `stop()`, of those that were being computed.

    Each device has lanes, threads that take a job and see it through: some read and write while others compute. A CPU's
    cores compute as many small images at once, which waits less for each other than all of them at one. Of large images
    one is read ahead, one computed and one written at a time. To close the generator stops, too.
    """
    jobs, lock, outcomes, ended = enumerate(jobs), threading.Lock(), queue.SimpleQueue(), threading.Event()
    threads = torch.get_num_threads()
    devices = {upscaler.model.mean.device for upscaler in upscalers}  # "cuda" is one of them by its number
    turns = {device: _Turns(threads if device.type == "cpu" else 1) for device in devices}

    def is_over() -> bool:
        return ended.is_set() or stop()

    def take() -> tuple[int, Job] | None:
        with lock:
            return None if is_over() else next(jobs, None)

    def work(lane: _Lane):
        torch.get_num_threads()  # the first call of a thread sets the number that is everybody's
        try:
            while taken := take():
                number, job = taken
                if outcome := lane.outcome(job, is_over):
                    outcomes.put(replace(outcome, number=number))
        except BaseException as error:
            outcomes.put(error)
        finally:
            outcomes.put(None)

    lanes = [_Lane(one, turns[one.model.mean.device], options) for one in upscalers for _ in range(_lanes(threads))]
    running = [threading.Thread(target=work, args=(lane,), daemon=True) for lane in lanes]
    try:
        for lane in running:
            lane.start()
        left = len(lanes)
        while left:
            outcome = outcomes.get()
            if outcome is None:
                left -= 1
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                yield outcome
    except KeyboardInterrupt:  # nobody wants to wait
        running.clear()
        raise
    finally:
        ended.set()
        for lane in running:
            lane.join()
        torch.set_num_threads(threads)  # of threads to come: lanes have set their own, and with that everybody's


def _lanes(threads: int) -> int:
    """Return how many images a device has at hand: one for each thread, and two at least, to read during computing."""
    available = memory.available_memory()
    room = MOST_LANES if available is None else available // MEMORY_OF_A_LANE
    return max(LEAST_LANES, min(threads, room, MOST_LANES))


class _Turns:
    """The threads of a device, which images wait for."""

    def __init__(self, threads: int):
        self.free = self.threads = threads
        self.entrance, self.returned = threading.Lock(), threading.Condition()
        # Of those that may be large, one waits while one is computed; and one of the large is written.
        self.two_are_read, self.one_is_written = threading.BoundedSemaphore(2), threading.Lock()
        self.at_hand = 0  # images that lanes have taken: they share the threads

    @contextmanager
    def image(self):
        """Count an image that a lane has taken, until it is written."""
        with self.returned:
            self.at_hand += 1
        try:
            yield
        finally:
            with self.returned:
                self.at_hand -= 1

    @contextmanager
    def computing(self, is_small: bool) -> Iterator[bool]:
        """Wait for an image's turn: all threads for a large one, its share for a small. Tell whether it is alone."""
        with self.entrance, self.returned:
            count = max(1, round(self.threads / self.at_hand)) if is_small else self.threads
            self.returned.wait_for(lambda: self.free >= count)
            self.free -= count
        try:
            if self.threads > 1:
                torch.set_num_threads(count)
            yield count == self.threads
        finally:
            with self.returned:
                self.free += count
                self.returned.notify_all()


class _Lane:
    """What one thread does for its images, one after another."""

    def __init__(self, upscaler: Upscaler, turns: _Turns, options: Options):
        self.upscaler, self.turns, self.options = upscaler, turns, options
        self.among_others = copy.copy(upscaler)  # whose progress nobody can tell from theirs
        self.among_others.way = replace(upscaler.way, progress=None)

    def outcome(self, job: Job, stop: Callable) -> Outcome | None:
        """Return what became of a job; None if it was to stop before the image was computed."""
        with self.turns.image():
            try:
                return self._outcome(job, stop)
            except Exception as error:  # one file's
                return _failed(job, error)

    def _outcome(self, job: Job, stop: Callable) -> Outcome | None:
        with ExitStack() as until_written:
            with ExitStack() as until_computed:
                until_computed.enter_context(self.turns.two_are_read)
                picture = _read(job, self.upscaler, self.options)
                if isinstance(picture, Outcome):
                    return picture
                is_small = self._is_small(picture)
                if is_small:
                    until_computed.close()
                with self.turns.computing(is_small) as is_alone:
                    if stop():
                        return None
                    begin = time.perf_counter()
                    upscaler = self.upscaler if is_alone else self.among_others
                    picture.image = upscaler(picture.image, **self.options.size)
                    seconds = time.perf_counter() - begin
                    if not is_small:
                        until_written.enter_context(self.turns.one_is_written)
            with naming(job.target):
                write_image(picture, job.target, self.options.quality)
        return Outcome(str(job.source), str(job.target), seconds=seconds, notes=picture.notes)

    def _is_small(self, picture: Picture) -> bool:
        width, height = picture.size
        result = self.upscaler.size_of(height, width, **self.options.size)
        return width * height <= SMALL and math.prod(result) <= SMALL_RESULT


def _read(job: Job, upscaler: Upscaler, options: Options) -> Picture | Outcome:
    try:
        if not (options.overwrite or job.is_named) and os.path.isfile(job.target):
            return Outcome(str(job.source), str(job.target), skipped=True)
        with naming(job.source):
            picture = read_image(job.source, options.max_megapixels, deeper=True)
        with naming(job.target):
            job.target.parent.mkdir(parents=True, exist_ok=True)
            width, height = picture.size
            height, width = upscaler.size_of(height, width, **options.size)
            check_output(job.target, picture, (width, height))
        return picture
    except Exception as error:
        return _failed(job, error)


def _failed(job: Job, error: Exception) -> Outcome:
    text = str(error) or ("out of memory" if isinstance(error, MemoryError) else type(error).__name__)
    text = text.splitlines()[0]
    if not isinstance(error, ImageError):  # those begin with the path at fault
        text = f"{job.source}: {text}"
    return Outcome(str(job.source), str(job.target), error=text)


def upscale_file(upscaler: Upscaler, source: Path, target: Path, options: Options):
    """Do what `Upscaler.upscale_file` promises."""
    if os.path.realpath(source) == os.path.realpath(target):
        raise ImageError(f"{target}: is the input too, expected another file")
    picture = _read(Job(source, target, is_named=True), upscaler, options)
    if isinstance(picture, Outcome):
        raise ImageError(picture.error)
    picture.image = upscaler(picture.image, **options.size)
    with naming(target):
        write_image(picture, target, options.quality)
    for note in picture.notes:
        warnings.warn(f"{source}: {note}", stacklevel=3)
