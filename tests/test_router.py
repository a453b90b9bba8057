"""router: the top_k most probable experts of each image."""

import pytest
import torch
from helpers.backends import each_backend, each_kernel, running_on
from helpers.faults import assert_refused, assert_sizes_refused, each_fault
from helpers.naive import naive_expert_weight, naive_router
from helpers.ops import (
    LAYOUTS,
    assert_close_to_naive,
    assert_compiles,
    assert_gradcheck,
    cast,
    each_layout,
    each_narrow_dtype,
    each_shape,
)
from helpers.router import tensors_of

from seemore_fast.ops import router


def assert_routes_like_naive(routed, a, weight, top_k, tolerance):
    expert_index, expert_weight = routed
    naive_index, naive_weight = naive_router(a, weight, top_k)
    assert expert_index.dtype == torch.int64
    assert expert_index.tolist() == naive_index.tolist()
    torch.testing.assert_close(expert_weight.double().cpu(), naive_weight, rtol=tolerance, atol=tolerance)


@each_backend("router")
@each_shape
@pytest.mark.parametrize("experts, top_k", [(1, 1), (3, 1), (3, 2), (3, 3), (6, 4)])
def test_values(backend, device, shape, experts, top_k):
    tensors = tensors_of(device, shape, experts)
    with running_on(backend, device):
        routed = router(**tensors, top_k=top_k)
    assert_routes_like_naive(routed, **tensors, top_k=top_k, tolerance=1e-10)
    assert routed[1].dtype == torch.float64


@each_backend("router")
@each_layout
def test_layouts(backend, device, layout):
    tensors = tensors_of(device)
    laid_out = {name: LAYOUTS[layout](tensor) for name, tensor in tensors.items()}
    with running_on(backend, device):
        routed = router(**laid_out, top_k=2)
    assert_routes_like_naive(routed, **tensors, top_k=2, tolerance=1e-10)
    assert all(torch.equal(laid_out[name], tensor) for name, tensor in tensors.items()), "an input was modified"


@each_backend("router")
def test_each_image_is_routed_alone(backend, device):
    tensors = tensors_of(device, (8, 5, 6, 7))
    with running_on(backend, device):
        index, weight = router(**tensors, top_k=2)
        alone = [router(image[None], tensors["weight"], 2) for image in tensors["a"]]
    assert len(set(index[:, 0].tolist())) > 1, "images that all choose the same prove nothing"
    assert torch.equal(index, torch.cat([i for i, _ in alone]))
    torch.testing.assert_close(weight, torch.cat([w for _, w in alone]), rtol=1e-12, atol=0)


@each_backend("router")
@each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
def test_probabilities_are_float32(backend, device, dtype, layout):
    """Also for 16-bit images, and as exact as float32 is: only the input is rounded."""
    tensors = cast(tensors_of(device, (3, 8, 17, 19)), dtype)
    a = LAYOUTS[layout](tensors["a"]) if layout else tensors["a"]
    with running_on(backend, device):
        routed = router(a, tensors["weight"], 3)
    assert routed[1].dtype == torch.float32
    assert_routes_like_naive(routed, **tensors, top_k=3, tolerance=1e-5)


@each_backend("router")
@each_narrow_dtype
def test_pool_does_not_overflow(backend, device, dtype):
    """The sum over the pixels is far beyond float16's 65504, and beyond the 8 bits of bfloat16."""
    a = torch.full((1, 2, 40, 40), 300.0, dtype=dtype, device=device)
    a[:, 1] += 2
    weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=dtype, device=device)
    with running_on(backend, device):
        routed = router(a, weight, 2)
    assert_routes_like_naive(routed, a, weight, 2, tolerance=1e-3)


@each_backend("router")
@each_narrow_dtype
def test_nearly_uniform_experts_are_told_apart(backend, device, dtype):
    """Probabilities that differ by 1e-4 are equal in 16 bits; the last expert is the best and must win."""
    a = torch.ones(2, 1, 3, 3, dtype=dtype, device=device)
    weight = torch.tensor([[1e-4], [2e-4], [4e-4]], dtype=dtype, device=device)
    with running_on(backend, device):
        index, _ = router(a, weight, 3)
    assert index.tolist() == [[2, 1, 0]] * 2


@each_backend("router")
@pytest.mark.parametrize("experts, top_k", [(2, 1), (4, 2), (5, 5)])
def test_ties_are_broken_as_by_topk(backend, device, experts, top_k):
    """Kernels take the lower index first; torch.topk's order differs from device to device."""
    equal = torch.full((3, experts), 1 / experts, device=device)
    expected = torch.arange(top_k, device=device).expand(3, top_k)
    if backend == "reference":
        expected = equal.topk(top_k, dim=1).indices
    with running_on(backend, device):
        index, weight = router(torch.rand(3, 2, 4, 4, device=device), torch.zeros(experts, 2, device=device), top_k)
    assert torch.equal(index, expected)
    torch.testing.assert_close(weight, equal[:, :top_k])


@each_kernel("router")
def test_some_ties(backend, device):
    a = torch.ones(1, 1, 2, 2, device=device)
    weight = torch.tensor([[1.0], [3.0], [2.0], [3.0], [2.0], [3.0]], device=device)
    with running_on(backend, device):
        index, probability = router(a, weight, 6)
    assert index.tolist() == [[1, 3, 5, 2, 4, 0]]
    assert torch.equal(probability, probability.sort(descending=True).values)


@each_backend("router")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_router_alone(backend, device, dtype):
    tensors = tensors_of(device, (3, 8, 17, 19))
    tensors = {"a": tensors["a"].to(dtype), "weight": tensors["weight"].float()}
    with running_on(backend, device), torch.autocast(torch.device(device).type, torch.bfloat16):
        routed = router(**tensors, top_k=3)
    assert routed[1].dtype == torch.float32
    assert_routes_like_naive(routed, **tensors, top_k=3, tolerance=1e-5)


@each_backend("router")
@each_shape
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gradients(backend, device, shape, top_k):
    """They reach a and weight through expert_weight."""
    tensors = tensors_of(device, shape, experts=3, sharpness=1)
    with running_on(backend, device):
        index = router(**tensors, top_k=top_k)[0]

    def expert_weight(a, weight, expert_index):
        return router(a, weight, top_k)[1]

    assert_close_to_naive(backend, expert_weight, naive_expert_weight, tensors | {"expert_index": index})


@each_backend("router", interpreted=False, dtype=torch.float64)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gradcheck(backend, device, top_k):
    tensors = tensors_of(device, (2, 2, 3, 4), experts=3, sharpness=1)
    with running_on(backend, device):
        assert_gradcheck(lambda a, weight: router(a, weight, top_k)[1], tensors)


@each_backend("router")
def test_compiles(backend, device):
    with running_on(backend, device):
        assert_compiles(router, tensors_of(device), tensors_of(device, (2, 5, 9, 4)), top_k=2)


@each_fault
def test_bad_tensors(device, fault):
    assert_refused(fault, router, tensors_of(device), top_k=1)


def test_bad_sizes(device):
    free = [("a", 0), ("a", 2), ("a", 3), ("weight", 0)]
    assert_sizes_refused(router, tensors_of(device), free, top_k=1)


@pytest.mark.parametrize("top_k", [0, -1, 5, 1.0, "1", None])
def test_bad_top_k_is_refused(device, top_k):
    with pytest.raises(ValueError, match=f"^router: top_k is {top_k!r}, expected 1 to 4, the number of experts"):
        router(**tensors_of(device, experts=4), top_k=top_k)
