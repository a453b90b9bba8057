"""How much memory there is, so that what cannot fit is refused before anything is allocated."""

from pathlib import Path

SMALL = 2**28  # bytes below which nobody asks
CGROUPS = (  # limit and use of the container that this process is in, if any: version 2, version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_memory() -> int | None:
    """Return the bytes that this process can still get, or None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    for limit, used in CGROUPS:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such container, or "max"
            continue
    return max(free, 0)


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
