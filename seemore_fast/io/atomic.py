"""Atomic file writing."""

import atexit
import contextlib
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from ..errors import os_reason

TEMPORARY = ".seemore-fast."  # prefix of temporary files
_being_written: set[Path] = set()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move it to `path` if the block ends without an error.

    If `path` is a symbolic link, the file it points to is replaced.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}.{threading.get_ident()}.tmp{path.suffix}")
    try:
        _being_written.add(temporary)
        temporary.touch()
        permissions = temporary.stat().st_mode  # of any new file; some writers make theirs private
        yield temporary
        temporary.chmod(permissions)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        _being_written.discard(temporary)


@atexit.register
def _clear():
    """Remove the temporary files of daemon threads that are still writing when the process ends."""
    for temporary in list(_being_written):
        with contextlib.suppress(OSError):
            temporary.unlink()


def unwritable_reason(path: Path) -> str | None:
    """Return why `path` cannot be written as a file, or None if it can."""
    path = Path(os.path.realpath(path))
    parent = path.parent
    try:
        if not parent.exists():
            return f"the folder {parent} does not exist: create it first"
        if not parent.is_dir():
            return f"{parent} is a file, expected a folder"
        if path.is_dir():
            return f"{path} is a folder, expected a file name"
        if path.exists() and not path.is_file():
            return f"{path} is a device or a pipe, expected a file name"
        for target in (parent, path):
            if target.exists() and _is_read_only(target):
                return f"{target} is read-only: choose another place or change its permissions"
    except OSError as error:
        return os_reason(error)
    return None


def _is_read_only(path: Path) -> bool:
    # The permission bits also hold for the superuser, who could ignore them.
    writable = path.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
    return not writable or not os.access(path, os.W_OK)
