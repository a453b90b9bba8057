"""Calls that are recorded and repeated: equal to the bit, in as much memory."""

import copy

import pytest
import torch
from helpers.backends import running_on
from helpers.networks import SMALL
from torch import Tensor

from seemore_fast import SeemoRe
from seemore_fast.network import replay
from seemore_fast.network.replay import Recorded

on_triton = pytest.mark.parametrize("backend", ["triton"])
WEIGHT = torch.arange(1.0, 4.0)


def mixed(x: Tensor) -> Tensor:
    """Allocations, views, operators that return, write to `out` and change in place, a constant and a scalar."""
    doubled = (2 * x).transpose(0, 1)
    sums = torch.empty_like(doubled)
    torch.add(doubled, WEIGHT[:, None], out=sums)
    del doubled
    y = torch.empty(2, *sums.shape)
    y[0].copy_(sums)
    del sums
    y[1] = x.t().cumsum(0)
    return y[:, 1:].mul_(0.5)


def test_a_repetition_gives_what_the_function_gives():
    recorded = Recorded(mixed, torch.rand(5, 3))
    for _ in range(3):
        x = torch.rand(5, 3)
        assert torch.equal(recorded(x), mixed(x))


def test_results_of_repetitions_are_apart():
    recorded, x = Recorded(mixed, torch.rand(5, 3)), torch.rand(5, 3)
    first = recorded(x)
    kept = first.clone()
    recorded(torch.rand(5, 3))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("make", [lambda: torch.rand(3, 5).t(), lambda: torch.rand(16)[1:].view(5, 3)])
def test_other_strides_or_alignment_run_as_they_are(make):
    recorded, x = Recorded(mixed, torch.rand(5, 3)), make()
    assert torch.equal(recorded(x), mixed(x))


def test_what_asks_the_device_is_not_recorded():
    with pytest.raises(RuntimeError, match="answers what is on the device: that cannot be recorded"):
        Recorded(lambda x: x * x.sum().item(), torch.rand(5, 3))


def test_a_result_that_is_not_new_is_not_recorded():
    for function in (lambda x: x, lambda x: WEIGHT.expand(5, 3)):
        with pytest.raises(RuntimeError, match="the result was not allocated by the function"):
            Recorded(function, torch.rand(5, 3))


def test_memory_is_freed_when_the_function_frees_it():
    """And what an operator returned; so a repetition needs no more memory than the function does."""
    recorded, x = Recorded(mixed, torch.rand(5, 3)), torch.rand(5, 3)
    live = []
    steps = [(Watched(step, live), *memories) for step, *memories in recorded._steps]
    recorded._steps = steps
    recorded(x)
    # x, 2 * x, its sum, y: the product is freed behind the addition and the sum behind the copy
    assert live == [[0], [0, 1, 2], [0, 2, 3], [0, 3], [0, 3, 4], [0, 3]]


class Watched:
    """A step that notes which memories there are before it runs."""

    def __init__(self, step, live):
        self._step, self._live = step, live

    def run(self, bases, now):
        self._live.append([number for number, tensor in enumerate(bases.tensors) if tensor is not None])
        self._step.run(bases, now)


@on_triton
def test_a_prepared_network_is_repeated(backend, device, monkeypatch):
    """From the second call for a size on; results are those of an unprepared one to the bit."""
    made, call = [], Recorded.__call__
    monkeypatch.setattr(replay.Recorded, "__call__", lambda self, x: made.append(self) or call(self, x))
    unprepared = SeemoRe(**{**SMALL, "num_layers": 1}).to(device, torch.bfloat16).eval()
    prepared = copy.deepcopy(unprepared)
    with torch.no_grad(), running_on(backend, device):
        prepared.prepare()
        for number in range(3):
            x = torch.rand(1, 3, 17, 19, device=device)
            with torch.inference_mode(number == 2), torch.no_grad():
                assert torch.equal(prepared(x), unprepared(x))
            assert len(made) == number
    assert made[0] is made[1]
