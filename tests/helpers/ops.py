"""Seeded tensors, layouts and comparisons of the operator tests.

A test of an operator hands `backend` (see `each_backend`) to the helpers; a new backend is tested as soon as
`seemore_fast.backends.KERNELS` lists it.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from .backends import (
    Backend,
    cut_off_by_tensor_cores,
    guarded_results,
    running_on,
    uninitialised_is_nan,
    uses_tensor_cores,
)

each_narrow_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

# (batch, channels, height, width): one pixel, one line, no image at all, odd, wider than a vector or a warp
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 1, 9),
    (2, 5, 7, 1),
    (0, 3, 4, 5),
    (3, 4, 5, 6),
    (1, 36, 8, 11),
    (2, 17, 9, 13),
    (1, 6, 3, 70),  # of some channels, so that not all sums over the pixels nearly cancel
]

# Tensors


def random_parameters(shapes: dict[str, tuple[int, ...]], device: str, seed: int = 0) -> dict[str, Tensor]:
    """Return float64 tensors by name, the same on every device; weights are scaled so that results are near 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        scale = max(1, math.prod(shape[1:])) ** -0.5 if name.startswith("weight") else 1
        tensors[name] = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device)
    return tensors


def norm_shapes(channels: int, prefix: str = "norm") -> dict[str, tuple[int, ...]]:
    return {f"{prefix}_weight": (channels,), f"{prefix}_bias": (channels,)}


def striped_shapes(channels: int, taps: int) -> dict[str, tuple[int, ...]]:
    return {
        "weight_row": (channels, 1, 1, taps),
        "bias_row": (channels,),
        "weight_col": (channels, 1, taps, 1),
        "bias_col": (channels,),
    }


def ffn_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    return {
        "weight_1": (2 * channels, channels, 1, 1),
        "bias_1": (2 * channels,),
        "weight_gate": (channels, 1, 3, 3),
        "bias_gate": (channels,),
        "weight_2": (channels, channels, 1, 1),
        "bias_2": (channels,),
    }


def calibrate_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    return {
        "weight_agg": (channels, 1, 4, 4),
        "bias_agg": (channels,),
        "weight_dw": (channels, 1, 3, 3),
        "bias_dw": (channels,),
        "weight_pw": (channels, channels, 1, 1),
        "bias_pw": (channels,),
    }


def expert_shapes(channels: int, ranks: Sequence[int]) -> dict[str, tuple[int, ...]]:
    total = sum(ranks)
    return {
        "weight_a": (total, channels),
        "bias_a": (total,),
        "weight_k": (total, channels),
        "bias_k": (total,),
        "weight_out": (channels, total),
        "bias_out": (len(ranks), channels),
    }


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert the floating tensors; the router's probabilities stay float32 at least, as it returns them."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        name: tensor.to(wide if name == "expert_weight" else dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def inside_a_larger_tensor(x: Tensor) -> Tensor:
    """View of a tensor with one more element on every side, NaN (or a huge index) so that nobody reads it unseen."""
    poison = torch.nan if x.is_floating_point() else 2**40
    larger = x.new_full([size + 2 for size in x.shape], poison)
    view = larger[(slice(1, -1),) * x.dim()]
    return view.copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x,
    "every_other": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "slice": inside_a_larger_tensor,
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


# Comparisons


