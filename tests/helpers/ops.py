"""Seeded tensors, layouts and comparisons of the operator tests.

A test of an operator hands `backend` (see `each_backend`) to the helpers; a new backend is tested as soon as
`seemore_fast.backends.KERNELS` lists it.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor

from seemore_fast import reference

from .backends import (
    Backend,
    at_large_offsets,
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
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))

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

    A gradient that is missing raises: optimizers and DDP tell None from zero. Only naive functions may leave it out.
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


def results(
    backend: Backend, operator: Callable, tensors: dict[str, Tensor], layout: str | None = None, **options
) -> dict[str, Tensor]:
    """Return value_and_gradients of a backend, and y without autograd; the inputs stay as they were."""
    laid_out = {name: LAYOUTS[layout](t) for name, t in tensors.items()} if layout else tensors
    before = {name: t.clone() for name, t in laid_out.items()}
    with running_on(backend, next(iter(tensors.values())).device):
        found = value_and_gradients(operator, laid_out, **options)
        with torch.no_grad():
            found["y without autograd"] = operator(**laid_out, **options)
    for name, tensor in laid_out.items():
        assert torch.equal(tensor, before[name]), f"{name} was modified"
    return found


def assert_close_to_naive(
    backend: Backend,
    operator: Callable,
    naive: Callable,
    tensors: dict[str, Tensor],
    layout: str | None = None,
    **options,
):
    """In float64, y (with and without autograd) and all gradients are naive's.

    A backend without a kernel for float64 computes in the widest dtype that it has kernels for, within the yardstick.
    """
    if backend.widest != torch.float64:
        return assert_within_yardstick(backend, operator, naive, tensors, backend.widest, layout, **options)
    expected = value_and_gradients(naive, tensors, **options)
    for what, value in results(backend, operator, tensors, layout, **options).items():
        torch.testing.assert_close(
            value,
            expected[what.removesuffix(" without autograd")],
            rtol=1e-10,
            atol=1e-10,
            msg=lambda text, what=what: f"{what}: {text}",
        )


def assert_within_yardstick(
    backend: Backend,
    operator: Callable,
    naive: Callable,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    layout: str | None = None,
    **options,
):
    """In `dtype`, y and gradients err at most twice as much as torch's eager operators, plus a little.

    Eager is the reference in `dtype` and the same layout; the little is half an eps of the largest value, in float32
    1e-6 of it (another order of summation) or what tensor cores cut off, if that is more. Eager's error is capped, at
    16 eps for y and 64 for gradients, some of which nearly cancel: else a reference without float32 statistics would
    excuse itself and every kernel.
    """
    narrow = cast(tensors, dtype)
    truth = value_and_gradients(naive, cast(narrow, torch.float64), **options)
    laid_out = {name: LAYOUTS[layout](t) for name, t in narrow.items()} if layout else narrow
    eager_operator = getattr(operator, "reference", None) or getattr(reference, operator.__name__)
    eager = value_and_gradients(eager_operator, laid_out, **options)
    failures = {}
    for found, value in results(backend, operator, narrow, layout, **options).items():
        what = found.removesuffix(" without autograd")
        exact = truth[what]
        assert value.dtype == (dtype if what == "y" else narrow[what.removeprefix("gradient of ")].dtype), what
        eps, largest = torch.finfo(dtype).eps, largest_of(exact)
        eager_error = min(largest_difference(eager[what], exact), (16 if what == "y" else 64) * eps * largest)
        little = max(eps / 2, 1e-6)
        if dtype == torch.float32 and uses_tensor_cores(backend, value.device):
            little = max(little, cut_off_by_tensor_cores(terms_of(what, narrow)))
        allowed = 2 * eager_error + little * largest
        error = largest_difference(value, exact)
        if not error <= allowed:  # NaN fails, too
            failures[found] = f"error {error:.3g}, allowed {allowed:.3g}, largest value {largest:.3g}"
    assert not failures, f"{operator.__name__} in {dtype}: {failures}"


def terms_of(what: str, tensors: dict[str, Tensor]) -> int:
    """Return of how many products sums are: a parameter's gradient's of pixels, others' of channels and taps."""
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


