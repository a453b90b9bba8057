"""The native libraries' own operators: schemas, memory, and what they do with results and with bad arguments.

The stable ABI of torch 2.10 to 2.13 loses the memory of every string that an operator takes or returns: 48 bytes each.
"""

import ctypes
import re
from pathlib import Path

import pytest
import torch
from helpers.backends import kernels_of, recorded_calls, running_on
from helpers.ops import striped_shapes, value_and_gradients
from helpers.table import CASES

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


# Calls as the package makes them, with one argument replaced


def libraries_of(operator):
    """Return the libraries that have an operator, the CPU's in one instruction set: all share their bindings."""
    found = {name.family: name for name in kernels_of(operator, interpreted=False)}
    return [found[family] for family in ("cpu", "cuda") if family in found]


each_library = pytest.mark.parametrize(
    "case, backend",
    [pytest.param(row, name, id=f"{row.name}-{name}") for row in CASES for name in libraries_of(row.kernel)],
)


def calls_of(case, backend, device, dtype=torch.float32, **given):
    """Yield the operators of the library that a forward and a backward call, with arguments by name."""
    tensors, options = case.call(device, dtype, **given)
    with recorded_calls() as recorded:
        value_and_gradients(case.run, tensors, **options)
    assert recorded
    for function, arguments in recorded:
        schema = function.default._schema
        yield function, schema, dict(zip((argument.name for argument in schema.arguments), arguments, strict=True))


@each_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [2, 0])
def test_all_of_the_results_is_written_and_nothing_beside(case, backend, dtype, batch, device):
    """The results lie in larger tensors of a value that nothing computes here."""
    if case.name == "striped_conv_router" and not batch:
        pytest.skip("left to the kernels of its parts")
    shape = (batch, *next(iter(case.call(device).tensors.values())).shape[1:])
    with running_on(backend, device):
        for function, schema, arguments in calls_of(case, backend, device, dtype, shape=shape):
            storages = {}
            for argument in schema.arguments:
                like = arguments[argument.name]
                if argument.alias_info and argument.alias_info.is_write and like is not None:
                    storage = torch.full((like.numel() + 32,), 77, dtype=like.dtype, device=device)
                    storages[argument.name], arguments[argument.name] = storage, storage[16:-16].view(like.shape)
            function(*arguments.values())
            for name, storage in storages.items():
                assert (storage[:16] == 77).all() and (storage[-16:] == 77).all(), f"{schema.name} wrote beside {name}"
                assert not (storage[16:-16] == 77).any(), f"{name} of {schema.name} is not written whole"


def narrower(x):
    return x[..., :-1].contiguous()


def scattered(x):
    return x.repeat_interleave(2, dim=-1)[..., ::2]


FAULTS = {
    "shape": (narrower, r"has shape|has \d+ taps"),
    "dtype": (lambda x: x.to(torch.int32), "has another dtype|is int32"),
    "strides": (scattered, "is not contiguous"),
    "device": (lambda x: x.to("meta"), "is on another (kind of )?device"),
}


@each_library
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_tensors_are_named(case, backend, fault, device):
    """Each tensor in turn, but images where they may have any strides, and the pooled ones any width."""
    spoil, message = FAULTS[fault]
    batch = len(next(iter(case.call(device).tensors.values())))
    with running_on(backend, device):
        for function, schema, arguments in calls_of(case, backend, device):
            for name, value in arguments.items():
                if not isinstance(value, torch.Tensor) or not value.numel():
                    continue
                is_image = value.dim() == 4 and len(value) == batch
                if fault == "strides" and (is_image or name == "dexpert_weight"):
                    continue
                if fault == "shape" and is_image and schema.name.split("::")[1] in ("router", "router_backward"):
                    continue
                with pytest.raises(RuntimeError, match=rf"\w+: \w+ ({message})"):
                    function(*(arguments | {name: spoil(value)}).values())


@each_library
def test_bad_numbers_are_named(case, backend, device):
    with running_on(backend, device):
        for function, _, arguments in calls_of(case, backend, device):
            for name in {"top_k", "recursive", "pixels"} & arguments.keys():
                for bad in (0, 99) if name != "pixels" else (0,):
                    with pytest.raises(RuntimeError, match=rf"{name} is {bad}, expected|has shape|pixels, expected"):
                        function(*(arguments | {name: bad}).values())