def value_and_gradients(function: Callable, tensors: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Return y and the gradient of every floating tensor for a fixed upstream gradient, itself not contiguous.

    A gradient that is missing raises: optimizers and DDP distinguish None from zero. Only naive functions may omit it.
    """
    leaves = {name: t.detach().requires_grad_() if t.is_floating_point() else t for name, t in tensors.items()}
    y = function(**leaves, **options)
    number = torch.arange(y.numel(), device=y.device)
    quarters = (number * 2654435761 >> 7) % 9 - 4  # divided by 4, exact in every dtype
    upstream = (quarters / 4).to(y.dtype).view(y.shape[::-1]).permute(*reversed(range(y.dim())))
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    is_naive = function.__name__.startswith("naive")
    gradients = torch.autograd.grad(y, wanted.values(), upstream, materialize_grads=is_naive)
    return {"y": y.detach()} | {f"gradient of {name}": g for name, g in zip(wanted, gradients, strict=True)}


def results(backend: Backend, function: Callable, tensors: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Return value_and_gradients of a backend, and y without autograd; the inputs stay as they were."""
    before = {name: t.clone() for name, t in tensors.items()}
    with running_on(backend, next(iter(tensors.values())).device):
        found = value_and_gradients(function, tensors, **options)
        with torch.no_grad():
            found["y without autograd"] = function(**tensors, **options)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), f"{name} was modified"
    return found


def assert_values(backend: Backend, case, tensors: dict[str, Tensor], options: dict):
    """y (with and without autograd) and all gradients are those of the naive formula, in float64.

    In narrower dtypes they err at most twice as much as PyTorch's eager operators, plus a little (`errors_of`).
    """
    expected = value_and_gradients(case.formula, cast(tensors, torch.float64), **options)
    dtype = next(iter(tensors.values())).dtype
    if dtype != torch.float64:
        failures = errors_of(backend, case, tensors, options, expected)
        assert not failures, f"{case.name} in {dtype}: {failures}"
        return
    for found, value in results(backend, case.run, tensors, **options).items():
        exact = expected[found.removesuffix(" without autograd")]
        torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-10, msg=partial("{}: {}".format, found))


def errors_of(
    backend: Backend, case, tensors: dict[str, Tensor], options: dict, expected: dict[str, Tensor]
) -> dict[str, str]:
    """Return which results of a backend err too much, and by how much.

    The baseline is the error of the reference, in the same dtype and layout; a little is half an eps of the largest
    value, in float32 1e-6 of it (another order of summation) or what tensor cores cut off, if that is more. The
    baseline is capped at 16 eps for y and 64 for gradients, some of which nearly cancel: else a reference without
    float32 statistics would excuse itself and every kernel.
    """
    dtype = next(iter(tensors.values())).dtype
    baseline = value_and_gradients(case.baseline, tensors, **options)
    failures = {}
    for found, value in results(backend, case.run, tensors, **options).items():
        what = found.removesuffix(" without autograd")
        exact, is_y = expected[what], what == "y"
        assert value.dtype == (case.dtype_of_y(dtype) if is_y else tensors[what.removeprefix("gradient of ")].dtype)
        eps, largest = torch.finfo(value.dtype if is_y else dtype).eps, largest_of(exact)
        tolerated = min(largest_difference(baseline[what], exact), (16 if is_y else 64) * eps * largest)
        little = max(eps / 2, 1e-6)
        if dtype == torch.float32 and uses_tensor_cores(backend, value.device):
            little = max(little, cut_off_by_tensor_cores(terms_of(what, tensors)))
        allowed = 2 * tolerated + little * largest
        error = largest_difference(value, exact)
        if not error <= allowed:  # NaN fails, too
            failures[found] = f"error {error:.3g}, allowed {allowed:.3g}, largest value {largest:.3g}"
    return failures


def terms_of(what: str, tensors: dict[str, Tensor]) -> int:
    """Return the number of products in a sum: pixels for a gradient of parameters, channels and taps for others."""
    image = next(iter(tensors.values()))
    if "weight" in what or "bias" in what:
        return image.numel() // image.shape[1]
    layers = [t for name, t in tensors.items() if name.startswith("weight") and t.shape[1] > 1]
    return max((max(t[0].numel(), t[:, 0].numel()) for t in layers), default=1)


def largest_of(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return largest_of(actual.double() - expected)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]):
    """All results are equal to the bit."""
    assert actual.keys() == expected.keys()
    for what, value in expected.items():
        torch.testing.assert_close(actual[what], value, rtol=0, atol=0, msg=partial("{}: {}".format, what))