def assert_gradcheck(operator: Callable, tensors: dict[str, Tensor], **options):
    """Finite differences agree with the gradient of every floating tensor, which is the same with all others frozen."""
    wanted = {name: t.clone().requires_grad_() for name, t in tensors.items() if t.is_floating_point()}

    def function(*values: Tensor) -> Tensor:
        return operator(**tensors | dict(zip(wanted, values, strict=True)), **options)

    # nondet_tol: torch's bilinear gradient on a GPU adds in any order
    assert torch.autograd.gradcheck(function, tuple(wanted.values()), nondet_tol=1e-10)
    together = torch.autograd.grad(function(*wanted.values()).square().sum(), wanted.values())
    for (name, tensor), expected in zip(wanted.items(), together, strict=True):
        y = operator(**tensors | {name: tensor}, **options)
        (alone,) = torch.autograd.grad(y.square().sum(), tensor)
        torch.testing.assert_close(
            alone, expected, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_compiles(operator: Callable, *calls: dict[str, Tensor], **options):
    """As one graph, traced once per call in `calls` (other sizes trace dynamic shapes), with bit-equal results."""
    torch._dynamo.reset()
    compiled = torch.compile(operator, fullgraph=True, backend="eager")
    for tensors in calls:
        torch.testing.assert_close(compiled(**tensors, **options), operator(**tensors, **options), rtol=0, atol=0)


def dispatcher_arguments(operator: Callable, tensors: dict[str, Tensor], **options) -> tuple:
    """Return the operator that torch's dispatcher knows and its positional arguments."""
    known = getattr(torch.ops.seemore_fast, operator.__name__).default
    given = tensors | options
    return known, tuple(given.get(argument.name) for argument in known._schema.arguments)


def assert_opcheck(operator: Callable, tensors: dict[str, Tensor], **options):
    """torch.library.opcheck finds schema, fake, autograd and compilation of the operator consistent."""
    wanted = {name: t.clone().requires_grad_() if t.is_floating_point() else t for name, t in tensors.items()}
    torch.library.opcheck(*dispatcher_arguments(operator, wanted, **options))


def assert_writes_its_results_only(operator: Callable, tensors: dict[str, Tensor], **options):
    """Results and gradients are written whole and not beyond, and workspace is not read before it is written."""
    expected = value_and_gradients(operator, tensors, **options)
    with guarded_results(), uninitialised_is_nan():
        actual = value_and_gradients(operator, tensors, **options)
    for what, value in expected.items():
        torch.testing.assert_close(actual[what], value, rtol=0, atol=0, msg=lambda text, what=what: f"{what}: {text}")


def assert_large_offsets(operator: Callable, tensors: dict[str, Tensor], names: Iterable[str], **options):
    """With the images of the tensors called `names` 2^31 elements apart, results and gradients are the same."""
    expected = value_and_gradients(operator, tensors, **options)
    far = {name: at_large_offsets(t) if name in names else t for name, t in tensors.items()}
    for what, value in value_and_gradients(operator, far, **options).items():
        torch.testing.assert_close(value, expected[what], rtol=0, atol=0, msg=lambda text, what=what: f"{what}: {text}")


def assert_deterministic(operator: Callable, tensors: dict[str, Tensor], **options):
    """Results and gradients are bit-equal in every run and for every number of threads."""
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            runs.append(value_and_gradients(operator, tensors, **options))
    finally:
        torch.set_num_threads(threads)
    for what, value in runs[0].items():
        assert all(torch.equal(run[what], value) for run in runs), what


def assert_images_are_alone(operator: Callable, tensors: dict[str, Tensor], **options):
    """NaN in the first image of the batch leaves the results and gradients of all others as they are, to the bit."""
    batch = next(iter(tensors.values())).shape[0]
    images = {name: t.clone() for name, t in tensors.items() if t.dim() == 4 and t.shape[0] == batch}
    expected = value_and_gradients(operator, tensors, **options)
    for image in images.values():
        image[0] = torch.nan
    actual = value_and_gradients(operator, tensors | images, **options)
    for what in ("y", *(f"gradient of {name}" for name in images)):
        assert torch.equal(actual[what][1:], expected[what][1:]), what
        assert not expected[what].isnan().any(), what


def assert_refuses_double_backward(operator: Callable, tensors: dict[str, Tensor], **options):
    """A gradient of a gradient is an error that names the operator and the way out, never a silent zero."""
    name, first = next((name, t) for name, t in tensors.items() if t.is_floating_point())
    leaf = first.clone().requires_grad_()
    y = operator(**tensors | {name: leaf}, **options)
    (gradient,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"^{operator.__name__}: its gradient is not differentiable, .*use_backend"):
        gradient.sum().backward()


def assert_operator(operator: Callable, tensors: dict[str, Tensor], defaults: dict | None = None, **options):
    """What every operator with kernels promises beside its values; `defaults` are what the dispatcher is told more."""
    assert_opcheck(operator, tensors, **options, **(defaults or {}))
    assert_writes_its_results_only(operator, tensors, **options)
    assert_deterministic(operator, tensors, **options)
    assert_refuses_double_backward(operator, tensors, **options)
