"""gated_ffn: what its conformance (test_conformance.py) leaves open."""

import torch
from helpers.backends import each_kernel, running_on
from helpers.naive import naive_gated_ffn
from helpers.ops import cast, largest_difference, value_and_gradients
from helpers.table import BY_NAME

from seemore_fast.ops import gated_ffn


@each_kernel("gated_ffn")
def test_nan_fills_its_image(backend, device):
    tensors, _ = BY_NAME["gated_ffn"].call(device, torch.float32, shape=(3, 4, 5, 6))
    tensors["x"][1] = torch.nan
    with running_on(backend, device):
        found = value_and_gradients(gated_ffn, tensors)
    assert found["y"][1].isnan().all() and found["gradient of x"][1].isnan().all()
    assert not found["y"][::2].isnan().any() and not found["gradient of x"][::2].isnan().any()


@each_kernel("gated_ffn")
def test_autocast_keeps_x_wide(backend, device):
    """x is float32 where it is normalised and where it is added: a mean that dwarfs the deviations does no harm."""
    tensors, _ = BY_NAME["gated_ffn"].call(device, torch.float32, shape=(2, 36, 6, 7), offset=1000)
    exact = naive_gated_ffn(**cast(tensors, torch.float64))
    with running_on(backend, device), torch.autocast(torch.device(device).type, torch.bfloat16):
        found = value_and_gradients(gated_ffn, tensors)
    assert {value.dtype for value in found.values()} == {torch.float32}
    change = exact - tensors["x"]
    assert largest_difference(found["y"] - tensors["x"], change) < 2**-5 * change.abs().max()
