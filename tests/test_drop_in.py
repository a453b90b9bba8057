"""accelerate(): someone else's module in, ours out, the very same Parameters."""

import copy

import pytest
import torch
import torch.nn as nn
from helpers.networks import SMALL

from seemore_fast import SeemoRe, accelerate, reference
from seemore_fast.network.checkpoint import CheckpointError

OPTIONS = [
    {},
    dict(use_shuffle=False, recursive=1, topk=2, num_experts=4, lr_space="double", img_range=3.0, scale=3),
    dict(global_kernel_size=7, num_experts=1),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_parameters_are_shared_and_outputs_equal(oracle, device, options):
    theirs = oracle(**{**SMALL, **options}).to(device).eval()
    ours = accelerate(theirs)
    assert isinstance(ours, SeemoRe)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    x = torch.rand(1, 3, 20, 33, device=device)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)


def test_an_existing_optimizer_goes_on(oracle, device):
    theirs = oracle(**SMALL).to(device).train()
    twin = copy.deepcopy(theirs)
    ours = accelerate(theirs)
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3) for model in (theirs, twin)]  # before and beside
    x, target = torch.rand(2, 3, 16, 16, device=device), torch.rand(2, 3, 32, 32, device=device)
    for _ in range(3):
        for model, optimizer in zip((ours, twin), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.l1_loss(model(x), target).backward()
            optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_mode_and_frozen_flags_are_kept(oracle, dtype):
    theirs = oracle(**SMALL).to(dtype).train()
    theirs.conv_1.requires_grad_(False)
    theirs.body[1].eval()
    ours = accelerate(theirs)
    assert ours.conv_2.weight.dtype == ours.mean.dtype == dtype
    assert not ours.conv_1.weight.requires_grad
    assert ours.conv_2.weight.requires_grad
    assert ours.training
    assert not ours.body[1].global_block.ffn.training
    assert ours.mean.device == ours.conv_1.weight.device


@pytest.mark.parametrize("model_class", [SeemoRe, reference.SeemoRe])
def test_our_own_modules_are_taken(model_class, device):
    model = model_class(**{**SMALL, "topk": 2, "img_range": 2.0}).to(device)
    ours = accelerate(model)
    assert ours.config == model.config
    assert ours is not model
    assert ours.conv_1.weight is model.conv_1.weight


def test_a_descriptor_is_unwrapped(oracle):
    class Descriptor:
        model = oracle(**SMALL)

    assert accelerate(Descriptor()).conv_1.weight is Descriptor.model.conv_1.weight


def test_wrappers_are_taken_off(device):
    model = reference.SeemoRe(**SMALL).to(device)
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        assert accelerate(wrapped).conv_1.weight is model.conv_1.weight


def test_a_mean_of_its_own_is_kept(oracle, device):
    theirs = oracle(**SMALL).to(device).eval()
    theirs.mean = torch.tensor([0.1, 0.2, 0.3], device=device).view(1, 3, 1, 1)
    x = torch.rand(1, 3, 16, 16, device=device)
    with torch.no_grad():
        torch.testing.assert_close(accelerate(theirs)(x), theirs(x), rtol=0, atol=1e-5)


def test_others_are_refused(oracle):
    with pytest.raises(TypeError, match="is a dict"):
        accelerate({})
    with pytest.raises(CheckpointError, match="Sequential does not have the structure"):
        accelerate(nn.Sequential(nn.Conv2d(3, 3, 3)))
    changed = oracle(**SMALL)
    changed.extra = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"2 unexpected \(extra\.weight, extra\.bias\)"):
        accelerate(changed)
