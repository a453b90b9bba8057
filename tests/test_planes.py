"""The room of images for kernels on a GPU: strides of whole vectors, and room that belongs to no other plane."""

import pytest
import torch

from seemore_fast import ops, use_backend
from seemore_fast.backends.planes import UNIT, has_room, new_image, new_packed, padded

ODD, EVEN = (2, 3, 5, 7), (2, 3, 4, 8)


@pytest.mark.parametrize("size", [ODD, EVEN, (1, 1, 1, 1), (0, 3, 5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_planes_begin_at_whole_vectors_and_rows_follow_each_other(size, dtype):
    like = torch.empty(size)
    image, packed = new_image(like, 6, dtype), new_packed(like, 6)
    assert image.shape == packed.shape == (size[0], 6, *size[2:])
    assert (image.dtype, packed.dtype) == (dtype, like.dtype)
    assert image.stride(0) % UNIT == image.stride(1) % UNIT == packed.stride(0) % UNIT == 0
    assert image.stride()[2:] == (size[3], 1) and packed.stride()[1:] == (1, 6 * size[3], 6)
    assert has_room(image) and has_room(packed)


@pytest.mark.parametrize("image", [new_image(torch.empty(ODD), 4), new_packed(torch.empty(ODD), 4)])
def test_the_room_of_a_plane_is_no_other_ones(image):
    """As a kernel does, write up to the end of the room of every plane: no pixel of another one changes."""
    batch, channels, height, width = image.shape
    image.zero_()
    for b in range(batch):
        for c in range(channels):
            offset = b * image.stride(0) + c * image.stride(1)
            room = image.as_strided((padded(height * width),), (image.stride(3),), offset)
            room[height * width :] = 1
    assert not image.any()


@pytest.mark.parametrize(
    "image, expected",
    {
        "even": (torch.empty(EVEN), True),
        "odd": (torch.empty(ODD), False),
        "one odd plane": (torch.empty(1, 1, 5, 7), False),
        "channels_last": (torch.empty(ODD).to(memory_format=torch.channels_last), False),
        "half of the channels": (new_image(torch.empty(ODD), 6).chunk(2, dim=1)[1], True),
        "cut out of a larger one": (torch.empty(2, 3, 8, 7)[:, :, :5], True),
        "the end of a larger one": (torch.empty(2, 3, 8, 7)[:, :, 3:], False),
        "strides without room at the end": (torch.empty_strided(ODD, (144, 48, 7, 1)), False),
        "expanded": (torch.empty(1, 1, 1, 1).expand(ODD), True),
    }.values(),
)
def test_images_that_have_room(image, expected):
    assert has_room(image) == expected


@pytest.mark.parametrize("name, is_padded", [("reference", False), ("auto", False), ("triton", True)])
def test_only_kernels_for_a_gpu_get_padded_results(name, is_padded):
    """Those of the CPU keep torch's layout."""
    with use_backend(name):
        y = ops.norm_pointwise(torch.rand(ODD), *torch.rand(2, 3), torch.rand(4, 3, 1, 1), torch.rand(4))
    assert has_room(y) == is_padded and y.is_contiguous() != is_padded
