"""Exit statuses, and the error that means the second of them."""

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class UsageError(Exception):
    """Arguments that cannot be carried out; nothing was done."""
