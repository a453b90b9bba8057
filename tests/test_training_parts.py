"""Losses, initial weights and checkpoint files of training."""

import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("pydantic", reason="needs the train extra")

from seemore_fast import load_model, seemore_t
from seemore_fast.errors import StateError
from seemore_fast.training.checkpoints import read_state
from seemore_fast.training.init import init_from, init_interpolation, rescale_upsampler
from seemore_fast.training.losses import fft_loss, pixel_loss


def test_fft_loss_is_that_of_the_published_training():
    x, target = torch.rand(2, 2, 3, 12, 13, dtype=torch.float64)
    spectra = [torch.fft.rfft2(image) for image in (x, target)]
    parts = [torch.stack([spectrum.real, spectrum.imag], dim=-1) for spectrum in spectra]
    torch.testing.assert_close(fft_loss(x, target), F.l1_loss(*parts))
    assert fft_loss(x.half(), target.half()).dtype == torch.float32


def test_losses_are_weighted():
    x, target = torch.rand(2, 2, 3, 12, 13, dtype=torch.float64)
    difference = x - target
    expected = 2 * difference.abs().mean() + 3 * (difference**2).mean() + 0.5 * fft_loss(x, target)
    torch.testing.assert_close(pixel_loss(x, target, l1=2, mse=3, fft=0.5), expected)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_initial_network_interpolates_bilinearly(scale):
    model = seemore_t(scale)
    init_interpolation(model)
    x = torch.rand(1, 3, 24, 24)
    expected = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
    inside = (..., slice(2 * scale, -2 * scale), slice(2 * scale, -2 * scale))
    assert (model.eval()(x) - expected)[inside].abs().mean() < 0.05


@pytest.mark.parametrize("scale", [1, 3, 4])
def test_rescaled_upsampler_is_interpolated(scale):
    """A plane over the subpixels of a pixel stays one."""

    def plane(scale):
        place = (torch.arange(scale).double() + 0.5) / scale - 0.5
        values = 3 + 2 * place[:, None] - 5 * place
        return torch.stack([values, -values]).flatten()

    torch.testing.assert_close(rescale_upsampler(plane(2), 2, scale), plane(scale))
    weight = plane(2)[:, None].expand(8, 5).contiguous()
    torch.testing.assert_close(rescale_upsampler(weight, 2, scale), plane(scale)[:, None].expand(-1, 5))


def test_weights_of_another_scale_are_a_start():
    model, source = seemore_t(3), load_model("seemore_t_x2")
    init_from(model, "seemore_t_x2")
    x = torch.rand(1, 3, 4, 5).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        y, expected = model.eval()(x), source(x)
    enlarged = F.interpolate(expected, scale_factor=1.5, mode="bilinear", align_corners=False)
    assert (y - enlarged).abs().mean() < 0.03
    assert torch.equal(model.conv_1.weight, source.conv_1.weight)


def test_checkpoints_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    path = tmp_path / "step_000000001.pt"
    torch.save({"version": 1, "step": Evil()}, path)
    with pytest.raises(StateError, match="cannot be read as a checkpoint"):
        read_state(path)
    torch.save({"step": 1}, path)
    with pytest.raises(StateError, match="is not a checkpoint of a run"):
        read_state(path)
