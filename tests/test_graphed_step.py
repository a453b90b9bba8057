"""Training steps in graphs, replayed on the host operator by operator: results, sizes, settings, errors. On a GPU:
test_gpu_training.py."""

import copy
import gc
import warnings
from unittest.mock import MagicMock, call

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import processes
from helpers.host_graphs import HostGraphs, eager_step
from helpers.networks import SMALL
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from seemore_fast import SeemoRe, graphed_step
from seemore_fast.errors import TrainingError
from seemore_fast.training import graphed_step as module
from seemore_fast.training.capture import CudaGraphs
from seemore_fast.training.graphed_step import MOST, WARM_UPS

RATES = [2**-8, 2**-8, 2**-9]  # exact in float32, as a graph holds them


def small_network():
    torch.manual_seed(0)
    return SeemoRe(**{**SMALL, "num_layers": 1})


def plain_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2))


def adam(network, **options):
    return torch.optim.Adam(network.parameters(), RATES[0], fused=True, **options)


def batch(seed, size=16, count=2):
    torch.manual_seed(seed)
    return torch.rand(count, 3, size, size), torch.rand(count, 3, 2 * size, 2 * size)


@pytest.fixture
def graphs(monkeypatch):
    """Graphs on the host, for models on the CPU."""
    graphs = HostGraphs()
    monkeypatch.setattr(module, "graphs_for", lambda device: graphs)
    return graphs


def assert_same(one, other):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a.grad, b.grad)


def pair(make=small_network, optimizer=adam, **options):
    """Return networks, optimizers and steps: in graphs, and as users write them."""
    networks = [make(), make()]
    optimizers = [optimizer(network) for network in networks]
    theirs = {**options, "scaler": copy.deepcopy(options.get("scaler"))}
    steps = [
        graphed_step(networks[0], F.l1_loss, optimizers[0], **options),
        eager_step(networks[1], optimizers[1], **theirs),
    ]
    return networks, optimizers, steps


@pytest.mark.parametrize(
    "options", [{}, {"clip": 0.01}, {"autocast": torch.bfloat16}, {"scaler": True, "clip": 0.01}], ids=str
)
def test_twenty_steps_are_those_of_a_plain_loop(graphs, options):
    if "scaler" in options:
        options = {**options, "scaler": torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)}
    networks, optimizers, steps = pair(**options)
    schedulers = [torch.optim.lr_scheduler.StepLR(one, 7, 0.5) for one in optimizers]
    for i in range(20):
        losses = [step(*batch(i)) for step in steps]
        assert torch.equal(*losses), i
        for scheduler in schedulers:
            scheduler.step()
    assert_same(*networks)
    assert (graphs.warm_ups, len(graphs.captures)) == (WARM_UPS, 1)
    states = [one.state_dict() for one in optimizers]
    assert states[0]["param_groups"] == states[1]["param_groups"] and states[0]["param_groups"][0]["lr"] == RATES[0] / 4
    for index, moments in states[1]["state"].items():
        assert all(torch.equal(states[0]["state"][index][name], value) for name, value in moments.items())


def test_without_a_gpu_steps_are_eager():
    networks, _, steps = pair(clip=0.1)
    for i in range(5):
        assert torch.equal(*[step(*batch(i)) for step in steps])
    assert_same(*networks)


@pytest.mark.parametrize("optimizer", [
    lambda network: torch.optim.SGD(network.parameters(), RATES[0], momentum=0.9, fused=True),
    lambda network: torch.optim.AdamW([
        {"params": network[0].parameters(), "lr": RATES[2]}, {"params": network[2].parameters(), "weight_decay": 0.5},
    ], RATES[0], fused=True),
], ids=["SGD", "two groups"])  # fmt: skip
def test_optimizers(graphs, optimizer):
    networks, optimizers, steps = pair(plain_network, optimizer)
    for i in range(8):
        for one in optimizers:
            one.param_groups[-1]["lr"] = 2.0 ** (-4 - i)  # a number, as users set it
        assert torch.equal(*[step(*batch(i)) for step in steps])
    assert_same(*networks)
    assert len(graphs.captures) == 1


