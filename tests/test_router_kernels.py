"""router's kernels, which sum parts of runs of 16 bytes: planes, or images whose channels lie side by side."""

import pytest
import torch
from helpers.backends import each_backend, each_kernel, running_on
from helpers.naive import naive_expert_weight
from helpers.ops import (
    LAYOUTS,
    assert_close_to_naive,
    assert_deterministic,
    assert_images_are_alone,
    assert_large_offsets,
    assert_opcheck,
    assert_refuses_double_backward,
    assert_writes_its_results_only,
    cast,
    each_layout,
    largest_difference,
)
from helpers.router import tensors_of, weight_of

from seemore_fast import reference
from seemore_fast.ops.router import MOST_EXPERTS, router


def dense(mean, weight, top_k):
    """Probabilities of all experts in float64, sorted."""
    found = (mean.double() @ weight.double().t()).softmax(dim=1).sort(dim=1, descending=True, stable=True)
    return found.indices[:, :top_k], found.values[:, :top_k]


@each_kernel("router", interpreted=False)
@pytest.mark.parametrize("layout", [None, "channels_last", "slice"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 3, 97, 131), (1, 2, 96, 264), (1, 1, 1, 40_001), (2, 36, 24, 40), (1, 301, 5, 7), (2, 520, 3, 5)]
)
def test_many_parts(backend, device, shape, dtype, layout):
    """Odd planes and even ones, and channels that repeat after 1 to 301 vectors, which is more than a block has."""
    tensors = cast(tensors_of(device, shape, sharpness=0.5), dtype)
    a = LAYOUTS[layout](tensors["a"]) if layout else tensors["a"]
    a, weight = a.requires_grad_(), tensors["weight"].requires_grad_()
    with running_on(backend, device):
        index, probability = router(a, weight, 2)
        upstream = torch.tensor([2.0, -1.0], device=device).expand_as(probability)
        gradients = torch.autograd.grad(probability, (a, weight), upstream.to(probability.dtype))
    exact = {"a": a.detach().double().requires_grad_(), "weight": weight.detach().double().requires_grad_()}
    expected = dense(exact["a"].mean(dim=(2, 3)), exact["weight"], 2)
    assert torch.equal(index, expected[0])
    torch.testing.assert_close(probability.double(), expected[1], rtol=1e-6, atol=1e-6)
    assert gradients[0].is_contiguous(memory_format=torch.channels_last) or layout != "channels_last"
    exact_gradients = torch.autograd.grad(expected[1], exact.values(), upstream.double())
    for actual, gradient in zip(gradients, exact_gradients, strict=True):
        assert actual.dtype == dtype
        error = largest_difference(actual, gradient)
        assert error <= max(torch.finfo(dtype).eps, 1e-6) * gradient.abs().max()


@each_kernel("router")
@pytest.mark.parametrize("shape, experts, top_k", [((2, 3, 70, 70), 3, 2), ((1, 70, 3, 5), 130, 130)], ids=str)
def test_some_parts_channels_and_experts(backend, device, shape, experts, top_k):
    """More than one tile of a plane, and more numbers than a program of Triton's has at a time."""
    assert_chooses(backend, device, shape, experts, top_k)


@each_kernel("router", interpreted=False)
@pytest.mark.parametrize("shape, experts, top_k", [((2, 6000, 1, 2), 7, 3), ((2, 9, 2, 3), 1024, 1024)], ids=str)
def test_many_channels_and_experts(backend, device, shape, experts, top_k):
    """Means that do not fit shared memory, and as many experts as kernels take."""
    assert_chooses(backend, device, shape, experts, top_k)


def assert_chooses(backend, device, shape, experts, top_k):
    tensors = tensors_of(device, shape, experts)
    with running_on(backend, device):
        index, probability = router(**tensors, top_k=top_k)
    expected = dense(tensors["a"].mean(dim=(2, 3)), tensors["weight"], top_k)
    assert torch.equal(index, expected[0])
    torch.testing.assert_close(probability, expected[1], rtol=1e-10, atol=1e-12)


