"""Every backend as a parameter of the operator tests, also where its hardware is missing.

reference       plain PyTorch, as far as it is a backend
cpu avx2, ...   the CPU library in each instruction set that this processor runs
cuda, triton    on a GPU, with --device cuda
triton          without a GPU, in Triton's interpreter
cuda_host       without a GPU, the very same CUDA sources compiled for the host (tests/helpers/cuda_host)

A test with such a parameter fails unless the kernel of that backend computed the operator, and the reference nothing
of it (`assert_computed`, which conftest.py calls after each test).
"""

import contextlib
import functools
import math
import shutil
from functools import partial
from unittest import mock

import pytest
import torch

from seemore_fast import backends, reference, use_backend
from seemore_fast.backends import native, selection
from seemore_fast.ops import allocation

from . import cuda_host

calls: set[tuple[str, str]] = set()  # (backend, operator) of all kernels, and fallbacks, that ran in this test
raw_calls: list[tuple] | None = None  # (function, its arguments) of kernels, while they are recorded


class Backend(str):
    """The name of a backend, for tests of one operator, and what it has kernels of that operator for."""

    operator: str
    dtypes: tuple[torch.dtype, ...]
    taps: tuple[int, ...]  # none for any number

    def __new__(
        cls, name: str, operator: str, dtypes: tuple[torch.dtype, ...] = backends.ALL, taps: tuple[int, ...] = ()
    ):
        backend = super().__new__(cls, name)
        backend.operator, backend.dtypes, backend.taps = operator, dtypes, taps
        return backend

    @property
    def family(self) -> str:
        """The backend's name for users: "cpu" for "cpu avx2", "cuda" for "cuda_host"."""
        return family(self)

    def serves(self, arguments: dict) -> bool:
        """Return whether there is a kernel for the dtype and the taps among arguments of a test."""
        dtype, taps = arguments.get("dtype"), arguments.get("taps")
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype not in self.dtypes:
            return False
        return not self.taps or taps is None or taps in self.taps

    @property
    def widest(self) -> torch.dtype:
        return max(self.dtypes, key=lambda dtype: torch.finfo(dtype).bits)


def family(name: str) -> str:
    return name.split()[0].split("_")[0]


@functools.cache
def usable() -> dict[str, str | None]:
    """Return the backends by name, each with None or the reason why it cannot be tested here."""
    reasons = {name: selection.unsupported_reason(name) for name in ("cuda", "triton")}
    try:
        cuda_host.cuda_headers()
        reasons["cuda_host"] = None if shutil.which("g++") else "no g++ on PATH"
    except cuda_host.Unavailable as missing:
        reasons["cuda_host"] = str(missing)
    if selection.unsupported_reason("cpu"):
        reasons["cpu"] = selection.unsupported_reason("cpu")
    else:
        known = native.build_info()
        for name in known["instruction_sets"] if isinstance(known, dict) else native.instruction_sets():
            runs = name in native.instruction_sets()
            reasons[f"cpu {name}"] = None if runs else f"this processor does not run {name}"
    return {"reference": None, **reasons}


def each_backend(operator: str, interpreted: bool = True, dtype: torch.dtype | None = None):
    """Parametrise `backend` over the backends that have `operator`, in `dtype` if given, and can be tested here.

    With `interpreted` false, Triton's interpreter is left out, which takes minutes for some tests. Where a test has a
    parameter `dtype` or `taps` as well, conftest.py leaves out the pairs that have no kernel.
    """
    return pytest.mark.parametrize(
        "backend", [Backend("reference", operator), *kernels_of(operator, interpreted, dtype)]
    )


def each_kernel(operator: str, interpreted: bool = True, dtype: torch.dtype | None = None):
    """The same without the reference, which promises less: no determinism, no operator of torch's dispatcher."""
    return pytest.mark.parametrize("backend", kernels_of(operator, interpreted, dtype))


def kernels_of(operator: str, interpreted: bool = True, dtype: torch.dtype | None = None) -> list[Backend]:
    have = {kernel.backend: kernel for kernel in backends.KERNELS.get(operator, ())}
    if backends.interpreted() and not interpreted:
        have.pop("triton", None)
    names = [name for name, reason in usable().items() if reason is None and family(name) in have]
    found = [Backend(name, operator, have[family(name)].dtypes, have[family(name)].taps) for name in names]
    return [backend for backend in found if dtype is None or dtype in backend.dtypes]


