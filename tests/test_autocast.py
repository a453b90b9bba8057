"""Operators under autocast whose images are float32, as they are in a training loop that calls one of them by itself.

What each operator casts, and to what, is tested beside it.
"""

import pytest
import test_calibrate
import test_gated_ffn
import test_low_rank_experts
import test_norm_conv3x3
import test_norm_pointwise
import test_striped_conv
import torch
from helpers.backends import kernels_of, running_on
from helpers.ops import cast, largest_difference, value_and_gradients

from seemore_fast import ops, reference

IMAGE = (2, 8, 6, 7)  # 42 pixels: of kernels' tiles, one of 16-bit pixels, two of float32
CASES = {
    "calibrate": (test_calibrate, {"recursive": 1}),
    "gated_ffn": (test_gated_ffn, {}),
    "low_rank_experts": (test_low_rank_experts, {"ranks": (2, 4, 8)}),
    "norm_conv3x3": (test_norm_conv3x3, None),  # they go with its tensors
    "norm_pointwise": (test_norm_pointwise, {"activation": "gelu"}),
    "striped_conv": (test_striped_conv, {"activation": "gelu"}),
}
each_case = pytest.mark.parametrize(
    "operator, backend",
    [(operator, backend) for operator in CASES for backend in kernels_of(operator, interpreted=True)],
)


@each_case
def test_gradients(operator, backend, device):
    """y and every gradient err at most twice as much as the reference's under autocast, plus half an eps."""
    module, options = CASES[operator]
    if options is None:
        tensors, options = module.case_of(device, IMAGE)
    else:
        tensors = module.tensors_of(device, IMAGE)
    tensors = cast(tensors, torch.float32)
    naive = getattr(module, f"naive_{operator}")
    truth = value_and_gradients(naive, cast(tensors, torch.float64), **options)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        eager = value_and_gradients(getattr(reference, operator), tensors, **options)
        with running_on(backend, device):
            found = value_and_gradients(getattr(ops, operator), tensors, **options)
    for what, exact in truth.items():
        allowed = 2 * largest_difference(eager[what], exact) + 2**-8 * exact.abs().max()
        assert largest_difference(found[what], exact) <= allowed <= 2**-3 * exact.abs().max(), what
        assert what == "y" or found[what].dtype == torch.float32, what


def test_gradients_do_not_go_by_the_autocast_of_their_moment(device):
    """Nothing has kernels for float16 on a CPU; a gradient that is taken under such an autocast is of its forward."""
    tensors = test_norm_pointwise.tensors_of(device, (1, 4, 3, 5))
    tensors = cast(tensors, torch.float32)
    expected = value_and_gradients(ops.norm_pointwise, tensors)

    def operator(**tensors):
        y = ops.norm_pointwise(**tensors)
        y.register_hook(lambda _: torch.set_autocast_enabled(y.device.type, True))
        return y

    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_dtype(device, torch.float16)
    try:
        actual = value_and_gradients(operator, tensors)
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
