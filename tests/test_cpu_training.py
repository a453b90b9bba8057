"""Training on the CPU's kernels: what users do to a model and its input, beside the plain reference."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from seemore_fast import SeemoRe, reference, use_backend
from seemore_fast.backends import unsupported_reason

CONFIG = {"scale": 2, "num_layers": 2, "embedding_dim": 12, "num_experts": 3, "topk": 2}
pytestmark = pytest.mark.skipif(
    unsupported_reason("cpu") is not None, reason=f"no CPU library: {unsupported_reason('cpu')}"
)


def pair(**options) -> tuple[SeemoRe, reference.SeemoRe]:
    torch.manual_seed(0)
    model = SeemoRe(**CONFIG | options).train()
    plain = reference.SeemoRe(**CONFIG | options).train()
    plain.load_state_dict(model.state_dict())
    return model, plain


def step(model, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Return the output, and the gradients by name, of a loss that sees every pixel in its own way."""
    model.zero_grad(set_to_none=True)
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    (y * weights).sum().backward()
    return {"y": y.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def assert_same(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            largest = value.abs().max().item()
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4 * largest + 1e-6, msg=name)


@pytest.mark.parametrize(
    "shape", [(2, 3, 40, 33), (1, 3, 24, 24), (1, 3, 60, 48), (2, 3, 5, 3), (9, 3, 16, 17)], ids=str
)
@pytest.mark.parametrize("options", [{}, {"use_shuffle": True, "recursive": 1, "global_kernel_size": 5}], ids=str)
def test_steps(shape, options):
    model, plain = pair(**options)
    x = torch.rand(shape)
    assert_same(step(model, x), step(plain, x))


@pytest.mark.parametrize("how", ["none", "block"])
def test_recompute_gives_the_same(how):
    model, _ = pair()
    x = torch.rand(2, 3, 32, 20)
    expected = step(model, x)
    model.recompute = how
    assert all(torch.equal(value, expected[name]) for name, value in step(model, x).items())


def test_frozen_shared_and_unused_parameters():
    model, plain = pair()
    for network in (model, plain):
        network.body[0].requires_grad_(False)
        network.body[1].global_block.norm_1.weight.requires_grad_(False)
        ffn = network.body[1].local_block.ffn
        network.body[1].global_block.ffn.fn_2[0].weight = ffn.fn_2[0].weight  # shared
        network.unused = torch.nn.Parameter(torch.ones(3))
    x = torch.rand(2, 3, 20, 24)
    found = step(model, x)
    assert_same(found, step(plain, x))
    assert found["unused"] is None and found["body.0.local_block.norm_1.weight"] is None


def test_gradients_of_the_input_and_of_what_it_was_made_of():
    (model, plain), gradients = pair(), []
    for network in (model, plain):
        x = torch.rand(2, 3, 18, 20, generator=torch.Generator().manual_seed(1)).requires_grad_()
        network(x * 2 - 0.5).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_no_grad_in_training_mode():
    model, plain = pair()
    x = torch.rand(1, 3, 20, 20)
    with torch.no_grad():
        y = model(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, plain(x).detach(), rtol=1e-5, atol=1e-5)


def test_an_image_that_is_not_a_number_stays_alone():
    model, _ = pair()
    x = torch.rand(3, 3, 32, 32)
    broken = x.clone()
    broken[1, :, 5, 7] = torch.nan
    found = []
    for images in (x, broken):
        images = images.requires_grad_()
        y = model(images)
        y[[0, 2]].square().sum().backward()
        found.append((y[[0, 2]].detach(), images.grad[[0, 2]]))
    for clean, beside in zip(*found, strict=True):
        assert torch.equal(clean, beside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(dtype):
    model, _ = pair()
    x, threads, found = torch.rand(5, 3, 33, 40), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found.append(step(model, x))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(value, found[0][name]) for name, value in other.items())


def test_float16_under_autocast_is_left_to_the_reference():
    model, plain = pair()
    x = torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", torch.float16):
        found, expected = step(model, x), step(plain, x)
    torch.testing.assert_close(found["y"], expected["y"], rtol=0, atol=5e-3)


@pytest.mark.parametrize("part", ["whole", "local_block", "global_block"])
def test_a_second_derivative_is_refused(part):
    model, _ = pair()
    x = torch.rand(1, 3, 16, 16)
    if part != "whole":
        model, x = getattr(model.body[0], part), torch.rand(1, model.config["embedding_dim"], 16, 16)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"not differentiable, expected a single backward.*use_backend"):
        gradient.sum().backward()


def test_a_run_follows_the_reference():
    model, plain = pair()
    generator = torch.Generator().manual_seed(3)
    batches = [torch.rand(2, 3, 32, 32, generator=generator) for _ in range(20)]
    losses = []
    for network in (model, plain):
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        losses.append([])
        for hr in batches:
            loss = F.l1_loss(network(F.avg_pool2d(hr, 2)), hr)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


LONG_TRAINING = """
import torch
from seemore_fast import SeemoRe

torch.set_num_threads(1)
torch.manual_seed(0)
model = SeemoRe(scale=2, num_layers=2, embedding_dim=36, num_experts=3, topk=1, lr_space="exp", use_shuffle=True)
model.recompute = "none"
x = torch.rand(2, 3, 48, 48)


def resident(steps):
    for _ in range(steps):
        model.zero_grad()
        model(x).mean().backward()
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))


first = resident(30)
print((resident(80) - first) / 1e3)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_training_takes_no_more_memory_with_its_steps():
    """Megabytes of 80 steps: 48 lost bytes a call would keep the freed images beside them apart, 0.5 MB a step."""
    done = subprocess.run([sys.executable, "-c", LONG_TRAINING], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 20


def test_no_kernels_by_choice():
    model, plain = pair()
    x = torch.rand(1, 3, 16, 16)
    with use_backend("reference"):
        assert_same(step(copy.deepcopy(model), x), step(plain, x))
