"""Which implementation of an operator runs, and why another does not."""

import contextlib
import functools
import importlib
import importlib.util
import os
import platform
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import native, preferences, row_major

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ALL = (torch.float64, *FLOATS)
CPU = (torch.float32, torch.float64, torch.bfloat16)

# Triton's kernels compile without spills for GPUs of these compute capabilities and newer: stencils, and layers whose
# products take matrix units, which Triton does not use before sm_80, and registers for up to so many channels.
STENCIL = dict(capability=(7, 5))
MATRIX = dict(capability=(8, 0), most=64)


class Kernel(NamedTuple):
    """A backend that has an operator: on which devices, for which dtypes, up to how many channels, for which taps.

    For fewer than `least` elements of x ``"auto"`` takes the reference, which has less overhead (measured:
    benchmarks/cases.py).
    """

    backend: str
    device: str
    dtypes: tuple[torch.dtype, ...] = ALL
    most: int = 2**31  # channels, where these are summed over
    taps: tuple[int, ...] = ()  # of a convolution; none for any number
    least: int = 0
    capability: tuple[int, int] = (0, 0)  # least compute capability of a GPU


# In the order in which "auto" prefers them where nobody measured (`preferences`). What is not here, the reference
# computes.
KERNELS = {
    "striped_conv": [
        Kernel("cpu", "cpu", CPU),
        Kernel("cuda", "cuda", FLOATS, taps=(3, 7, 11)),
        Kernel("triton", "cuda", **STENCIL),
    ],
    "striped_conv_router": [
        Kernel("cpu", "cpu", (torch.float32, torch.bfloat16)),
        Kernel("cuda", "cuda", FLOATS),
        Kernel("triton", "cuda", FLOATS, **STENCIL),
    ],
    "calibrate": [Kernel("cpu", "cpu", CPU), Kernel("cuda", "cuda"), Kernel("triton", "cuda", **STENCIL)],
    "router": [Kernel("cpu", "cpu", CPU), Kernel("cuda", "cuda"), Kernel("triton", "cuda", **STENCIL)],
    "norm_pointwise": [Kernel("cpu", "cpu", CPU), Kernel("triton", "cuda", FLOATS, **MATRIX)],
    "norm_conv3x3": [Kernel("cpu", "cpu", CPU), Kernel("triton", "cuda", FLOATS, **MATRIX)],
    "conv3x3_shuffle": [Kernel("triton", "cuda", (torch.float32,), **MATRIX)],
    "gated_ffn": [Kernel("cpu", "cpu", CPU), Kernel("triton", "cuda", FLOATS, **MATRIX)],
    "low_rank_experts": [Kernel("cpu", "cpu", CPU), Kernel("triton", "cuda", FLOATS, **MATRIX)],
    "network": [Kernel("cpu", "cpu", (torch.float32, torch.bfloat16, torch.float16))],
}
BACKENDS = ("cpu", "cuda", "triton")

_chosen = "auto"


class use_backend:
    """Choose the backend of every operator: ``"auto"`` (the fastest there is) or one by name.

    An operator, device or dtype that the named backend has no kernel for runs on the reference.
    Takes effect at once; as a context manager it restores the earlier choice at the end:

        use_backend("reference")
        with use_backend("reference"): ...

    Raises ValueError for an unknown name and RuntimeError, with the reason, for a backend that is not available.
    """

    def __init__(self, name: str):
        global _chosen
        if name not in ("auto", "reference", *BACKENDS):
            raise ValueError(f"backend is {name!r}, expected one of: auto, reference, {', '.join(BACKENDS)}")
        if name in BACKENDS and why_not(name):
            raise RuntimeError(f"backend {name!r} is not available: {why_not(name)}")
        self._previous, _chosen = _chosen, name
        self._name = name

    def __enter__(self):
        global _chosen
        if _chosen != self._name:  # kept for later and entered only now
            self._previous, _chosen = _chosen, self._name
        return self

    def __exit__(self, *exception):
        global _chosen
        _chosen = self._previous


def current() -> str:
    """Return the name that was chosen last, "auto" among them."""
    return _chosen


def why_not(backend: str, device: torch.device | None = None) -> str | None:
    """Return None for a backend that can be used, on a device or at all, else the reason why not.

    Libraries are loaded at the first call. No CUDA context is made but on the device that is asked for.
    """
    reason = _why_not_installed(backend)
    if reason or backend == "cpu" or (backend == "triton" and interpreted()):
        return reason
    if device is not None and device.type == "cuda":
        return native.cuda_unsupported_reason(_index_of(device)) if backend == "cuda" else None
    if torch.cuda.is_available():
        return None
    hint = " (with TRITON_INTERPRET=1 kernels run, slowly, on the CPU)" if backend == "triton" else ""
    return f"torch finds no usable NVIDIA GPU{hint}"


