"""Naive formulas of all operators: float64 sums of shifted slices and matrix products, differentiable.

They never call seemore_fast, and no convolution of torch.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


def shifted(x: Tensor, height: int, width: int) -> Iterable[tuple[int, int, Tensor]]:
    """Yield (i, j, what tap i, j of a centred height x width kernel sees of x with zeros around it)."""
    top, left = height // 2, width // 2
    padded = x.new_zeros(*x.shape[:2], x.shape[2] + 2 * top, x.shape[3] + 2 * left)
    padded[:, :, top : top + x.shape[2], left : left + x.shape[3]] = x
    for i in range(height):
        for j in range(width):
            yield i, j, padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]


def naive_depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    taps = shifted(x, *weight.shape[2:])
    return sum(per_channel(weight[:, 0, i, j]) * seen for i, j, seen in taps) + per_channel(bias)


def naive_conv1x1(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("dc,bchw->bdhw", weight[:, :, 0, 0], x) + per_channel(bias)


def naive_dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    taps = shifted(x, *weight.shape[2:])
    return sum(torch.einsum("dc,bchw->bdhw", weight[:, :, i, j], seen) for i, j, seen in taps) + per_channel(bias)


def naive_gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def naive_activation(x: Tensor, activation: str | None) -> Tensor:
    return x if activation is None else {"gelu": naive_gelu}[activation](x)


def naive_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    deviation = x - x.sum(dim=1, keepdim=True) / x.shape[1]
    variance = (deviation**2).sum(dim=1, keepdim=True) / x.shape[1]
    return deviation / (variance + eps).sqrt() * per_channel(weight) + per_channel(bias)


def naive_striped_conv(x, weight_row, bias_row, weight_col, bias_col, activation=None, gate=None):
    y = naive_depthwise(naive_depthwise(x, weight_row, bias_row), weight_col, bias_col)
    y = naive_activation(y, activation)
    return y if gate is None else gate * y


def interpolation(size, new_size, like):
    """Matrix (new_size, size) of the linear interpolation between pixel centres, constant beyond the outer ones."""
    matrix = like.new_zeros(new_size, size)
    for i in range(new_size):
        position = min(max((i + 0.5) * size / new_size - 0.5, 0), size - 1)
        left = int(position)
        right = min(left + 1, size - 1)
        matrix[i, left] += 1 - (position - left)
        matrix[i, right] += position - left
    return matrix


def naive_calibrate(k, weight_agg, bias_agg, weight_dw, bias_dw, weight_pw, bias_pw, recursive):
    s = k
    for _ in range(recursive):
        height, width = s.shape[2] // 4 * 4, s.shape[3] // 4 * 4
        taps = [(i, j, s[:, :, i:height:4, j:width:4]) for i in range(4) for j in range(4)]
        s = sum(per_channel(weight_agg[:, 0, i, j]) * seen for i, j, seen in taps) + per_channel(bias_agg)
        s = naive_gelu(s)
    s = naive_conv1x1(naive_depthwise(s, weight_dw, bias_dw), weight_pw, bias_pw)
    rows, columns = (interpolation(s.shape[dim], k.shape[dim], k) for dim in (2, 3))
    return k + rows @ s @ columns.t()


def naive_choice(mean, weight, top_k):
    """Return the most probable experts, one image and one expert after another in Python floats."""
    images, experts = mean.detach().tolist(), weight.detach().tolist()
    logits = [[math.fsum(w * m for w, m in zip(row, image, strict=True)) for row in experts] for image in images]
    index = [sorted(range(len(image)), key=lambda e: -image[e])[:top_k] for image in logits]
    return torch.tensor(index, dtype=torch.int64, device=mean.device).view(len(mean), top_k)


def naive_router(a, weight, top_k):
    mean = a.sum(dim=(2, 3)) / (a.shape[2] * a.shape[3])
    index = naive_choice(mean, weight, top_k)
    e = torch.exp(mean @ weight.t())
    return index, (e / e.sum(dim=1, keepdim=True)).gather(1, index)


def naive_striped_conv_router(x, weight_row, bias_row, weight_col, bias_col, weight_router, top_k, activation=None):
    y = naive_striped_conv(x, weight_row, bias_row, weight_col, bias_col, activation)
    return y, *naive_router(y, weight_router, top_k)


def naive_norm_pointwise(x, norm_weight, norm_bias, weight, bias, activation=None, eps=1e-6, residual=None):
    return naive_pointwise(naive_layer_norm(x, norm_weight, norm_bias, eps), weight, bias, activation, residual)


def naive_pointwise(x, weight, bias, activation=None, residual=None):
    y = naive_activation(naive_conv1x1(x, weight, bias), activation)
    return y if residual is None else residual + y


def naive_norm_conv3x3(
    x, norm_weight, norm_bias, weight, bias, weight_pw=None, bias_pw=None, activation=None, eps=1e-6
):
    if norm_weight is not None:
        x = naive_layer_norm(x, norm_weight, norm_bias, eps)
    y = naive_activation(naive_dense(x, weight, bias), activation)
    return y if weight_pw is None else naive_conv1x1(y, weight_pw, bias_pw)


def naive_conv3x3_shuffle(x, weight, bias, mean, scale, img_range=1.0):
    y = naive_dense(x, weight, bias)
    batch, channels, height, width = y.shape
    picture = channels // scale**2
    y = y.reshape(batch, picture, scale, scale, height, width)
    rows = [torch.stack([y[:, :, i, j] for j in range(scale)], dim=-1).flatten(-2) for i in range(scale)]
    return torch.stack(rows, dim=-2).flatten(2, 3) / img_range + mean


def naive_gated_ffn(x, norm_weight, norm_bias, weight_1, bias_1, weight_gate, bias_gate, weight_2, bias_2, eps=1e-6):
    channels = x.shape[1]
    ug = naive_gelu(naive_conv1x1(naive_layer_norm(x, norm_weight, norm_bias, eps), weight_1, bias_1))
    gated = ug[:, :channels] * naive_depthwise(ug[:, channels:], weight_gate, bias_gate)
    return x + naive_gelu(naive_conv1x1(gated, weight_2, bias_2))


def naive_low_rank_experts(
    a,
    k,
    expert_index,
    expert_weight,
    weight_a,
    bias_a,
    weight_k,
    bias_k,
    weight_out,
    bias_out,
    ranks,
    weight_proj=None,
    bias_proj=None,
    residual=None,
):
    """One image after another, one chosen expert after another."""
    y = a.clone()
    for image, experts in enumerate(expert_index.tolist()):
        for slot, e in enumerate(experts):
            rows = slice(sum(ranks[:e]), sum(ranks[: e + 1]))
            rank_a = torch.einsum("rc,chw->rhw", weight_a[rows], a[image]) + per_channel(bias_a[rows])
            rank_k = torch.einsum("rc,chw->rhw", weight_k[rows], k[image]) + per_channel(bias_k[rows])
            out = torch.einsum("cr,rhw->chw", weight_out[:, rows], rank_a * rank_k) + per_channel(bias_out[e])
            y[image] += expert_weight[image, slot] * out
    return y if residual is None else residual + naive_conv1x1(y, weight_proj, bias_proj)