def test_rates_that_are_tensors(graphs):
    networks, optimizers, steps = pair(plain_network, lambda n: adam(n, capturable=False))
    for one in optimizers:
        one.param_groups[0]["lr"] = torch.tensor([RATES[0]])
    for i in range(8):
        assert torch.equal(*[step(*batch(i)) for step in steps])
        for one in optimizers:
            one.param_groups[0]["lr"].mul_(0.5)
    assert_same(*networks)


def test_each_size_has_a_graph(graphs):
    networks, _, steps = pair()
    for i in range(2 * WARM_UPS + 6):
        assert torch.equal(*[step(*batch(i, *((16, 2), (20, 1))[i % 2])) for step in steps])
        assert_same(*networks)  # with the gradients of this step, whichever graph it was
    assert graphs.warm_ups == 2 * WARM_UPS and len(graphs.captures) == 2


def test_graphs_are_bounded(graphs):
    networks, _, steps = pair(plain_network)
    for size in (*range(4, 5 + MOST), 4):
        for i in range(WARM_UPS + 1):
            assert torch.equal(*[step(*batch(i, size)) for step in steps])
        assert len(steps[0]._step) <= MOST
    assert len(graphs.captures) == MOST + 2  # the first size made room, and is captured again
    assert_same(*networks)


def freeze(network, optimizer):
    next(iter(network.parameters())).requires_grad_(False)


def decay(network, optimizer):
    optimizer.param_groups[0]["weight_decay"] = 0.25


def move(network, optimizer):
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()


def restore(network, optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    for moments in state["state"].values():
        moments["exp_avg"].mul_(0.5)
    optimizer.load_state_dict(state)


@pytest.mark.parametrize("change", [freeze, decay, move, restore], ids=lambda one: one.__name__)
def test_changes_that_need_another_graph(graphs, change):
    networks, optimizers, steps = pair(plain_network)
    for i in range(12):
        if i == 6:
            for arguments in zip(networks, optimizers, strict=True):
                change(*arguments)
        assert torch.equal(*[step(*batch(i)) for step in steps])
    for a, b in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.equal(a, b)
    assert len(graphs.captures) == 2


def test_steps_are_seen_as_changes_of_parameters(graphs):
    network = plain_network()
    step = graphed_step(network, F.l1_loss, adam(network))
    for i in range(WARM_UPS + 2):
        before = [p._version for p in network.parameters()]
        step(*batch(i))
        assert all(p._version > old for p, old in zip(network.parameters(), before, strict=True))


def test_autocast_around_a_step_has_graphs_of_its_own(graphs):
    networks, _, steps = pair()
    for i in range(10):
        with torch.autocast("cpu", torch.bfloat16, enabled=i % 2 == 1):
            assert torch.equal(*[step(*batch(i)) for step in steps])
    assert_same(*networks)
    assert len(graphs.captures) == 2


def test_losses_keep_their_values(graphs):
    _, _, steps = pair(plain_network)
    losses = [[step(*batch(i)) for i in range(8)] for step in steps]
    assert torch.equal(*map(torch.stack, losses))


# Processes


def step_in_two_processes(fails):
    """What each of two processes does: steps of its own batches, in graphs and by DDP."""
    dist.init_process_group("gloo")
    graphs = HostGraphs()
    module.graphs_for = lambda device: graphs
    if fails and dist.get_rank() == 1:
        graphs.error = RuntimeError("no memory on this one")
    networks, _, steps = pair(lambda: DistributedDataParallel(small_network()), clip=0.01)
    for i in range(8):
        mine = batch(2 * i + dist.get_rank(), size=16 + 4 * (i % 2))
        for loss in (step(*mine) for step in steps):
            assert loss.isfinite()
        for a, b in zip(*(network.parameters() for network in networks), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    print(len(graphs.captures), "captures")
    dist.destroy_process_group()


@pytest.mark.parametrize("fails", [False, True])
def test_two_processes_take_the_steps_of_ddp(tmp_path, fails):
    """A process whose captures fail waits for the same collectives as the other."""
    done = processes.run_two(step_in_two_processes, fails, output=tmp_path / "printed")
    assert [status for status, _ in done] == [0, 0], done
    assert done[0][1] == "4 captures\n"  # two of each size
    assert ("no CUDA graph for batches" in done[1][1]) == fails


# Captures


def test_captures_are_on_one_stream_and_share_memory(monkeypatch):
    cuda = MagicMock()
    cuda.CUDAGraph.side_effect = lambda: MagicMock()
    monkeypatch.setattr(torch, "cuda", cuda)
    graphs, stream = CudaGraphs("cuda:1"), cuda.Stream.return_value
    assert graphs.warm_up(lambda: 7) == 7
    assert cuda.mock_calls.index(call.Stream().wait_stream(cuda.current_stream())) < cuda.mock_calls.index(
        call.current_stream().wait_stream(stream)
    )

    def pool(result):
        nonlocal captures
        captures.append(graphs.capture(lambda: result))
        options = cuda.graph.call_args.kwargs
        assert captures[-1].result == result and options["stream"] is stream
        assert options["capture_error_mode"] == "thread_local"
        return options["pool"]

    captures = []
    assert pool("first") is None and pool("second") is captures[0].pool
    captures[1].replay()
    captures[1]._graph.replay.assert_called_once_with()
    captures, cuda.graph.call_args = [], None  # memory without graphs is not used again
    gc.collect()
    assert pool("third") is None


# Errors


@pytest.mark.parametrize("make, scaler, message", [
    (lambda p: torch.optim.SGD(p, 0.1), None, "optimizer is SGD, whose step .*: expected one .* with fused=True"),
    (lambda p: torch.optim.LBFGS(p), None, "optimizer is LBFGS, whose step cannot be captured"),
    (lambda p: torch.optim.RMSprop(p), torch.amp.GradScaler("cpu"), "waits for the GPU .* RMSprop: .*fused=True"),
], ids=["SGD", "LBFGS", "scaler"])  # fmt: skip
def test_optimizers_that_cannot_be_captured(graphs, make, scaler, message):
    network = plain_network()
    with pytest.raises(ValueError, match=message):
        graphed_step(network, F.l1_loss, make(network.parameters()), scaler=scaler)


def test_a_model_on_two_devices():
    network = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, device="meta"))
    with pytest.raises(ValueError, match="model and optimizer are on cpu, meta, expected one device"):
        graphed_step(network, F.l1_loss, adam(network[0]))


