"""The network as a single node, on Triton's kernels: what users do to a model, beside its operators one by one."""

import copy
import pickle

import pytest
import torch
from helpers.backends import kernels_of, running_on

from seemore_fast import SeemoRe, reference
from seemore_fast.network import model as network
from seemore_fast.network import node
from seemore_fast.network.replay import Recorded

TINY = dict(
    scale=2, num_layers=1, embedding_dim=4, num_experts=2, topk=1, recursive=1, global_kernel_size=3, use_shuffle=True
)
pytestmark = pytest.mark.skipif("triton" not in kernels_of("gated_ffn"), reason="no Triton: see kernels_of")


@pytest.fixture
def models(device):
    """The plain network and ours, with the same parameters."""
    torch.manual_seed(0)
    plain, ours = reference.SeemoRe(**TINY).to(device), SeemoRe(**TINY).to(device)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.fixture
def x(device):
    return torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    """The calls of a node, of which there must be one in each test."""
    made, run = [], node.run
    monkeypatch.setattr(network.node, "run", lambda *arguments: made.append(1) or run(*arguments))
    yield made
    assert made


def step(model, x, loss=lambda y: y.square().mean()):
    """Return the result and all gradients, by Triton for ours."""
    model.zero_grad()
    x.grad = None
    with running_on("triton", x.device.type):
        y = model(x)
        loss(y).backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def assert_near(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-9)


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one is None if other is None else torch.equal(one, other)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_recorded_steps_are_equal_to_the_bit(models, x, monkeypatch, dtype):
    node.steps_of.cache_clear()
    repeated, call = [], Recorded.__call__
    monkeypatch.setattr(Recorded, "__call__", lambda self, *given: repeated.append(1) or call(self, *given))
    found = []
    for _ in range(3):
        with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            found.append(step(models[1], x))
    assert len(repeated) == 4  # forward and backward of the second and the third
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


def test_random_numbers_and_copies_are_left_alone(models, x):
    _, ours = models
    state = torch.get_rng_state()
    expected = step(ours, x)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_equal(step(other, x), expected)


def test_a_change_through_data_is_seen(models, x):
    plain, ours = models
    step(ours, x)
    for model in models:
        for parameter in model.parameters():
            parameter.data.mul_(1.25)
    assert_near(step(ours, x), step(plain, x))


def test_gradients_are_those_of_the_weights_of_the_forward(models, x):
    _, ours = models
    expected = step(ours, x)
    ours.zero_grad()
    with running_on("triton", x.device.type):
        y = ours(x)
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.data.zero_()
            ours(x)
        y.square().mean().backward()
    assert_equal([p.grad for p in ours.parameters()], expected[2:])


@pytest.mark.parametrize("part", ["conv_1", "body.0.local_block", "body", "all but the last"])
def test_frozen_parameters(models, x, part):
    """Backward ends at the first that needs a gradient."""
    for model in models:
        for name, parameter in model.named_parameters():
            is_part = not name.startswith("upsampler") if part == "all but the last" else name.startswith(part)
            parameter.requires_grad_(not is_part and not (part == "body" and name.startswith("conv_1")))
    plain, ours = models
    assert_near(step(ours, x), step(plain, x))
    x.requires_grad_()
    assert_near(step(ours, x), step(plain, x))


def test_shared_parameters_and_the_gradient_of_the_input(models, x):
    for model in models:
        group = model.body[0]
        group.global_block.ffn.fn_2[0].weight = group.local_block.ffn.fn_2[0].weight
        group.global_block.norm_1.bias = group.global_block.norm_2.bias
    plain, ours = models
    x.requires_grad_()
    assert_near(step(ours, x), step(plain, x))


def test_accumulation_and_two_calls_in_a_graph(models, x):
    plain, ours = models

    def two(model):
        model.zero_grad()
        with running_on("triton", x.device.type):
            for _ in range(2):
                (model(x).mean() + model(x.flip(3)).square().mean()).backward()
        return [p.grad for p in model.parameters()]

    assert_near(two(ours), two(plain))


def test_channels_last(models, x):
    """Of images and of parameters; gradients have the layout of these."""
    plain, ours = models
    expected = step(plain, x)
    ours.to(memory_format=torch.channels_last)
    found = step(ours, x.to(memory_format=torch.channels_last))
    assert_near(found, expected)
    images = [p.grad for p in ours.parameters() if p.dim() == 4]
    assert all(gradient.is_contiguous(memory_format=torch.channels_last) for gradient in images)


def test_other_parameters_for_a_call(models, x):
    """As functions of tensors, which get the gradients."""
    plain, ours = models
    factor, found = torch.tensor(1.5, device=x.device, requires_grad=True), []
    for model in (plain, ours):
        with running_on("triton", x.device.type):
            parameters = {name: p.detach() * factor for name, p in model.named_parameters()}
            y = torch.func.functional_call(model, parameters, (x,))
        found.append(torch.autograd.grad(y.square().mean(), factor))
    assert_near(*found)


def test_a_second_derivative_is_refused(models, x):
    x.requires_grad_()
    with running_on("triton", x.device.type):
        (gradient,) = torch.autograd.grad(models[1](x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"not differentiable, expected a single backward.*use_backend"):
            gradient.sum().backward()


@pytest.mark.parametrize("wants_dx", [False, True])
def test_compiled_whole(models, x, wants_dx):
    """The graph has the very step; sizes may differ."""
    _, ours = models
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for image in (x, torch.cat([x, x.flip(2)], dim=3)):
        image = image.requires_grad_(wants_dx)
        assert_equal(step(compiled, image), step(ours, image))


def test_what_changes_the_network_selects_another_path(models, x, steps):
    """Hooks, no images, calls without gradients."""
    _, ours = models
    step(ours, x)
    with running_on("triton", x.device.type):
        assert ours(x[:0]).shape == (0, 3, 8, 10)
        with torch.no_grad():
            ours(x)
        calls = []
        handle = ours.body[0].global_block.ffn.register_forward_hook(lambda *_: calls.append(1))
        ours(x)
        handle.remove()
    assert calls and len(steps) == 1


@pytest.mark.slow
def test_a_run_follows_the_reference(models, x):
    losses = []
    for model in models:
        optimizer, found = torch.optim.Adam(model.parameters(), lr=1e-3), []
        for number in range(200):
            target = torch.rand(2, 3, 8, 10, generator=torch.Generator().manual_seed(number)).to(x.device)
            image = torch.nn.functional.avg_pool2d(target, 2)
            y = step(model, image, lambda y, target=target: torch.nn.functional.l1_loss(y, target))[0]
            found.append(torch.nn.functional.l1_loss(y, target).item())
            optimizer.step()
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
