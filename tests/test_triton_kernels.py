"""Triton kernels compiled ahead of time: legal, without spills and within shared memory, for GPUs that are not here.

Their numbers are tested by the operators' own tests, with the backend "triton" and TRITON_INTERPRET=1. With that set
nothing compiles; so this file, run as a program, compiles in a process of its own.
"""

import dataclasses
import importlib
import json
import os
import pkgutil
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import pytest
import torch
from helpers.interpreter import run_without
from helpers.ptx import widest

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from seemore_fast import kernels
from seemore_fast.backends import KERNELS
from seemore_fast.kernels import configurations, norm_pointwise, striped_conv
from seemore_fast.kernels.launch import Launch, Resources, parse_resources

SHARED = 99 * 1024  # bytes that a block can have on every architecture
IMAGES = {  # (B, C, H, W) and memory format
    "aligned": ((2, 36, 64, 64), torch.contiguous_format),
    "odd": ((1, 5, 45, 77), torch.contiguous_format),
    "channels_last": ((2, 36, 64, 64), torch.channels_last),
    "one pixel": ((1, 1, 1, 1), torch.contiguous_format),  # sizes and strides of 1 are constants to the compiler
    "many channels": ((2, 64, 64, 64), torch.contiguous_format),
    "wide index": ((2**16, 2, 2**15, 2), torch.contiguous_format),  # more than 2**31 lines; on the meta device
}
TARGETS = [(80, "float32"), (90, "bfloat16"), (100, "bfloat16"), (120, "float32")]
QUICK = [("compile_all", *target, "aligned") for target in TARGETS]
QUICK += [("compile_with_few_registers",), ("unlike_jit",), ("sums_that_differ_among_lanes",)]
ALL = [(capability, dtype) for capability in (80, 86, 89, 90, 100, 120) for dtype in ("float32", "bfloat16", "float16")]
SLOW = [
    *[(*target, "aligned") for target in ALL if target not in TARGETS],
    *[(capability, "float32", "aligned", "ieee") for capability in (80, 90, 120)],  # three products of TF32 for each
    *[(90, dtype, "many channels") for dtype in ("float32", "bfloat16")],
    *[(90, "float64", image) for image in IMAGES],
    *[(80, "bfloat16", image) for image in IMAGES if image != "aligned"],
]
INSTRUCTIONS = {  # whose number in a kernel is tested
    "mma.sync": r"\bmma\.sync",
    "of warp groups": r"\b(?:wgmma|tcgen05)\.",  # matrix units of sm_90 and sm_100 that four warps share
    "ex2": r"\bex2\.approx\.ftz\.f32",
    "rcp": r"\brcp\.approx\.ftz\.f32",
}
SPILLS = {  # bytes a thread, at most, where float32 takes three products of TF32 and an image several experts
    "low_rank_experts backward 0 top 2: low_rank_experts_backward_input": 64,
    "low_rank_experts backward 0 top 2 proj: low_rank_experts_backward_input": 64,
    "low_rank_experts backward 1 top 2 proj: add_products": 64,
}
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: "sm_{}-{}".format(*target))

