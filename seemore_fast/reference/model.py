"""SeemoRe in plain PyTorch: the published network, module by module, named as in the paper.

State-dict keys are the published ones. All experts are computed for every image, as in the published training.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .config import RGB_MEAN, check_config, expert_ranks
from .layer_norm import layer_norm
from .router import router, without_autocast


def body_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of features: autocast's where it is on, else that of the weights."""
    device = weight.device.type
    is_cast = weight.dtype == torch.float32 and device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_cast else weight.dtype


class LayerNorm(nn.Module):
    """LayerNorm over channels; x (B, C, H, W)."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class StripedConv2d(nn.Module):
    """Depthwise 1xK, then depthwise Kx1."""

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, (1, taps), padding=(0, taps // 2), groups=channels),
            nn.Conv2d(channels, channels, (taps, 1), padding=(taps // 2, 0), groups=channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class GatedFFN(nn.Module):
    """Feed-forward network, one half of which is gated by the surroundings of the other."""

    def __init__(self, channels: int):
        super().__init__()
        self.fn_1 = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.GELU())
        self.fn_2 = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GELU())
        self.gate = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        u, g = self.fn_1(x).chunk(2, dim=1)
        return self.fn_2(u * self.gate(g))


class Expert(nn.Module):
    """Low-rank expert."""

    def __init__(self, channels: int, rank: int):
        super().__init__()
        self.conv_1 = nn.Conv2d(channels, rank, 1)
        self.conv_2 = nn.Conv2d(channels, rank, 1)
        self.conv_3 = nn.Conv2d(rank, channels, 1)

    def forward(self, a: Tensor, k: Tensor) -> Tensor:
        return self.conv_3(self.conv_2(k) * self.conv_1(a))


class Router(nn.Module):
    """Choice of experts for each image: (index (B, top_k) int64, probability (B, top_k) float32)."""

    def __init__(self, channels: int, num_experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_experts, bias=False))

    def forward(self, a: Tensor) -> tuple[Tensor, Tensor]:
        linear = self.body[2]
        assert isinstance(linear, nn.Linear)
        return router(a, linear.weight, self.top_k)


class MoELayer(nn.Module):
    """Mixture of low-rank experts."""

    router: type[nn.Module] = Router  # class of `gate`
    experts: Any  # a list of `Expert`

    def __init__(self, channels: int, ranks: Sequence[int], top_k: int):
        super().__init__()
        self.experts = nn.ModuleList(Expert(channels, rank) for rank in ranks)
        self.gate = self.router(channels, len(ranks), top_k)

    @property
    def ranks(self) -> list[int]:
        return [expert.conv_1.out_channels for expert in self.experts]

    def forward(self, a: Tensor, k: Tensor) -> Tensor:
        return self.modulate(a, k, *self.gate(a))

    def modulate(self, a: Tensor, k: Tensor, index: Tensor, probability: Tensor) -> Tensor:
        """Return a and what the experts make of a and k, by the router's decision."""
        share = probability.new_zeros(a.shape[0], len(self.experts)).scatter(1, index, probability).to(a.dtype)
        return a + sum(expert(a, k) * share[:, i, None, None, None] for i, expert in enumerate(self.experts))


class MoEBlock(nn.Module):
    """MoRE with what prepares its two inputs and projects its output."""

    mixture: type[nn.Module] = MoELayer  # class of `moe_layer`

    def __init__(self, channels: int, ranks: Sequence[int], top_k: int, recursive: int, use_shuffle: bool):
        super().__init__()
        self.recursive, self.use_shuffle = recursive, use_shuffle
        self.conv_1 = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.GELU(), nn.Conv2d(channels, 2 * channels, 1)
        )
        self.agg_conv = nn.Sequential(nn.Conv2d(channels, channels, 4, stride=4, groups=channels), nn.GELU())
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.Conv2d(channels, channels, 1)
        )
        self.conv_2 = nn.Sequential(StripedConv2d(channels, 3), nn.GELU())
        self.moe_layer = self.mixture(channels, ranks, top_k)
        self.proj = nn.Conv2d(channels, channels, 1)

    def calibrate(self, k: Tensor) -> Tensor:
        s = k
        for _ in range(self.recursive):
            s = self.agg_conv(s)
        return k + F.interpolate(self.conv(s), size=k.shape[-2:], mode="bilinear", align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        u = self.conv_1(x)
        if self.use_shuffle:
            u = u.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)  # channel g * C + c becomes c * 2 + g
        a, k = u.chunk(2, dim=1)
        return self.proj(self.moe_layer(self.conv_2(a), self.calibrate(k)))


