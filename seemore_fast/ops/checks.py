"""Checks of arguments, the same for every operator and backend."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .autocast import autocast_dtype

WORDS = ("?", "int64", "mixed", "autocast", "stencil", "unread")


class Spec(NamedTuple):
    """Shape and type that an operator wants of a tensor, written as ``"C 1 1 K"`` with words behind it.

    Numbers are themselves, a letter stands for the size that it first met, ``2C`` for 2 times that of C. ``?`` allows
    None, ``int64`` asks for that dtype, ``mixed`` allows a floating dtype other than that of the first tensor,
    ``autocast`` does so under autocast. Kernels take a ``stencil``, a 3x3 weight, with its outputs innermost, too;
    backward kernels do not take ``unread`` tensors, whose values they do not need.
    """

    sizes: tuple[tuple[int, str], ...]  # factor and letter of each, the letter empty for a number
    words: frozenset[str]
    text: str  # of the sizes, as messages give it

    @staticmethod
    @functools.cache
    def parse(text: str) -> "Spec":
        symbols = [symbol for symbol in text.split() if symbol not in WORDS]
        words = frozenset(text.split()) - frozenset(symbols)
        sizes = ((int(s), "") if s.isdigit() else (2, s[1:]) if s[0] == "2" else (1, s) for s in symbols)
        return Spec(tuple(sizes), words, f"({', '.join(symbols)})")

    @property
    def is_optional(self) -> bool:
        return "?" in self.words

    @property
    def is_floating(self) -> bool:
        return "int64" not in self.words

    @property
    def is_image(self) -> bool:
        return len(self.sizes) == 4 and self.sizes[-2:] == ((1, "H"), (1, "W"))


def check_tensors(operator: str, one_dtype: bool = False, **arguments: tuple[Tensor | None, str]) -> dict[str, int]:
    """Check shapes, dtypes and devices of an operator's tensors; return the sizes that the letters stand for.

    Each argument is ``name=(tensor, "C 1 1 K")``, see `Spec`. Sizes are at least 1, but B may be 0.

    Raises TypeError for anything but a floating tensor or for a dtype other than that of the first one (under autocast
    dtypes may differ, unless `one_dtype`), ValueError for a shape or device that does not fit.
    """
    sizes: dict[str, int] = {}
    first_name, first = None, None
    for name, (tensor, text) in arguments.items():
        spec = Spec.parse(text)
        if tensor is None and spec.is_optional:
            continue
        if not isinstance(tensor, Tensor):
            got = "None" if tensor is None else f"a {type(tensor).__name__}"
            raise TypeError(f"{operator}: {name} is {got}, expected a tensor of shape {spec.text}")
        _check_shape(operator, name, tensor, spec, sizes)
        if not spec.is_floating and tensor.dtype != torch.int64:
            raise TypeError(f"{operator}: {name} has dtype {tensor.dtype}, expected torch.int64")
        if spec.is_floating and not tensor.is_floating_point():
            raise TypeError(f"{operator}: {name} has dtype {tensor.dtype}, expected a floating type")
        if first is None:
            first_name, first = name, tensor
        elif tensor.device != first.device:
            raise ValueError(
                f"{operator}: {name} is on {tensor.device}, expected {first.device}, where {first_name} is"
            )
        differs = tensor.dtype != first.dtype and not spec.words & {"int64", "mixed"}
        if differs and (autocast_dtype(first) is None or (one_dtype and "autocast" not in spec.words)):
            raise TypeError(
                f"{operator}: {name} has dtype {tensor.dtype}, expected {first.dtype}, which {first_name} has"
            )
    return sizes


def _check_shape(operator: str, name: str, tensor: Tensor, spec: Spec, sizes: dict[str, int]):
    fits = tensor.dim() == len(spec.sizes)
    for size, (factor, letter) in zip(tensor.shape, spec.sizes, strict=False):
        wanted = factor * sizes.setdefault(letter, size) if letter else factor
        if size == 0 and letter not in ("", "B", "K"):  # no image is a batch; the taps K are checked to be odd
            raise ValueError(f"{operator}: {name} has shape {tuple(tensor.shape)}, expected no size of 0 but B's")
        fits = fits and size == wanted
    if not fits:
        known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
        raise ValueError(f"{operator}: {name} has shape {tuple(tensor.shape)}, expected {spec.text} with {known}")


def check_shapes(operator: str, **arguments: tuple[Tensor | None, str]):
    """Check that sizes of one letter agree, as a compiler has to know it."""
    sizes: dict[str, int] = {}
    for name, (tensor, text) in arguments.items():
        for size, (factor, letter) in zip(() if tensor is None else tensor.shape, Spec.parse(text).sizes, strict=False):
            wanted = factor * sizes.setdefault(letter, size) if letter else factor
            torch._check(size == wanted, lambda name=name: f"{operator}: the shape of {name} does not fit the others'")


def check_choice(operator: str, name: str, value: object, choices: tuple):
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