@functools.cache
def _why_not_installed(backend: str) -> str | None:
    """Return None where a backend is installed for this torch, else the reason why not; asks no device."""
    if backend == "cpu":
        return native.load_cpu()
    if backend == "cuda":
        return native.load_cuda()
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip and not interpreted():
        return "its kernels are made for NVIDIA GPUs, and this torch is built for ROCm"
    return None


def _index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _has_capability(kernel: Kernel, device: torch.device) -> bool:
    """Tell whether a GPU is of the compute capability that a kernel needs; other devices have none and need none."""
    if device.type != "cuda" or kernel.capability == (0, 0):
        return True
    return torch.cuda.get_device_capability(_index_of(device)) >= kernel.capability


# torch.compiler.assume_constant_result, which would import all of torch's compiler here: torch.compile takes the
# answers as they are instead of tracing how a library is loaded and a driver asked.
why_not._dynamo_marked_constant = True
_has_capability._dynamo_marked_constant = True


def interpreted() -> bool:
    """Tell whether Triton's kernels run in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_plain() -> bool:
    """Tell whether nothing but the reference may run now.

    Exported and traced graphs are for machines without this package: plain operators only.
    """
    return _chosen == "reference" or torch.compiler.is_exporting() or torch.jit.is_tracing()


def choose(operator: str, x: Tensor, size: int = 1) -> str:
    """Return the backend that computes `operator` (its stem) for `x`, with so many taps or channels, now."""
    if is_plain():
        return "reference"
    serving = _serving(operator, x, size, _dtypes_now(x))
    if _chosen != "auto":
        return next((kernel.backend for kernel in serving if kernel.backend == _chosen), "reference")
    # A compiled graph may be for all sizes.
    large = [kernel for kernel in serving if torch.compiler.is_compiling() or x.numel() >= kernel.least]
    there = [kernel.backend for kernel in large if kernel.device == x.device.type] + ["reference"]
    return next(iter(_by_preference(operator, x, there)))


def _by_preference(operator: str, x: Tensor, backends: list[str]) -> list[str]:
    """Return the backends, those first that were measured for this device, quickest first."""
    measured = preferences.preferred(operator, x.device, x.dtype) or []
    return sorted(backends, key=lambda name: measured.index(name) if name in measured else len(measured))


def _dtypes_now(x: Tensor) -> set[torch.dtype]:
    """Return the dtypes of x and, as autocast is now, of the weights."""
    if x.dtype != torch.float64 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return {x.dtype, torch.get_autocast_dtype(x.device.type)}
    return {x.dtype}


def _serving(operator: str, x: Tensor, size: int, dtypes: set[torch.dtype]) -> list[Kernel]:
    """Return the kernels that can compute `operator` for `x`, Triton's in the interpreter among them."""
    return [
        kernel
        for kernel in KERNELS.get(operator, ())
        if (kernel.device == x.device.type or (kernel.backend == "triton" and interpreted()))
        and dtypes <= set(kernel.dtypes)
        and size <= kernel.most
        and (not kernel.taps or size in kernel.taps)
        and why_not(kernel.backend, x.device) is None
        and _has_capability(kernel, x.device)
    ]


def chosen_backend(device: str | torch.device = "cpu") -> str:
    """Return the backend that computes what it has kernels for on a device; the rest is the reference's."""
    if _chosen != "auto":
        return _chosen
    device = torch.device(device)
    kernels = (k for choices in KERNELS.values() for k in choices if k.device == device.type)
    usable = (k.backend for k in kernels if not why_not(k.backend, device) and _has_capability(k, device))
    return next(usable, "reference")


def kernel_for(operator: str, x: Tensor, size: int = 1, part: str = "") -> Callable:
    """Return the function of the kernel that computes `operator` for `x`; `part` is, say, ``"_backward"``.

    A backward whose forward a kernel computed runs on a kernel, whatever is chosen by then, and whatever autocast is.
    """
    serving = _by_preference(operator, x, [kernel.backend for kernel in _serving(operator, x, size, {x.dtype})])
    backend = _chosen if _chosen in serving else serving[0]
    function = getattr(_functions(backend, operator), operator + part)
    is_strided = backend.startswith("cuda") and operator in row_major.OPERATORS and not row_major.in_rows(x)
    return row_major.by_rows(function) if is_strided else function


def _functions(backend: str, operator: str):
    if backend == "triton":
        return importlib.import_module(f"seemore_fast.kernels.{operator}")
    return getattr(torch.ops, f"seemore_{backend}")


def backend_info() -> dict:
    """Return what is available, what is not and why, and the versions that matter in a bug report."""
    from .. import __version__

    reasons = {name: why_not(name) for name in BACKENDS}
    available = [name for name, reason in reasons.items() if reason is None]
    return {
        "seemore_fast": __version__,
        "backend": _chosen,
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
    if why_not("cpu") is None:
        info |= {"instruction_sets": native.instruction_sets(), "instruction_set": native.instruction_set()}
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
    from importlib.metadata import PackageNotFoundError, version

    for name in ("triton", "triton-windows", "pytorch-triton"):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return None