CUOBJDUMP = """
Fatbin elf code:
================
arch = sm_80
host = linux

Resource usage:
 Common:
  GLOBAL:0
 Function _Z1kILi64EEvPfi:
  REG:24 STACK:448 SHARED:256 LOCAL:0 CONSTANT[0]:364 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z1kILi32EEvPfi:
  REG:31 STACK:0 SHARED:128 LOCAL:8 CONSTANT[0]:364 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_90

Fatbin elf code:
================
arch = sm_90

Resource usage:
 Common:
  GLOBAL:0
 Function _Z1kILi64EEvPfi:
  REG:31 STACK:0 SHARED:1280 LOCAL:0 CONSTANT[0]:540 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def operators(dtype: str) -> list[str]:
    """Return the operators that have kernels for a dtype; layers with matrices have none for float64."""
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__) if module.name in KERNELS]
    return [
        name
        for name in names
        if any(kernel.backend == "triton" and getattr(torch, dtype) in kernel.dtypes for kernel in KERNELS[name])
    ]


# In a process of its own


def launches(dtype: str, image: str, precision: str = "tf32") -> dict[str, Launch]:
    """Return the launches of all operators' kernels by name, each specialization once.

    `precision` is torch's of float32 in convolutions: "tf32", its default, or "ieee".
    """
    torch.backends.cudnn.conv.fp32_precision = precision
    size, memory_format = IMAGES[image]
    x = torch.empty(size, dtype=getattr(torch, dtype), device="meta", memory_format=memory_format)
    found = {}
    for operator in operators(dtype):
        for name, launch in importlib.import_module(f"seemore_fast.kernels.{operator}").specializations(x):
            key = repr((launch.kernel.__name__, launch.specialization(), launch.options))
            found.setdefault(key, (f"{operator} {name}: {launch.kernel.__name__}", launch))
    return dict(found.values())


def compile_all(capability: int, dtype: str, image: str, precision: str = "tf32") -> dict[str, dict]:
    configurations.MEANT = capability
    return {name: compiled(launch, capability) for name, launch in launches(dtype, image, precision).items()}


def compiled(launch: Launch, capability: int) -> dict:
    code = launch.compile_for(capability)
    widths = {"load": widest("ld", code.ptx), "store": widest("st", code.ptx)}
    counts = {name: len(re.findall(pattern, code.ptx)) for name, pattern in INSTRUCTIONS.items()}
    return code.resources()._asdict() | widths | counts


def compile_with_few_registers() -> dict:
    launch = launches("float32", "aligned")["striped_conv forward 1 gelu gated: convolve"]
    return compiled(dataclasses.replace(launch, more_options={"maxnreg": 24}), 90)


def sums_that_differ_among_lanes() -> list[int]:
    """Return for each kernel with a norm of few channels how many products it fuses with a sum from another lane.

    Each lane then rounds the other's product, not its own, and the lanes' sums differ in the last bit.
    """
    configurations.MEANT = 90
    x = torch.empty(1, 3, 64, 64, dtype=torch.bfloat16, device="meta")
    launches = dict(norm_pointwise.specializations(x))
    found = []
    for name in ("forward 6 gelu norm", "backward 0 6 gelu norm"):
        ptx = launches[name].compile_for(90).ptx
        shuffled = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)", ptx))
        assert shuffled
        shuffled |= {to for to, moved in re.findall(r"mov\.b32\s+(%\w+), (%\w+)", ptx) if moved in shuffled}
        added = re.findall(r"fma\.rn\.f32\s+%\w+, %\w+, %\w+, (%\w+)", ptx)
        found.append(sum(addend in shuffled for addend in added))
    return found


def unlike_jit() -> list[str]:
    """Return the launches that Triton would specialize otherwise than we do, by its own functions (not public)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    unlike = []
    for image in IMAGES:
        for name, launch in launches("bfloat16", image).items():
            arguments = launch.arguments | launch.options | {"debug": False}
            bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
            packed = launch.kernel._pack_args(backend, arguments, *bind(**arguments))
            signature, constexprs, attrs = packed[1:]
            theirs = dict(signature=signature, constexprs=constexprs, attrs={k: v for k, v in attrs.items() if v})
            if theirs != launch.specialization():
                unlike.append(f"{name}, {image}: {theirs}, ours {launch.specialization()}")
    return unlike


if __name__ == "__main__":
    print(json.dumps([globals()[function](*arguments) for function, *arguments in json.loads(sys.argv[1])]))
    sys.exit()


# Tests


def without_interpreter(*calls: tuple) -> dict[tuple, dict | list]:
    """Return what functions above give where TRITON_INTERPRET is not set, by call: a name and arguments."""
    return dict(zip(calls, json.loads(run_without(__file__, json.dumps(calls))), strict=True))


@pytest.fixture(scope="module")
def quick() -> dict[tuple, dict | list]:
    """The results of the calls in QUICK, by call: a process per target, as many at a time as there are cores."""
    processes = [QUICK[i :: len(TARGETS)] for i in range(len(TARGETS))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda calls: without_interpreter(*calls), processes))
    return {call: result for of_process in results for call, result in of_process.items()}


def assert_fits(kernels: dict[str, dict], dtype: str, spills: dict[str, int] = MappingProxyType({})):
    assert {name.split()[0] for name in kernels} == set(operators(dtype))
    for name, takes in kernels.items():
        assert 0 < takes["registers"] <= 255, name
        assert takes["local"] <= spills.get(name, 0), f"{name} spills: {takes}"
        assert takes["shared"] <= SHARED, f"{name}: {takes}"
        # For products this small they are no faster, and versions of Triton and ptxas are known that get them wrong.
        assert takes["of warp groups"] == 0, f"{name}: {takes}"
    # Sums over all threads of a program go through shared memory: it is seen if it is there.
    assert any(takes["shared"] > 0 for takes in kernels.values())


@each_target
def test_kernels_compile_and_fit(quick, target):
    assert_fits(quick[("compile_all", *target, "aligned")], target[1])


@pytest.mark.slow
@pytest.mark.parametrize("target", SLOW, ids=lambda target: "sm_" + "-".join(map(str, target)))
def test_more_kernels_compile_and_fit(target):
    call = ("compile_all", *target)
    assert_fits(without_interpreter(call)[call], target[1], SPILLS if target[-1] == "ieee" else {})


@each_target
def test_aligned_images_are_read_and_written_four_pixels_at_a_time(quick, target):
    """For each thread, that of the workspace between the two steps, too."""
    takes = quick[("compile_all", *target, "aligned")]
    row, column = (takes[f"striped_conv forward {step} gelu gated: convolve"] for step in (0, 1))
    size = 4 * getattr(torch, target[1]).itemsize
    assert (row["load"], row["store"], column["load"], column["store"]) == (size, 16, 16, size)


