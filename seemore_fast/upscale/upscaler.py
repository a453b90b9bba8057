"""One object that upscales arrays and Pillow images of any usual kind."""

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

import numpy as np
import torch
from PIL import Image, ImageSequence

from ..devices import find_device
from ..io.images import as_8_bit, frame_count
from ..io.resize import bicubic_bands
from ..network.accelerate import accelerate
from ..network.checkpoint import load_model, shipped_models
from .running import Way, must_stream, run

DTYPES = {
    "fp32": torch.float32, "float32": torch.float32,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip
LUMA = (0.299, 0.587, 0.114)


class Upscaler:
    """Upscale images: ``Upscaler("seemore_t_x2")(image)`` returns an image of the same kind, `scale` times the size.

    model: the name of a shipped model, with or without its scale ("seemore_t_x2", "seemore_t"), the path of a
        .safetensors or .pth file, or what `accelerate` takes (its own device and dtype are left alone: a copy works).
    scale: what the model is expected to do; chooses among shipped models. None: the model's own, or 2 for a name.
    device: "auto" (a CUDA device if there is one), "cpu", "cuda", "cuda:1", ...
    dtype: torch.float32 (None), torch.bfloat16, torch.float16, or "fp32", "bf16", "fp16".
    stream: always stream the image, through a file if its features take more than a few GiB. By default it is streamed
        only where its features do not fit into memory. The result is the same.
    scratch: a folder for what does not fit into memory; by default the system's for temporary files, or /var/tmp.
    tta: the mean over the eight orientations of an image: a little better, eight times as long.
    alpha: "bicubic", or "network", which enlarges alpha as a grey image.
    progress: is told, by the shares of an image that are done, how far it is; from another thread, maybe.

    Raises ValueError for arguments that do not fit together, and what `load_model` raises.
    """

    def __init__(
        self,
        model="seemore_t",
        scale: int | None = None,
        device="auto",
        dtype=None,
        stream: bool = False,
        scratch: str | os.PathLike | None = None,
        tta: bool = False,
        alpha: str = "bicubic",
        progress: Callable[[float], None] | None = None,
    ):
        self.way = Way(stream, scratch, progress)
        if alpha not in ("bicubic", "network"):
            raise ValueError(f"alpha is {alpha!r}, expected bicubic or network")
        self.tta, self.alpha = tta, alpha
        self.device = find_device(device)
        self.dtype = _dtype(dtype)
        if scale is not None and (not isinstance(scale, int) or scale < 1):
            raise ValueError(f"scale is {scale!r}, expected a positive integer, or None for the model's own")
        named = isinstance(model, (str, os.PathLike))
        network = load_model(_full_name(model, scale)) if named else copy.deepcopy(accelerate(model))
        if scale is not None and network.scale != scale:
            name = model if named else "the model"
            raise ValueError(f"{name} enlarges {network.scale} times, expected scale {scale}: choose another model")
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

        outscale, or width or height or both: another size than the network makes, by antialiased bicubic interpolation
        of what it makes. Of width and height the other one follows where one is given.

        Raises TypeError or ValueError for other images and sizes, RuntimeError where the network returns NaN or
        infinity, and on a CPU MemoryError, before anything is allocated, where the memory for the image is not there.
        """
        if isinstance(image, Image.Image):
            size = self.size_of(image.height, image.width, outscale, width, height)
            with contextlib.suppress(ValueError):  # of a file that is closed
                if (count := frame_count(image)) > 1 and image.tell() == 0:
                    warnings.warn(f"the image has {count} frames, this is the first: see Upscaler.frames", stacklevel=2)
            pixels = np.asarray(as_8_bit(image))
            copies = pixels.nbytes + (4 if pixels.ndim == 3 else 1) * math.prod(size)  # in and out: Pillow's pads RGB
            return Image.fromarray(self._upscale_array(pixels, size, copies))
        if not isinstance(image, np.ndarray):
            raise TypeError(f"image is a {type(image).__name__}, expected a numpy array or a Pillow image")
        _check_array(image)
        return self._upscale_array(image, self.size_of(*image.shape[:2], outscale, width, height))

    def frames(self, images: Iterable[np.ndarray | Image.Image], **size) -> Iterator[np.ndarray | Image.Image]:
        """Yield each of `images` upscaled, in order: a video's frames, say; `size` as for a call.

        images: an iterable, which is asked for the next one, in another thread, while one is computed: arrays that it
        gives must stay as they are, and closing the generator waits for the one that was asked for. Or an animated
        Pillow image, whose frames are taken.
        """
        if isinstance(images, Image.Image):
            images = (frame.copy() for frame in ImageSequence.Iterator(images))
        images, end = iter(images), object()
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
        """Upscale a file into another, whose ending chooses the format; the size as for a call.

        quality: of JPEG and WebP, 1 to 100. max_megapixels: refuse larger inputs, 50 by default; a small file can
        declare pixels that exhaust the memory.

        Raises ValueError or TypeError for such numbers, and otherwise `errors.ImageError`, which begins with the path
        at fault; `target` is then untouched, and otherwise whole. What its format cannot hold is told in a UserWarning.
        """
        from .folder import Options, upscale_file

        size = {"outscale": outscale, "width": width, "height": height}
        self.size_of(1, 1, **size)
        if quality is not None and not 1 <= _whole("quality", quality) <= 100:
            raise ValueError(f"quality is {quality}, expected 1 to 100")
        limit = {} if max_megapixels is None else {"max_megapixels": _positive("max_megapixels", max_megapixels)}
        upscale_file(self, Path(source), Path(target), Options(**limit, quality=quality, size=size))

    def size_of(
        self,
        image_height: int,
        image_width: int,
        outscale: float | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> tuple[int, int]:
        """Return height and width of the result for an image; ValueError or TypeError for what `__call__` refuses."""
        if outscale is not None and (width is not None or height is not None):
            raise ValueError("outscale and width or height are given, expected one way to tell the size")
        outscale = None if outscale is None else _positive("outscale", outscale)
        width, height = (
            None if side is None else _positive(name, _whole(name, side))
            for name, side in (("width", width), ("height", height))
        )
        factor = outscale or (width / image_width if width else height / image_height if height else self.scale)
        size = (height or round(image_height * factor), width or round(image_width * factor))
        return max(size[0], 1), max(size[1], 1)

    def _upscale_array(self, image: np.ndarray, size: tuple[int, int], copies: int = 0) -> np.ndarray:
        """Upscale an array that the caller needs so many bytes more for."""
        planes = image if image.ndim == 3 else image[:, :, None]
        channels, has_alpha = planes.shape[2], planes.shape[2] in (2, 4)
        beside = copies + self._beside(planes, size)
        parts = 2 if has_alpha and self.alpha == "network" else 1
        result = self._colours(planes[:, :, : channels - has_alpha], self.way.part(0, parts), beside)
        if result.shape[:2] != size:
            result = np.dstack([_resized(result[:, :, c], size) for c in range(result.shape[2])])
        if has_alpha:
            alpha = planes[:, :, -1]
            if self.alpha == "network":
                alpha = self._colours(planes[:, :, -1:], self.way.part(1, parts), beside)[:, :, 0]
            result = np.dstack([result, alpha if alpha.shape == size else _resized(alpha, size)])
        return result if image.ndim == 3 else result[:, :, 0]

    def _beside(self, planes: np.ndarray, size: tuple[int, int]) -> int:
        """Return about how many bytes are needed besides one run of the network and its result."""
        height, width, channels = planes.shape
        enlarged = height * self.scale, width * self.scale
        beside = 0
        if self.tta:  # the image in floats, turned; the sum, and the new sum
            beside += 4 * min(channels, 3) * (2 * height * width + 2 * math.prod(enlarged))
        if size != enlarged:  # planes, and all of them together
            beside += 2 * channels * math.prod(size) * planes.itemsize
        if channels in (2, 4):  # alpha, and all of it together
            beside += (channels + 1) * math.prod(size) * planes.itemsize
        return beside

    def _colours(self, colours: np.ndarray, way: Way, beside: int) -> np.ndarray:
        """Return (scale * H, scale * W, C) of (H, W, C) with C 1 or 3, of the same type."""
        if not self.tta:
            return self._once(colours, way, self._must_stream(colours, way, beside))
        streamed = self._must_stream(colours, way, beside)  # for all: a turned image takes about as much
        unit, total = _to_unit(colours, np.float32), 0
        for number in range(8):
            turns, flip = number // 2, 1 - 2 * (number % 2)
            turned = np.ascontiguousarray(np.rot90(unit, turns)[:, ::flip])
            total = total + np.rot90(self._once(turned, way.part(number, 8), streamed)[:, ::flip], -turns)
        return _to_kind(total / 8, colours.dtype)

    def _once(self, colours: np.ndarray, way: Way, streamed: bool) -> np.ndarray:
        if self._is_read(colours):
            return self._run(colours.astype(colours.dtype.newbyteorder("="), copy=False), way, streamed).astype(
                colours.dtype, copy=False
            )
        result = self._run(_to_unit(colours, np.float32), way, streamed)
        if colours.shape[2] == 1 and result.shape[2] == 3:
            result = result @ np.array(LUMA, np.float32)[:, None]
        return _to_kind(result, colours.dtype)

    def _is_read(self, colours: np.ndarray) -> bool:
        """Tell whether integers go in and come out as they are."""
        return colours.dtype in (np.uint8, np.uint16) and self.model.in_chans in (1, colours.shape[2])

    def _must_stream(self, colours: np.ndarray, way: Way, beside: int) -> bool:
        height, width, count = colours.shape
        planes = (count, 1) if self.model.in_chans == 1 else (1, 3)
        itemsize = colours.itemsize if self._is_read(colours) and not self.tta else 4
        return must_stream(self.model, (*planes, height, width), itemsize, way, beside)

    def _as_batch(self, planes: torch.Tensor) -> torch.Tensor:
        """Return a view (B, in_chans, H, W) of (H, W, C): a network of one channel takes colours as so many images."""
        planes = planes.permute(2, 0, 1)
        return planes[:, None] if self.model.in_chans == 1 else planes.expand(3, -1, -1)[None]

    @torch.inference_mode()
    def _run(self, colours: np.ndarray, way: Way, streamed: bool) -> np.ndarray:
        """Return (scale * H, scale * W, C) of (H, W, C), both float32, uint8 or uint16."""
        height, width, planes = colours.shape
        made = planes if self.model.in_chans in (1, planes) else 3  # grey, of a network for RGB
        result = np.empty((self.scale * height, self.scale * width, made), colours.dtype)
        x, y = (self._as_batch(_as_tensor(array)) for array in (colours, result))
        run(self.model, x, y, way, streamed)
        return result


def _whole(name: str, value) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, expected a whole number") from None


def _positive(name: str, value):
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}, expected a number")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}, expected a positive number")
    return value


def _check_array(image: np.ndarray):
    if image.dtype.newbyteorder("=") not in (np.uint8, np.uint16) and not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"image has dtype {image.dtype}, expected uint8, uint16 or a floating type in [0, 1]")
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.ndim not in (2, 3) or channels not in (1, 2, 3, 4) or 0 in image.shape:
        raise ValueError(f"image has shape {image.shape}, expected (H, W) or (H, W, C) with C from 1 to 4, none empty")


def _as_tensor(image: np.ndarray) -> torch.Tensor:
    """Return a tensor that shares the array's memory, or has a copy where torch would not take that."""
    is_simple = image.flags.writeable and all(s >= 0 and s % image.itemsize == 0 for s in image.strides)
    return torch.from_numpy(image if is_simple else image.copy("C"))


def _to_unit(image: np.ndarray, dtype=np.float64) -> np.ndarray:
    """Return [0, 1] floats, writable and contiguous."""
    unit = np.array(image, dtype=dtype)
    if np.issubdtype(image.dtype, np.integer):
        unit /= np.iinfo(image.dtype).max
    return unit


def _resized(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return (H, W) at another size, of the same type."""
    result, is_integer = np.empty(size, plane.dtype), np.issubdtype(plane.dtype, np.integer)
    whole = np.iinfo(plane.dtype).max if is_integer else 1
    for top, lines in bicubic_bands(plane, *size):
        lines.clip(0, whole, out=lines)
        result[top : top + len(lines)] = np.rint(lines) if is_integer else lines
    return result


def _to_kind(image: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return [0, 1] floats, which are overwritten, as `dtype`: clipped, and rounded to the nearest integers."""
    image.clip(0, 1, out=image)
    if np.issubdtype(dtype, np.integer):
        image *= np.iinfo(dtype).max
        np.rint(image, out=image)
    return image.astype(dtype, copy=False)


def shipped_scales(name: str | os.PathLike) -> list[int]:
    """Return the scales that a name without one is shipped for, ascending: "seemore_t" gives 2, 3, 4."""
    found = [shipped.removeprefix(f"{name}_x") for shipped in shipped_models() if shipped.startswith(f"{name}_x")]
    return sorted(map(int, found))


def _full_name(name: str | os.PathLike, scale: int | None) -> str | os.PathLike:
    """Return a shipped model's whole name for its beginning: "seemore_t" and 2 give "seemore_t_x2"."""
    return f"{name}_x{scale or 2}" if shipped_scales(name) else name


def _dtype(dtype) -> torch.dtype:
    if dtype is None:
        return torch.float32
    dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}, expected float32, bfloat16 or float16")
    return dtype