def test_a_failed_capture_is_reported_once_and_steps_go_on(graphs):
    networks, _, steps = pair(scaler=torch.amp.GradScaler("cpu", init_scale=8.0), clip=0.1)
    graphs.error = torch.OutOfMemoryError("out of memory: tried to allocate 3 TiB\nand more")
    for i in range(8):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            graphed = steps[0](*batch(i))
        if i == WARM_UPS:
            (warning,) = caught
            assert str(warning.message) == (
                "no CUDA graph for batches of shape (2, 3, 16, 16) and (2, 3, 32, 32), their steps run eagerly: "
                "out of memory: tried to allocate 3 TiB"
            )
        assert bool(caught) == (i == WARM_UPS)
        assert torch.equal(graphed, steps[1](*batch(i)))
    assert_same(*networks)
    assert not graphs.captures and len(steps[0]._step) == 0


def test_a_loss_that_waits_for_the_device_runs_eagerly(graphs):
    network = plain_network()
    step = graphed_step(network, lambda y, hr: F.l1_loss(y, hr) * (1 + 0 * y.mean().item()), adam(network))
    for i in range(WARM_UPS):
        step(*batch(i))
    with pytest.warns(UserWarning, match="steps run eagerly: operation not permitted when stream is capturing$"):
        assert step(*batch(9)).isfinite()


def test_errors_of_the_model_are_raised(graphs):
    network, fails = plain_network(), []

    def loss(y, hr):
        if fails:
            raise fails[0]
        return F.l1_loss(y, hr)

    step = graphed_step(network, loss, adam(network))
    for i in range(WARM_UPS):
        step(*batch(i))
    for error, context in ((ValueError("mine"), ValueError), (RuntimeError("mine"), RuntimeError)):
        fails[:] = [error]
        with pytest.raises(context, match="mine"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step(*batch(0))


def test_a_loss_that_is_nan_ends_the_loop(graphs):
    network = plain_network()
    step = graphed_step(network, F.l1_loss, adam(network))
    for i in range(WARM_UPS + 2):
        step(*batch(i))
    lr, hr = batch(0)
    with pytest.raises(TrainingError, match=f"the loss of step {WARM_UPS + 3} is nan, found after step {WARM_UPS + 3}"):
        step(lr * torch.nan, hr)
