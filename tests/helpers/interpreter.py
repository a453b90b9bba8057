"""Triton's interpreter, quicker, and processes without it.

Here it builds each type and shape once, which takes most of its time elsewhere, and patches its language once a kernel:
a third of the time, for the same results. Sums are added as on a GPU. A Triton that does it otherwise is left as it is.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import numpy as np

from . import ROOT

try:
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    PATCHED = (
        (interpreter, "_patch_lang"),
        (interpreter, "_patch_attr"),
        (interpreter, "_get_np_dtype"),
        (core.block_type, "__init__"),
        (core.tensor, "__init__"),
        (TritonSemantic, "broadcast_impl_value"),
        (TritonSemantic, "binary_op_sanitize_overflow_impl"),
        (interpreter.ReduceOps, "sum"),
    )
    is_known = os.environ.get("TRITON_INTERPRET") == "1" and all(hasattr(*place) for place in PATCHED)
except ImportError:
    is_known = False

NUMPY_NAMES = {"add": "add", "sub": "subtract", "mul": "multiply"}


def run_without(*arguments: str) -> str:
    """Return what Python prints where TRITON_INTERPRET is not set, so that kernels compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), environment.get("PYTHONPATH", "")]).rstrip(
        os.pathsep
    )
    finished = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@contextlib.contextmanager
def quicker() -> Iterator[None]:
    """Make the interpreter quicker in a context."""
    if not is_known:
        yield
        return
    replacements = [patch_once(), patch_member, numpy_dtype(), build_block_type(), build_tensor(), broadcast()]
    with contextlib.ExitStack() as patches:
        for (place, name), replacement in zip(PATCHED, [*replacements, check_overflow, sum_of_halves], strict=True):
            patches.enter_context(mock.patch.object(place, name, replacement))
        yield


def patch_once():
    """Patch the language once for all functions that see the same modules of it, until the kernel has ended."""
    original, modules, scopes, seen = interpreter._patch_lang, (interpreter.tl, core), {}, {}

    def patch(function):
        if function not in seen:
            seen[function] = tuple(module in function.__globals__.values() for module in modules)
        key = seen[function]
        if key not in scopes:
            scope = scopes[key] = original(function)
            restore = scope.restore
            scope.restore = lambda: (scopes.clear(), restore())
        return scopes[key]

    return patch


def patch_member(place, name, member, builder, scope):
    """Let a function of the language run by the interpreter, which needs no checks of how it is called."""
    function = member.__wrapped__ if hasattr(member, "__wrapped__") else member

    def interpreted(*arguments, **options):
        options["_semantic"] = interpreter.interpreter_semantic
        return function(*arguments, **options)

    scope.set_attr(place, name, interpreted)


def numpy_dtype():
    original, known = interpreter._get_np_dtype, {}

    def find(dtype):
        scalar = dtype.scalar
        if scalar.name not in known:
            known[scalar.name] = original(scalar)
        return known[scalar.name]

    return find


def build_block_type():
    """Types of one element and shape share their attributes."""
    original, known = core.block_type.__init__, {}

    def build(self, element_ty, shape):
        key = (element_ty.name, *[side.value if isinstance(side, core.constexpr) else side for side in shape])
        if key not in known:
            original(self, element_ty, shape)
            known[key] = self.__dict__
        self.__dict__ = known[key]

    return build


def build_tensor():
    """Tensors of one shape share it."""
    original, known = core.tensor.__init__, {}

    def build(self, handle, type):
        sides = tuple(type.shape.values) if type.is_block() else ()
        if sides not in known:
            original(self, handle, type)
            known[sides] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known[sides]

    return build


def broadcast():
    original = TritonSemantic.broadcast_impl_value

    def broadcast(self, left, right):
        return (left, right) if left.shape is right.shape else original(self, left, right)

    return broadcast


def check_overflow(semantic, left, right, operation):
    """Refuse integers that wrap, as the original does by operations of the language."""
    one, other = left.handle.data, right.handle.data
    if one.dtype.kind in "iu" and one.itemsize < 8:
        limits, function = np.iinfo(one.dtype), getattr(np, NUMPY_NAMES[operation.__name__])
        exact = function(one, other, dtype=np.int64)
        assert limits.min <= exact.min() and exact.max() <= limits.max, f"{one.dtype} overflow: {operation.__name__}"


def sum_of_halves(reduction, tensor):
    """Add a dimension's halves, again and again, as lanes do: numpy adds 64 numbers one by one and rounds each."""
    data, axis = tensor.handle.data, reduction.axis
    sides = [1 if axis in (None, dim) else side for dim, side in enumerate(data.shape)]
    data = data.reshape(-1) if axis is None else np.moveaxis(data, axis, 0)
    while len(data) > 1:
        data = data[: len(data) // 2] + data[len(data) // 2 :]
    return reduction.to_tensor(data.reshape(sides) if reduction.keep_dims else data[0], tensor.dtype)
