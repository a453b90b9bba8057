"""router: the top_k most probable experts of each image."""

import functools
import math

import kit
import pytest
import torch

from seemore_fast import reference
from seemore_fast.ops.router import MOST_EXPERTS, route, router
from seemore_fast.reference.router import route as reference_route


def naive_router(a, weight, top_k):
    """One image and one expert after another, in Python floats; no two probabilities are equal."""
    index, probability = [], []
    for image in a.double():
        pooled = [channel.sum().item() / channel.numel() for channel in image]
        logits = [math.fsum(w * p for w, p in zip(row, pooled, strict=True)) for row in weight.tolist()]
        total = math.fsum(math.exp(logit) for logit in logits)
        order = sorted(range(len(logits)), key=lambda e: -logits[e])[:top_k]
        index.append(order)
        probability.append([math.exp(logits[e]) / total for e in order])
    shape = (len(a), top_k)
    return torch.tensor(index, dtype=torch.int64).view(shape), torch.tensor(probability, dtype=torch.float64).view(
        shape
    )


def naive_expert_weight(a, weight, expert_index):
    """The probabilities of given experts, differentiable."""
    e = torch.exp(a.sum(dim=(2, 3)) / (a.shape[2] * a.shape[3]) @ weight.t())
    return (e / e.sum(dim=1, keepdim=True)).gather(1, expert_index)


def tensors_of(device, shape=(3, 5, 6, 7), experts=4, sharpness=5):
    tensors = kit.random_parameters({"a": shape, "weight": (experts, shape[1])}, device)
    tensors["weight"] *= sharpness * math.prod(shape[2:]) ** 0.5  # the pool of noise is near 0
    return tensors


def assert_routes_like_naive(routed, a, weight, top_k, tolerance):
    expert_index, expert_weight = routed
    naive_index, naive_weight = naive_router(a, weight, top_k)
    assert expert_index.dtype == torch.int64
    assert expert_index.tolist() == naive_index.tolist()
    torch.testing.assert_close(expert_weight.double().cpu(), naive_weight, rtol=tolerance, atol=tolerance)


@kit.each_backend("router")
@kit.each_shape
@pytest.mark.parametrize("experts, top_k", [(1, 1), (3, 1), (3, 2), (3, 3), (6, 4)])
def test_values(backend, device, shape, experts, top_k):
    tensors = tensors_of(device, shape, experts)
    with kit.chosen(backend, device):
        routed = router(**tensors, top_k=top_k)
    assert_routes_like_naive(routed, **tensors, top_k=top_k, tolerance=1e-10)
    assert routed[1].dtype == torch.float64


@kit.each_backend("router")
@kit.each_layout
def test_layouts(backend, device, layout):
    tensors = tensors_of(device)
    laid_out = {name: kit.LAYOUTS[layout](tensor) for name, tensor in tensors.items()}
    with kit.chosen(backend, device):
        routed = router(**laid_out, top_k=2)
    assert_routes_like_naive(routed, **tensors, top_k=2, tolerance=1e-10)
    assert all(torch.equal(laid_out[name], tensor) for name, tensor in tensors.items()), "an input was modified"


@kit.each_backend("router")
def test_each_image_is_routed_alone(backend, device):
    tensors = tensors_of(device, (8, 5, 6, 7))
    with kit.chosen(backend, device):
        index, weight = router(**tensors, top_k=2)
        alone = [router(image[None], tensors["weight"], 2) for image in tensors["a"]]
    assert len(set(index[:, 0].tolist())) > 1, "images that all choose the same prove nothing"
    assert torch.equal(index, torch.cat([i for i, _ in alone]))
    torch.testing.assert_close(weight, torch.cat([w for _, w in alone]), rtol=1e-12, atol=0)


@kit.each_backend("router")
@kit.each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
def test_probabilities_are_float32(backend, device, dtype, layout):
    """Also for 16-bit images, and as exact as float32 is: only the input is rounded."""
    tensors = kit.cast(tensors_of(device, (3, 8, 17, 19)), dtype)
    a = kit.LAYOUTS[layout](tensors["a"]) if layout else tensors["a"]
    with kit.chosen(backend, device):
        routed = router(a, tensors["weight"], 3)
    assert routed[1].dtype == torch.float32
    assert_routes_like_naive(routed, **tensors, top_k=3, tolerance=1e-5)


