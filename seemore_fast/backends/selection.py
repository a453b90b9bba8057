"""Selection of the backend that computes an operator, and the reasons why another does not."""

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .._torch_compat import constant_in_graphs
from . import native, preferences, row_major
from .registry import BACKENDS, KERNELS, Kernel

_thread = threading.local()
_default = "auto"  # of all threads
_in_context: ContextVar[str | None] = ContextVar("backend", default=None)
_latest = "auto"  # the choice made last, in any thread: torch.compile cannot read context variables


def set_backend(name: str):
    """Choose the backend of every operator in all threads: ``"auto"`` (the fastest available) or one by name.

    An operator, device or dtype that the named backend has no kernel for runs on the reference. Threads and contexts
    with a `use_backend` of their own keep it.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for a backend that is not available.
    """
    global _default, _latest
    _check_name(name)
    _default = _latest = name
    _in_context.set(None)


class use_backend:
    """Choice of the backend in this thread, until the end of a ``with`` block; see `set_backend`.

        with use_backend("reference"): ...
        use_backend("reference")

    Takes effect at once; without ``with``, it lasts. Compiled graphs go by the choice that was made last in any thread.
    """

    def __init__(self, name: str):
        _check_name(name)
        self._name, self._previous = name, _in_context.get()
        _choose(name)

    def __enter__(self) -> "use_backend":
        if _in_context.get() != self._name:  # kept for later and entered only now
            self._previous = _in_context.get()
            _choose(self._name)
        return self

    def __exit__(self, *exception: object):
        _choose(self._previous)


def _choose(name: str | None):
    global _latest
    _in_context.set(name)
    _latest = name or _default


def _check_name(name: str):
    if name not in ("auto", "reference", *BACKENDS):
        raise ValueError(f"backend is {name!r}, expected one of: auto, reference, {', '.join(BACKENDS)}")
    if name in BACKENDS and (reason := unsupported_reason(name)):
        raise RuntimeError(f"backend {name!r} is not available: {reason}")


def current_backend() -> str:
    """Return the name chosen for this thread, "auto" among them."""
    if torch.compiler.is_compiling():
        return _latest
    return _in_context.get() or _default


@constant_in_graphs
def unsupported_reason(backend: str, device: torch.device | None = None) -> str | None:
    """Return None for a backend that can be used, on a device or at all, otherwise the reason why not.

    Libraries are loaded at the first call. No CUDA context is made but on the device that is asked for.
    """
    reason = _missing_reason(backend)
    if reason or backend == "cpu" or (backend == "triton" and interpreted()):
        return reason
    if device is not None and device.type == "cuda":
        return native.cuda_unsupported_reason(_index_of(device)) if backend == "cuda" else None
    if torch.cuda.is_available():
        return None
    hint = " (with TRITON_INTERPRET=1 kernels run, slowly, on the CPU)" if backend == "triton" else ""
    return f"torch finds no usable NVIDIA GPU{hint}"


@functools.cache
def _missing_reason(backend: str) -> str | None:
    """Return None if a backend is installed for this torch, otherwise the reason why not; queries no device."""
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


@constant_in_graphs
def _has_capability(kernel: Kernel, device: torch.device) -> bool:
    """Return whether a GPU has the compute capability that a kernel needs; always true of other devices."""
    if device.type != "cuda" or kernel.capability == (0, 0):
        return True
    return torch.cuda.get_device_capability(_index_of(device)) >= kernel.capability


def interpreted() -> bool:
    """Return whether Triton's kernels run in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_plain() -> bool:
    """Return whether only the reference may run now.

    Exported and traced graphs are for machines without this package: plain operators only.
    """
    return current_backend() == "reference" or torch.compiler.is_exporting() or torch.jit.is_tracing()


def select_backend(operator: str, x: Tensor, size: int = 1) -> str:
    """Return the backend that computes `operator` (its stem) for `x`, with so many taps or channels, now."""
    if is_plain():
        return "reference"
    serving = _serving(operator, x, size, _dtypes_now(x))
    chosen = current_backend()
    if chosen != "auto":
        return next((kernel.backend for kernel in serving if kernel.backend == chosen), "reference")
    # A compiled graph may be for all sizes.
    large = [kernel for kernel in serving if torch.compiler.is_compiling() or x.numel() >= kernel.least]
    there = [kernel.backend for kernel in large if kernel.device == x.device.type] + ["reference"]
    return next(iter(_by_preference(operator, x, there)))


def _by_preference(operator: str, x: Tensor, backends: list[str]) -> list[str]:
    """Return the backends in the measured order of this device, quickest first; unmeasured ones follow."""
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
        and unsupported_reason(kernel.backend, x.device) is None
        and _has_capability(kernel, x.device)
    ]


def backend_for_device(device: str | torch.device = "cpu") -> str:
    """Return the first backend with kernels for a device; the reference computes operators without one."""
    if current_backend() != "auto":
        return current_backend()
    device = torch.device(device)
    kernels = (k for choices in KERNELS.values() for k in choices if k.device == device.type)
    usable = (k.backend for k in kernels if not unsupported_reason(k.backend, device) and _has_capability(k, device))
    return next(usable, "reference")


def backend_of(operator: str, x: Tensor, size: int = 1) -> str:
    """Return the backend whose kernel `lookup_kernel` returns."""
    return _serving_kernel(operator, x, size).backend


def lookup_kernel(operator: str, x: Tensor, size: int = 1, part: str = "") -> Callable:
    """Return the function of the kernel that computes `operator` for `x`; `part` is, say, ``"_backward"``.

    A backward whose forward a kernel computed runs on a kernel, whatever is chosen by then, and whatever autocast is.
    """
    if getattr(_thread, "leaves_out", False):
        return _nothing
    kernel = _serving_kernel(operator, x, size)
    function = getattr(_functions(kernel.backend, operator), operator + part)
    return row_major.by_rows(function) if kernel.row_major else function


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Let kernels of this thread do nothing within, so that operators only allocate: for tensors without values."""
    before, _thread.leaves_out = getattr(_thread, "leaves_out", False), True
    try:
        yield
    finally:
        _thread.leaves_out = before


def _nothing(*arguments: Any, **options: Any):
    """Stand in for a kernel."""


def _serving_kernel(operator: str, x: Tensor, size: int) -> Kernel:
    serving = {kernel.backend: kernel for kernel in _serving(operator, x, size, {x.dtype})}
    chosen = current_backend()
    return serving[chosen if chosen in serving else _by_preference(operator, x, list(serving))[0]]


def _functions(backend: str, operator: str):
    if backend == "triton":
        return importlib.import_module(f"seemore_fast.kernels.{operator}")
    return getattr(torch.ops, f"seemore_{backend}")
