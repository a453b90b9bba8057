"""Triton kernels of a training step, beyond what operators promise: joined launches, added residuals."""

import importlib
import os

import pytest
import torch
from helpers.backends import running_on
from helpers.table import BY_NAME

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from seemore_fast.kernels import products, sums
from seemore_fast.kernels.launch import joining, observed

BACKWARD = ("norm_pointwise", "norm_conv3x3", "gated_ffn", "striped_conv", "calibrate", "low_rank_experts")
CPU = torch.device("cpu")


def kernel(operator: str, part: str = "_backward"):
    """Return the function that runs an operator's kernels."""
    return getattr(importlib.import_module(f"seemore_fast.kernels.{operator}"), operator + part)


def gradients(operator: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return all gradients of an operator's example, by Triton."""
    tensors, options = BY_NAME[operator].call("cpu", dtype)
    leaves = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in tensors.items()}
    with running_on("triton", "cpu"):
        y = BY_NAME[operator].run(**leaves, **options)
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        return list(torch.autograd.grad(y, wanted, torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)))


def count(run) -> list[str]:
    """Return the names of the kernels that a function launches."""
    found = []

    def observer(launch):
        found.append(launch.kernel.__name__)
        launch.start()

    with observed(observer):
        run()
    return found


@pytest.mark.parametrize("most", [16, 3])
def test_joined_launches_give_the_same(monkeypatch, most):
    """Weights' products, and second stages, of several operators in one launch, or in few if there are many."""
    monkeypatch.setattr(sums, "MOST", most)
    monkeypatch.setattr(products, "MOST", most)
    apart = {operator: gradients(operator) for operator in BACKWARD}
    together = {}

    def run():
        with joining(CPU):
            for operator in BACKWARD:
                together[operator] = gradients(operator)

    launched = count(run)
    by_itself = [name for operator in BACKWARD for name in count(lambda o=operator: gradients(o))]
    for name in ("add_up", "add_products"):
        assert 1 <= launched.count(name) < by_itself.count(name)
    for operator in BACKWARD:
        for found, expected in zip(together[operator], apart[operator], strict=True):
            assert torch.equal(found, expected), operator


def test_an_error_within_leaves_nothing_to_join():
    with pytest.raises(ZeroDivisionError), joining(CPU):
        gradients("norm_pointwise")
        1 / 0  # noqa: B018
    assert all(torch.isfinite(g).all() for g in gradients("norm_pointwise"))


def backward_of(operator: str, written: list, given: tuple, **options):
    """Run an operator's backward kernels into NaN and return what they wrote."""
    made = [None if tensor is None else torch.full_like(tensor, torch.nan) for tensor in written]
    kernel(operator)(*made, *given, **options)
    return made


def test_a_residual_is_added_to_the_gradient_of_the_image():
    tensors, _ = BY_NAME["norm_conv3x3"].call("cpu", torch.float32, shape=(2, 5, 4, 7))
    x, *parameters = tensors.values()
    dy, residual = torch.rand(2, parameters[4].shape[0], 4, 7), torch.rand(2, 5, 7, 4).transpose(2, 3)
    given = dy, x, *parameters, True, 1e-6
    expected = backward_of("norm_conv3x3", [x, *parameters], given)
    found = backward_of("norm_conv3x3", [x, *parameters], given, residual=residual)
    torch.testing.assert_close(found[0], expected[0] + residual)
    assert all(map(torch.equal, found[1:], expected[1:]))
    found = backward_of("norm_conv3x3", [None, *parameters], given)
    assert all(map(torch.equal, found[1:], expected[1:]))


@pytest.mark.parametrize("gelu, gated", [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_the_mean_is_spread_over_the_pixels(dtype, gelu, gated):
    tensors, _ = BY_NAME["striped_conv"].call("cpu", dtype, shape=(2, 3, 4, 7))
    x, gate, *parameters = tensors.values()
    gate, dy, dmean = gate if gated else None, torch.rand(2, 3, 4, 7).to(dtype), torch.rand(2, 3)
    written = [x, gate, *parameters]
    found = backward_of("striped_conv", written, (dy, x, *parameters, gelu, gate), dmean=dmean)
    spread = (dy.double() + dmean.double()[:, :, None, None] / 28).to(torch.float64)
    exact = [None if tensor is None else tensor.double() for tensor in written]
    x, gate, *parameters = exact
    expected = backward_of("striped_conv", exact, (spread, x, *parameters, gelu, gate))
    for gradient, exact in zip(found, expected, strict=True):
        if exact is not None:
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(
                gradient.double(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max())
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gelu, gated", [(True, False), (False, True)])
def test_the_result_is_written_again_on_request(dtype, gelu, gated):
    tensors, _ = BY_NAME["striped_conv"].call("cpu", dtype, shape=(2, 3, 34, 7))
    x, gate, *parameters = tensors.values()
    given = x, *parameters, gelu, gate if gated else None
    y, again = (torch.full_like(x, torch.nan) for _ in range(2))
    kernel("striped_conv", "")(y, *given)
    backward_of("striped_conv", [x, gate if gated else None, *parameters], (x, *given), y=again)
    assert torch.equal(again, y)
