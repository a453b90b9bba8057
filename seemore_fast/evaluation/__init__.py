"""Measures of picture quality."""

from .metrics import luma, psnr_y

__all__ = ["luma", "psnr_y"]
