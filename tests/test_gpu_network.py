"""What only a GPU can show of the whole network: graphs, nobody waiting, memory. With --device cuda."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.networks import SMALL

from seemore_fast import SeemoRe, Upscaler, reference, use_backend
from seemore_fast.network.gpu_memory import gpu_memory_needed

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def model(device):
    torch.manual_seed(0)
    return SeemoRe(**{**SMALL, "embedding_dim": 36}).to(device).eval()


def image(device, height=40, width=53, batch=1, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graphs_give_what_eager_gives(model, device, dtype):
    """Several sizes in turns, on two streams; results that a caller holds are not overwritten."""
    model.to(dtype)
    sizes = [(40, 53), (33, 64), (17, 20)]
    with torch.inference_mode():
        expected = [[model(image(device, *size, seed=seed)) for size in sizes] for seed in range(4)]
    model.prepare(graph=True)
    stream, found = torch.cuda.Stream(), []
    for seed in range(4):
        for size in sizes:
            x = image(device, *size, seed=seed)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.inference_mode(), torch.cuda.stream(stream if seed % 2 else torch.cuda.current_stream()):
                found.append(model(x))
    torch.cuda.synchronize()
    for one, other in zip(found, [y for row in expected for y in row], strict=True):
        assert torch.equal(one, other)
    assert len(model._frozen["graphs"]) == len(sizes)


def test_gradients_and_training_go_past_the_graph(model, device):
    model.prepare(graph=True)
    x = image(device)
    for _ in range(3):
        model(x).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert len(model._frozen["graphs"]) == 0
    model.train()
    assert not model._frozen


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nobody_waits_for_the_gpu(model, device, dtype, training):
    x = image(device, batch=2)

    def run():
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32), torch.set_grad_enabled(training):
            y = model.train(training)(x)
        if training:
            y.mean().backward()

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(400_000_000)
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("how", ["auto", "none", "block"])
def test_a_whole_training_step_in_a_graph(model, device, how):
    """Captured once, replayed with other images: parameters go where eager steps take them."""
    model.train().recompute = how
    eager = copy.deepcopy(model)
    x, target = image(device, batch=2), image(device, 80, 106, batch=2, seed=1)
    batches = [(image(device, batch=2, seed=2 * i), image(device, 80, 106, batch=2, seed=2 * i + 1)) for i in range(3)]

    def step(network, optimizer, x, target):
        optimizer.zero_grad(set_to_none=True)
        F.l1_loss(network(x), target).backward()
        optimizer.step()

    def adam(network):
        return torch.optim.Adam(network.parameters(), lr=1e-3, capturable=True)

    optimizers = adam(model), adam(eager)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(model, optimizers[0], x, target)
    torch.cuda.current_stream().wait_stream(stream)
    step(eager, optimizers[1], x, target)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, optimizers[0], x, target)
    for inputs, targets in batches:
        x.copy_(inputs), target.copy_(targets)
        graph.replay()
        step(eager, optimizers[1], inputs, targets)
    for one, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_memory_is_less_than_half_of_the_plain_networks(model, device):
    model.bfloat16()
    plain, x = reference.SeemoRe(**model.config).to(device).eval().bfloat16(), image(device, 480, 640)

    def peak(call):
        with torch.no_grad():
            call(x)
            torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call(x)
        return torch.cuda.max_memory_allocated() - before

    ours = peak(model)
    assert ours <= 1.1 * gpu_memory_needed(model, x.shape)
    with use_backend("reference"):
        assert ours * 2 <= peak(plain)


def test_out_of_memory_says_what_helps_and_leaves_the_process_usable(model, device):
    side = int((torch.cuda.mem_get_info()[1] / 36 / 4) ** 0.5)  # f alone would fill the GPU
    with pytest.raises(torch.OutOfMemoryError, match=r"needs about .* GiB .*smaller image.*bfloat16"), torch.no_grad():
        model(torch.empty(1, 3, side, side, device=device))
    assert model(image(device)).isfinite().all()


def test_upscaler_replays_graphs(model, device):
    upscaler = Upscaler(model, device=device)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 53, 3), np.uint8)
    first, *others = [upscaler(pixels) for _ in range(3)]
    assert len(upscaler.model._frozen["graphs"]) == 1
    assert all(np.array_equal(first, other) for other in others)
