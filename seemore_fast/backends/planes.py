"""Memory of images for kernels on a GPU, each plane of which, one (batch, channel), begins at a whole vector.

Strides between planes are multiples of 16 elements, and so is the room of each. Kernels load 16 bytes at a time
whatever the size, may read and write all of the room, and are not compiled again for a size whose planes are odd.
"""

import torch
from torch import Tensor

UNIT = 16  # elements: at least 32 bytes


def padded(pixels: int) -> int:
    """Return the number of pixels that a plane has room for."""
    return (pixels + UNIT - 1) // UNIT * UNIT


def new_image(like: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return room for an image of the batch and size of `like`, row after row, its planes padded."""
    batch, _, height, width = like.shape
    plane = padded(height * width)
    room = like.new_empty(batch * channels * plane, dtype=dtype or like.dtype)
    return room.as_strided((batch, channels, height, width), (channels * plane, plane, width, 1))


def new_packed(like: Tensor, channels: int, dtype: torch.dtype | None = None, room: int = 0) -> Tensor:
    """Return the same with channels innermost; pixels lie `channels` elements apart or, if given, `room`."""
    batch, _, height, width = like.shape
    room = room or channels
    image = padded(height * width) * room
    memory = like.new_empty(batch * image, dtype=dtype or like.dtype)
    return memory.as_strided((batch, channels, height, width), (image, 1, width * room, room))


def has_room(image: Tensor) -> bool:
    """Return whether a kernel may read `padded` pixels of every plane: rows must follow each other."""
    batch, channels, height, width = image.shape
    pixels = height * width
    if pixels % UNIT == 0:
        return True
    of_batch, of_channel, _, of_pixel = image.stride()
    room = padded(pixels) * of_pixel
    if (batch > 1 and of_batch < room) or (channels > 1 and of_channel > of_pixel and of_channel < room):
        return False
    last = image.storage_offset() + (batch - 1) * of_batch + (channels - 1) * of_channel + room - of_pixel
    return (last + 1) * image.element_size() <= image.untyped_storage().nbytes()
