"""Arithmetic of sizes on the host; Triton's functions of the same names take microseconds there."""


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is not less than n, a positive number."""
    return 1 << (n - 1).bit_length()


def round_up(n: int, multiple: int) -> int:
    """Return the least multiple that is not less than n."""
    return cdiv(n, multiple) * multiple
