"""Images far larger than what is computed at once, against the plain reference on a piece of them.

A pattern repeated in both directions looks the same to the network everywhere but near the borders of the image, save
for what it pools. So three patterns in a row stand for any number: the pools are means in which the one in the middle
counts for all that are not at the border.
"""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from helpers.networks import network
from torch import nn

from seemore_fast import Upscaler, backends, load_model
from seemore_fast.network import engine
from seemore_fast.reference import SeemoRe as PlainSeemoRe
from seemore_fast.reference.router import route

pytestmark = pytest.mark.skipif(backends.unsupported_reason("cpu") is not None, reason="no CPU library")


class RouterOfMany(nn.Module):
    """A router that pools `blocks` x `blocks` patterns, given 3 x 3 of them."""

    def __init__(self, router, blocks):
        super().__init__()
        self.router = router
        self.weights = torch.tensor([1.0, blocks - 2, 1.0], dtype=torch.float64) / blocks

    def forward(self, x):
        count, channels, height, width = x.shape
        parts = x.double().reshape(count, channels, 3, height // 3, 3, width // 3).mean((3, 5))
        mean = torch.einsum("ncij,i,j->nc", parts, self.weights, self.weights)
        return route(mean.to(x.dtype), self.router.body[2].weight, self.router.top_k)


# model, patterns in a row and column, their period, bytes of features in memory
CASES = {
    "two groups": (network, 4, 128, 0),
    "six groups": (partial(load_model, "seemore_t_x2"), 4, 256, 0),
    "105 megapixels": (partial(load_model, "seemore_t_x2"), 20, 512, engine.IN_MEMORY),  # 36 GB, some ten minutes
}
EACH = [pytest.param(*of, id=name, marks=[] if of[0] is network else pytest.mark.slow) for name, of in CASES.items()]


@pytest.mark.parametrize("make, blocks, period, in_memory", EACH)
def test_a_huge_image_is_what_the_reference_makes_of_a_piece(make, blocks, period, in_memory, monkeypatch, tmp_path):
    """A group sees some 40 pixels around itself."""
    side, model = blocks * period, make().eval()
    monkeypatch.setattr(engine, "IN_MEMORY", in_memory)
    needs = engine.plan_memory(model, (1, 3, side, side), itemsize=4, streamed=True)
    assert needs.disk > 0
    if shutil.disk_usage(tmp_path).free < needs.disk:
        pytest.skip(f"{needs.disk / 2**30:.0f} GiB are needed in {tmp_path}")
    y, x = np.mgrid[:period, :period] * (2 * np.pi / period)
    waves = [np.sin(20 * x) * np.sin(30 * y), np.sin(3 * x + 120 * np.sin(y)), np.sin(90 * x + 70 * y)]
    pattern = np.dstack(waves) * 0.4 + 0.5 + 0.1 * np.random.default_rng(0).random((period, period, 3))
    pattern = pattern.clip(0, 1).astype(np.float32)

    huge = np.tile(pattern, (blocks, blocks, 1))
    result = Upscaler(model, device="cpu", stream=True, scratch=tmp_path)(huge)
    del huge

    plain = PlainSeemoRe(**model.config).eval()
    plain.load_state_dict(model.state_dict())
    for group in plain.body:
        moe = group.local_block.block.moe_layer
        moe.gate = RouterOfMany(moe.gate, blocks)
    with torch.inference_mode():
        x = torch.from_numpy(np.tile(pattern, (3, 3, 1))).permute(2, 0, 1)[None]
        expected = plain(x).clamp(0, 1)[0].permute(1, 2, 0).numpy()

    step = 2 * period
    for row, column in [(0, 0), (0, 1), (1, blocks - 1), (blocks // 2, 1), (blocks - 2, blocks - 2), (blocks - 1, 1)]:
        part = result[row * step :, column * step :][:step, :step]
        i, j = (min(n, 1) + (n == blocks - 1) for n in (row, column))
        like = expected[i * step :, j * step :][:step, :step]
        np.testing.assert_allclose(part, like, rtol=0, atol=1e-5)
    assert np.abs(expected[step : 2 * step, step : 2 * step] - expected[:step, :step]).max() > 1e-3  # the border shows
