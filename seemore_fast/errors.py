"""Exceptions of the package, each a complete message for the user, and helpers to word them."""

import os


class SeemoreError(Exception):
    """Base of the package's own exceptions."""


class UsageError(SeemoreError):
    """Command line arguments that cannot be carried out; nothing was done."""


class CheckpointError(SeemoreError, ValueError):
    """A file or state dict that does not hold the expected weights."""


class ImageError(SeemoreError, ValueError):
    """A file that cannot be read or written as an image."""


class JobError(SeemoreError, ValueError):
    """Inputs and outputs that do not fit together; nothing was done."""


class PairError(SeemoreError, ValueError):
    """Folders whose images cannot be compared."""


class ConfigError(SeemoreError, ValueError):
    """A training configuration that cannot be run: names the key, its value and what is expected."""


class StateError(SeemoreError, RuntimeError):
    """A checkpoint that does not belong to the run to resume."""


class TrainingError(SeemoreError, RuntimeError):
    """A run that cannot go on: names the step, the images and the last checkpoint."""


def first_line(error: object) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return str(error).partition("\n")[0] or type(error).__name__


def os_reason(error: OSError) -> str:
    """Return the system's message for an error, without the name of the file."""
    return os.strerror(error.errno) if error.errno else str(error)


def file_error(path: str | os.PathLike, error: Exception) -> str:
    """Return the first line of an error, with the name of the file at fault."""
    if isinstance(error, ImageError):  # names it already
        return first_line(error)
    is_bare = isinstance(error, MemoryError) and not str(error)
    return f"{path}: {'out of memory' if is_bare else first_line(error)}"


def some_of(names: list[str], most: int = 6) -> str:
    """Return the first `most` names and the number of the others."""
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")
