"""Row-major images for the CUDA stencils, which read the pixels of a row side by side and refuse other images.

Of such images, channels_last among them, a kernel would fetch a sector of 32 bytes for each pixel; a copy there and one
back read and write less.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_strided(argument: Any) -> bool:
    """Return whether an argument is an image whose pixels of a row lie apart."""
    return isinstance(argument, Tensor) and argument.dim() == 4 and argument.stride(3) != 1 and argument.shape[3] > 1


def by_rows(operator: torch._ops.OpOverloadPacket) -> Callable:
    """Return a function that calls a library's operator with copies of those images that are strided."""

    def run(*arguments: Any) -> Any:
        if not any(map(is_strided, arguments)):
            return operator(*arguments)
        schema = operator.default._schema.arguments
        copies = list(arguments)
        for number, (argument, declared) in enumerate(zip(arguments, schema, strict=True)):
            if is_strided(argument):
                is_result = declared.alias_info is not None and declared.alias_info.is_write
                copies[number] = argument.new_empty(argument.shape) if is_result else argument.contiguous()
        found = operator(*copies)
        for argument, copy, declared in zip(arguments, copies, schema, strict=True):
            if copy is not argument and declared.alias_info is not None and declared.alias_info.is_write:
                argument.copy_(copy)
        return found

    return run
