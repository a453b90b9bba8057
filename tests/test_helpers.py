"""The tests' own tools: a test runs what its name says, in the dtypes that its backend has, and no more than needed."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import has_kernel, is_too_much_to_interpret
from helpers.backends import (
    Backend,
    assert_computed,
    calls,
    cut_off_by_tensor_cores,
    kernels_of,
    running_on,
    uses_tensor_cores,
)
from helpers.naive import naive_norm_pointwise
from helpers.ops import assert_values, cast, largest_difference, largest_of, terms_of, value_and_gradients
from helpers.table import BY_NAME

from seemore_fast import backends
from seemore_fast.backends import select_backend
from seemore_fast.ops import norm_pointwise

CASE = BY_NAME["norm_pointwise"]
NAMES = [name for name in kernels_of("norm_pointwise") if name in ("triton", "cpu portable", "cpu avx2")]
each_name = pytest.mark.parametrize("name", NAMES)


@pytest.mark.parametrize("operator", [operator for operator in backends.KERNELS if operator != "network"])
def test_kernels_serve_the_dtypes_that_tests_take_and_the_reference_the_rest(operator, device):
    for name in kernels_of(operator):
        with running_on(name, device):
            for dtype in backends.ALL:
                found = select_backend(operator, torch.empty(1, 2, 4, 4, dtype=dtype, device=device), *name.taps[:1])
                served = "cpu" if name.family == "cpu" else name
                assert found == (served if dtype in name.dtypes else "reference"), (name, dtype)
        assert name.widest in name.dtypes
        assert not has_kernel({"backend": name, "dtype": torch.float64}) or name.widest == torch.float64


@each_name
def test_the_widest_dtype_is_computed(name, device, monkeypatch):
    """By a kernel: in float64 to 1e-10; where there is none in float32, within twice the error of the reference."""
    dtypes, forward = set(), value_and_gradients
    monkeypatch.setattr(
        "helpers.ops.value_and_gradients", lambda f, t, **o: dtypes.add(t["x"].dtype) or forward(f, t, **o)
    )
    calls.clear()
    assert_values(name, CASE, *CASE.call(device, name.widest))
    assert_computed(name, None)
    assert name.widest in dtypes


@each_name
def test_what_is_not_close_to_naive_is_seen(name, device):
    def naive_with_another_eps(**tensors):
        return naive_norm_pointwise(**tensors, eps=1e-3)

    with pytest.raises(AssertionError, match=r"y.?: "):
        assert_values(name, replace(CASE, naive=naive_with_another_eps), *CASE.call(device, name.widest))


@each_name
def test_a_name_whose_kernel_did_not_run_fails(name, device):
    other = next(other for other in (*NAMES, Backend("reference", "norm_pointwise")) if other != name)
    tensors = cast(CASE.call(device).tensors, torch.float32)
    calls.clear()
    with pytest.raises(AssertionError, match=f"named after {name}, whose kernel of norm_pointwise never ran"):
        assert_computed(name, None)
    with running_on(other, device):
        norm_pointwise(**tensors)
    with pytest.raises(AssertionError, match=f"named after {name}, whose kernel of norm_pointwise never ran"):
        assert_computed(name, None)
    with running_on(name, device):
        norm_pointwise(**tensors)
    assert_computed(name, None)
    with pytest.raises(AssertionError, match="named after the reference, but kernels ran"):
        assert_computed(Backend("reference", "norm_pointwise"), None)


@each_name
def test_a_name_whose_work_the_reference_did_fails(name, device):
    tensors = cast(CASE.call(device).tensors, torch.float32)
    leaves_it = pytest.mark.falls_back(name.family, reason="a test").mark
    calls.clear()
    with running_on(name, device):
        norm_pointwise(**cast(tensors, torch.float16 if name.family == "cpu" else torch.float64))
    with pytest.raises(AssertionError, match="never ran"):
        assert_computed(name, None)
    assert_computed(name, leaves_it)
    with running_on(name, device):
        norm_pointwise(**tensors)
    with pytest.raises(AssertionError, match=r"but the reference computed {'norm_pointwise'}, too"):
        assert_computed(name, None)
    with pytest.raises(AssertionError, match=f"expected {name} to leave it to the reference"):
        assert_computed(name, leaves_it)


@each_name
def test_a_kernel_that_was_looked_up_before_is_noted(name, device):
    x = CASE.call(device).tensors["x"].float()
    with running_on(name, device):
        kept = backends.lookup_kernel("norm_pointwise", x)
        calls.clear()
        kept(torch.empty_like(x), x, None, None, x.new_ones(3, 3, 1, 1), x.new_ones(3), None, 1e-6, None)
    assert calls == {(name, "norm_pointwise")}


@pytest.mark.parametrize("counts", [(3,), (8, 3), (3, 8), (2, 2, 2), (8, 2, 3)], ids=str)
def test_the_interpreter_takes_each_value_in_turn(counts):
    marks = [pytest.mark.parametrize(f"p{i}, q{i}", [(j, 9 - j) for j in range(n)]).mark for i, n in enumerate(counts)]
    taken = []
    for combination in itertools.product(*map(range, counts)):
        arguments = {f"p{i}": j for i, j in enumerate(combination)} | {
            f"q{i}": 9 - j for i, j in enumerate(combination)
        }
        item = SimpleNamespace(iter_markers=lambda _: marks, callspec=SimpleNamespace(params=arguments))
        if not is_too_much_to_interpret(item):
            taken.append(combination)
    for i, count in enumerate(counts):
        assert {combination[i] for combination in taken} == set(range(count))
    assert len(taken) == torch.tensor(counts).prod() // (sorted(counts)[-2] if len(counts) > 1 else 1)


# Tensor cores


def rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def cut_to_float32(x: torch.Tensor) -> torch.Tensor:
    rounded = x.float()
    return torch.where(rounded.double().abs() > x.abs(), torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)


def multiplied_by_tensor_cores(a: torch.Tensor, b: torch.Tensor, products: int) -> torch.Tensor:
    """Return a @ b in one product of TF32 or in three, each of whose sums takes 8 terms at a time and is cut off."""
    large = rounded_to_tf32(a), rounded_to_tf32(b)
    small = rounded_to_tf32(a - large[0]), rounded_to_tf32(b - large[1])
    y = torch.zeros(len(a), b.shape[1])
    for left, right in [(small[0], large[1]), (large[0], small[1]), large][-products:]:
        for k in range(0, a.shape[1], 8):
            y = cut_to_float32(y.double() + left[:, k : k + 8].double() @ right[k : k + 8].double())
    return y


@pytest.mark.parametrize("terms", [36, 324, 646])
def test_tensor_cores_lose_no_more_than_they_may(terms):
    """Of long sums more than the 1e-6 of another order of summation; one product instead of three loses much more."""
    a, b = torch.randn(400, terms), torch.randn(terms, 32)
    exact = a.double() @ b.double()
    three, one = (
        largest_difference(multiplied_by_tensor_cores(a, b, products), exact) / largest_of(exact) for products in (3, 1)
    )
    allowed = max(1e-6, cut_off_by_tensor_cores(terms))
    assert three < allowed < one / 20
    assert terms < 600 or three > 1e-6


def test_the_terms_of_a_sum(device):
    tensors = CASE.call(device).tensors
    assert [terms_of(what, tensors) for what in ("y", "gradient of x", "gradient of norm_bias")] == [5, 5, 84]
    gpu = torch.device("cuda")
    assert uses_tensor_cores(Backend("triton", "norm_pointwise"), gpu)
    assert not uses_tensor_cores(Backend("triton", "norm_pointwise"), torch.device("cpu"))
    assert not uses_tensor_cores(Backend("triton", "striped_conv"), gpu)
    assert not uses_tensor_cores(Backend("reference", "norm_pointwise"), gpu)
