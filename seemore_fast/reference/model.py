"""SeemoRe in plain PyTorch: the published module tree, block by block, named as in the paper.

State-dict keys are the published ones. Hooks, parametrizations and replaced submodules work as in any network: every
submodule is called as a module; the experts and the layers of the router, only where someone changed them. The fused
model (`seemore_fast.SeemoRe`) falls back on these forwards.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .layer_norm import layer_norm
from .low_rank_experts import low_rank_experts
from .rme_block import channel_shuffle
from .router import choose_experts, router, without_autocast

RGB_MEAN = (0.4488, 0.4371, 0.4040)
LR_SPACES = {
    "linear": lambda i: i + 2,
    "exp": lambda i: 2 ** (i + 1),
    "double": lambda i: 2 * i + 2,
}


def expert_ranks(lr_space: str, num_experts: int) -> tuple[int, ...]:
    """Return the rank of each expert, e.g. (2, 4, 8) for "exp" and three experts."""
    return tuple(LR_SPACES[lr_space](i) for i in range(num_experts))


def has_additions(module: nn.Module) -> bool:
    """Tell whether a hook or a `forward` of its own sits on `module`."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks or "forward" in vars(module))


def is_customised(module: nn.Module) -> bool:
    """Tell whether a hook or a `forward` of its own sits on `module` or on anything inside it."""
    return any(map(has_additions, module.modules()))


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

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        half = kernel_size // 2
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, (1, kernel_size), padding=(0, half), groups=channels),
            nn.Conv2d(channels, channels, (kernel_size, 1), padding=(half, 0), groups=channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class GatedFFN(nn.Module):
    """Feed-forward network whose one half is gated by the surroundings of the other."""

    def __init__(self, channels: int):
        super().__init__()
        self.fn_1 = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.GELU())
        self.fn_2 = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GELU())
        self.gate = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        u, g = self.fn_1(x).chunk(2, dim=1)
        return self.fn_2(u * self.gate(g))


class Expert(nn.Module):
    """One low-rank expert. `MoELayer` reads its parameters and calls it only when it is customised."""

    def __init__(self, channels: int, rank: int):
        super().__init__()
        self.conv_1 = nn.Conv2d(channels, rank, 1)
        self.conv_2 = nn.Conv2d(channels, rank, 1)
        self.conv_3 = nn.Conv2d(rank, channels, 1)

    def forward(self, a: Tensor, k: Tensor) -> Tensor:
        return self.conv_3(self.conv_2(k) * self.conv_1(a))