MATRICES = ["norm_pointwise", "gated_ffn", "low_rank_experts", "norm_conv3x3"]
WITHOUT = ("add_up", "pack_pixels", "gate_backward")  # kernels of theirs that multiply no matrices


def layers(takes: dict[str, dict]) -> dict[str, dict]:
    """Return the kernels that multiply matrices."""
    mine = {name: kernel for name, kernel in takes.items() if name.split()[0] in MATRICES}
    return {name: kernel for name, kernel in mine.items() if not name.split(": ")[1].startswith(WITHOUT)}


@each_target
def test_matrices_are_multiplied_by_matrix_units(quick, target):
    found = layers(quick[("compile_all", *target, "aligned")])
    assert {name.split()[0] for name in found} == set(MATRICES)
    for name, kernel in found.items():
        assert kernel["mma.sync"] > 0, name


@each_target
def test_gelu_takes_no_more_than_its_result_keeps(quick, target):
    """For 16 bits a power of two and its reciprocal for each number, in float32 a quotient: `test_triton_activation`.

    A product with the reciprocal instead took gradients beyond twice the error of eager PyTorch.
    """
    takes = quick[("compile_all", *target, "aligned")]
    gelu, none = (
        takes[f"norm_pointwise forward {name} norm: norm_pointwise_forward"] for name in ("36 gelu", "72 None")
    )
    is_narrow = getattr(torch, target[1]).itemsize == 2
    assert none["rcp"] == none["ex2"] == 0
    assert gelu["ex2"] == gelu["rcp"] and (gelu["rcp"] > 0) == is_narrow


@each_target
def test_layers_read_16_bytes_at_a_time(quick, target):
    """For each thread. Windows of three pixels with 36 channels of 16 bits begin at multiples of 8 bytes only.

    Those with 3 channels of float32, 12 bytes, at multiples of 4: nothing is wider, and little is read.
    """
    for name, kernel in layers(quick[("compile_all", *target, "aligned")]).items():
        if " forward" in name and "3 channels" not in name:
            assert kernel["load"] >= (8 if name.startswith("norm_conv3x3") else 16), name
            assert kernel["store"] >= 8, name


def test_all_lanes_have_the_same_sums(quick):
    assert quick[("sums_that_differ_among_lanes",)] == [0, 0]


def test_spills_are_seen(quick):
    takes = quick[("compile_with_few_registers",)]
    assert takes["registers"] <= 24 and takes["local"] > 0


def test_what_compiles_is_what_a_launch_would_compile(quick):
    assert quick[("unlike_jit",)] == []


def test_resources_of_a_library():
    assert parse_resources(CUOBJDUMP) == {
        "sm_80": {"_Z1kILi64EEvPfi": Resources(24, 448, 256), "_Z1kILi32EEvPfi": Resources(31, 8, 128)},
        "sm_90": {"_Z1kILi64EEvPfi": Resources(31, 0, 1280)},
    }


def test_interpreted_kernels_do_not_compile():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        Launch(kernel=print, programs=1, arguments={}).compile_for(90)


@triton.jit
def add(y, step):
    tl.store(y, step + step)


interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 is not set")


def results_of_striped_conv() -> tuple[torch.Tensor, ...]:
    """Return y and all gradients for some float64 tensors."""
    torch.manual_seed(0)
    shapes = [(2, 3, 6, 7), (3, 1, 1, 5), (3,), (3, 1, 5, 1), (3,)]
    x, *parameters = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    y, dx, dgate, *gradients = (torch.full_like(p, torch.nan) for p in (x, x, x, *parameters))
    striped_conv.striped_conv(y, x, *parameters, True, x)
    striped_conv.striped_conv_backward(dx, dgate, *gradients, x, x, *parameters, True, x)
    return y, dx, dgate, *gradients


@interpreted
def test_wide_indices_give_the_same(monkeypatch):
    narrow = results_of_striped_conv()
    used = []
    monkeypatch.setattr(striped_conv, "index_type", lambda largest: used.append(largest) or tl.int64)
    assert all(map(torch.equal, results_of_striped_conv(), narrow)) and used


@interpreted
def test_parts_add_up(monkeypatch):
    whole, made, new_partial = results_of_striped_conv(), [], striped_conv.new_partial
    monkeypatch.setattr(striped_conv, "PART", 16)
    monkeypatch.setattr(striped_conv, "new_partial", lambda *given: made.append(new_partial(*given)) or made[-1])
    parts = results_of_striped_conv()
    assert [len(partial) for partial in made] == [6]  # 84 pixels
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


@interpreted
def test_an_index_that_wraps_is_refused():
    y = torch.zeros(1, dtype=torch.int64)
    add[(1,)](y, 2**30 - 1)
    assert y.item() == 2**31 - 2
    with pytest.raises(Exception, match="int32 overflow"):
        add[(1,)](y, 2**30)
