"""Which implementation of the operators runs, and why the others do not."""

import platform

import torch

from . import reference

# Filled by what a build brings; the reference is always there.
IMPLEMENTATIONS = {"reference": reference}
UNAVAILABLE = {
    "cpu": "the native CPU library is not part of this version",
    "cuda": "the native CUDA library is not part of this version",
    "triton": "the Triton kernels are not part of this version",
}

_chosen = "auto"


class use_backend:
    """Choose the backend of every operator: ``"auto"`` (the fastest there is) or one by name.

    Takes effect at once; as a context manager it restores the earlier choice at the end:

        use_backend("reference")
        with use_backend("reference"): ...

    Raises ValueError for an unknown name and RuntimeError, with the reason, for a backend that is not available.
    """

    def __init__(self, name: str):
        global _chosen
        if name in UNAVAILABLE:
            raise RuntimeError(f"backend {name!r} is not available: {UNAVAILABLE[name]}")
        if name != "auto" and name not in IMPLEMENTATIONS:
            known = ", ".join(["auto", *IMPLEMENTATIONS, *UNAVAILABLE])
            raise ValueError(f"backend is {name!r}, expected one of: {known}")
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


def chosen_backend() -> str:
    """Return the name of the backend that an operator uses now."""
    return "reference" if _chosen == "auto" else _chosen


def implementation(operator: str):
    """Return the function that implements `operator` (its stem) in the backend chosen now."""
    return getattr(IMPLEMENTATIONS[chosen_backend()], operator)


def backend_info() -> dict:
    """Return what is available, what is not and why, and the versions that matter in a bug report."""
    from . import __version__

    return {
        "seemore_fast": __version__,
        "backend": chosen_backend(),
        "available": list(IMPLEMENTATIONS),
        "unavailable": dict(UNAVAILABLE),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()},
        "cuda": _cuda_info(),
    }


def _cuda_info() -> dict:
    if not torch.cuda.is_available():
        reason = "torch is built without CUDA" if torch.version.cuda is None else "torch finds no usable NVIDIA GPU"
        return {"available": False, "reason": reason}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"available": True, "version": torch.version.cuda, "devices": devices}
