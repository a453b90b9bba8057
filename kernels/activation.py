"""GELU, its derivative and activations by name, for all kernels; x is of the accumulation dtype."""

import triton
import triton.language as tl


@triton.jit
def normal_cdf(x):
    """Phi(x). float32: erf(x / sqrt(2)) / x as a rational function of x^2, as in csrc/cuda/types.h, within 6e-8."""
    if x.dtype == tl.float64:
        return 0.5 * (1 + tl.math.erf(x * 0.7071067811865476))
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
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return x * normal_cdf(x)
    else:
        return x


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr):
    """Return activation(x) and activation'(x), which share what is expensive."""
    if ACTIVATION == "gelu":
        cdf = normal_cdf(x)
        return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327  # 1 / sqrt(2 pi)
    else:
        return x, tl.full(x.shape, 1, x.dtype)


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """Return activation'(x)."""
    return activate_with_slope(x, ACTIVATION)[1]