@contextlib.contextmanager
def running_on(backend: str, device: str | torch.device):
    """Run operators by `backend` in a context, and note `calls`; skip the test where it cannot serve `device`."""
    devices = {
        "cuda": {"cuda"},
        "triton": {"cpu"} if backends.interpreted() else {"cuda"},
        "reference": {"cpu", "cuda"},
    }
    if torch.device(device).type not in devices.get(backend, {"cpu"}):
        pytest.skip(f"{backend} does not serve {device}")
    if backend == "reference":
        context = use_backend("reference")
    elif backend == "cuda_host":
        context = _on_the_host()
    elif backend.startswith("cpu "):
        context = _with_instruction_set(backend.removeprefix("cpu "))
    else:
        context = use_backend(backend)
    for name in ("cpu", "cuda", "triton"):
        note_kernels(name)
    with context, contextlib.nullcontext() if backend == "reference" else noted_fallbacks():
        yield


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
    usable = mock.patch.object(selection, "unsupported_reason", lambda *_: None)
    with mock.patch.dict(backends.KERNELS, hosted), usable, use_backend("auto"):
        note_kernels("cuda_host")
        yield


# Which backend computed


class Noted:
    """A function of a kernel that notes each of its calls, however it was looked up and wherever it is kept."""

    def __init__(self, function, backend: str, operator: str):
        self._function, self._backend, self._operator = function, backend, operator

    def __call__(self, *arguments, **options):
        cpu = self._backend == "cpu"
        calls.add((f"cpu {native.instruction_set()}" if cpu else self._backend, self._operator))
        if raw_calls is not None:
            raw_calls.append((self._function, arguments))
        return self._function(*arguments, **options)

    def __getattr__(self, name: str):
        return getattr(self._function, name)


@contextlib.contextmanager
def recorded_calls():
    """Record what kernels are called with."""
    with mock.patch(f"{__name__}.raw_calls", []) as recorded:
        yield recorded


@functools.cache
def note_kernels(backend: str):
    """Make all functions of a backend's kernels note their calls from now on, if the backend can be used."""
    if selection.unsupported_reason(backend):
        return
    for operator in [op for op, kernels in backends.KERNELS.items() if backend in {k.backend for k in kernels}]:
        functions = selection._functions(backend, operator)
        for part in ("", "_part", "_backward", "_into", "_from_sums", "_from_sums_backward"):
            if function := getattr(functions, operator + part, None):
                setattr(functions, operator + part, Noted(function, backend, operator))


@contextlib.contextmanager
def noted_fallbacks():
    """Make operators that have kernels note that they call the reference instead, though that was not chosen.

    Inside of compiled graphs nothing is noted.
    """

    def noted(name: str, function):
        @functools.wraps(function)
        def fallback(*arguments, **options):
            if not torch.compiler.is_compiling() and backends.current_backend() != "reference":
                calls.add(("reference", name))
            return function(*arguments, **options)

        return fallback

    names = [name for name in backends.KERNELS if hasattr(reference, name)]
    with mock.patch.multiple(reference, **{name: noted(name, getattr(reference, name)) for name in names}):
        yield


def assert_computed(backend: Backend, fallback: pytest.Mark | None):
    """Fail unless `calls` are what a test with this backend is named after.

    These are the kernel of its operator and no fallback, or, if the mark `falls_back` names the backend, the contrary.
    """
    kernel = not calls.isdisjoint({(backend, backend.operator), (backend, "network")})  # which has all operators
    fallbacks = {name for by, name in calls if by == "reference"}
    if backend == "reference":
        assert not calls, f"named after the reference, but kernels ran: {calls}"
    elif fallback and backend.family in fallback.args:
        assert fallbacks and not kernel, f"expected {backend} to leave it to the reference; what ran: {calls}"
    else:
        assert kernel, f"named after {backend}, whose kernel of {backend.operator} never ran; what ran: {calls}"
        assert not fallbacks, f"named after {backend}, but the reference computed {fallbacks}, too"


# Arithmetic


def uses_tensor_cores(backend: Backend, device: torch.device) -> bool:
    """Return whether a backend's kernel of its operator multiplies matrices, and by tensor cores."""
    own = [kernel for kernel in backends.KERNELS.get(backend.operator, ()) if kernel.backend == backend]
    return device.type == "cuda" and any(kernel.capability >= backends.MATRIX["capability"] for kernel in own)


def cut_off_by_tensor_cores(terms: int) -> float:
    """Return the share of a sum of so many float32 products that tensor cores may lose.

    They add products of TF32, 8 at a time, to a sum whose bits beyond float32's are cut off, not rounded: up to 2^-23
    of it each time. (Fasi, Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science
    7:e330, 2021.)
    """
    return math.ceil(terms / 8) * 2**-23


# Memory


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
        for module, name in ((torch, "empty_like"), (allocation, "new_image"), (allocation, "new_packed")):
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
