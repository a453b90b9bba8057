"""The host code of a GPU's calls, without a GPU: launches, torch's kernels, compiled kernels and pointers.

Triton's binder needs a process without TRITON_INTERPRET: this file, run as a program, is that.
"""

import json
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from helpers.interpreter import run_without

from seemore_fast.benchmarks import gpu_dry_run

pytestmark = pytest.mark.triton
SIZES = [(480, 640), (481, 641), (500, 333)]
STENCILS = {"convolve", "sum_tiles", "aggregate", "stretch"}  # whose rows begin at whole vectors, or not
OF_A_GROUP = 19  # launches, counted in test_triton_network
# Bytes of the widest load, where less than 16: windows of 36 channels of 16 bits, shifted rows, and small arrays.
LEAST = {"norm_conv3x3_forward": 8, "conv3x3_shuffle_forward": 8, "convolve": 2, "stretch": 4, "choose": 4, "mix": 2}


# In a process of its own


def figures(case: str) -> dict:
    with gpu_dry_run.dry_run() as compiled:
        return gpu_dry_run.measure(gpu_dry_run.cases()[case], compiled)[0]


def plans(compile_all: bool) -> dict:
    """Return for each size its launches as (kernel, variant, grid), and the widest loads and stores by variant."""
    from helpers.ptx import widest

    def widths(variant) -> tuple[int, int]:
        ptx = variant.compile().asm["ptx"]
        return widest("ld", ptx), widest("st", ptx)

    with gpu_dry_run.dry_run() as compiled:
        case = gpu_dry_run.cases()["inference T x4 480x640 bf16"]
        found = []
        for size in SIZES:
            with gpu_dry_run.launches() as launched:
                case.run(case.image(1, *size))
            found.append(launched)
        variants = list(compiled.values())
        numbers = {id(variant): number for number, variant in enumerate(variants)}
    wanted = ["norm_pointwise_forward", "pack_pixels", "sum_tiles"]
    compiled = {
        number: (variant.name, *widths(variant))
        for number, variant in enumerate(variants)
        if compile_all or variant.name in wanted
    }
    return {
        "plans": [[(one.variant.name, numbers[id(one.variant)], one.grid) for one in launched] for launched in found],
        "widths": compiled,
    }


def repetition() -> dict:
    """Return how the launches of a repeated call differ from those of the first one in what is no pointer."""
    with gpu_dry_run.dry_run():
        case, found = gpu_dry_run.cases()["inference T x4 480x640 bf16"], []
        for _ in range(4):
            with gpu_dry_run.launches() as launched:
                case.run(case.image(1, 97, 113))
            found.append(launched)
    first, last = found[0], found[-1]

    def plain(arguments):
        return [argument for argument in arguments if not is_pointer(argument)]

    def is_pointer(argument):
        return isinstance(argument, torch.Tensor) or (isinstance(argument, int) and argument >= 2**32)

    pointers = [argument for one in last for argument in one.arguments if is_pointer(argument)]
    constants = [a.data_ptr() for one in first for a in one.arguments if isinstance(a, torch.Tensor)]
    addresses = [a if isinstance(a, int) else a.data_ptr() for a in pointers]
    return {
        "launches": [len(launched) for launched in found],
        "same": [(a.variant, a.grid, plain(a.arguments)) == (b.variant, b.grid, plain(b.arguments))
                 for a, b in zip(first, last, strict=True)],
        "pointers": [len(constants), len(addresses)],
        "aligned": all(address % 4 == 0 for address in addresses),
        "weights": len({a for a in constants} & set(addresses)),
    }  # fmt: skip


def compiled_step() -> list[int]:
    """Return the launches of a training step, and of a compiled one, without and with sizes as symbols."""
    from seemore_fast import seemore_t

    model, found = seemore_t(scale=2, num_layers=1).train(), []
    with gpu_dry_run.dry_run():
        for dynamic in (None, False, True):
            how = dict(fullgraph=True, dynamic=dynamic, backend="aot_eager")
            run = model if dynamic is None else torch.compile(model, **how)
            with gpu_dry_run.launches() as launched:
                run(torch.rand(2, 3, 32, 16 * (2 + len(found)))).square().mean().backward()
            found.append(len(launched))
    return found


