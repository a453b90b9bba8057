"""What training is made of: losses, starts, checkpoints."""

import os

import pytest
import torch

from seemore_fast import load_model
from seemore_fast.training.checkpoints import StateError, read_state
from seemore_fast.training.init import init_from, init_interpolation, rescale_upsampler
from seemore_fast.training.losses import fft_loss, pixel_loss

pytest.importorskip("yaml", reason="configurations are YAML")


def test_fft_loss_is_that_of_the_published_training():
    x, truth = torch.rand(2, 2, 3, 12, 13, dtype=torch.float64)
    spectra = [torch.fft.rfft2(image) for image in (x, truth)]
    parts = [torch.stack([spectrum.real, spectrum.imag], dim=-1) for spectrum in spectra]
    torch.testing.assert_close(fft_loss(x, truth), torch.nn.functional.l1_loss(*parts))
    assert fft_loss(x.half(), truth.half()).dtype == torch.float32


def test_losses_add_up_by_their_weights():
    x, truth = torch.rand(2, 2, 3, 12, 13, dtype=torch.float64)
    apart = x - truth
    want = 2 * apart.abs().mean() + 3 * (apart**2).mean() + 0.5 * fft_loss(x, truth)
    torch.testing.assert_close(pixel_loss(x, truth, l1=2, mse=3, fft=0.5), want)


def test_it_starts_as_bilinear_interpolation():
    from seemore_fast import seemore_t

    for scale in (2, 3, 4):
        model = seemore_t(scale)
        init_interpolation(model)
        x = torch.rand(1, 3, 24, 24)
        expected = torch.nn.functional.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
        inside = (..., slice(2 * scale, -2 * scale), slice(2 * scale, -2 * scale))
        assert (model.eval()(x) - expected)[inside].abs().mean() < 0.05


@pytest.mark.parametrize("wanted", [1, 3, 4])
def test_an_upsampler_of_another_scale_is_interpolated(wanted):
    """A plane that rises evenly inside a pixel stays one."""

    def plane(scale):
        place = (torch.arange(scale).double() + 0.5) / scale - 0.5
        values = 3 + 2 * place[:, None] - 5 * place
        return torch.stack([values, -values]).flatten()

    torch.testing.assert_close(rescale_upsampler(plane(2), 2, wanted), plane(wanted))
    weight = plane(2)[:, None].expand(8, 5).contiguous()
    torch.testing.assert_close(rescale_upsampler(weight, 2, wanted), plane(wanted)[:, None].expand(-1, 5))


def test_another_scales_weights_are_a_start(tmp_path):
    from seemore_fast import seemore_t

    model, source = seemore_t(3), load_model("seemore_t_x2")
    init_from(model, "seemore_t_x2")
    x = torch.rand(1, 3, 4, 5).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        y, expected = model.eval()(x), source(x)
    small = torch.nn.functional.interpolate(expected, scale_factor=1.5, mode="bilinear", align_corners=False)
    assert (y - small).abs().mean() < 0.03
    assert torch.equal(model.conv_1.weight, source.conv_1.weight)


def test_checkpoints_hold_no_code(tmp_path):
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
