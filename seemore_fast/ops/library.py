"""What operators with kernels register with torch: schema, kernels, shapes, gradients. One namespace, one way.

An operator <op> is `seemore_fast::<op>` and, for its gradients, `seemore_fast::<op>_backward`: Python functions
that allocate the results and hand them to the kernel of the backend chosen at that moment.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

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
    """Return room for an image of the batch, size and layout of `like`."""
    is_plain = like.is_contiguous() or not like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.contiguous_format if is_plain else torch.channels_last
    return torch.empty_like(like[:, :1].expand(-1, channels, -1, -1), dtype=dtype, memory_format=layout)


def contiguous(*parameters: Tensor | None) -> list[Tensor | None]:
    """Return the parameters as kernels take them."""
    return [None if p is None else p.contiguous() for p in parameters]