def assert_gradcheck(function: Callable, tensors: dict[str, Tensor], **options):
    """Finite differences agree with the gradient of every floating tensor, which is the same with all others frozen."""
    wanted = {name: t.clone().requires_grad_() for name, t in tensors.items() if t.is_floating_point()}

    def of_values(*values: Tensor) -> Tensor:
        return function(**tensors | dict(zip(wanted, values, strict=True)), **options)

    # nondet_tol: torch's bilinear gradient on a GPU adds in any order
    assert torch.autograd.gradcheck(of_values, tuple(wanted.values()), nondet_tol=1e-10)
    together = torch.autograd.grad(of_values(*wanted.values()).square().sum(), wanted.values())
    for (name, tensor), expected in zip(wanted.items(), together, strict=True):
        y = function(**tensors | {name: tensor}, **options)
        (alone,) = torch.autograd.grad(y.square().sum(), tensor)
        torch.testing.assert_close(alone, expected, rtol=1e-10, atol=1e-10, msg=partial("{}: {}".format, name))


def assert_compiles(function: Callable, *calls: dict[str, Tensor], **options):
    """As one graph, traced once per call in `calls` (other sizes trace dynamic shapes), with bit-equal results."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for tensors in calls:
        torch.testing.assert_close(compiled(**tensors, **options), function(**tensors, **options), rtol=0, atol=0)


def assert_opcheck(operator: Callable, tensors: dict[str, Tensor], **options):
    """torch.library.opcheck finds schema, fake, autograd and compilation of the dispatcher's operator consistent."""
    known = getattr(torch.ops.seemore_fast, operator.__name__).default
    given = {name: t.clone().requires_grad_() if t.is_floating_point() else t for name, t in tensors.items()} | options
    torch.library.opcheck(known, tuple(given.get(argument.name) for argument in known._schema.arguments))


def assert_writes_its_results_only(function: Callable, tensors: dict[str, Tensor], **options):
    """Results and gradients are written whole and not beyond, and workspace is not read before it is written."""
    expected = value_and_gradients(function, tensors, **options)
    with guarded_results(), uninitialised_is_nan():
        actual = value_and_gradients(function, tensors, **options)
    assert_same(actual, expected)


def assert_deterministic(function: Callable, tensors: dict[str, Tensor], **options):
    """Results and gradients are bit-equal in every run and for every number of threads."""
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            runs.append(value_and_gradients(function, tensors, **options))
    finally:
        torch.set_num_threads(threads)
    for what, value in runs[0].items():
        assert all(torch.equal(run[what], value) for run in runs), what


def assert_images_are_alone(function: Callable, tensors: dict[str, Tensor], **options):
    """NaN in the first image of the batch leaves the results and gradients of all others as they are, to the bit."""
    batch = next(iter(tensors.values())).shape[0]
    images = {name: t.clone() for name, t in tensors.items() if t.dim() == 4 and t.shape[0] == batch}
    expected = value_and_gradients(function, tensors, **options)
    for image in images.values():
        image[0] = torch.nan
    actual = value_and_gradients(function, tensors | images, **options)
    for what in ("y", *(f"gradient of {name}" for name in images)):
        assert torch.equal(actual[what][1:], expected[what][1:]), what
        assert not expected[what].isnan().any(), what


def assert_refuses_double_backward(function: Callable, kernel: str, tensors: dict[str, Tensor], **options):
    """A gradient of a gradient is an error that names the operator, or its kernel's, and the way out."""
    message = rf"^({function.__name__}|{kernel}): its gradient is not differentiable, .*use_backend"
    name, first = next((name, t) for name, t in tensors.items() if t.is_floating_point())
    leaf = first.clone().requires_grad_()
    y = function(**tensors | {name: leaf}, **options)
    (gradient,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        gradient.sum().backward()
