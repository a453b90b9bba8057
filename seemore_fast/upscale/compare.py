"""Self-contained HTML page with a before/after slider for each image."""

import base64
import html
import io
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import ImageError, file_error, os_reason
from ..io.atomic import replacing
from ..io.images import MAX_MEGAPIXELS, Picture, profile_for, read_image

MAX_IMAGES = 100
MAX_SCALE = 4
MAX_WIDTH, MAX_HEIGHT = 960, 720  # pixels of a result on the page, unscaled on most screens
QUALITY = 90
SEARCH_SIDE = 512  # pixels, of the thumbnail in which the most detailed part is searched

# Two images on top of each other, each clipped at --x. A range input over both moves it: that brings keyboard, touch
# and screen reader support.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Before and after</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem }
h1 { line-height: 1.2 } figure { margin: 2rem 0 }
figcaption { font-size: .9rem; opacity: .8; overflow-wrap: anywhere }
.pair { position: relative; max-width: 100%; margin: 0 auto; --x: 50%;
        background: repeating-conic-gradient(#bbb 0 25%, #fff 0 50%) 0 0 / 20px 20px }
.pair img { position: absolute; inset: 0; width: 100%; height: 100% }
.before { clip-path: inset(0 calc(100% - var(--x)) 0 0) } .after { clip-path: inset(0 0 0 var(--x)) }
.pair span { position: absolute; top: .5rem; padding: 0 .5rem; border-radius: .25rem; font-size: .8rem;
             color: #fff; background: #000a; pointer-events: none }
.pair span:last-of-type { right: .5rem } .pair span:first-of-type { left: .5rem }
input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; background: none; cursor: ew-resize;
        appearance: none; -webkit-appearance: none; touch-action: pan-y }
input::-webkit-slider-runnable-track { height: 100% }
input::-webkit-slider-thumb { -webkit-appearance: none; width: 4px; height: 100%; background: #fff;
                              box-shadow: 0 0 4px #000 }
input::-moz-range-thumb { width: 4px; height: 100%; border: 0; border-radius: 0; background: #fff;
                          box-shadow: 0 0 4px #000 }
input:focus-visible { outline: 3px solid #d9480f; outline-offset: 3px }
</style>
<h1>Before and after</h1>
<p>Left of the line: bicubic interpolation. Right of the line: seemore-fast. Move the line with a finger, the mouse or
the arrow keys.</p>
"""
_TAIL = """<script>
const show = slider => slider.parentNode.style.setProperty("--x", slider.value + "%")
document.addEventListener("input", event => show(event.target))
document.querySelectorAll("input").forEach(show)  // a browser may restore their values
</script>
</html>
"""


def write_page(
    path: Path,
    pairs: Iterable[tuple[Path, Path]],
    max_megapixels: float = MAX_MEGAPIXELS,
    done: Callable[[], object] = lambda: None,
) -> list[str]:
    """Write the page for pairs of a file and its result; return a warning for each image that is not on it.

    Of a large image the page shows the part with the most detail, of many images the first hundred; `done` is called
    after each. Raises ImageError if the page cannot be written; the file at `path` is then unchanged.
    """
    pairs, warnings = iter(pairs), []
    try:
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as page:
            page.write(_HEAD)
            for source, target in islice(pairs, MAX_IMAGES):
                try:
                    figure = _figure(source, target, max_megapixels)
                except Exception as error:  # all kinds, from decoders and encoders
                    warnings.append(f"not on the page: {file_error(target, error)}")
                else:
                    page.write(figure)
                done()
            if left := sum(1 for _ in pairs):
                page.write(f"<p>And {left} more, which are not shown.</p>\n")
            page.write(_TAIL)
    except OSError as error:
        raise ImageError(f"{path}: cannot be written: {os_reason(error)}") from None
    return warnings


def _figure(source: Path, target: Path, max_megapixels: float) -> str:
    before = read_image(source, max_megapixels, keep_16_bit=True)
    after = read_image(target, MAX_SCALE**2 * max_megapixels, keep_16_bit=True)
    (width, height), name = after.size, html.escape(source.name)
    small = before.in_8_bits()
    left, top, right, bottom = box = _part(small, after.size)
    x, y = small.width / width, small.height / height
    enlarged = small.resize(
        (right - left, bottom - top), Image.Resampling.BICUBIC, box=(left * x, top * y, right * x, bottom * y)
    )
    shown = "" if (right - left, bottom - top) == after.size else f", {right - left}x{bottom - top} of them shown"
    return (
        f'<figure>\n<div class="pair" style="width: {right - left}px; aspect-ratio: {right - left} / {bottom - top}">\n'
        f'<img class="before" alt="{name}, bicubic" src="{_data(enlarged, before)}">\n'
        f'<img class="after" alt="{name}, seemore-fast" src="{_data(after.in_8_bits(box), after)}">\n'
        f'<span>bicubic</span><span>seemore-fast</span>\n<input type="range" min="0" max="100" step="0.5" value="50" '
        f'aria-label="{name}: position of the line, in percent of the width">\n</div>\n'
        f"<figcaption>{name}: {small.width}x{small.height} pixels to {width}x{height}{shown}</figcaption>\n"
        "</figure>\n"
    )


def _part(image: Image.Image, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom, in a result of `size`, of the part with the most detail."""
    shape = min(size[0], MAX_WIDTH), min(size[1], MAX_HEIGHT)
    if shape == size:
        return (0, 0, *size)
    image = image.convert("L")
    image.thumbnail((SEARCH_SIDE, SEARCH_SIDE), Image.Resampling.BOX)
    grey = np.asarray(image, np.float32)
    edges = np.zeros_like(grey)
    edges[1:] += np.abs(np.diff(grey, axis=0))
    edges[:, 1:] += np.abs(np.diff(grey, axis=1))
    window = [max(round(s * n / full), 1) for s, n, full in zip(shape[::-1], grey.shape, size[::-1], strict=True)]
    sums = np.pad(edges.cumsum(0, dtype=np.float64).cumsum(1), ((1, 0), (1, 0)))
    high, wide = window
    detail = sums[high:, wide:] - sums[:-high, wide:] - sums[high:, :-wide] + sums[:-high, :-wide]
    top, left = np.unravel_index(detail.argmax(), detail.shape)
    left = min(round(left * size[0] / grey.shape[1]), size[0] - shape[0])
    top = min(round(top * size[1] / grey.shape[0]), size[1] - shape[1])
    return left, top, left + shape[0], top + shape[1]


def _data(image: Image.Image, picture: Picture) -> str:
    file = io.BytesIO()
    profile = profile_for(picture, "WEBP")
    image.save(file, "WEBP", quality=QUALITY, **({"icc_profile": profile} if profile else {}))
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
