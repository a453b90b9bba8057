"""Memory for time in training: same results and gradients, fewer tensors kept."""

import copy

import pytest
import torch
from helpers.backends import kernels_of, running_on
from helpers.networks import SMALL
from torch import nn

from seemore_fast import SeemoRe, backends, use_backend
from seemore_fast.network.checkpointing import CHOICES

TINY = {**SMALL, "num_layers": 1}


@pytest.fixture
def model(device):
    torch.manual_seed(0)
    return SeemoRe(**TINY).to(device)


def step(model, x, how, **options):
    """Return the result, all gradients, and how many elements were kept for backward, each storage once."""
    model.recompute = how
    model.zero_grad()
    x, kept = x.clone().requires_grad_(), {}
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    y.square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())], sum(kept.values())


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one is None if other is None else torch.equal(one, other)


def test_results_are_equal_and_blocks_keep_least(model, device):
    x = torch.rand(2, 3, 17, 20, device=device)
    expected, most = step(model, x, "none")
    for how in ("auto", "block"):
        found, kept = step(model, x, how)
        assert_equal(found, expected)
        assert kept <= most
    assert kept < 0.5 * most


@pytest.mark.parametrize("backend", [name for name in kernels_of("norm_pointwise") if name == "triton"])
def test_triton_makes_sees_inside_again(backend, model, device):
    """On Triton's kernels, "auto" keeps q, v and their product no more; backward may come under another choice."""
    x = torch.rand(1, 3, 16, 16, device=device)
    with running_on(backend, device):
        expected, most = step(model, x, "none")
        found, kept = step(model, x, "auto")
        assert_equal(found, expected)
        features = 4 * 16 * 16 * model.config["embedding_dim"]
        assert kept == most - 3 * features
        model.recompute = "block"
        y = model(x)
    model.zero_grad()
    with use_backend("reference"):
        y.square().mean().backward()
    found = [p.grad for p in model.parameters()]  # of kernels, if not of the same ones
    torch.testing.assert_close(found, expected[2:], rtol=1e-3, atol=1e-6)
    assert backends.current_backend() == "auto"


def test_blocks_in_a_wider_life(model, device):
    """Accumulation, one module twice in a graph, frozen parameters, autocast, a copy."""
    x, model.recompute = torch.rand(1, 3, 16, 16, device=device), "block"
    model.conv_1.weight.requires_grad_(False)
    other = copy.deepcopy(model)
    assert other.recompute == "block"
    other.recompute = "none"
    for network in (model, other):
        for _ in range(2):
            with torch.autocast(x.device.type, torch.bfloat16):
                (network(x).mean() + network(x.flip(3)).square().mean()).backward()
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])
    assert model.conv_1.weight.grad is None


def test_where_nothing_is_recorded_nothing_is_made_again(model, device):
    model.recompute = "block"
    x = torch.rand(1, 3, 16, 16, device=device)
    with torch.no_grad():
        assert not model(x).requires_grad
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    with use_backend("reference"):
        found = torch.func.grad(loss)(parameters)
        loss(parameters).backward()
    torch.testing.assert_close(found, {name: p.grad for name, p in parameters.items()}, rtol=1e-4, atol=1e-6)


def test_hooks_inside_run(model, device):
    """A hooked module sends its block down the plain path, which keeps everything."""
    model.recompute, calls = "block", []
    model.body[0].global_block.ffn.register_forward_hook(lambda *_: calls.append(1))
    model(torch.rand(1, 3, 16, 16, device=device)).mean().backward()
    assert calls == [1]


def test_replaced_blocks_are_left_alone(model):
    model.body[0].local_block = nn.Identity()
    model.recompute = "block"
    assert model.body[0].global_block.recompute == "block"


def test_compiled_whole(model, device):
    x = torch.rand(1, 3, 16, 16, device=device)
    expected, _ = step(model, x, "block")
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().mean().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected[2:], rtol=1e-4, atol=1e-6)


def test_other_words_are_refused(model):
    assert model.recompute == "auto"
    with pytest.raises(ValueError, match=r"recompute is 'all', expected one of 'auto', 'none', 'block'"):
        model.recompute = "all"
    assert model.recompute == "auto" and set(CHOICES) == {"auto", "none", "block"}