@each_kernel("router")
@pytest.mark.falls_back("cpu", "cuda", "triton", reason="kernels take MOST_EXPERTS")
def test_more_experts_are_left_to_the_reference(backend, device):
    tensors = tensors_of(device, (2, 3, 4, 5), MOST_EXPERTS + 1)
    with running_on(backend, device):
        routed = router(**tensors, top_k=2)
    expected = reference.router(**tensors, top_k=2)
    assert all(torch.equal(actual, value) for actual, value in zip(routed, expected, strict=True))


@each_kernel("router")
def test_alone_and_in_a_batch_to_the_bit(backend, device):
    tensors = cast(tensors_of(device, (3, 5, 60, 70)), torch.float32)
    with running_on(backend, device):
        _, together = router(**tensors, top_k=3)
        alone = [router(image[None], tensors["weight"], 3)[1] for image in tensors["a"]]
    assert torch.equal(together, torch.cat(alone))


@each_kernel("router", interpreted=False)
def test_images_are_alone(backend, device):
    with running_on(backend, device):
        tensors = cast(tensors_of(device, (3, 5, 7, 20), sharpness=1), torch.float32)
        assert_images_are_alone(weight_of(router), tensors)


@each_backend("router")
def test_not_finite(backend, device):
    """Where a probability is NaN all are; the indices are an image's experts all the same, and others do not change."""
    tensors = cast(tensors_of(device, (5, 3, 4, 5), 4, sharpness=1), torch.float32)
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
@each_layout
def test_layouts_of_gradients(backend, device, layout):
    tensors = tensors_of(device, sharpness=1)
    index, _ = reference.router(**tensors, top_k=2)

    def expert_weight(a, weight, expert_index):
        return router(a, weight, 2)[1]

    assert_close_to_naive(backend, expert_weight, naive_expert_weight, tensors | {"expert_index": index}, layout)


@each_backend("router")
def test_the_image_may_be_overwritten(backend, device):
    tensors = tensors_of(device, sharpness=1)
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
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors_of(device).items()}
    with running_on(backend, device):
        index, weight = router(**tensors, top_k=2)
    assert weight.requires_grad
    assert not index.requires_grad


@each_kernel("router")
def test_opcheck(backend, device):
    for shape in [(3, 5, 6, 7), (0, 5, 6, 7)]:
        with running_on(backend, device):
            assert_opcheck(router, tensors_of(device, shape), top_k=2)
    narrow = cast(tensors_of(device), torch.bfloat16)
    narrow["a"] = LAYOUTS["channels_last"](narrow["a"])
    with running_on(backend, device):
        assert_opcheck(router, narrow, top_k=2)


@each_kernel("router")
@pytest.mark.parametrize("layout", [None, "channels_last"])
def test_writes_its_results_only(backend, device, layout):
    for shape in [(2, 9, 13, 19), (0, 3, 4, 5)]:
        tensors = tensors_of(device, shape)
        if layout:
            tensors["a"] = LAYOUTS[layout](tensors["a"])
        with running_on(backend, device):
            assert_writes_its_results_only(weight_of(router), tensors)


@each_kernel("router")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_offsets(backend, device, dtype):
    with running_on(backend, device):
        for shape in [(2, 2, 3, 5), (2, 2, 40, 52)]:
            assert_large_offsets(weight_of(router), cast(tensors_of(device, shape), dtype), ["a"])


@each_kernel("router")
@pytest.mark.parametrize("layout", [None, "channels_last"])
def test_deterministic(backend, device, layout):
    tensors = cast(tensors_of(device, (3, 20, 70, 40)), torch.bfloat16)
    if layout:
        tensors["a"] = LAYOUTS[layout](tensors["a"])
    with running_on(backend, device):
        assert_deterministic(weight_of(router), tensors)


@each_backend("router")
def test_double_backward(backend, device):
    tensors = tensors_of(device, (1, 2, 2, 2), sharpness=1)
    with running_on(backend, device):
        if backend == "reference":
            assert torch.autograd.gradgradcheck(
                lambda a: router(**tensors | {"a": a}, top_k=2)[1], tensors["a"].requires_grad_()
            )
        else:
            assert_refuses_double_backward(weight_of(router), tensors)
