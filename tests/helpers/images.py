"""Images, and what a folder of them holds."""

import numpy as np


def max_value(dtype):
    """Return the value of white."""
    return np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1


def noise(*shape, dtype=np.uint8):
    return (np.random.default_rng(0).random(shape) * max_value(dtype)).astype(dtype)


def listing(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def pixels(channels):
    return np.random.default_rng(0).integers(0, 256, (16, 20, channels), np.uint8).squeeze()
