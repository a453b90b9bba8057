"""The promises of all operators, on every backend: helpers/table.py has the examples of each.

In float64 results are those of naive formulas; a backend without float64 computes in the widest dtype that it has.
"""

import pytest
import torch
from helpers.backends import at_large_offsets, running_on
from helpers.cases import each
from helpers.faults import assert_refused, assert_sizes_refused
from helpers.ops import (
    assert_compiles,
    assert_deterministic,
    assert_gradcheck,
    assert_images_are_alone,
    assert_opcheck,
    assert_refuses_double_backward,
    assert_same,
    assert_values,
    assert_writes_its_results_only,
    cast,
    largest_difference,
    value_and_gradients,
)
from helpers.table import BY_NAME, CASES, LAYER_NORM

each_operator = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each([*CASES, LAYER_NORM], "values")
def test_values(case, backend, example, device):
    assert_values(backend, case, *case.call_of(backend, device, example))


@each(CASES, "sizes", reference=False)
def test_sizes(case, backend, example, device):
    assert_values(backend, case, *case.call_of(backend, device, example))


@each(CASES, "layouts")
def test_layouts(case, backend, example, device):
    assert_values(backend, case, *case.call_of(backend, device, example))


@each(CASES, "narrow")
def test_narrow_dtypes(case, backend, example, device):
    assert_values(backend, case, *case.call_of(backend, device, example))


@each(CASES, "larger", reference=False, interpreted=False)
def test_more_than_one_tile(case, backend, example, device):
    assert_values(backend, case, *case.call_of(backend, device, example))


@each(CASES, "too_wide", reference=False)
@pytest.mark.falls_back("triton", reason="up to 64 channels and ranks")
def test_wide_models(case, backend, example, device):
    """Triton's kernels leave them to the reference; the CPU's take any number of channels."""
    assert_values(backend, case, *case.call_of(backend, device, example))


@each(CASES, "products", reference=False)
def test_programs_of_more_than_one_tile_add_up(case, backend, example, device, monkeypatch):
    products = pytest.importorskip("seemore_fast.kernels.products")
    monkeypatch.setattr(products, "PARTS", 2)
    assert_values(backend, case, *case.call_of(backend, device, example))


@each([*CASES, LAYER_NORM], "gradcheck", dtype=torch.float64)
def test_gradcheck(case, backend, example, device):
    tensors, options = case.call_of(backend, device, example)
    with running_on(backend, device):
        assert_gradcheck(case.run, tensors, **options)


@each(CASES, "double_backward")
def test_double_backward(case, backend, example, device):
    """Kernels refuse it; the reference has gradients of gradients."""
    tensors, options = case.call_of(backend, device, example)
    with running_on(backend, device):
        if backend != "reference":
            return assert_refuses_double_backward(case.run, case.kernel, tensors, **options)
        wide = cast(tensors, torch.float64)
        image = next(iter(wide))

        def of_image(x):
            return case.run(**wide | {image: x}, **options)

        assert torch.autograd.gradgradcheck(of_image, wide[image].requires_grad_(), nondet_tol=1e-10)


@each([*CASES, LAYER_NORM], "compiles")
def test_compiles(case, backend, example, device):
    tensors, options = case.call_of(backend, device, example)
    others, _ = case.call_of(backend, device, example, **case.other)
    with running_on(backend, device):
        assert_compiles(case.operator, tensors, others, **options)


@each(CASES, "opcheck", reference=False)
def test_opcheck(case, backend, example, device):
    tensors, options = case.call_of(backend, device, example)
    with running_on(backend, device):
        assert_opcheck(case.operator, tensors, **options)


@each(CASES, "writes", reference=False)
def test_writes_its_results_only(case, backend, example, device):
    tensors, options = case.call_of(backend, device, example)
    with running_on(backend, device):
        assert_writes_its_results_only(case.run, tensors, **options)


