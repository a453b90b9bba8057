"""Available memory, and room that a mapped file extends."""

import contextlib
import ctypes
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

SMALL = 2**28  # bytes below which nothing is checked
OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = {  # by version: where they are; a limit, the use, and what of that are pages of files, which make room
    1: ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file")),
    2: ("/sys/fs/cgroup", "memory.max", "memory.current", ("active_file", "inactive_file")),
}  # fmt: skip
KINDS_IN_MEMORY = ("tmpfs", "ramfs")
MAP_FIXED = 0x10  # of Linux and macOS
CAN_STAY_RESIDENT = hasattr(mmap, "MAP_ANONYMOUS")  # whether a part of a `mapped_buffer` can


def available_memory() -> int | None:
    """Return the bytes that this process can still get, or None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    return max(min([free, *_spare_in_containers()]), 0)


def _spare_in_containers() -> Iterator[int]:
    """Yield what the limits leave of each control group that this process is in, from its own up to the topmost."""
    try:
        lines = [line.split(":", 2) for line in OWN_CGROUPS.read_text().splitlines()]
    except OSError:  # unknown: as in the topmost ones
        lines = [("", "memory", "/"), ("", "", "/")]
    for _, controllers, path in lines:
        if controllers and "memory" not in controllers.split(","):
            continue
        root, limit, used, reclaimable = CGROUPS[1 if controllers else 2]
        own = Path(root) / path.lstrip("/")
        for group in (own, *own.parents[: len(Path(path).parts) - 1]):
            try:
                spare = int((group / limit).read_text()) - int((group / used).read_text())
            except (OSError, ValueError):  # no limits here, or "max"
                continue
            with contextlib.suppress(OSError, ValueError):
                pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                spare += sum(int(pages.get(name, 0)) for name in reclaimable)
            yield spare


def check_memory(needed: int, what: str):
    """Raise MemoryError where `needed` bytes, for `what`, are more than are available."""
    if needed < SMALL:
        return
    available = available_memory()
    if available is not None and needed > available:
        raise MemoryError(
            f"{what} needs {needed / 2**30:,.1f} GiB ({needed:,} bytes) of memory, {available / 2**30:,.1f} GiB are "
            "available: take a smaller image, or a part of it"
        )


def is_in_memory(folder: Path) -> bool:
    """Return whether files of a folder take memory, as those of /tmp do on many systems."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    real = Path(os.path.realpath(folder))
    above = [(place, kind) for place, kind in reversed(mounts) if real.is_relative_to(place)]
    return bool(above) and max(above, key=lambda mount: len(mount[0]))[1] in KINDS_IN_MEMORY


def folder_of_large_files() -> Path:
    """Return the system's folder for temporary files, or the one for large ones where the first is in memory."""
    usual, large = Path(tempfile.gettempdir()), Path("/var/tmp")
    return large if is_in_memory(usual) and os.access(large, os.W_OK) and not is_in_memory(large) else usual


def mapped_buffer(count: int, folder: Path, resident: int = 0) -> tuple[torch.Tensor, Callable[[int, int], None]]:
    """Return `count` bytes of zero, uint8, in a temporary file of `folder`, which is gone as soon as they are.

    And a function that takes the bytes [begin, end) out of memory, where the system can: they stay in the file. The
    first `resident` bytes, whole pages, are in memory instead; of these it must not take any.

    Raises OSError where the folder cannot be written to, or its disk has no room for them; MemoryError where it is a
    folder in memory (tmpfs), and the memory does not suffice.
    """
    filed = count - resident
    if is_in_memory(folder):
        check_memory(filed, f"what is to wait in {folder}, which is in memory itself,")
    free = shutil.disk_usage(folder).free
    if filed > free:
        raise OSError(
            f"{filed / 2**30:,.1f} GiB are needed in {folder} for what does not fit into memory, {free / 2**30:,.1f} "
            "GiB are free: choose a folder on another disk with --scratch"
        )
    with tempfile.NamedTemporaryFile(prefix="seemore-fast-", dir=folder) as file:
        file.truncate(count)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), resident, filed)  # a disk that is full later would end the process
        mapped = mmap.mmap(file.fileno(), count)

    def release(begin: int, end: int):
        begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    room = torch.frombuffer(mapped, dtype=torch.uint8)
    if resident:
        _map_memory(room.data_ptr(), resident)
    return room, release


def _map_memory(address: int, count: int):
    """Put memory of zeros into the place of the pages at an address, which have to be this process's own."""
    system = ctypes.CDLL(None, use_errno=True)
    system.mmap.restype = ctypes.c_void_p
    system.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    if system.mmap(address, count, access, kind, -1, 0) != address:
        raise OSError(ctypes.get_errno(), f"could not map {count:,} bytes")
