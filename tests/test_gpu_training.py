"""Training steps in CUDA graphs, with --device cuda: results, waits, errors. Without a GPU: test_graphed_step.py."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.host_graphs import eager_step
from helpers.networks import SMALL
from torch.nn.parallel import DistributedDataParallel

from seemore_fast import SeemoRe, graphed_step
from seemore_fast.errors import TrainingError

pytestmark = pytest.mark.gpu


def network(device):
    torch.manual_seed(0)
    return SeemoRe(**{**SMALL, "embedding_dim": 36}).to(device)


def batch(device, seed, size=32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(2, 3, s * size, s * size, generator=generator).to(device) for s in (1, 2))


def adam(model, **options):
    return torch.optim.Adam(model.parameters(), 1e-3, **(options or {"fused": True}))


@pytest.mark.parametrize(
    "options",
    [{}, {"clip": 0.1}, {"autocast": torch.bfloat16}, {"autocast": torch.float16, "clip": 0.1, "scaler": True}],
    ids=str,
)
def test_steps_in_graphs_are_those_of_a_plain_loop(device, options):
    """Two sizes in turns; the learning rate falls."""

    def build(make):
        model = network(device)
        optimizer = adam(model)
        mine = {**options, "scaler": torch.amp.GradScaler(init_scale=1024.0)} if "scaler" in options else options
        return optimizer, make(model, optimizer, **mine)

    optimizers, steps = zip(
        build(lambda model, optimizer, **mine: graphed_step(model, F.l1_loss, optimizer, **mine)), build(eager_step),
        strict=True,
    )  # fmt: skip
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5) for optimizer in optimizers]
    losses = []
    for i in range(20):
        losses.append([step(*batch(device, i, 32 + 8 * (i % 2))) for step in steps])
        for scheduler in schedulers:
            scheduler.step()
    assert len(steps[0]._step) == 2
    graphed, expected = torch.tensor(losses).unbind(1)
    tolerance = 1e-4 if options.get("autocast") is None else 2e-2
    torch.testing.assert_close(graphed, expected, rtol=tolerance, atol=tolerance)


def test_optimizers_are_made_capturable(device):
    model = network(device)
    optimizer = adam(model, foreach=True)
    step = graphed_step(model, F.l1_loss, optimizer)
    losses = [step(*batch(device, 0)) for _ in range(12)]
    assert len(step._step) == 1 and losses[-1] < losses[0] and not optimizer.param_groups[0]["capturable"]
    with pytest.raises(ValueError, match="SGD, whose step cannot be captured"):
        graphed_step(model, F.l1_loss, torch.optim.SGD(model.parameters(), 0.1))


def test_a_replay_waits_for_nothing(device):
    model = network(device)
    step, inputs = graphed_step(model, F.l1_loss, adam(model)), batch(device, 0)
    for _ in range(6):
        step(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(400_000_000)
        loss = step(*inputs)
        assert not torch.cuda.current_stream().query()  # it still runs
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


def test_a_loss_that_waits_is_reported_and_steps_go_on(device):
    model = network(device)
    step = graphed_step(model, lambda y, hr: F.l1_loss(y, hr) * (1 + 0 * y.mean().item()), adam(model))
    with pytest.warns(UserWarning, match="no CUDA graph for batches of shape .* run eagerly: "):
        losses = [step(*batch(device, 0)) for _ in range(8)]
    assert losses[-1] < losses[0] and torch.cuda.current_stream() == torch.cuda.default_stream()
    other = graphed_step(model, F.l1_loss, adam(model))
    for _ in range(5):
        other(*batch(device, 0))
    assert len(other._step) == 1  # the failed capture disturbs no other


def test_nan_is_found_some_steps_later(device):
    model = network(device)
    step = graphed_step(model, F.l1_loss, adam(model))
    lr, hr = batch(device, 0)
    for _ in range(5):
        step(lr, hr)
    with pytest.raises(TrainingError, match="the loss of step 6 is nan, found after step"):
        for _ in range(9):
            step(lr * torch.nan, hr)
            torch.cuda.synchronize()


def test_ddp(device):
    """One process, by NCCL; the means of several: test_graphed_step.py."""
    with socket.create_server(("localhost", 0)) as free:
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    dist.init_process_group("nccl", rank=0, world_size=1)
    try:
        plain = network(device)
        expected = eager_step(plain, adam(plain))
        with torch.cuda.stream(torch.cuda.Stream()):
            model = DistributedDataParallel(network(device))
        step = graphed_step(model, F.l1_loss, adam(model))
        for i in range(8):
            torch.testing.assert_close(step(*batch(device, i)), expected(*batch(device, i)), rtol=1e-4, atol=1e-4)
        assert len(step._step) == 1
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_in_graphs_is_near_the_eager_one(work, device, precision, capsys):
    """Also resumed, with images on the GPU and from workers."""
    from helpers.tables import read_csv
    from helpers.training import arguments  # skips without the train extra

    from seemore_fast.cli import main

    line = ["--device", device, "--resume", "auto"]
    for out, options in (
        ("graphs", ["graph=true"]),
        ("eager", ["graph=false"]),
        ("workers", ["data.on_device=false", "data.workers=1"]),
    ):
        overrides = [f"precision={precision}", "log.every=1", "optimizer.clip=1", *options]
        for end in ("7", "12"):
            assert main(["train", *arguments(work, *overrides, out=out), *line, "--until", end]) == 0
    assert "no CUDA graph" not in capsys.readouterr().out
    losses = [
        torch.tensor([float(row["loss"]) for row in read_csv(work / out / "steps.csv")])
        for out in ("graphs", "eager", "workers")
    ]
    tolerance = 1e-3 if precision == "fp32" else 5e-2
    for other in losses[1:]:
        torch.testing.assert_close(losses[0], other, rtol=tolerance, atol=0)


def test_patches_cut_on_a_gpu_are_those_of_the_host(work, device):
    from helpers.training import trainer

    from seemore_fast.training.patches import Patches

    pairs = trainer(work).dataset
    for host, found in zip(*(Patches(pairs, 16, 3, device=one).batch(5, 64) for one in ("cpu", device)), strict=True):
        assert found.is_cuda and torch.equal(host, found.cpu())
