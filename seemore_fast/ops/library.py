"""What operators with kernels register with torch: schema, kernels, shapes, gradients. One namespace, one way.

An operator <op> is `seemore_fast::<op>` and, for its gradients, `seemore_fast::<op>_backward`: Python functions
that allocate the results and hand them to the kernel of the backend chosen at that moment.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import backends
from ..backends.planes import new_image, new_packed

LIBRARY = torch.library.Library("seemore_fast", "DEF")
IMPLEMENTATIONS: dict[str, Callable] = {}  # what runs, by the operator's qualified name


def define(name: str, schema: str, implementation: Callable, fake: Callable):
    """Register ``seemore_fast::<name><schema>``: what runs, and what gives shapes and strides to compilers."""
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    IMPLEMENTATIONS[f"seemore_fast::{name}"] = implementation
    torch.library.register_fake(f"seemore_fast::{name}", fake, lib=LIBRARY)


def differentiate(name: str, setup_context: Callable, backward: Callable):
    """Register the gradient of an operator, and that its backward has none."""
    torch.library.register_autograd(f"seemore_fast::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    refuse = partial(refuse_second_derivative, name)
    torch.library.register_autograd(f"seemore_fast::{name}_backward", refuse, lib=LIBRARY)


def refuse_second_derivative(name: str, ctx, *gradients):
    raise RuntimeError(
        f"{name}: its gradient is not differentiable, expected a single backward; "
        'under seemore_fast.use_backend("reference") torch differentiates any number of times'
    )


def cast_for_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, return the tensors in its dtype, as torch does for convolutions: all but float64 ones.

    What is no tensor stays as it is: the check that follows refuses it.
    """
    first = tensors[0]
    if not isinstance(first, Tensor) or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


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
    """Tell whether images are allocated for kernels on a GPU: on one, or where Triton takes those of the CPU."""
    return image.device.type == "cuda" or (backends.interpreted() and backends.current() == "triton")


def laid_out(weight: Tensor) -> Tensor:
    """Return a 3x3 weight (D, C, 3, 3) with outputs innermost, as Triton's layers read it without another copy."""
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def stencil(weight: Tensor, x: Tensor) -> Tensor:
    """Return a 3x3 weight as the kernels of layers take it for x: Triton's lay it out, unless it is, others do not."""
    return weight if takes_planes(x) else weight.contiguous()


def contiguous(*parameters: Tensor | None) -> list[Tensor | None]:
    """Return the parameters as kernels take them."""
    return [None if p is None else p.contiguous() for p in parameters]
