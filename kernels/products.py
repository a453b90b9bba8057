"""The gradients of a pointwise layer's parameters, s = x @ weight + bias or s = LN(x) @ weight + bias, from x and ds.

A kernel of its own, for all operators with such layers: in one that also multiplies ds by the weight, Triton gives each
warp all of the sums. A program goes over some pixels of an image and leaves its sums to `add_parts`: those of dweight
and dbias, before them, with a norm, of its gain and shift.
"""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from . import tiles as t
from .configurations import configuration
from .integers import cdiv
from .launch import Launch, joined
from .rounding import round_to
from .strided import index_type

MOST = 8  # jobs of a launch: each is a branch of the kernel
PARTS = 512  # programs, about: some for each multiprocessor, and few sums to add up later


def steps_of(x: Tensor, kernel: str) -> int:
    """Return how many tiles a program goes over."""
    tiles = cdiv(x.shape[2] * x.shape[3], configuration(kernel, x).pixels)
    return cdiv(tiles, max(1, PARTS // len(x)))


def parts_of(x: Tensor, kernel: str) -> int:
    """Return how many programs there are, each with a row of partial sums; `kernel` says whose tiles they go over."""
    return len(x) * cdiv(x.shape[2] * x.shape[3], configuration(kernel, x).pixels * steps_of(x, kernel))


def products(partial: Tensor, ds: Tensor, x: Tensor, weight=None, gain=None, shift=None, eps=0.0) -> Launch:
    """Describe the launch that writes partial; with a norm weight, gain, shift and eps are those of forward."""
    assert len(partial) == parts_of(x, "products"), f"partial has {len(partial)} rows: not made for x, {x.dtype}"
    pixels, *how = configuration("products", x)
    places = t.pixels_of(x, ds)
    # What is missing stands there as something else: Triton 3.6 takes no None in tuples.
    parameters = (partial, partial, partial) if gain is None else (weight, gain, shift)
    job = partial, ds, *ds.stride(), x, *x.stride(), *parameters, eps, places["width"] or 0
    sizes = dict(pixels=places["pixels"], steps=steps_of(x, "products"), parts=len(partial))
    sizes |= dict(CHANNELS=x.shape[1], SUMMED=t.cut(x.shape[1]))
    factor = ds.dtype if weight is None else weight.dtype
    options = dict(PIXELS=pixels, INDEX=index_type(x.shape[2] * x.shape[3] + 2**16), PRECISION=t.precision(factor))
    made = dict(OUT_CHANNELS=(ds.shape[1],), MADE=(t.powers(ds.shape[1]),))
    made |= dict(NORM=(gain is not None,), ROWS=(places["width"] is not None,))
    return replace(t.launch(add_products, len(partial), dict(jobs=job) | sizes | made | options, *how), join=join)


@joined(stage=1)
def join(launches: list[Launch]) -> list[Launch]:
    """Join those that go over as many pixels and channels with the same configuration."""
    alike: dict[tuple, list[Launch]] = {}
    of_a_job = ("jobs", "OUT_CHANNELS", "MADE", "NORM", "ROWS")
    for launch in launches:
        common = {name: value for name, value in launch.arguments.items() if name not in of_a_job}
        alike.setdefault((*common.values(), *launch.options.items()), []).append(launch)
    found = []
    for group in alike.values():
        for first in range(0, len(group), MOST):
            some = group[first : first + MOST]
            jobs = {name: tuple(item for one in some for item in one.arguments[name]) for name in of_a_job}
            programs = sum(one.programs for one in some)
            found.append(replace(some[0], programs=programs, arguments=some[0].arguments | jobs))
    return found


@triton.jit(do_not_specialize=["steps", "parts"])
def add_products(
    jobs, pixels, steps, parts,
    CHANNELS: tl.constexpr, SUMMED: tl.constexpr, OUT_CHANNELS: tl.constexpr, MADE: tl.constexpr, NORM: tl.constexpr,
    ROWS: tl.constexpr, PIXELS: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of each job, `parts` programs of each."""
    for i in tl.static_range(len(MADE)):
        if tl.program_id(0) // parts == i:
            add_some(
                jobs, pixels, steps, tl.program_id(0) % parts,
                CHANNELS, SUMMED, OUT_CHANNELS, MADE, NORM, ROWS, i, PIXELS, INDEX, PRECISION,
            )  # fmt: skip


@triton.jit
def add_some(
    jobs, pixels, steps, program,
    CHANNELS: tl.constexpr, SUMMED: tl.constexpr, OUTS: tl.constexpr, MADES: tl.constexpr, NORMS: tl.constexpr,
    ROWS: tl.constexpr, job: tl.constexpr, PIXELS: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[program] = sums over pixels of dgain and dshift (with a norm), dweight and dbias, in this order.

    With a norm, s = (gain * n + shift) @ W + bias. Only M = transposed ds @ n is summed over the pixels:
        dweight = gain * M + shift * dbias      dgain = columns of W * M      dshift = columns of W * dbias
    """
    FIRST: tl.constexpr = job * (len(jobs) // len(MADES))  # as `products` puts them; Triton 3.6 nests no tuples
    partial, ds, x = jobs[FIRST], jobs[FIRST + 1], jobs[FIRST + 6]
    ds_strides = jobs[FIRST + 2], jobs[FIRST + 3], jobs[FIRST + 4], jobs[FIRST + 5]
    x_strides = jobs[FIRST + 7], jobs[FIRST + 8], jobs[FIRST + 9], jobs[FIRST + 10]
    weight, gain, shift = jobs[FIRST + 11], jobs[FIRST + 12], jobs[FIRST + 13]
    eps = jobs[FIRST + 14]
    width = jobs[FIRST + 15] if ROWS[job] else None
    NORM: tl.constexpr = NORMS[job]
    OUT_CHANNELS: tl.constexpr = OUTS[job]
    MADE: tl.constexpr = MADES[job]
    FACTOR: tl.constexpr = weight.dtype.element_ty if NORM else ds.dtype.element_ty
    sums = ()
    for j in tl.static_range(len(MADE)):
        for i in tl.static_range(len(SUMMED)):
            sums += (t.zero_tile(MADE[j], SUMMED[i]),)
    dbias = ()
    for j in tl.static_range(len(MADE)):
        dbias += (t.zero_row(MADE[j]),)
    image, start = t.tile_of(program, pixels, PIXELS * steps, INDEX)
    for step in tl.range(0, steps, disable_licm=True):
        pixel = start + step * PIXELS + tl.arange(0, PIXELS)
        inside = pixel < pixels
        seen = t.load_pixels(t.address(x, x_strides, image, pixel, width), x_strides, inside, CHANNELS, SUMMED)
        gradient = t.load_pixels(t.address(ds, ds_strides, image, pixel, width), ds_strides, inside, OUT_CHANNELS, MADE)
        if NORM:
            seen, _ = t.normalise(seen, eps, CHANNELS, SUMMED)
        factor = t.round_all(seen, FACTOR)
        sums_before, dbias_before = sums, dbias
        sums, dbias = (), ()
        for j in tl.static_range(len(MADE)):
            for i in tl.static_range(len(SUMMED)):
                before = sums_before[j * len(SUMMED) + i]
                sums += (t.dot(tl.trans(round_to(gradient[j].to(tl.float32), FACTOR)), factor[i], before, PRECISION),)
            dbias += (dbias_before[j] + tl.sum(gradient[j].to(tl.float32), axis=0),)
    BEFORE: tl.constexpr = 2 if NORM else 0
    partial += program.to(tl.int64) * (BEFORE * CHANNELS + OUT_CHANNELS * (CHANNELS + 1))
    for i in tl.static_range(len(SUMMED)):
        channel = t.channels_of(SUMMED, i)
        real = channel < CHANNELS
        dgain = t.zero_row(SUMMED[i]).to(tl.float64)  # its terms nearly cancel
        dshift = t.zero_row(SUMMED[i]).to(tl.float64)
        for j in tl.static_range(len(MADE)):
            made = t.channels_of(MADE, j)[:, None]
            there = (made < OUT_CHANNELS) & real[None, :]
            dweight = sums[j * len(SUMMED) + i]
            if NORM:
                mixing = tl.load(weight + made * CHANNELS + channel[None, :], mask=there, other=0).to(tl.float64)
                dgain += tl.sum(mixing * dweight, axis=0)
                dshift += tl.sum(mixing * dbias[j][:, None], axis=0)
                dweight *= t.load_row(gain, channel, CHANNELS)
                dweight += dbias[j][:, None] * t.load_row(shift, channel, CHANNELS)
            tl.store(partial + (BEFORE + made) * CHANNELS + channel[None, :], dweight, mask=there)
        if NORM:
            tl.store(partial + channel, dgain.to(tl.float32), mask=real)
            tl.store(partial + CHANNELS + channel, dshift.to(tl.float32), mask=real)
    for j in tl.static_range(len(MADE)):
        made = t.channels_of(MADE, j)
        tl.store(partial + (BEFORE + OUT_CHANNELS) * CHANNELS + made, dbias[j], mask=made < OUT_CHANNELS)