@kit.each_backend("router")
@kit.each_narrow_dtype
def test_pool_does_not_overflow(backend, device, dtype):
    """The sum over the pixels is far beyond float16's 65504, and beyond the 8 bits of bfloat16."""
    a = torch.full((1, 2, 40, 40), 300.0, dtype=dtype, device=device)
    a[:, 1] += 2
    weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=dtype, device=device)
    with kit.chosen(backend, device):
        routed = router(a, weight, 2)
    assert_routes_like_naive(routed, a, weight, 2, tolerance=1e-3)


@kit.each_backend("router")
@kit.each_narrow_dtype
def test_nearly_uniform_experts_are_told_apart(backend, device, dtype):
    """Probabilities that differ by 1e-4 are equal in 16 bits; the last expert is the best and must win."""
    a = torch.ones(2, 1, 3, 3, dtype=dtype, device=device)
    weight = torch.tensor([[1e-4], [2e-4], [4e-4]], dtype=dtype, device=device)
    with kit.chosen(backend, device):
        index, _ = router(a, weight, 3)
    assert index.tolist() == [[2, 1, 0]] * 2


@kit.each_backend("router")
@pytest.mark.parametrize("experts, top_k", [(2, 1), (4, 2), (5, 5)])
def test_ties_are_broken_as_by_topk(backend, device, experts, top_k):
    """Kernels take the lower index first; torch.topk's order differs from device to device."""
    equal = torch.full((3, experts), 1 / experts, device=device)
    expected = torch.arange(top_k, device=device).expand(3, top_k)
    if backend == "reference":
        expected = equal.topk(top_k, dim=1).indices
    with kit.chosen(backend, device):
        index, weight = router(torch.rand(3, 2, 4, 4, device=device), torch.zeros(experts, 2, device=device), top_k)
    assert torch.equal(index, expected)
    torch.testing.assert_close(weight, equal[:, :top_k])


@kit.each_kernel("router")
def test_some_ties(backend, device):
    a = torch.ones(1, 1, 2, 2, device=device)
    weight = torch.tensor([[1.0], [3.0], [2.0], [3.0], [2.0], [3.0]], device=device)
    with kit.chosen(backend, device):
        index, probability = router(a, weight, 6)
    assert index.tolist() == [[1, 3, 5, 2, 4, 0]]
    assert torch.equal(probability, probability.sort(descending=True).values)


@kit.each_backend("router")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_router_alone(backend, device, dtype):
    tensors = tensors_of(device, (3, 8, 17, 19))
    tensors = {"a": tensors["a"].to(dtype), "weight": tensors["weight"].float()}
    with kit.chosen(backend, device), torch.autocast(torch.device(device).type, torch.bfloat16):
        routed = router(**tensors, top_k=3)
    assert routed[1].dtype == torch.float32
    assert_routes_like_naive(routed, **tensors, top_k=3, tolerance=1e-5)


@kit.each_backend("router")
@kit.each_shape
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gradients(backend, device, shape, top_k):
    """They reach a and weight through expert_weight."""
    tensors = tensors_of(device, shape, experts=3, sharpness=1)
    with kit.chosen(backend, device):
        index = router(**tensors, top_k=top_k)[0]

    def expert_weight(a, weight, expert_index):
        return router(a, weight, top_k)[1]

    kit.assert_close_to_naive(backend, expert_weight, naive_expert_weight, tensors | {"expert_index": index})


@kit.each_backend("router", interpreted=False)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gradcheck(backend, device, top_k):
    tensors = tensors_of(device, (2, 2, 3, 4), experts=3, sharpness=1)
    with kit.chosen(backend, device):
        kit.assert_gradcheck(lambda a, weight: router(a, weight, top_k)[1], tensors)


@kit.each_backend("router")
def test_compiles(backend, device):
    with kit.chosen(backend, device):
        kit.assert_compiles(router, tensors_of(device), tensors_of(device, (2, 5, 9, 4)), top_k=2)


