"""One checker for the arguments of every operator, so that every backend refuses with the same words."""

import functools

import torch
from torch import Tensor


def check_tensors(operator: str, one_dtype: bool = False, **arguments: tuple[Tensor | None, str]) -> dict[str, int]:
    """Check shapes, dtypes and devices of an operator's tensors; return what the letters of the shapes stand for.

    Each argument is ``name=(tensor, "C 1 1 K")``: numbers are themselves, a letter stands for the size that it
    first met, ``2C`` for twice that of C. Sizes are at least 1, but B may be 0. A question mark at the end, as in
    ``"C ?"``, allows None.

    Raises TypeError for what is no floating tensor or differs in dtype from the first one (under autocast dtypes
    may differ, unless `one_dtype`), ValueError for a shape or device that does not fit.
    """
    sizes: dict[str, int] = {}
    first_name, first = None, None
    for name, (tensor, spec) in arguments.items():
        if tensor is None and spec.endswith("?"):
            continue
        spec = spec.removesuffix(" ?")
        check_is_tensor(operator, name, tensor, spec)
        _check_shape(operator, name, tensor, spec, sizes)
        if not tensor.is_floating_point():
            raise TypeError(f"{operator}: {name} has dtype {tensor.dtype}, expected a floating type")
        if first is None:
            first_name, first = name, tensor
        else:
            check_device(operator, name, tensor, first_name, first)
        if tensor.dtype != first.dtype and (one_dtype or not torch.is_autocast_enabled(first.device.type)):
            raise TypeError(
                f"{operator}: {name} has dtype {tensor.dtype}, expected {first.dtype}, which {first_name} has"
            )
    return sizes


def check_is_tensor(operator: str, name: str, tensor, spec: str):
    """Raise TypeError unless `tensor` is one; `spec` says of what shape it should be."""
    if not isinstance(tensor, Tensor):
        got = "None" if tensor is None else f"a {type(tensor).__name__}"
        raise TypeError(f"{operator}: {name} is {got}, expected a tensor of shape ({', '.join(spec.split())})")


def check_device(operator: str, name: str, tensor: Tensor, first_name: str, first: Tensor):
    """Raise ValueError unless both tensors are on one device."""
    if tensor.device != first.device:
        raise ValueError(f"{operator}: {name} is on {tensor.device}, expected {first.device}, where {first_name} is")


def _check_shape(operator: str, name: str, tensor: Tensor, spec: str, sizes: dict[str, int]):
    expected = _parse(spec)
    fits = tensor.dim() == len(expected)
    for size, (factor, letter) in zip(tensor.shape, expected, strict=False):
        wanted = factor * sizes.setdefault(letter, size) if letter else factor
        if size == 0 and letter not in ("", "B", "K"):  # no image is a batch; the taps K are checked to be odd
            raise ValueError(f"{operator}: {name} has shape {tuple(tensor.shape)}, expected no size of 0 but B's")
        fits = fits and size == wanted
    if not fits:
        known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
        raise ValueError(
            f"{operator}: {name} has shape {tuple(tensor.shape)}, expected ({', '.join(spec.split())}) with {known}"
        )


@functools.cache
def _parse(spec: str) -> list[tuple[int, str]]:
    """Return the factor and the letter of each size, the letter empty for a number."""
    sizes = []
    for symbol in spec.split():
        if symbol.isdigit():
            sizes.append((int(symbol), ""))
        else:
            sizes.append((2, symbol[1:]) if symbol[0] == "2" else (1, symbol))
    return sizes


def check_choice(operator: str, name: str, value, choices: tuple):
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{operator}: {name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_together(operator: str, **tensors: Tensor | None):
    """Raise ValueError where some of the optional tensors are given without the others."""
    missing = [name for name, tensor in tensors.items() if tensor is None]
    given = [name for name in tensors if name not in missing]
    if missing and given:
        all_of_them = "both" if len(tensors) == 2 else "all"
        raise ValueError(
            f"{operator}: {missing[0]} is None, expected a tensor beside {given[0]}, or None for {all_of_them}"
        )


def check_odd(operator: str, name: str, value: int):
    """Raise ValueError unless `value`, a kernel size, is odd and positive."""
    if value < 1 or value % 2 == 0:
        raise ValueError(f"{operator}: {name} has {value} taps, expected an odd number")


def check_at_least(operator: str, name: str, value: int, least: int):
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{operator}: {name} is {value!r}, expected an integer of at least {least}")
