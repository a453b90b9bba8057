"""Upscaling of arrays, Pillow images and files."""

from .upscaler import Upscaler

__all__ = ["Upscaler"]