# Kernels, which sum parts of runs of 16 bytes: planes, or images whose channels lie side by side


def weight_of(operator):
    """The operator's one differentiable result."""

    @functools.wraps(operator)
    def expert_weight(*tensors, top_k=2, **named):
        return operator(*tensors, **named, top_k=top_k)[1]

    return expert_weight


def dense(mean, weight, top_k):
    """Probabilities of all experts in float64, sorted."""
    found = (mean.double() @ weight.double().t()).softmax(dim=1).sort(dim=1, descending=True, stable=True)
    return found.indices[:, :top_k], found.values[:, :top_k]


@kit.each_kernel("router", interpreted=False)
@pytest.mark.parametrize("layout", [None, "channels_last", "slice"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 3, 97, 131), (1, 2, 96, 264), (1, 1, 1, 40_001), (2, 36, 24, 40), (1, 301, 5, 7), (2, 520, 3, 5)]
)
def test_many_parts(backend, device, shape, dtype, layout):
    """Odd planes and even ones, and channels that repeat after 1 to 301 vectors, which is more than a block has."""
    tensors = kit.cast(tensors_of(device, shape, sharpness=0.5), dtype)
    a = kit.LAYOUTS[layout](tensors["a"]) if layout else tensors["a"]
    a, weight = a.requires_grad_(), tensors["weight"].requires_grad_()
    with kit.chosen(backend, device):
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
        error = kit.largest_difference(actual, gradient)
        assert error <= max(torch.finfo(dtype).eps, 1e-6) * gradient.abs().max()


@kit.each_kernel("router")
@pytest.mark.parametrize("shape, experts, top_k", [((2, 3, 70, 70), 3, 2), ((1, 70, 3, 5), 130, 130)], ids=str)
def test_some_parts_channels_and_experts(backend, device, shape, experts, top_k):
    """More than one tile of a plane, and more numbers than a program of Triton's has at a time."""
    assert_chooses(backend, device, shape, experts, top_k)


@kit.each_kernel("router", interpreted=False)
@pytest.mark.parametrize("shape, experts, top_k", [((2, 6000, 1, 2), 7, 3), ((2, 9, 2, 3), 1024, 1024)], ids=str)
def test_many_channels_and_experts(backend, device, shape, experts, top_k):
    """Means that do not fit shared memory, and as many experts as kernels take."""
    assert_chooses(backend, device, shape, experts, top_k)


def assert_chooses(backend, device, shape, experts, top_k):
    tensors = tensors_of(device, shape, experts)
    with kit.chosen(backend, device):
        index, probability = router(**tensors, top_k=top_k)
    expected = dense(tensors["a"].mean(dim=(2, 3)), tensors["weight"], top_k)
    assert torch.equal(index, expected[0])
    torch.testing.assert_close(probability, expected[1], rtol=1e-10, atol=1e-12)


@kit.each_kernel("router")
@pytest.mark.parametrize("operator", [router, route], ids=lambda operator: operator.__name__)
def test_more_experts_are_left_to_the_reference(backend, device, operator):
    tensors = tensors_of(device, (2, 3, 4, 5), MOST_EXPERTS + 1)
    if operator is route:
        tensors = {"mean": tensors["a"][:, :, 0, 0], "weight": tensors["weight"]}
    with kit.chosen(backend, device):
        routed = operator(**tensors, top_k=2)
    expected = (reference.router if operator is router else reference_route)(**tensors, top_k=2)
    assert all(torch.equal(actual, value) for actual, value in zip(routed, expected, strict=True))


@kit.each_kernel("router")
def test_alone_and_in_a_batch_to_the_bit(backend, device):
    tensors = kit.cast(tensors_of(device, (3, 5, 60, 70)), torch.float32)
    with kit.chosen(backend, device):
        _, together = router(**tensors, top_k=3)
        alone = [router(image[None], tensors["weight"], 3)[1] for image in tensors["a"]]
    assert torch.equal(together, torch.cat(alone))