@each(CASES, "offsets")
def test_large_offsets(case, backend, example, device):
    """With the images of a batch 2^31 elements apart, results and gradients are the same."""
    tensors, options = case.call_of(backend, device, example)
    batch = next(iter(tensors.values())).shape[0]
    far = {name: at_large_offsets(t) if t.dim() == 4 and len(t) == batch else t for name, t in tensors.items()}
    with running_on(backend, device):
        expected = value_and_gradients(case.run, tensors, **options)
        assert_same(value_and_gradients(case.run, far, **options), expected)


@each(CASES, "deterministic", reference=False, interpreted=False)  # which takes one program after another
def test_deterministic(case, backend, example, device):
    tensors, options = case.call_of(backend, device, example)
    with running_on(backend, device):
        assert_deterministic(case.run, tensors, **options)


@each(CASES, "alone", reference=False)
def test_images_are_alone(case, backend, example, device):
    tensors, options = case.call_of(backend, device, example)
    with running_on(backend, device):
        assert_images_are_alone(case.run, tensors, **options)


@each(CASES, "autocast", reference=False)
def test_autocast(case, backend, example, device):
    """Of float32 tensors, y and every gradient err at most twice as much as the reference's, plus half an eps.

    So it is in a training loop that calls one operator by itself. Each operator's own test has what it casts to what.
    """
    tensors, options = case.call_of(backend, device, example)
    expected = value_and_gradients(case.formula, cast(tensors, torch.float64), **options)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        baseline = value_and_gradients(case.baseline, tensors, **options)
        with running_on(backend, device):
            found = value_and_gradients(case.run, tensors, **options)
    for what, exact in expected.items():
        allowed = 2 * largest_difference(baseline[what], exact) + 2**-8 * exact.abs().max()
        assert largest_difference(found[what], exact) <= allowed <= 2**-3 * exact.abs().max(), what
        assert what == "y" or found[what].dtype == torch.float32, what


def test_gradients_go_by_the_autocast_of_their_forward(device):
    """Nothing has kernels for float16 on a CPU: a backward under such an autocast still is of its forward."""
    case = BY_NAME["norm_pointwise"]
    tensors, _ = case.call(device, torch.float32, shape=(1, 4, 3, 5))
    expected = value_and_gradients(case.run, tensors)

    def function(**tensors):
        y = case.run(**tensors)
        y.register_hook(lambda _: torch.set_autocast_enabled(y.device.type, True))
        return y

    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_dtype(device, torch.float16)
    try:
        actual = value_and_gradients(function, tensors)
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
    assert_same(actual, expected)


# What is refused, by every backend with the same words


@pytest.mark.parametrize(
    "case, fault", [pytest.param(case, fault, id=f"{case.name}-{fault}") for case in CASES for fault in case.faults]
)
def test_bad_tensors(case, fault, device):
    assert_refused(fault, case, device)


@each_operator
def test_bad_sizes(case, device):
    assert_sizes_refused(case, device)


@each_operator
def test_other_devices(case, device):
    """Each tensor but the first, which sets the device."""
    tensors, options = case.call(device)
    first, *others = tensors
    for name in others:
        with pytest.raises(
            ValueError, match=f"^{case.error_name}: {name} is on meta, expected {device}.*, where {first} is"
        ):
            case.operator(**tensors | {name: tensors[name].to("meta")}, **options)


@pytest.mark.parametrize(
    "case, bad, message",
    [
        pytest.param(case, bad, message, id=f"{case.name}-" + " ".join(f"{name}={bad[name]}" for name in bad))
        for case in CASES
        for bad, message in case.bad_options
    ],
)
def test_bad_options(case, bad, message, device):
    known = case.arguments(device)
    made = case.arguments(device, **{name: value for name, value in bad.items() if name not in known})
    with pytest.raises((TypeError, ValueError), match=f"^{case.error_name}: {message}"):
        case.operator(**made | {name: value for name, value in bad.items() if name in known})