class SEE(nn.Module):
    """Spatial Enhancement Expert: a large striped convolution gates a projection."""

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, channels, 1)
        self.to_qv = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.GELU())
        self.attn = StripedConv2d(channels, taps)

    def forward(self, x: Tensor) -> Tensor:
        q, v = self.to_qv(x).chunk(2, dim=1)
        return self.proj(self.attn(q) * v)


class ResidualPair(nn.Module):
    """RME around a MoEBlock, or SME around SEE: x + block(LN(x)), then x + ffn(LN(x))."""

    def __init__(self, channels: int, block: nn.Module):
        super().__init__()
        self.norm_1 = LayerNorm(channels)
        self.block = block
        self.norm_2 = LayerNorm(channels)
        self.ffn = GatedFFN(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.norm_1(x)) + x
        return self.ffn(self.norm_2(x)) + x


class ResGroup(nn.Module):
    """Residual group: Rank Modulating Expert, then Spatial Modulating Expert."""

    def __init__(self, channels: int, taps: int, ranks: Sequence[int], top_k: int, recursive: int, use_shuffle: bool):
        super().__init__()
        self.local_block = ResidualPair(channels, MoEBlock(channels, ranks, top_k, recursive, use_shuffle))
        self.global_block = ResidualPair(channels, SEE(channels, taps))

    def forward(self, x: Tensor) -> Tensor:
        return self.global_block(self.local_block(x))


class SeemoRe(nn.Module):
    """The whole network: (B, in_chans, H, W) in [0, 1] -> (B, in_chans, scale * H, scale * W).

    Arguments are the published ones. `lr_space` is the growth of the experts' ranks: "linear" i + 2, "exp"
    2^(i+1), "double" 2i + 2. Images smaller than 4^recursive pixels on a side are extended at the right and the
    bottom by their last column and row, and the result is cropped back. The result is at least float32, whatever
    the precision inside: rounding it to the 8 bits of bfloat16 would show in the picture.
    """

    group: type[nn.Module] = ResGroup  # class of the items of `body`
    mean: Tensor  # a buffer

    def __init__(
        self,
        scale: int = 4,
        in_chans: int = 3,
        num_experts: int = 6,
        num_layers: int = 6,
        embedding_dim: int = 64,
        img_range: float = 1.0,
        use_shuffle: bool = False,
        global_kernel_size: int = 11,
        recursive: int = 2,
        lr_space: str = "linear",
        topk: int = 2,
    ):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_config(self.config)
        self.scale, self.in_chans, self.img_range, self.min_size = scale, in_chans, img_range, 4**recursive
        self.register_buffer("mean", self.mean_of(in_chans), persistent=False)
        ranks = expert_ranks(lr_space, num_experts)
        self.conv_1 = nn.Conv2d(in_chans, embedding_dim, 3, padding=1)
        self.body = nn.ModuleList(
            self.group(embedding_dim, global_kernel_size, ranks, topk, recursive, use_shuffle)
            for _ in range(num_layers)
        )
        self.norm = LayerNorm(embedding_dim)
        self.conv_2 = nn.Conv2d(embedding_dim, embedding_dim, 3, padding=1)
        self.upsampler = nn.Sequential(
            nn.Conv2d(embedding_dim, scale**2 * in_chans, 3, padding=1), nn.PixelShuffle(scale)
        )

    @staticmethod
    def mean_of(in_chans: int) -> Tensor:
        """Return the mean that the network subtracts, (1, in_chans, 1, 1): that of DIV2K for RGB, else 0."""
        mean = torch.tensor(RGB_MEAN) if in_chans == 3 else torch.zeros(in_chans)
        return mean.view(1, in_chans, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        missing = (0, max(0, self.min_size - width), 0, max(0, self.min_size - height))
        if any(missing):
            x = F.pad(x, missing, mode="replicate")
        # The picture itself travels through f and the upsampler: those stay wide when the body is narrow.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        f = self._wide(self.conv_1, (x - self.mean) * self.img_range)
        y = f.to(body_dtype(self.conv_1.weight))
        for group in self.body:
            y = group(y)
        y = self.conv_2(self.norm(y)) + f
        y = self._wide(self.upsampler, y) / self.img_range + self.mean
        return y[..., : height * self.scale, : width * self.scale]

    @staticmethod
    def _wide(module: nn.Module, x: Tensor) -> Tensor:
        """Call `module` in at least float32, whatever the type of its weights and of autocast."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device.type):
            if all(parameter.dtype == wide for parameter in module.parameters()):
                return module(x.to(wide))
            parameters = {name: parameter.to(wide) for name, parameter in module.named_parameters()}
            return torch.func.functional_call(module, parameters, (x.to(wide),))
