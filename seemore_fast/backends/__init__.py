"""Backends: table of kernels, selection of the one that computes an operator, and a report."""

from .registry import ALL, BACKENDS, CPU, FLOATS, KERNELS, MATRIX, STENCIL, Kernel
from .report import backend_info
from .selection import (
    backend_for_device,
    backend_of,
    current_backend,
    interpreted,
    is_plain,
    lookup_kernel,
    select_backend,
    set_backend,
    unsupported_reason,
    use_backend,
    without_kernels,
)  # fmt: skip

__all__ = [
    "ALL",
    "BACKENDS",
    "CPU",
    "FLOATS",
    "KERNELS",
    "MATRIX",
    "STENCIL",
    "Kernel",
    "backend_for_device",
    "backend_info",
    "backend_of",
    "current_backend",
    "interpreted",
    "is_plain",
    "lookup_kernel",
    "select_backend",
    "set_backend",
    "unsupported_reason",
    "use_backend",
    "without_kernels",
]
