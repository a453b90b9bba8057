"""The published sizes of SeemoRe as functions: T, B and L."""

from typing import Any

from .checkpoint import load_model
from .config import PRESETS
from .model import SeemoRe


def seemore_t(scale: int = 4, pretrained: bool = False, **overrides: Any) -> SeemoRe:
    """Return SeemoRe-T: 6 groups of 36 channels. `overrides` are arguments of `SeemoRe`."""
    return _build("t", scale, pretrained, overrides)


def seemore_b(scale: int = 4, pretrained: bool = False, **overrides: Any) -> SeemoRe:
    """Return SeemoRe-B: 8 groups of 48 channels. `overrides` are arguments of `SeemoRe`."""
    return _build("b", scale, pretrained, overrides)


def seemore_l(scale: int = 4, pretrained: bool = False, **overrides: Any) -> SeemoRe:
    """Return SeemoRe-L: 16 groups of 48 channels. `overrides` are arguments of `SeemoRe`."""
    return _build("l", scale, pretrained, overrides)


def _build(size: str, scale: int, pretrained: bool, overrides: dict) -> SeemoRe:
    if pretrained:
        return load_model(f"seemore_{size}_x{scale}", **overrides)
    return SeemoRe(**{"scale": scale, **PRESETS[size], **overrides})