class Router(nn.Module):
    """Choice of experts per image: (index (B, top_k) int64, probability (B, top_k) float32)."""

    def __init__(self, channels: int, num_experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        # Called only where someone changed them: `router` does the same in float32.
        self.body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_experts, bias=False))

    def forward(self, a: Tensor) -> tuple[Tensor, Tensor]:
        as_built = [type(layer) for layer in self.body] == [nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
        if as_built and self.body[2].bias is None and not is_customised(self.body):
            return router(a, self.body[2].weight, self.top_k)
        return choose_experts(self.body(a), self.top_k)


class MoELayer(nn.Module):
    """Mixture of low-rank experts: only those that the router chose for an image work on it."""

    def __init__(self, channels: int, ranks: Sequence[int], top_k: int):
        super().__init__()
        self.experts = nn.ModuleList(Expert(channels, rank) for rank in ranks)
        self.gate = Router(channels, len(ranks), top_k)

    @property
    def ranks(self) -> list[int]:
        return [expert.conv_1.out_channels for expert in self.experts]

    def packed_experts(self) -> tuple[Tensor, ...]:
        """Return weight_a, bias_a, weight_k, bias_k, weight_out, bias_out as `low_rank_experts` takes them."""
        first, second, third = ([getattr(e, name) for e in self.experts] for name in ("conv_1", "conv_2", "conv_3"))
        return (
            torch.cat([conv.weight.flatten(1) for conv in first]),
            torch.cat([conv.bias for conv in first]),
            torch.cat([conv.weight.flatten(1) for conv in second]),
            torch.cat([conv.bias for conv in second]),
            torch.cat([conv.weight.flatten(1) for conv in third], dim=1),
            torch.stack([conv.bias for conv in third]),
        )

    def forward(self, a: Tensor, k: Tensor) -> Tensor:
        index, probability = self.gate(a)
        as_built = all(type(e) is Expert and {type(conv) for conv in e.children()} == {nn.Conv2d} for e in self.experts)
        if as_built and not is_customised(self.experts):
            return low_rank_experts(a, k, index, probability, *self.packed_experts(), self.ranks)
        # Dense, as the published training path: every expert is called, so that whatever was added to it runs.
        share = probability.new_zeros(len(a), len(self.experts)).scatter(1, index, probability).to(a.dtype)
        return a + sum(expert(a, k) * share[:, i, None, None, None] for i, expert in enumerate(self.experts))


class MoEBlock(nn.Module):
    """MoRE with what prepares its two inputs and projects its output."""

    def __init__(
        self, channels: int, ranks: Sequence[int], top_k: int = 2, recursive: int = 2, use_shuffle: bool = False
    ):
        super().__init__()
        self.recursive = recursive
        self.use_shuffle = use_shuffle
        self.conv_1 = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.GELU(), nn.Conv2d(channels, 2 * channels, 1)
        )
        self.agg_conv = nn.Sequential(nn.Conv2d(channels, channels, 4, stride=4, groups=channels), nn.GELU())
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.Conv2d(channels, channels, 1)
        )
        self.conv_2 = nn.Sequential(StripedConv2d(channels, 3), nn.GELU())
        self.moe_layer = MoELayer(channels, ranks, top_k)
        self.proj = nn.Conv2d(channels, channels, 1)

    def calibrate(self, k: Tensor) -> Tensor:
        s = k
        for _ in range(self.recursive):
            s = self.agg_conv(s)
        return k + F.interpolate(self.conv(s), size=k.shape[-2:], mode="bilinear", align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        u = self.conv_1(x)
        if self.use_shuffle:
            u = channel_shuffle(u)
        a, k = u.chunk(2, dim=1)
        return self.proj(self.moe_layer(self.conv_2(a), self.calibrate(k)))


class SEE(nn.Module):
    """Spatial Enhancement Expert: a large striped convolution gates a projection."""

    def __init__(self, channels: int, kernel_size: int = 11):
        super().__init__()
        self.proj = nn.Conv2d(channels, channels, 1)
        self.to_qv = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.GELU())
        self.attn = StripedConv2d(channels, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        q, v = self.to_qv(x).chunk(2, dim=1)
        return self.proj(self.attn(q) * v)


class ResidualPair(nn.Module):
    """x + block(LN(x)), then x + ffn(LN(x)): the frame that RME and SME share."""

    def __init__(self, channels: int, block: nn.Module):
        super().__init__()
        self.norm_1 = LayerNorm(channels)
        self.block = block
        self.norm_2 = LayerNorm(channels)
        self.ffn = GatedFFN(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.norm_1(x)) + x
        return self.ffn(self.norm_2(x)) + x


class RME(ResidualPair):
    """Rank Modulating Expert."""

    def __init__(self, channels: int, **moe_options):
        super().__init__(channels, MoEBlock(channels, **moe_options))


class SME(ResidualPair):
    """Spatial Modulating Expert."""

    def __init__(self, channels: int, kernel_size: int = 11):
        super().__init__(channels, SEE(channels, kernel_size))


class ResGroup(nn.Module):
    """Residual group: RME, then SME."""

    local_class, global_class = RME, SME

    def __init__(self, channels: int, kernel_size: int, **moe_options):
        super().__init__()
        self.local_block = self.local_class(channels, **moe_options)
        self.global_block = self.global_class(channels, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.global_block(self.local_block(x))


class SeemoRe(nn.Module):
    """The whole network: (B, in_chans, H, W) in [0, 1] -> (B, in_chans, scale * H, scale * W).

    Arguments are the published ones. `lr_space` is the growth of the experts' ranks: "linear" i + 2, "exp"
    2^(i+1), "double" 2i + 2. Images smaller than 4^recursive pixels on a side are extended at the right and the
    bottom by their last column and row, and the result is cropped back. The result is at least float32, whatever
    the precision inside: rounding it to the 8 bits of bfloat16 would show in the picture.
    """

    group_class = ResGroup

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
        check_config(**self.config)
        self.scale = scale
        self.in_chans = in_chans
        self.img_range = img_range
        self.min_size = 4**recursive
        self.register_buffer("mean", self.mean_of(in_chans), persistent=False)

        self.conv_1 = nn.Conv2d(in_chans, embedding_dim, 3, padding=1)
        self.body = nn.ModuleList(
            self.group_class(
                embedding_dim,
                global_kernel_size,
                ranks=expert_ranks(lr_space, num_experts),
                top_k=topk,
                recursive=recursive,
                use_shuffle=use_shuffle,
            )
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
        check_image(x, self.in_chans)
        height, width = x.shape[-2:]
        if height < self.min_size or width < self.min_size:
            missing = (0, max(0, self.min_size - width), 0, max(0, self.min_size - height))
            y = self._forward(F.pad(x, missing, mode="replicate"))
            return y[..., : height * self.scale, : width * self.scale]
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        # The picture itself travels through f and the upsampler: those stay wide when the body is narrow.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        f = call_wide(self.conv_1, (x - self.mean) * self.img_range)
        y = f.to(body_dtype(self.conv_1.weight))
        for group in self.body:
            y = group(y)
        y = self.conv_2(self.norm(y)) + f
        return call_wide(self.upsampler, y) / self.img_range + self.mean


def body_dtype(weight: Tensor) -> torch.dtype:
    """Return the type the features are computed in: autocast's where it is on, else that of the weights."""
    device = weight.device.type
    if weight.dtype == torch.float32 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def call_wide(module: nn.Module, x: Tensor) -> Tensor:
    """Call `module` in at least float32, whatever the type of its weights and of autocast."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device.type):
        if all(parameter.dtype == wide for parameter in module.parameters()):
            return module(x.to(wide))
        parameters = {name: parameter.to(wide) for name, parameter in module.named_parameters()}
        return torch.func.functional_call(module, parameters, (x.to(wide),))


def check_config(
    scale, in_chans, num_experts, num_layers, embedding_dim, img_range, use_shuffle, global_kernel_size, recursive,
    lr_space, topk,
):  # fmt: skip
    """Raise ValueError for a configuration that no SeemoRe can have, naming the argument, its value and the remedy."""
    for name, value in {
        "scale": scale, "in_chans": in_chans, "num_experts": num_experts, "num_layers": num_layers,
        "embedding_dim": embedding_dim, "recursive": recursive, "topk": topk,
        "global_kernel_size": global_kernel_size,
    }.items():  # fmt: skip
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
    if global_kernel_size % 2 == 0:
        raise ValueError(f"global_kernel_size is {global_kernel_size}, expected an odd number")
    if topk > num_experts:
        raise ValueError(f"topk is {topk}, expected at most num_experts, which is {num_experts}")
    if recursive > 8:
        raise ValueError(f"recursive is {recursive}, expected at most 8: images would need 4^recursive pixels a side")
    if not isinstance(lr_space, str) or lr_space not in LR_SPACES:
        raise ValueError(f"lr_space is {lr_space!r}, expected one of {', '.join(map(repr, LR_SPACES))}")
    if not isinstance(img_range, (int, float)) or not img_range > 0:
        raise ValueError(f"img_range is {img_range!r}, expected a positive number")


def check_image(x: Tensor, in_chans: int):
    """Raise for an input that the network cannot take: what was got, what was expected, how to mend it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}, expected a torch.Tensor of shape (B, {in_chans}, H, W)")
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, {in_chans}, H, W)")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}, expected a floating type with values in [0, 1]: x.float() / 255")
    if 0 in x.shape[2:]:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected a height and a width of at least 1")
