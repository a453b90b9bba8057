"""Streaming by the GPU engine: the whole call's bits in less memory; on the host, or on a GPU with --device cuda."""

import pytest
import torch
from helpers.backends import kernels_of, running_on, uninitialised_is_nan
from helpers.networks import network

from seemore_fast import SeemoRe
from seemore_fast.network import engine
from seemore_fast.network.config import PRESETS
from seemore_fast.network.engine_streaming import part_memory, stream
from seemore_fast.upscale import runner

each_gpu = pytest.mark.parametrize("backend", [b for b in kernels_of("network") if b.family == "cuda"])

CASES = {  # the configuration, the sides, and how many times the unit's rows a band has
    "many bands": (dict(), (77, 21), 1),
    "two bands": (dict(), (37, 50), 2),
    "one band": (dict(), (18, 33), 2),
    "one group": (dict(num_layers=1), (50, 20), 1),
    "50 features": (dict(embedding_dim=50), (29, 19), 1),
    "64 features": (dict(embedding_dim=64, num_experts=6, lr_space="linear", topk=2), (31, 70), 1),
    "recursive 1": (dict(recursive=1, use_shuffle=False, num_layers=1), (43, 18), 1),
    "recursive 3": (dict(recursive=3, num_layers=1), (70, 64), 1),
    "kernel 7": (dict(global_kernel_size=7, embedding_dim=48, scale=4), (26, 17), 1),
    "5 colours": (dict(in_chans=5, scale=3, num_layers=1), (26, 17), 1),
}
QUICK = ["many bands", "50 features", "kernel 7"]
FLOAT16 = pytest.param(torch.float16, marks=pytest.mark.slow)


def whole(model: SeemoRe, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty(1, x.shape[1], *(side * model.scale for side in x.shape[2:]), dtype=x.dtype, device=x.device)
    assert engine.run_out(model, x, y)
    return y


def streamed(model: SeemoRe, x: torch.Tensor, times: int = 1, **options) -> torch.Tensor:
    """Return model(x) in bands of so many units' rows."""
    needed = part_memory(model, *x.shape[2:])
    features = torch.full((needed.features,), 0xFF, dtype=torch.uint8)  # NaN
    y = torch.empty(1, x.shape[1], *(side * model.scale for side in x.shape[2:]), dtype=x.dtype)
    assert stream(model, x.cpu(), y, features, times * needed.unit, **options)
    return y


@each_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT16], ids=str)
@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in CASES])
def test_the_result_is_the_whole_images_to_the_bit(backend, device, case, dtype):
    config, sides, times = CASES[case]
    model = network(**config).to(device, dtype)
    x = torch.rand(1, config.get("in_chans", 3), *sides, device=device)
    with running_on(backend, device):
        expected = whole(model, x)
        with uninitialised_is_nan():
            assert torch.equal(streamed(model, x, times), expected.cpu())


@each_gpu
@pytest.mark.parametrize("integer", [torch.uint8, torch.uint16], ids=str)
def test_integers_and_progress(backend, device, integer):
    model, shares, released = network().to(device, torch.bfloat16), [], []
    x = (torch.rand(1, 3, 41, 19, device=device) * torch.iinfo(integer).max).to(integer)
    with running_on(backend, device):
        y = streamed(model, x, progress=shares.append, release=lambda *part: released.append(part))
        assert torch.equal(y.int(), whole(model, x).cpu().int())
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) == 3 * 4
    assert max(end for _, end in released) == 41 * 19 * 40 * 2


@each_gpu
def test_weights_that_are_no_numbers_are_reported(backend, device):
    model = network().to(device, torch.bfloat16)
    model.conv_2.bias.data[0] = torch.nan
    x = torch.zeros(1, 3, 30, 18, dtype=torch.uint8)
    with running_on(backend, device):
        needed = part_memory(model, 30, 18)
        features = torch.empty(needed.features, dtype=torch.uint8)
        assert not stream(model, x, torch.empty(1, 3, 60, 36, dtype=torch.uint8), features, needed.unit)


@each_gpu
def test_the_upscaler_streams_by_it(backend, device, monkeypatch):
    model, x = network().to(device, torch.bfloat16), torch.rand(1, 3, 45, 20)
    rows = []
    monkeypatch.setattr(engine, "MAX_BANDS", 0)  # bytes: as few rows as there can be
    monkeypatch.setattr(runner.engine_streaming, "stream", lambda *given: rows.append(given[4]) or stream(*given))
    with running_on(backend, device):
        y = torch.empty(1, 3, 90, 40)
        assert runner._run_streamed(model, x, y, runner.ExecutionOptions())
        assert torch.equal(y, whole(model, x.to(device)).cpu())
    assert rows == [12]


@each_gpu
@pytest.mark.slow
def test_the_pools_sums_do_not_depend_on_the_batch(backend, device):
    """A batch that fills the GPU needs no bands as low as those of an image alone."""
    model, x = network(num_layers=1).to(device, torch.bfloat16), torch.rand(32, 3, 36, 16, device=device)
    with running_on(backend, device):
        assert torch.equal(model(x[-1:]), model(x)[-1:])


@pytest.mark.parametrize("name", [str(backend) for backend in kernels_of("network") if backend.family == "cuda"])
def test_a_band_takes_a_share_of_the_memory(name, device):
    """30 megapixels: the GPU keeps 11 bytes of each of the whole image's, and the host 80."""
    height, width = 5000, 6000
    model = SeemoRe(scale=4, **PRESETS["t"]).to(device, torch.bfloat16).eval().requires_grad_(False)
    with running_on(name, device):
        config = engine.config_of(model)
        needed = part_memory(model, height, width)
        at_once = sum(
            engine.lookup_kernel("network", model.mean, part="_memory")(config.numbers(), 1, height, width, 1, 0)
        )
    assert needed.features == 80 * height * width
    assert needed.rest < 12 * height * width and needed.unit <= 128
    assert needed.band + needed.rest < at_once / 10
