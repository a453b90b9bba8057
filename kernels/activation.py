"""GELU, its derivative and activations by name, for all kernels; x is of the accumulation dtype.

`dtype` is that which a result is rounded to when it is stored or multiplied: 16 bits take a shorter form of GELU.
"""

import triton
import triton.language as tl

from .rounding import INTERPRETED


@triton.jit
def reciprocal(x):
    """1 / x of float32, within a unit in the last place, where neither is denormal."""
    if INTERPRETED:
        return 1 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def power_of_two(x):
    """2^x of float32, within 2^-22 of it; denormal ones are 0."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def normal_cdf(x, dtype: tl.constexpr):
    """Phi(x), as in csrc/cuda/common/types.h.

    For float32: erf(x / sqrt(2)) / x as a rational function of x^2, within 6e-8.
    For 16 bits: 1 / (1 + 2^(x P(x^2))). GELU's relative error is 6e-5 at most for x > 0, a quarter of half a unit of
    float16, and its absolute error 3e-5. By tanh.approx, which errs by 2^-11, it would be that half unit.
    """
    if x.dtype == tl.float64:
        return 0.5 * (1 + tl.math.erf(x * 0.7071067811865476))
    elif dtype == tl.float16 or dtype == tl.bfloat16:
        square = tl.minimum(x * x, 64.0)  # P is positive up to there
        p = (square * 0.000995201504 - 0.10662615) * square - 2.30134832
        return reciprocal(power_of_two(x * p) + 1)
    else:
        square = tl.minimum(x * x, 29.3764)  # erf is 1 from here on
        p = square * 4.65137902e-08 + 1.27150315e-05
        q = square * 1.21264384e-06 + 7.26336657e-05
        p = p * square + 0.000330363371
        q = q * square + 0.00186383305
        p = p * square + 0.00931170303
        q = q * square + 0.028429985
        p = p * square + 0.0669297799
        q = q * square + 0.250550091
        p = p * square + 0.797884464
        q = q * square + 1
        return 0.5 * tl.clamp(x * (p / q), -1.0, 1.0) + 0.5


def activation_of(gelu: bool) -> str | None:
    """Return kernels' ACTIVATION for the flag that the operators of every backend take."""
    return "gelu" if gelu else None


@triton.jit
def normal_density(x):
    """exp(-x^2 / 2) / sqrt(2 pi)"""
    if x.dtype == tl.float64:
        return tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        return power_of_two(x * x * -0.7213475204444817) * 0.3989422804014327


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    if ACTIVATION == "gelu":
        return x * normal_cdf(x, dtype)
    else:
        return x


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    """Return activation(x) and activation'(x), which share what is expensive."""
    if ACTIVATION == "gelu":
        cdf = normal_cdf(x, dtype)
        return x * cdf, cdf + x * normal_density(x)
    else:
        return x, tl.full(x.shape, 1, x.dtype)


@triton.jit
def slope(x, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    """Return activation'(x)."""
    return activate_with_slope(x, ACTIVATION, dtype)[1]
