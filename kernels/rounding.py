"""Rounding to the dtype that is stored, in Triton's interpreter, too."""

import os

import triton
import triton.language as tl

# The interpreter multiplies bit patterns of bfloat16, and cuts off where it converts to it.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Return x, of the accumulation dtype, in dtype, rounded to the nearest."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, nearest, bits).to(tl.float32, bitcast=True)  # NaN stays NaN
    return x.to(dtype)