@kit.each_kernel("router", interpreted=False)
def test_images_are_alone(backend, device):
    with kit.chosen(backend, device):
        tensors = kit.cast(tensors_of(device, (3, 5, 7, 20), sharpness=1), torch.float32)
        kit.assert_images_are_alone(weight_of(router), tensors)


@kit.each_backend("router")
def test_not_finite(backend, device):
    """Where a probability is NaN all are; the indices are an image's experts all the same, and others do not change."""
    tensors = kit.cast(tensors_of(device, (5, 3, 4, 5), 4, sharpness=1), torch.float32)
    tensors["weight"][1].fill_(-1)
    for image, value in enumerate((torch.nan, torch.inf, -torch.inf, 1e38)):
        tensors["a"][image, :, 2, 3] = value
    with kit.chosen(backend, device):
        index, probability = router(**tensors, top_k=4)
        finite = router(tensors["a"][4:], tensors["weight"], 4)
    assert index.sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * 5
    torch.testing.assert_close(probability, reference.router(**tensors, top_k=4)[1], equal_nan=True)
    assert probability[:2].isnan().all()
    assert torch.equal(index[4:], finite[0])
    torch.testing.assert_close(probability[4:], finite[1])


@kit.each_backend("router")
def test_experts_that_no_logit_reaches(backend, device):
    """A logit of minus infinity is a probability of 0."""
    a = torch.ones(1, 1, 2, 2, device=device)
    weight = torch.tensor([[-torch.inf], [1.0], [2.0]], device=device)
    with kit.chosen(backend, device):
        index, probability = router(a, weight, 3)
    assert index.tolist() == [[2, 1, 0]]
    torch.testing.assert_close(probability[0], torch.tensor([2.0, 1.0, -torch.inf], device=device).softmax(dim=0))


@kit.each_backend("router")
@kit.each_layout
def test_layouts_of_gradients(backend, device, layout):
    tensors = tensors_of(device, sharpness=1)
    index, _ = reference.router(**tensors, top_k=2)

    def expert_weight(a, weight, expert_index):
        return router(a, weight, 2)[1]

    kit.assert_close_to_naive(backend, expert_weight, naive_expert_weight, tensors | {"expert_index": index}, layout)


@kit.each_backend("router")
def test_the_image_may_be_overwritten(backend, device):
    tensors = tensors_of(device, sharpness=1)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    with kit.chosen(backend, device):
        expected = torch.autograd.grad(router(**leaves, top_k=2)[1].square().sum(), leaves.values())
        a = leaves["a"] * 1
        y = router(a, leaves["weight"], 2)[1]
        with torch.no_grad():
            a.zero_()
        actual = torch.autograd.grad(y.square().sum(), leaves.values())
    for value, gradient in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, gradient)


@kit.each_backend("router")
def test_only_the_probabilities_are_differentiable(backend, device):
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors_of(device).items()}
    with kit.chosen(backend, device):
        index, weight = router(**tensors, top_k=2)
    assert weight.requires_grad
    assert not index.requires_grad


@kit.each_kernel("router")
def test_opcheck(backend, device):
    for shape in [(3, 5, 6, 7), (0, 5, 6, 7)]:
        with kit.chosen(backend, device):
            kit.assert_opcheck(router, tensors_of(device, shape), top_k=2)
    narrow = kit.cast(tensors_of(device), torch.bfloat16)
    narrow["a"] = kit.LAYOUTS["channels_last"](narrow["a"])
    with kit.chosen(backend, device):
        kit.assert_opcheck(router, narrow, top_k=2)
        kit.assert_opcheck(route, means_of(device), top_k=2)


@kit.each_kernel("router")
@pytest.mark.parametrize("layout", [None, "channels_last"])
def test_writes_its_results_only(backend, device, layout):
    for shape in [(2, 9, 13, 19), (0, 3, 4, 5)]:
        tensors = tensors_of(device, shape)
        if layout:
            tensors["a"] = kit.LAYOUTS[layout](tensors["a"])
        with kit.chosen(backend, device):
            kit.assert_writes_its_results_only(weight_of(router), tensors)


