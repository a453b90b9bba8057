"""Memory of an operator's results, and weights as kernels read them."""

import torch
from torch import Tensor

from ..backends import selection
from ..backends.planes import new_image, new_packed


def empty_image(like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Return room for an image of the batch, size and layout of `like`; for kernels on a GPU its planes are padded."""
    is_plain = like.is_contiguous() or not like.is_contiguous(memory_format=torch.channels_last)
    if takes_planes(like):
        return new_image(like, channels, dtype) if is_plain else new_packed(like, channels, dtype)
    layout = torch.contiguous_format if is_plain else torch.channels_last
    return torch.empty_like(like[:, :1].expand(-1, channels, -1, -1), dtype=dtype, memory_format=layout)


def empty_like(image: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return room for an image like another one; for kernels on a GPU its planes are padded."""
    if takes_planes(image):
        return empty_image(image, image.shape[1], dtype or image.dtype)
    return torch.empty_like(image, dtype=dtype)


def takes_planes(image: Tensor) -> bool:
    """Return whether images are allocated for a GPU's kernels: on a GPU, or where Triton takes those of the CPU."""
    return image.device.type == "cuda" or (selection.interpreted() and selection.current_backend() == "triton")


def laid_out(weight: Tensor) -> Tensor:
    """Return a 3x3 weight (D, C, 3, 3) with outputs innermost, as Triton's layers read it without another copy."""
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def stencil(weight: Tensor, x: Tensor) -> Tensor:
    """Return a 3x3 weight as the kernels of layers take it for x: Triton's lay it out, unless it is, others do not."""
    return weight if takes_planes(x) else weight.contiguous()
