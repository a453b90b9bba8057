"""router: what its conformance (test_conformance.py) leaves open."""

import pytest
import torch
from helpers.backends import each_backend, each_kernel, kernels_of, running_on
from helpers.naive import naive_router
from helpers.ops import cast, each_narrow_dtype, random_parameters
from helpers.table import BY_NAME

from seemore_fast import reference
from seemore_fast.ops.router import MOST_EXPERTS, router

CASE = BY_NAME["router"]


def assert_close(found, expected, tolerance):
    """The same experts, with about the same probabilities."""
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1].double(), expected[1], rtol=tolerance, atol=tolerance)


@each_backend("router")
@each_narrow_dtype
@pytest.mark.parametrize("layout, autocast", [(None, False), ("channels_last", False), (None, True)])
def test_probabilities_are_float32(backend, device, dtype, layout, autocast):
    """Also for 16-bit images and under autocast, and as exact as float32 is: only the input is rounded."""
    tensors, _ = CASE.call(device, torch.float32 if autocast else dtype, layout, shape=(3, 8, 17, 19))
    tensors["a"] = tensors["a"].to(dtype)
    with running_on(backend, device), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
        found = router(**tensors, top_k=3)
    assert [result.dtype for result in found] == [torch.int64, torch.float32]
    assert_close(found, naive_router(**cast(tensors, torch.float64), top_k=3), 1e-5)


@each_backend("router")
@each_narrow_dtype
def test_pool_does_not_overflow(backend, device, dtype):
    """The sum over the pixels is far beyond float16's 65504, and beyond the 8 bits of bfloat16."""
    a = torch.full((1, 2, 40, 40), 300.0, dtype=dtype, device=device)
    a[:, 1] += 2
    weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=dtype, device=device)
    with running_on(backend, device):
        found = router(a, weight, 2)
    assert_close(found, naive_router(a.double(), weight.double(), 2), 1e-3)


@each_backend("router")
@each_narrow_dtype
def test_nearly_uniform_experts_are_distinguished(backend, device, dtype):
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
@pytest.mark.parametrize("shape, dtype", [((8, 5, 6, 7), None), ((3, 5, 60, 70), torch.float32)], ids=str)
def test_alone_and_in_a_batch(backend, device, shape, dtype):
    """An image has the same experts and, on kernels to the bit, probabilities."""
    tensors, _ = CASE.call(device, dtype or backend.widest, shape=shape)
    with running_on(backend, device):
        index, weight = router(**tensors, top_k=3)
        alone = [router(image[None], tensors["weight"], 3) for image in tensors["a"]]
    assert len(set(index[:, 0].tolist())) > 1, "images that all choose the same prove nothing"
    assert torch.equal(index, torch.cat([i for i, _ in alone]))
    together = torch.cat([w for _, w in alone])
    if backend == "reference":
        torch.testing.assert_close(weight, together, rtol=1e-12 if dtype is None else 1e-6, atol=0)
    else:
        assert torch.equal(weight, together)


@each_kernel("router")
@pytest.mark.falls_back("cpu", "cuda", "triton", reason="kernels take MOST_EXPERTS")
def test_more_experts_are_left_to_the_reference(backend, device):
    tensors, options = CASE.call(device, experts=MOST_EXPERTS + 1)
    with running_on(backend, device):
        found = router(**tensors, **options)
    expected = reference.router(**tensors, **options)
    assert all(torch.equal(actual, value) for actual, value in zip(found, expected, strict=True))


@each_backend("router")
def test_not_finite(backend, device):
    """Where a probability is NaN all are; the indices are an image's experts all the same, and others do not change."""
    tensors, _ = CASE.call(device, torch.float32, shape=(5, 3, 4, 5), sharpness=1)
    tensors["weight"][1].fill_(-1)
    for image, value in enumerate((torch.nan, torch.inf, -torch.inf, 1e38)):
        tensors["a"][image, :, 2, 3] = value
    with running_on(backend, device):
        index, probability = router(**tensors, top_k=4)
        finite = router(tensors["a"][4:], tensors["weight"], 4)
    assert index.sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * 5
    torch.testing.assert_close(probability, reference.router(**tensors, top_k=4)[1], equal_nan=True)
    assert probability[:2].isnan().all()
    assert torch.equal(index[4:], finite[0])
    torch.testing.assert_close(probability[4:], finite[1])


@each_backend("router")
def test_experts_that_no_logit_reaches(backend, device):
    """A logit of minus infinity is a probability of 0."""
    a = torch.ones(1, 1, 2, 2, device=device)
    weight = torch.tensor([[-torch.inf], [1.0], [2.0]], device=device)
    with running_on(backend, device):
        index, probability = router(a, weight, 3)
    assert index.tolist() == [[2, 1, 0]]
    torch.testing.assert_close(probability[0], torch.tensor([2.0, 1.0, -torch.inf], device=device).softmax(dim=0))


@each_backend("router")
def test_the_image_may_be_overwritten(backend, device):
    """Only its mean is kept for the gradients."""
    tensors, _ = CASE.call(device, sharpness=1)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    with running_on(backend, device):
        expected = torch.autograd.grad(router(**leaves, top_k=2)[1].square().sum(), leaves.values())
        a = leaves["a"] * 1
        y = router(a, leaves["weight"], 2)[1]
        with torch.no_grad():
            a.zero_()
        actual = torch.autograd.grad(y.square().sum(), leaves.values())
    for value, gradient in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, gradient)


@each_backend("router")
def test_only_the_probabilities_are_differentiable(backend, device):
    """And the image's gradient has its layout."""
    tensors = {name: tensor.requires_grad_() for name, tensor in CASE.call(device, layout="channels_last")[0].items()}
    with running_on(backend, device):
        index, weight = router(**tensors, top_k=2)
        (gradient,) = torch.autograd.grad(weight.sum(), tensors["a"])
    assert weight.requires_grad
    assert not index.requires_grad
    assert gradient.is_contiguous(memory_format=torch.channels_last) or backend == "reference"


@pytest.mark.parametrize("backend", [name for name in kernels_of("router", False) if name != "triton"])
def test_sums_of_parts(backend, device):
    """As an operator that pools on its way leaves them: any number of parts, added up in their order."""
    library = getattr(torch.ops, f"seemore_{backend.split()[0]}")
    for parts in (1, 2, 100):
        sums = random_parameters({"partial": (parts, 3, 5), "weight": (4, 5)}, device)
        mean = sums["partial"].sum(dim=0) / 42
        with running_on(backend, device):
            index, weight = router(mean[:, :, None, None], sums["weight"], 4)
            results = torch.empty_like(index), torch.empty_like(weight), torch.empty_like(mean), weight.new_empty(3, 4)
            library.router_from_sums(*results, *sums.values(), 42, 4)
        assert torch.equal(results[0], index)
        torch.testing.assert_close(results[1:3], (weight, mean))
        torch.testing.assert_close(results[3].gather(1, index), weight)
