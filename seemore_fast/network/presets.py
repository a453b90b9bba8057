"""The published sizes of SeemoRe: T, B and L."""

from .model import SeemoRe

_COMMON = dict(in_chans=3, num_experts=3, img_range=1.0, global_kernel_size=11, lr_space="exp", topk=1)
PRESETS = {
    "t": dict(num_layers=6, embedding_dim=36, use_shuffle=True, recursive=2, **_COMMON),
    "b": dict(num_layers=8, embedding_dim=48, use_shuffle=True, recursive=2, **_COMMON),
    "l": dict(num_layers=16, embedding_dim=48, use_shuffle=False, recursive=1, **_COMMON),
}


def seemore_t(scale: int = 4, pretrained: bool = False, **overrides) -> SeemoRe:
    """Return SeemoRe-T: 6 groups of 36 channels. `overrides` are arguments of `SeemoRe`."""
    return _build("t", scale, pretrained, overrides)


def seemore_b(scale: int = 4, pretrained: bool = False, **overrides) -> SeemoRe:
    """Return SeemoRe-B: 8 groups of 48 channels. `overrides` are arguments of `SeemoRe`."""
    return _build("b", scale, pretrained, overrides)


def seemore_l(scale: int = 4, pretrained: bool = False, **overrides) -> SeemoRe:
    """Return SeemoRe-L: 16 groups of 48 channels. `overrides` are arguments of `SeemoRe`."""
    return _build("l", scale, pretrained, overrides)


def _build(size: str, scale: int, pretrained: bool, overrides: dict) -> SeemoRe:
    if pretrained:
        from .checkpoint import load_model

        return load_model(f"seemore_{size}_x{scale}", **overrides)
    return SeemoRe(**{"scale": scale, **PRESETS[size], **overrides})
