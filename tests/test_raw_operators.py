"""The native libraries' own operators: what their schemas may hold, and that a call keeps no memory.

The stable ABI of torch 2.10 to 2.13 loses the memory of every string that an operator takes or returns: 48 bytes each.
"""

import ctypes
import re
from pathlib import Path

import pytest
import torch
from helpers.ops import striped_shapes

from seemore_fast import backends
from seemore_fast.backends import native

CSRC = Path(__file__).parents[1] / "csrc"
CALLS = 5_000
ONCE = {"instruction_sets", "unsupported_reason"}  # their callers keep the string


def schemas():
    """Return the schemas of all raw operators, by name, as the sources of both libraries declare them."""
    sources = [*(CSRC / "bindings").glob("*.cpp"), CSRC / "cpu/dispatch/dispatch.cpp", CSRC / "cuda/common/library.cpp"]
    declared = [text for source in sources for text in re.findall(r"m\.def\(([^;]*)\);", source.read_text())]
    parsed = [torch._C.parse_schema("".join(re.findall(r'"([^"]*)"', text))) for text in declared]
    return {schema.name: schema for schema in parsed}


def test_no_operator_takes_a_string():
    found = schemas()
    assert {"striped_conv", "network", "use_instruction_set", "unsupported_reason"} <= set(found)
    takes = {name for name, schema in found.items() if any("str" in str(a.type) for a in schema.arguments)}
    returns = {name for name, schema in found.items() if any("str" in str(r.type) for r in schema.returns)}
    assert takes == set()
    assert returns == ONCE


class Mallinfo(ctypes.Structure):
    _fields_ = [(f"field_{i}", ctypes.c_size_t) for i in range(7)]
    _fields_ += [("uordblks", ctypes.c_size_t), ("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]


def bytes_in_use() -> int:
    """Return the bytes that malloc has handed out and not got back (glibc's main arena)."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("no mallinfo2: not glibc 2.33 or newer")
    mallinfo2.restype = Mallinfo
    return mallinfo2().uordblks


def striped_tensors():
    shapes = striped_shapes(2, 3)
    return torch.rand(1, 2, 3, 4), [torch.rand(shape) for shape in shapes.values()]


def striped_conv():
    x, parameters = striped_tensors()
    y = torch.empty_like(x)
    return lambda: torch.ops.seemore_cpu.striped_conv(y, x, *parameters, True, x)


def norm_pointwise():
    x, (_, bias, _, _) = striped_tensors()
    weight, y = torch.rand(2, 2, 1, 1), torch.empty_like(x)
    return lambda: torch.ops.seemore_cpu.norm_pointwise(y, x, bias, bias, weight, bias, True, 1e-6, None)


def network_memory():
    config = [2, 3, 36, 2, 11, 2, 1, 0, 0, 1, 2, 3]
    return lambda: torch.ops.seemore_cpu.network_memory(config, 1, 30, 30, 1, 0)


def instruction_set():
    def call():
        native.instruction_sets()
        native.use_instruction_set(native.instruction_set())

    return call


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(backends.unsupported_reason("cpu") is not None, reason="no CPU library")
@pytest.mark.parametrize("prepare", [striped_conv, norm_pointwise, network_memory, instruction_set])
def test_calls_keep_no_memory(prepare, one_thread):
    call = prepare()
    for _ in range(100):
        call()
    before = bytes_in_use()
    for _ in range(CALLS):
        call()
    assert bytes_in_use() - before < 8 * CALLS
