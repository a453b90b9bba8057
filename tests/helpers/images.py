"""Images, and what a folder of them holds."""

import numpy as np


def noise(*shape, dtype=np.uint8):
    values = np.random.default_rng(0).random(shape)
    return (values * np.iinfo(dtype).max).astype(dtype) if np.issubdtype(dtype, np.integer) else values.astype(dtype)


def listing(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def pixels(channels):
    return np.random.default_rng(0).integers(0, 256, (16, 20, channels), np.uint8).squeeze()
