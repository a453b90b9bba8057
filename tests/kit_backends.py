"""Every backend as a parameter of the operator tests, also where its hardware is missing.

reference       plain PyTorch, as far as it is a backend
cpu avx2, ...   the CPU library in each instruction set that this processor runs
cuda, triton    on a GPU, with --device cuda
triton          without a GPU, in Triton's interpreter
cuda_host       without a GPU, the very same CUDA sources compiled for the host (tests/cuda_host)
"""

import contextlib
import functools
import shutil
from functools import partial
from unittest import mock

import cuda_host
import pytest
import torch

from seemore_fast import backends, native, use_backend
from seemore_fast.ops import library


@functools.cache
def usable() -> dict[str, str | None]:
    """Return the backends by name, each with None or the reason why it cannot be tested here."""
    reasons = {name: backends.why_not(name) for name in ("cuda", "triton")}
    try:
        cuda_host.cuda_headers()
        reasons["cuda_host"] = None if shutil.which("g++") else "no g++ on PATH"
    except cuda_host.Unavailable as missing:
        reasons["cuda_host"] = str(missing)
    if backends.why_not("cpu"):
        reasons["cpu"] = backends.why_not("cpu")
    else:
        known = native.build_info()
        for name in known["instruction_sets"] if isinstance(known, dict) else native.instruction_sets():
            runs = name in native.instruction_sets()
            reasons[f"cpu {name}"] = None if runs else f"this processor does not run {name}"
    return {"reference": None, **reasons}


def each_backend(operator: str, interpreted: bool = True):
    """Parametrise `backend` over the backends that have `operator` and can be tested here.

    With `interpreted` false, Triton's interpreter is left out, which takes minutes for some tests.
    """
    return pytest.mark.parametrize("backend", ["reference", *kernels_of(operator, interpreted)])


def each_kernel(operator: str, interpreted: bool = True):
    """The same without the reference, which promises less: no determinism, no operator of torch's dispatcher."""
    return pytest.mark.parametrize("backend", kernels_of(operator, interpreted))


def kernels_of(operator: str, interpreted: bool) -> list[str]:
    have = {kernel.backend for kernel in backends.KERNELS.get(operator, ())}
    if backends.interpreted() and not interpreted:
        have.discard("triton")
    return [name for name, reason in usable().items() if reason is None and name.split()[0].split("_")[0] in have]


def chosen(backend: str, device: str | torch.device):
    """Return the context in which operators run by `backend`; skip the test where that cannot serve `device`."""
    devices = {
        "cuda": {"cuda"},
        "triton": {"cpu"} if backends.interpreted() else {"cuda"},
        "reference": {"cpu", "cuda"},
    }
    if torch.device(device).type not in devices.get(backend, {"cpu"}):
        pytest.skip(f"{backend} does not serve {device}")
    if backend == "cuda_host":
        return _on_the_host()
    if backend.startswith("cpu "):
        return _with_instruction_set(backend.removeprefix("cpu "))
    return use_backend(backend)


@contextlib.contextmanager
def _with_instruction_set(name: str):
    before = native.instruction_set()
    native.use_instruction_set(name)
    try:
        with use_backend("cpu"):
            yield
    finally:
        native.use_instruction_set(before)


@functools.cache
def _load_host_library():
    torch.ops.load_library(cuda_host.library())


@contextlib.contextmanager
def _on_the_host():
    _load_host_library()
    hosted = {
        op: [kernel._replace(backend="cuda_host", device="cpu") for kernel in kernels if kernel.backend == "cuda"]
        for op, kernels in backends.KERNELS.items()
    }
    usable = mock.patch.object(backends, "why_not", lambda *_: None)
    with mock.patch.dict(backends.KERNELS, hosted), usable, use_backend("auto"):
        yield


@contextlib.contextmanager
def guarded_results():
    """Make operators allocate NaN inside a margin of NaN; at the end all of the results is written, nothing outside.

    Between the planes of an image for kernels on a GPU there is room that they may write to.
    """
    margin, made = 64, []

    def guarded(allocate, x: torch.Tensor, *arguments, **options) -> torch.Tensor:
        like = allocate(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), *arguments, **options)
        count = like.untyped_storage().nbytes() // like.element_size()
        storage = torch.full((count + 2 * margin,), torch.nan, dtype=like.dtype, device=x.device)
        made.append((storage, storage.as_strided(like.shape, like.stride(), margin)))
        return made[-1][1]

    with contextlib.ExitStack() as patches:
        for module, name in ((torch, "empty_like"), (library, "new_image"), (library, "new_packed")):
            patches.enter_context(mock.patch.object(module, name, partial(guarded, getattr(module, name))))
        yield
    assert made, "the operator allocated no result"
    for storage, result in made:
        assert storage[:margin].isnan().all() and storage[-margin:].isnan().all(), "written outside"
        assert not result.isnan().any(), "not all was written"


@contextlib.contextmanager
def uninitialised_is_nan():
    """Make torch fill new memory with NaN, that of the libraries' workspaces, too."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def at_large_offsets(x: torch.Tensor) -> torch.Tensor:
    """Return x as a view whose last image lies more than 2^31 elements behind the first one.

    The memory between is never touched, so it costs nothing.
    """
    batch, stride = x.shape[0], 2**31 + 8
    storage = torch.empty((batch - 1) * stride + x[0].numel(), dtype=x.dtype, device=x.device)
    return storage.as_strided(x.shape, (stride, *x[0].contiguous().stride())).copy_(x)
