"""Many files: read ahead, compute, write behind; on several devices at once; what fails costs the others nothing."""

import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .errors import ImageError
from .images import MAX_MEGAPIXELS, Picture, check_output, naming, read_image, write_image
from .jobs import Job
from .upscaler import Upscaler


@dataclass(frozen=True)
class Options:
    """How files are read and written; `size` are `Upscaler`'s keywords."""

    max_megapixels: float = MAX_MEGAPIXELS
    overwrite: bool = False
    quality: int | None = None
    size: dict = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of a file: done, or skipped, or failed with a reason."""

    source: str
    target: str
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

    Each upscaler has a thread; its next image is read and its last one written meanwhile.
    """
    jobs, lock, outcomes = iter(jobs), threading.Lock(), queue.SimpleQueue()

    def take() -> Job | None:
        with lock:
            return None if stop() else next(jobs, None)

    def work(upscaler: Upscaler):
        try:
            _pipeline(upscaler, take, stop, options, outcomes.put)
        except BaseException as error:
            outcomes.put(error)
        finally:
            outcomes.put(None)

    threads = [threading.Thread(target=work, args=(upscaler,), daemon=True) for upscaler in upscalers]
    for thread in threads:
        thread.start()
    running = len(threads)
    while running:
        outcome = outcomes.get()
        if outcome is None:
            running -= 1
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            yield outcome


def _pipeline(upscaler: Upscaler, take: Callable, stop: Callable, options: Options, put: Callable):
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        written: Future | None = None
        ahead = _ahead(reader, take, upscaler, options)
        while ahead and not stop():
            (job, reading), following = ahead, None
            try:
                picture = reading.result()
                following = _ahead(reader, take, upscaler, options)  # read while this one is computed
                if isinstance(picture, Outcome):
                    put(picture)
                else:
                    begin = time.perf_counter()
                    picture.image = upscaler(picture.image, **options.size)
                    if written:
                        written.result()  # one at a time: finished images are not heaped up
                    outcome = Outcome(str(job.source), str(job.target), time.perf_counter() - begin)
                    written = writer.submit(_write, job, picture, options, outcome, put)
            except Exception as error:  # one file's
                put(_failed(job, error))
                following = following or _ahead(reader, take, upscaler, options)
            ahead = following
        if written:
            written.result()


def _ahead(reader: ThreadPoolExecutor, take: Callable, upscaler, options: Options) -> tuple[Job, Future] | None:
    job = take()
    return (job, reader.submit(_read, job, upscaler, options)) if job else None


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


def _write(job: Job, picture: Picture, options: Options, outcome: Outcome, put: Callable):
    try:
        with naming(job.target):
            write_image(picture, job.target, options.quality)
        outcome.notes = picture.notes
        put(outcome)
    except Exception as error:
        put(_failed(job, error))


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
