"""SeemoRe super-resolution, fast: a drop-in PyTorch module whose operators are checked against a plain reference."""

from typing import TYPE_CHECKING, Any

from . import ops, reference
from ._version import __version__
from .backends import backend_info, set_backend, use_backend
from .network.accelerate import accelerate
from .network.checkpoint import load_model
from .network.model import SeemoRe
from .network.presets import seemore_b, seemore_l, seemore_t
from .training.graphed_step import graphed_step

if TYPE_CHECKING:
    from .upscale import Upscaler

__all__ = [
    "SeemoRe",
    "Upscaler",
    "__version__",
    "accelerate",
    "backend_info",
    "graphed_step",
    "load_model",
    "ops",
    "reference",
    "seemore_b",
    "seemore_l",
    "seemore_t",
    "set_backend",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name == "Upscaler":  # brings numpy and Pillow: only when asked for
        from .upscale import Upscaler

        return Upscaler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
