"""Picture quality: PSNR and SSIM."""

from .metrics import luma, psnr_y, ssim_y

__all__ = ["luma", "psnr_y", "ssim_y"]