def unlike_jit() -> list[str]:
    """Return the kernels that `Launch.compile_for` would compile with other options than Triton does at a launch.

    TRITON_DEBUG is on: Triton adds it, and others, to what it is given.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    from seemore_fast.kernels.launch import observed

    parse, unlike = make_backend(GPUTarget("cuda", gpu_dry_run.ARCHITECTURE, 32)).parse_options, []

    def compare(launch):
        theirs = launch.start().variant.options
        if parse(launch.jit_options) != theirs:
            unlike.append(f"{launch.kernel.__name__}: {launch.jit_options}, expected {theirs}")

    triton.knobs.runtime.debug = True
    with gpu_dry_run.dry_run(), observed(compare):
        case = gpu_dry_run.cases()["inference T x4 480x640 bf16"]
        case.run(case.image(1, 32, 32))
    return unlike


if __name__ == "__main__":
    print(json.dumps([globals()[function](*arguments) for function, *arguments in json.loads(sys.argv[1])]))
    sys.exit()


# Tests


def without_interpreter(function: str, *arguments):
    """Return what a function above gives where TRITON_INTERPRET is not set."""
    return json.loads(run_without(__file__, json.dumps([[function, *arguments]])))[0]


def test_kernels_are_compiled_ahead_of_time_with_the_options_of_a_launch():
    assert without_interpreter("unlike_jit") == []


def test_inference():
    found = without_interpreter("figures", "inference T x4 480x640 bf16")
    # Beside six groups: the first convolution two times, LayerNorm and the second one, and the last one.
    assert found["launches"] <= 6 * OF_A_GROUP + 5
    assert found["torch_kernels"] <= 1  # the mean is subtracted; weights were laid out before
    assert found["variants"] <= 21
    assert found["variants_40_sizes"] <= 21 + 8  # stencils once more, for rows that do not begin at whole vectors
    assert found["host_ms"] > 0


@pytest.mark.slow
def test_training():
    found = without_interpreter("figures", "training T x2 32x64x64 bf16")
    assert found["launches"] <= 331
    assert found["torch_kernels"] <= 32  # 10 of them the loss's
    assert found["variants"] <= 50
    assert found["variants_40_sizes"] <= 178
    assert found["host_ms"] > 0


def test_a_compiled_step_launches_what_an_eager_one_does():
    eager, *compiled = without_interpreter("compiled_step")
    assert compiled == [eager, eager]


@pytest.fixture(scope="module")
def planned():
    return without_interpreter("plans", False)


def test_odd_sizes_have_the_launches_and_the_kernels_of_even_ones(planned):
    even, *odd = planned["plans"]
    for plan in odd:
        assert [name for name, _, _ in plan] == [name for name, _, _ in even]
        for (name, variant, _), (_, expected, _) in zip(plan, even, strict=True):
            assert (variant == expected) or name in STENCILS, name
    assert [variant for _, variant, _ in odd[0]] == [variant for _, variant, _ in odd[1]]


def test_layers_read_16_bytes_at_a_time_whatever_the_size(planned):
    assert_wide(planned)


@pytest.mark.slow
def test_all_kernels_read_16_bytes_at_a_time():
    assert_wide(without_interpreter("plans", True))


def assert_wide(found: dict):
    """Stencils read wide if rows begin at whole vectors; otherwise they read pixel by pixel along a row."""
    even, odd, _ = found["plans"]
    for variants in ({v for _, v, _ in even}, {v for name, v, _ in odd if name not in STENCILS}):
        compiled = [width for number, width in found["widths"].items() if int(number) in variants]
        assert compiled
        for name, load, _ in compiled:
            assert load >= LEAST.get(name, 16), name


def test_a_repeated_call_launches_the_same_with_other_pointers():
    found = without_interpreter("repetition")
    first, recorded, *repeated = found["launches"]
    assert (recorded, repeated) == (2 * first, [first, first])
    assert all(found["same"])
    assert found["pointers"][0] == found["pointers"][1] and found["aligned"]
    assert found["weights"] > 100  # what is constant is where it was
