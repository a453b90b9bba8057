"""One object that upscales arrays and Pillow images of any usual kind."""

import copy
import os

import numpy as np
import torch
from PIL import Image

from .. import engine
from ..checkpoint import load_model, shipped_models
from ..drop_in import accelerate
from ..memory import check_memory
from ..resize import bicubic_resize

DTYPES = {
    "fp32": torch.float32, "float32": torch.float32,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip
LUMA = (0.299, 0.587, 0.114)
NO_NUMBERS = "the network returned NaN or infinity: the image, the weights or the dtype is to blame"


class Upscaler:
    """Upscale images: ``Upscaler("seemore_t_x2")(image)`` returns an image of the same kind, `scale` times the size.

    model: the name of a shipped model, with or without its scale ("seemore_t_x2", "seemore_t"), the path of a
        .safetensors or .pth file, or what `accelerate` takes (its own device and dtype are left alone: a copy works).
    scale: what the model is expected to do; chooses among shipped models. None: the model's own, or 2 for a name.
    device: "auto" (a CUDA device if there is one), "cpu", "cuda", "cuda:1", ...
    dtype: torch.float32 (None), torch.bfloat16, torch.float16, or "fp32", "bf16", "fp16".
    tile: None, the whole image at once: the network pools globally, so tiles would not give the same picture.

    Raises ValueError for arguments that do not fit together, and what `load_model` raises.
    """

    def __init__(self, model="seemore_t", scale: int | None = None, device="auto", dtype=None, tile: int | None = None):
        if tile is not None:
            raise ValueError(f"tile is {tile!r}, expected None: images are upscaled whole, tiles are not supported yet")
        self.device = _device(device)
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

    def __call__(self, image: np.ndarray | Image.Image) -> np.ndarray | Image.Image:
        """Upscale one image.

        image: a Pillow image, or an array (H, W), (H, W, 1), (H, W, 3) or with alpha (H, W, 2), (H, W, 4), of uint8,
        uint16, or a floating type with values in [0, 1]. Returns the same kind and type; a Pillow palette image comes
        back as RGB, a bilevel one as greyscale, CMYK as RGB. Alpha is enlarged by bicubic interpolation.

        Raises TypeError or ValueError for other images, RuntimeError where the network returns NaN or infinity, and on
        a CPU MemoryError, before anything is allocated, where the memory for the image is not there.
        """
        if isinstance(image, Image.Image):
            return self._upscale_pil(image)
        if isinstance(image, np.ndarray):
            return self._upscale_array(image)
        raise TypeError(f"image is a {type(image).__name__}, expected a numpy array or a Pillow image")

    def _upscale_pil(self, image: Image.Image) -> Image.Image:
        return Image.fromarray(self._upscale_array(np.asarray(as_8_bit(image))))

    def _upscale_array(self, image: np.ndarray) -> np.ndarray:
        _check_array(image)
        planes = image if image.ndim == 3 else image[:, :, None]
        has_alpha = planes.shape[2] in (2, 4)
        colours = planes[:, :, :-1] if has_alpha else planes
        if self._takes_integers(colours):
            result = self._run_integers(colours)
        else:
            result = _to_kind(self._run(colours), image.dtype)
        if has_alpha:
            alpha = _to_kind(bicubic_resize(_to_unit(planes[:, :, -1]), self.scale), image.dtype)
            result = np.dstack([result, alpha])
        return result if image.ndim == 3 else result[:, :, 0]

    def _as_batch(self, planes: torch.Tensor) -> torch.Tensor:
        """Return a view (B, in_chans, H, W) of (H, W, C): a network of one channel takes colours as so many images."""
        planes = planes.permute(2, 0, 1)
        return planes[:, None] if self.model.in_chans == 1 else planes.expand(3, -1, -1)[None]

    def _check_memory(self, shape: tuple[int, int, int], itemsize: int, more: int = 0):
        """Raise MemoryError where an image of (H, W, C), a result of `itemsize` a value and `more` bytes do not fit."""
        height, width, planes = shape
        batch = (planes, 1) if self.model.in_chans == 1 else (1, 3)
        needed = engine.needs(self.model, (*batch, height, width), itemsize=itemsize).memory + more
        check_memory(needed, f"an image of {width}x{height} pixels, enlarged {self.scale} times,")

    @torch.inference_mode()
    def _takes_integers(self, colours: np.ndarray) -> bool:
        """Tell whether the engine for CPUs reads and writes these integers itself."""
        is_integer = colours.dtype in (np.uint8, np.uint16) and colours.dtype.isnative
        fits = self.model.in_chans in (1, colours.shape[2])
        return is_integer and fits and engine.why_not(self.model, self.model.mean) is None

    @torch.inference_mode()
    def _run_integers(self, colours: np.ndarray) -> np.ndarray:
        """Return (scale * H, scale * W, C) of (H, W, C), both uint8 or both uint16, without a copy in floats."""
        self._check_memory(colours.shape, colours.itemsize)
        height, width, planes = colours.shape
        result = np.empty((self.scale * height, self.scale * width, planes), colours.dtype)
        x, y = (self._as_batch(_as_tensor(array)) for array in (colours, result))
        if not engine.run_into(self.model, x, y):
            raise RuntimeError(NO_NUMBERS)
        return result

    @torch.inference_mode()
    def _run(self, colours: np.ndarray) -> np.ndarray:
        """Return float32 (scale * H, scale * W, C) of (H, W, C) with C 1 or 3."""
        if engine.why_not(self.model, self.model.mean) is None:
            self._check_memory(colours.shape, itemsize=4, more=4 * colours.size)
        x = self._as_batch(torch.from_numpy(_to_unit(colours, np.float32)))
        y = self.model(x.to(self.device)).float().cpu()
        if not y.isfinite().all():
            raise RuntimeError(NO_NUMBERS)
        y = y[:, 0] if self.model.in_chans == 1 else y[0]
        if colours.shape[2] == 1 and len(y) == 3:
            y = torch.einsum("c,chw->hw", torch.tensor(LUMA), y)[None]
        return y.permute(1, 2, 0).numpy()


def as_8_bit(image: Image.Image) -> Image.Image:
    """Return an L, LA, RGB or RGBA version of a Pillow image; ValueError for modes of more than 8 bits."""
    if image.mode in ("L", "LA", "RGB", "RGBA"):
        if image.mode in ("L", "RGB") and "transparency" in image.info:
            return image.convert("LA" if image.mode == "L" else "RGBA")
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ValueError(f"the image has mode {image.mode}, expected 8 bits a channel: give 16 bits as a uint16 array")
    if image.mode in ("1", "La"):
        return image.convert("L" if image.mode == "1" else "LA")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


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


def _to_kind(image: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return [0, 1] floats, which are overwritten, as `dtype`: clipped, and rounded to the nearest integers."""
    image.clip(0, 1, out=image)
    if np.issubdtype(dtype, np.integer):
        image *= np.iinfo(dtype).max
        np.rint(image, out=image)
    return image.astype(dtype, copy=False)


def _full_name(name: str | os.PathLike, scale: int | None) -> str | os.PathLike:
    """Return a shipped model's whole name for its beginning: "seemore_t" and 2 give "seemore_t_x2"."""
    whole = f"{name}_x{scale or 2}"
    scales = [shipped for shipped in shipped_models() if shipped.startswith(f"{name}_x")]
    return whole if scales else name


def _device(device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, expected auto, cpu, cuda or cuda:N ({error})") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device is {str(device)!r}, expected auto, cpu, cuda, cuda:N or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is 'mps', but torch finds no Apple GPU here: use device 'cpu'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(device)!r}, but torch finds no CUDA device here: use device 'cpu'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {str(device)!r}, expected an index below {torch.cuda.device_count()}")
    return device


def _dtype(dtype) -> torch.dtype:
    if dtype is None:
        return torch.float32
    dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}, expected float32, bfloat16 or float16")
    return dtype
