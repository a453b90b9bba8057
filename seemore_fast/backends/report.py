"""Report on the backends of this machine, for bug reports."""

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import _version
from . import native
from .registry import BACKENDS, KERNELS
from .selection import current_backend, unsupported_reason


def backend_info() -> dict:
    """Return available backends, reasons for the others, and the versions that matter in a bug report."""
    reasons = {name: unsupported_reason(name) for name in BACKENDS}
    available = [name for name, reason in reasons.items() if reason is None]
    return {
        "seemore_fast": _version.__version__,
        "backend": current_backend(),
        "available": ["reference", *available],
        "unavailable": {name: reason for name, reason in reasons.items() if reason},
        "operators": {
            name: [k.backend for k in kernels if k.backend in available] for name, kernels in KERNELS.items()
        },
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "build": native.build_info(),
        "cpu": _cpu_info(),
        "cuda": _cuda_info(),
        "triton": _triton_info(),
    }


def _cpu_info() -> dict:
    info = {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    if unsupported_reason("cpu") is None:
        info |= {"instruction_sets": list(native.instruction_sets()), "instruction_set": native.instruction_set()}
    return info


def _cuda_info() -> dict:
    if not torch.cuda.is_available():
        reason = "torch is built without CUDA" if torch.version.cuda is None else "torch finds no usable NVIDIA GPU"
        return {"available": False, "reason": reason}
    indices = range(torch.cuda.device_count())
    reasons = {i: native.architecture_reason(torch.cuda.get_device_capability(i)) for i in indices}
    return {
        "available": True,
        "version": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in indices],
        "without_cuda_library": {i: reason for i, reason in reasons.items() if reason},
    }


def _triton_info() -> str | None:
    for name in ("triton", "triton-windows", "pytorch-triton"):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return None
