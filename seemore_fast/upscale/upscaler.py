"""Upscaler: super-resolution of arrays, Pillow images and files."""

import contextlib
import copy
import math
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageSequence

from ..devices import find_device
from ..errors import ImageError, file_error
from ..io.images import MAX_MEGAPIXELS, as_8_bit, frame_count, write_image
from ..network.accelerate import accelerate
from ..network.checkpoint import load_model, shipped_models
from .arrays import as_tensor, check_array, from_unit, resized, to_unit
from .files import FileOptions, read
from .runner import ExecutionOptions, must_stream, run

DTYPES = {
    "fp32": torch.float32, "float32": torch.float32,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip
T = TypeVar("T", int, float)
LUMA = (0.299, 0.587, 0.114)


class Upscaler:
    """Super-resolution: ``Upscaler("seemore_t_x2")(image)`` returns an image of the same kind, `scale` times the size.

    model: the name of a shipped model, with or without its scale ("seemore_t_x2", "seemore_t"), the path of a
        .safetensors or .pth file, or a module that `accelerate` accepts (it is copied and stays unchanged).
    scale: the expected scale; selects among shipped models. None: the model's own, or 2 for a name without a scale.
    device: "auto" (a CUDA device if there is one), "cpu", "cuda", "cuda:1", ...
    dtype: torch.float32 (None), torch.bfloat16, torch.float16, or "fp32", "bf16", "fp16".
    stream: always stream the image, through a file if its features take more than a few GiB. By default it is streamed
        only if its features do not fit into memory. The result is the same.
    scratch: folder for features that do not fit into memory; by default the system's for temporary files, or /var/tmp.
    tta: average over the eight flips and rotations of the image: slightly better, 8x slower.
    alpha: "bicubic", or "network", which upscales the alpha channel as a grey image.
    progress: callback for the finished share of an image, from 0 to 1; may be called from another thread.

    Raises ValueError for arguments that do not fit together, and the errors of `load_model`.
    """

    def __init__(
        self,
        model: str | os.PathLike | torch.nn.Module = "seemore_t",
        scale: int | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        stream: bool = False,
        scratch: str | os.PathLike | None = None,
        tta: bool = False,
        alpha: str = "bicubic",
        progress: Callable[[float], None] | None = None,
    ):
        self.options = ExecutionOptions(stream, scratch, progress)
        if alpha not in ("bicubic", "network"):
            raise ValueError(f"alpha is {alpha!r}, expected bicubic or network")
        self.tta, self.alpha = tta, alpha
        self.device = find_device(device)
        self.dtype = _dtype(dtype)
        if scale is not None and (not isinstance(scale, int) or scale < 1):
            raise ValueError(f"scale is {scale!r}, expected a positive integer, or None for the model's own")
        is_name = isinstance(model, (str, os.PathLike))
        network = load_model(_full_name(model, scale)) if is_name else copy.deepcopy(accelerate(model))
        if scale is not None and network.scale != scale:
            name = model if is_name else "the model"
            raise ValueError(f"{name} has scale {network.scale}, expected {scale}: choose another model")
        if network.in_chans not in (1, 3):
            raise ValueError(
                f"the model takes {network.in_chans} channels, expected 3 (RGB) or 1 (one plane at a time)"
            )
        self.scale = network.scale
        self.model = network.requires_grad_(False).to(self.device, self.dtype).eval()
        self.model.prepare(graph=self.device.type == "cuda")

    def __call__(
        self,
        image: np.ndarray | Image.Image,
        *,
        outscale: float | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> np.ndarray | Image.Image:
        """Upscale one image.

        image: a Pillow image, or an array (H, W), (H, W, 1), (H, W, 3) or with alpha (H, W, 2), (H, W, 4), of uint8,
        uint16, or a floating type with values in [0, 1]. Returns the same kind and type; a Pillow palette image comes
        back as RGB, a bilevel one as greyscale, CMYK as RGB.

        outscale, or width or height or both: a size other than the network's, by antialiased bicubic resampling of its
        result. If only one of width and height is given, the other keeps the aspect ratio.

        Raises TypeError or ValueError for other images and sizes, RuntimeError if the network returns NaN or infinity,
        and on a CPU MemoryError, before anything is allocated, if the memory does not suffice.
        """
        if isinstance(image, Image.Image):
            size = self.size_of(image.height, image.width, outscale, width, height)
            with contextlib.suppress(ValueError):  # of a closed file
                if (count := frame_count(image)) > 1 and image.tell() == 0:
                    warnings.warn(
                        f"the image has {count} frames; only the first is upscaled: see Upscaler.frames", stacklevel=2
                    )
            pixels = np.asarray(as_8_bit(image))
            copies = pixels.nbytes + (4 if pixels.ndim == 3 else 1) * math.prod(size)  # in and out: Pillow's pads RGB
            return Image.fromarray(self._upscale_array(pixels, size, copies))
        if not isinstance(image, np.ndarray):
            raise TypeError(f"image is a {type(image).__name__}, expected a numpy array or a Pillow image")
        check_array(image)
        rows, columns = image.shape[:2]
        return self._upscale_array(image, self.size_of(rows, columns, outscale, width, height))

    def frames(self, images: Iterable[np.ndarray | Image.Image], **size: Any) -> Iterator[np.ndarray | Image.Image]:
        """Yield each of `images` upscaled, in order, such as a video's frames; `size` as for a call.

        images: an iterable, or an animated Pillow image. The next item is fetched in another thread during the
        computation: arrays must stay unchanged, and closing the generator waits for the item being fetched.
        """
        if isinstance(images, Image.Image):
            images = (frame.copy() for frame in ImageSequence.Iterator(images))
        end: Any = object()
        images = iter(images)
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(next, images, end)
            while (image := ahead.result()) is not end:
                ahead = reader.submit(next, images, end)
                yield self(image, **size)

    def upscale_file(
        self,
        source: str | os.PathLike,
        target: str | os.PathLike,
        *,
        quality: int | None = None,
        max_megapixels: float | None = None,
        outscale: float | None = None,
        width: int | None = None,
        height: int | None = None,
    ):
        """Upscale a file into another, in the format of its extension; the size as for a call.

        quality: of JPEG and WebP, 1 to 100. max_megapixels: limit for the input, 50 by default; a small file can
        declare pixels that exhaust the memory.

        Raises ValueError or TypeError for these arguments, and otherwise `errors.ImageError`, which names the file.
        `target` is then unchanged. Metadata that its format cannot hold is reported in a UserWarning.
        """
        size = {"outscale": outscale, "width": width, "height": height}
        self.size_of(1, 1, **size)
        if quality is not None and not 1 <= _integer("quality", quality) <= 100:
            raise ValueError(f"quality is {quality}, expected 1 to 100")
        limit = MAX_MEGAPIXELS if max_megapixels is None else _positive("max_megapixels", max_megapixels)
        source, target, options = Path(source), Path(target), FileOptions(limit, size=size)
        if os.path.realpath(source) == os.path.realpath(target):
            raise ImageError(f"{target}: is also the input, expected another file")
        try:
            picture, _ = read(self.size_of, source, target, options)
        except Exception as error:
            raise ImageError(file_error(source, error)) from None
        picture.image = self(picture.image, **size)
        write_image(picture, target, quality)
        for note in picture.notes:
            warnings.warn(f"{source}: {note}", stacklevel=2)

    def size_of(
        self,
        image_height: int,
        image_width: int,
        outscale: float | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> tuple[int, int]:
        """Return height and width of the result for an image; ValueError or TypeError for invalid sizes."""
        if outscale is not None and (width is not None or height is not None):
            raise ValueError("outscale is given with width or height: expected only one of them")
        outscale = None if outscale is None else _positive("outscale", outscale)
        width, height = (
            None if side is None else _positive(name, _integer(name, side))
            for name, side in (("width", width), ("height", height))
        )
        factor = outscale or (width / image_width if width else height / image_height if height else self.scale)
        size = (height or round(image_height * factor), width or round(image_width * factor))
        return max(size[0], 1), max(size[1], 1)

    def _upscale_array(self, image: np.ndarray, size: tuple[int, int], copies: int = 0) -> np.ndarray:
        """Upscale a checked array; `copies` are the bytes that the caller needs besides."""
        planes = image if image.ndim == 3 else image[:, :, None]
        channels, has_alpha = planes.shape[2], planes.shape[2] in (2, 4)
        extra_bytes = copies + self._extra_bytes(planes, size)
        through_network = has_alpha and self.alpha == "network"
        parts = [self.options.part(i, 1 + through_network) for i in range(1 + through_network)]
        result = resized(self._colours(planes[:, :, : channels - has_alpha], parts[0], extra_bytes), size)
        if has_alpha:
            alpha = planes[:, :, -1:]
            alpha = self._colours(alpha, parts[1], extra_bytes) if through_network else alpha
            result = np.dstack([result, resized(alpha, size)])
        return result if image.ndim == 3 else result[:, :, 0]

    def _extra_bytes(self, planes: np.ndarray, size: tuple[int, int]) -> int:
        """Return the approximate memory needed besides one run of the network and its result."""
        height, width, channels = planes.shape
        own_size = height * self.scale, width * self.scale
        count = 0
        if self.tta:  # the turned image in floats; the old and the new sum
            count += 4 * min(channels, 3) * (2 * height * width + 2 * math.prod(own_size))
        if size != own_size:  # single planes, and all of them stacked
            count += 2 * channels * math.prod(size) * planes.itemsize
        if channels in (2, 4):  # alpha, and all planes stacked
            count += (channels + 1) * math.prod(size) * planes.itemsize
        return count

    def _colours(self, colours: np.ndarray, options: ExecutionOptions, extra_bytes: int) -> np.ndarray:
        """Return (scale * H, scale * W, C) of (H, W, C) with C 1 or 3, of the same dtype."""
        height, width, count = colours.shape
        planes = (count, 1) if self.model.in_chans == 1 else (1, 3)
        itemsize = colours.itemsize if self._is_native(colours) and not self.tta else 4
        streamed = must_stream(self.model, torch.Size((*planes, height, width)), itemsize, options, extra_bytes)
        if not self.tta:
            return self._one_orientation(colours, options, streamed)
        unit, total = to_unit(colours), np.zeros((), np.float32)
        for number in range(8):
            turns, flip = number // 2, 1 - 2 * (number % 2)
            turned = np.ascontiguousarray(np.rot90(unit, turns)[:, ::flip])
            result = self._one_orientation(turned, options.part(number, 8), streamed)
            total = total + np.rot90(result[:, ::flip], -turns)
        return from_unit(total / 8, colours.dtype)

    def _one_orientation(self, colours: np.ndarray, options: ExecutionOptions, streamed: bool) -> np.ndarray:
        if self._is_native(colours):
            native_order = colours.astype(colours.dtype.newbyteorder("="), copy=False)
            return self._run(native_order, options, streamed).astype(colours.dtype, copy=False)
        result = self._run(to_unit(colours), options, streamed)
        if colours.shape[2] == 1 and result.shape[2] == 3:
            result = result @ np.array(LUMA, np.float32)[:, None]
        return from_unit(result, colours.dtype)

    def _is_native(self, colours: np.ndarray) -> bool:
        """Return whether the network reads and writes these integers directly."""
        return colours.dtype in (np.uint8, np.uint16) and self.model.in_chans in (1, colours.shape[2])

    @torch.inference_mode()
    def _run(self, colours: np.ndarray, options: ExecutionOptions, streamed: bool) -> np.ndarray:
        """Return (scale * H, scale * W, C) of (H, W, C), both float32, uint8 or uint16."""
        height, width, planes = colours.shape
        channels = planes if self.model.in_chans in (1, planes) else 3  # grey, through a network for RGB
        result = np.empty((self.scale * height, self.scale * width, channels), colours.dtype)
        x, y = (self._as_batch(as_tensor(array)) for array in (colours, result))
        run(self.model, x, y, options, streamed)
        return result

    def _as_batch(self, planes: torch.Tensor) -> torch.Tensor:
        """Return a view (B, in_chans, H, W) of (H, W, C); for a network of one channel, a batch of planes."""
        planes = planes.permute(2, 0, 1)
        return planes[:, None] if self.model.in_chans == 1 else planes.expand(3, -1, -1)[None]


def shipped_scales(name: str | os.PathLike) -> list[int]:
    """Return the scales of a shipped model's name without one, ascending: 2, 3, 4 for "seemore_t"."""
    found = [shipped.removeprefix(f"{name}_x") for shipped in shipped_models() if shipped.startswith(f"{name}_x")]
    return sorted(map(int, found))


def _full_name(name: str | os.PathLike, scale: int | None) -> str | os.PathLike:
    """Return the full name of a shipped model, "seemore_t_x2" for "seemore_t" and 2, or any other name as it is."""
    return f"{name}_x{scale or 2}" if shipped_scales(name) else name


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    found = torch.float32 if dtype is None else DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}, expected float32, bfloat16 or float16")
    return found


def _integer(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, expected an integer") from None


def _positive(name: str, value: T) -> T:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}, expected a number")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}, expected a positive number")
    return value