@kit.each_kernel("router")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_offsets(backend, device, dtype):
    with kit.chosen(backend, device):
        for shape in [(2, 2, 3, 5), (2, 2, 40, 52)]:
            kit.assert_large_offsets(weight_of(router), kit.cast(tensors_of(device, shape), dtype), ["a"])


@kit.each_kernel("router")
@pytest.mark.parametrize("layout", [None, "channels_last"])
def test_deterministic(backend, device, layout):
    tensors = kit.cast(tensors_of(device, (3, 20, 70, 40)), torch.bfloat16)
    if layout:
        tensors["a"] = kit.LAYOUTS[layout](tensors["a"])
    with kit.chosen(backend, device):
        kit.assert_deterministic(weight_of(router), tensors)


@kit.each_backend("router")
def test_double_backward(backend, device):
    tensors = tensors_of(device, (1, 2, 2, 2), sharpness=1)
    with kit.chosen(backend, device):
        if backend == "reference":
            assert torch.autograd.gradgradcheck(
                lambda a: router(**tensors | {"a": a}, top_k=2)[1], tensors["a"].requires_grad_()
            )
        else:
            kit.assert_refuses_double_backward(weight_of(router), tensors)
            kit.assert_refuses_double_backward(weight_of(route), means_of(device))


# route: the same without the pool


def means_of(device, batch=3, channels=5, experts=4):
    return kit.random_parameters({"mean": (batch, channels), "weight": (experts, channels)}, device)


@kit.each_backend("router")
@pytest.mark.parametrize("batch, channels, experts, top_k", [(3, 5, 4, 2), (1, 1, 1, 1), (0, 3, 2, 1), (2, 7, 5, 5)])
def test_route(backend, device, batch, channels, experts, top_k):
    tensors = means_of(device, batch, channels, experts)
    with kit.chosen(backend, device):
        routed = route(**tensors, top_k=top_k)
        if batch:
            kit.assert_gradcheck(weight_of(route), tensors, top_k=top_k)
        kit.assert_compiles(route, tensors, top_k=top_k)
    assert_routes_like_naive(routed, tensors["mean"][:, :, None, None], tensors["weight"], top_k, 1e-10)


@kit.each_backend("router")
def test_route_is_what_follows_the_pool(backend, device):
    tensors = kit.cast(tensors_of(device), torch.bfloat16)
    mean = tensors["a"].mean(dim=(2, 3), dtype=torch.float32)
    with kit.chosen(backend, device):
        for given in (mean, mean.t().contiguous().t()):
            routed = route(given, tensors["weight"], 2)
            assert_routes_like_naive(routed, mean[:, :, None, None], tensors["weight"], 2, tolerance=1e-6)
        index, weight = router(**tensors, top_k=2)
    assert torch.equal(index, routed[0])
    torch.testing.assert_close(weight, routed[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fault", [fault for fault in kit.FAULTS if fault != "dtype"])
def test_route_refuses_bad_tensors(device, fault):
    kit.assert_refused(fault, route, means_of(device), top_k=1)


def test_route_refuses_bad_sizes(device):
    kit.assert_sizes_refused(route, means_of(device), [("mean", 0), ("weight", 0)], top_k=1)
    with pytest.raises(ValueError, match=r"^route: top_k is 5, expected 1 to 4, the number of experts"):
        route(**means_of(device), top_k=5)
    with pytest.raises(ValueError, match=r"^route: weight is on meta, expected"):
        route(means_of(device)["mean"], means_of("meta")["weight"], top_k=1)


@kit.each_fault
def test_bad_tensors(device, fault):
    kit.assert_refused(fault, router, tensors_of(device), top_k=1)


def test_bad_sizes(device):
    free = [("a", 0), ("a", 2), ("a", 3), ("weight", 0)]
    kit.assert_sizes_refused(router, tensors_of(device), free, top_k=1)


@pytest.mark.parametrize("top_k", [0, -1, 5, 1.0, "1", None])
def test_bad_top_k_is_refused(device, top_k):
    with pytest.raises(ValueError, match=f"^router: top_k is {top_k!r}, expected 1 to 4, the number of experts"):
        router(**tensors_of(device, experts=4), top_k=top_k)
