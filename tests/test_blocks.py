"""Blocks: RME, a routed mixture of low-rank experts, and SME, spatial enhancement, each with its GatedFFN."""

import pytest
import torch
from helpers.backends import each_backend, each_kernel, running_on
from helpers.naive import (
    naive_calibrate,
    naive_conv1x1,
    naive_expert_weight,
    naive_gated_ffn,
    naive_low_rank_experts,
    naive_norm_conv3x3,
    naive_norm_pointwise,
    naive_router,
    naive_striped_conv,
)
from helpers.ops import (
    assert_close_to_naive,
    assert_compiles,
    assert_gradcheck,
    assert_within_yardstick,
    calibrate_shapes,
    cast,
    each_layout,
    each_narrow_dtype,
    each_shape,
    expert_shapes,
    ffn_shapes,
    norm_shapes,
    random_parameters,
    striped_shapes,
    value_and_gradients,
)

from seemore_fast import use_backend
from seemore_fast.network.blocks import RME, SME
from seemore_fast.network.fused import RMEParams, SMEParams, rme, sme, unflatten
from seemore_fast.network.modules import shuffle_channels

STEM = ("norm_1_weight", "norm_1_bias", "weight_conv", "bias_conv", "weight_expand", "bias_expand")
CALIBRATE = ("weight_agg", "bias_agg", "weight_dw", "bias_dw", "weight_pw", "bias_pw")
STRIPED = ("weight_row", "bias_row", "weight_col", "bias_col")
EXPERTS = ("weight_a", "bias_a", "weight_k", "bias_k", "weight_out", "bias_out")
FFN = ("norm_2_weight", "norm_2_bias", "weight_1", "bias_1", "weight_gate", "bias_gate", "weight_2", "bias_2")
OPTIONS = {"ranks": (2, 4, 8), "top_k": 1, "recursive": 1, "use_shuffle": False}

each_mixture = pytest.mark.parametrize(
    "ranks, top_k", [((3,), 1), ((2, 4, 8), 1), ((2, 4, 8), 3), ((2, 3, 4, 5), 2)], ids=str
)
each_shuffle = pytest.mark.parametrize("use_shuffle", [False, True])


def rme_block(x, *, ranks, top_k, recursive, use_shuffle, **p):
    """`rme` of parameters by name, in the order of its parts."""
    if use_shuffle:
        p |= {name: shuffle_channels(p[name], dim=0) for name in ("weight_expand", "bias_expand")}
    return rme(x, unflatten(RMEParams, p.values()), list(ranks), top_k, recursive)


def sme_block(x, *, recompute=False, **p):
    """`sme` of parameters by name, in the order of its parts."""
    return sme(x, unflatten(SMEParams, p.values()), recompute)


def by_reference(block):
    def eager(**arguments):
        with use_backend("reference"):
            return block(**arguments)

    return eager


rme_block.reference, sme_block.reference = by_reference(rme_block), by_reference(sme_block)


def naive_inputs_of_the_experts(x, p, recursive, use_shuffle):
    channels = x.shape[1]
    u = naive_norm_conv3x3(x, *(p[name] for name in STEM), activation="gelu")
    if use_shuffle:  # the channels of both halves in turn: 0, C, 1, C + 1, ...
        u = u[:, [half * channels + c for c in range(channels) for half in (0, 1)]]
    a = naive_striped_conv(u[:, :channels], *(p[name] for name in STRIPED), activation="gelu")
    return a, naive_calibrate(u[:, channels:], *(p[name] for name in CALIBRATE), recursive)


def naive_rme_block(x, ranks, top_k, recursive, use_shuffle, **p):
    a, k = naive_inputs_of_the_experts(x, p, recursive, use_shuffle)
    index = naive_router(a, p["weight_router"], top_k)[0].to(x.device)
    weight = naive_expert_weight(a, p["weight_router"], index)
    m = naive_low_rank_experts(a, k, index, weight, *(p[name] for name in EXPERTS), ranks)
    x = x + naive_conv1x1(m, p["weight_proj"], p["bias_proj"])
    return naive_gated_ffn(x, *(p[name] for name in FFN))


def rme_tensors(device, shape=(3, 4, 6, 7), ranks=(2, 4, 8), use_shuffle=False):
    """Random tensors whose images choose different experts."""
    channels = shape[1]
    shapes = {"x": shape} | norm_shapes(channels, "norm_1")
    shapes |= {"weight_conv": (channels, channels, 3, 3), "bias_conv": (channels,)}
    shapes |= {"weight_expand": (2 * channels, channels, 1, 1), "bias_expand": (2 * channels,)}
    shapes |= calibrate_shapes(channels) | striped_shapes(channels, 3)
    shapes |= {"weight_router": (len(ranks), channels)} | expert_shapes(channels, ranks)
    shapes |= {"weight_proj": (channels, channels, 1, 1), "bias_proj": (channels,)}
    shapes |= norm_shapes(channels, "norm_2") | ffn_shapes(channels)
    p = random_parameters(shapes, device)
    p["x"] += 2 * random_parameters({"mean": (*shape[:2], 1, 1)}, device, seed=1)["mean"]
    if shape[0] > 1:  # what all images have in common would decide: the router is made blind to it
        pooled = naive_inputs_of_the_experts(p["x"], p, 1, use_shuffle)[0].mean(dim=(2, 3))
        common = pooled.mean(dim=0) / pooled.mean(dim=0).norm()
        p["weight_router"] -= torch.outer(p["weight_router"] @ common, common)
        p["weight_router"] *= 2 / (pooled @ p["weight_router"].t()).std()
    return p


@each_backend("rme_block")
@pytest.mark.parametrize(
    "shape, recursive",
    [
        ((1, 1, 4, 4), 1),
        ((0, 3, 4, 5), 1),
        ((3, 5, 5, 9), 1),
        ((1, 36, 7, 8), 1),
        ((2, 3, 16, 16), 2),
        ((2, 4, 17, 35), 2),
    ],
    ids=str,
)
@each_shuffle
def test_values(backend, device, shape, recursive, use_shuffle):
    options = OPTIONS | {"recursive": recursive, "use_shuffle": use_shuffle}
    tensors = rme_tensors(device, shape, use_shuffle=use_shuffle)
    assert_close_to_naive(backend, rme_block, naive_rme_block, tensors, **options)


@each_backend("rme_block")
@each_mixture
@each_shuffle
def test_mixtures(backend, device, ranks, top_k, use_shuffle):
    options = OPTIONS | {"ranks": ranks, "top_k": top_k, "use_shuffle": use_shuffle}
    tensors = rme_tensors(device, ranks=ranks, use_shuffle=use_shuffle)
    assert_close_to_naive(backend, rme_block, naive_rme_block, tensors, **options)


@each_backend("rme_block")
@pytest.mark.parametrize("taps", [1, 7])
def test_other_striped_kernels(backend, device, taps):
    tensors = rme_tensors(device)
    tensors |= random_parameters(striped_shapes(4, taps), device)
    assert_close_to_naive(backend, rme_block, naive_rme_block, tensors, **OPTIONS)


@each_backend("rme_block")
@each_shuffle
def test_each_image_is_routed_alone(backend, device, use_shuffle):
    """Images of a batch that choose different experts come out as they do one by one."""
    tensors = rme_tensors(device, (6, 4, 6, 7), use_shuffle=use_shuffle)
    options = OPTIONS | {"use_shuffle": use_shuffle}
    a, _ = naive_inputs_of_the_experts(tensors["x"], tensors, 1, use_shuffle)
    assert len(set(naive_router(a, tensors["weight_router"], 1)[0][:, 0].tolist())) > 1
    with running_on(backend, device):
        batch = rme_block(**tensors, **options)
        alone = [rme_block(**tensors | {"x": image[None]}, **options) for image in tensors["x"]]
    torch.testing.assert_close(batch, torch.cat(alone), rtol=1e-10, atol=1e-10)


@each_backend("rme_block")
@each_layout
@each_shuffle
def test_layouts(backend, device, layout, use_shuffle):
    options = OPTIONS | {"use_shuffle": use_shuffle}
    tensors = rme_tensors(device, use_shuffle=use_shuffle)
    assert_close_to_naive(backend, rme_block, naive_rme_block, tensors, layout, **options)


@each_backend("rme_block")
@each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize("spread", [1, 300])
def test_narrow_dtypes(backend, device, dtype, layout, spread):
    """Squares of 300 overflow float16: the statistics must not be computed in it."""
    options = OPTIONS | {"top_k": 2, "use_shuffle": True}
    tensors = rme_tensors(device, (2, 8, 17, 19), use_shuffle=True)
    tensors["x"] *= spread
    a, _ = naive_inputs_of_the_experts(tensors["x"], tensors, 1, use_shuffle=True)
    p = naive_router(a, tensors["weight_router"], 3)[1]
    assert (p[:, 1] / p[:, 2]).log().min() > 0.3, "rounding may flip the choice: errors then mean nothing"
    assert_within_yardstick(backend, rme_block, naive_rme_block, tensors, dtype, layout, **options)


@each_backend("rme_block", dtype=torch.float64)
@each_shuffle
@pytest.mark.parametrize("top_k", [1, 2])
def test_gradcheck(backend, device, use_shuffle, top_k):
    options = OPTIONS | {"ranks": (1, 2), "top_k": top_k, "use_shuffle": use_shuffle}
    with running_on(backend, device):
        assert_gradcheck(rme_block, rme_tensors(device, (2, 2, 4, 4), (1, 2), use_shuffle), **options)


@each_backend("rme_block")
def test_experts_not_chosen_get_zero_gradients(backend, device):
    tensors = rme_tensors(device, (1, 4, 6, 7))
    with running_on(backend, device):
        gradients = value_and_gradients(rme_block, tensors, **OPTIONS)
    used = gradients["gradient of bias_out"].abs().sum(dim=1) > 0
    assert used.sum() == 1
    for name in ("weight_a", "bias_a", "weight_k", "bias_k"):
        experts = gradients[f"gradient of {name}"].split((2, 4, 8))
        assert [bool(gradient.any()) for gradient in experts] == used.tolist(), name


@each_backend("rme_block")
def test_compiles(backend, device):
    with running_on(backend, device):
        assert_compiles(
            rme_block, rme_tensors(device), rme_tensors(device, (2, 4, 9, 5)), **OPTIONS | {"use_shuffle": True}
        )


@each_kernel("low_rank_experts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [None, "channels_last"])
def test_of_kernels(backend, device, dtype, layout):
    options = OPTIONS | {"use_shuffle": True}
    tensors = rme_tensors(device, (2, 12, 7, 18), use_shuffle=True)
    a, _ = naive_inputs_of_the_experts(tensors["x"], tensors, 1, use_shuffle=True)
    p = naive_router(a, tensors["weight_router"], 2)[1]
    assert (p[:, 0] / p[:, 1]).log().min() > 0.1, "rounding may flip the choice: errors then mean nothing"
    assert_within_yardstick(backend, rme_block, naive_rme_block, tensors, dtype, layout, **options)


@each_kernel("low_rank_experts")
def test_of_kernels_is_one_graph(backend, device):
    calls = (cast(rme_tensors(device, shape), torch.float32) for shape in [(2, 4, 6, 7), (3, 4, 9, 5)])
    with running_on(backend, device):
        assert_compiles(rme_block, *calls, **OPTIONS | {"use_shuffle": True})


def naive_sme_block(x, **p):
    channels = x.shape[1]
    qv = naive_norm_pointwise(x, p["norm_1_weight"], p["norm_1_bias"], p["weight_qv"], p["bias_qv"], "gelu")
    q = naive_striped_conv(qv[:, :channels], *(p[name] for name in STRIPED))
    x = x + naive_conv1x1(q * qv[:, channels:], p["weight_proj"], p["bias_proj"])
    return naive_gated_ffn(x, *(p[name] for name in FFN))


def sme_tensors(device, shape=(2, 3, 6, 7), taps=5):
    channels = shape[1]
    shapes = {"x": shape} | norm_shapes(channels, "norm_1")
    shapes |= {"weight_qv": (2 * channels, channels, 1, 1), "bias_qv": (2 * channels,)}
    shapes |= striped_shapes(channels, taps)
    shapes |= {"weight_proj": (channels, channels, 1, 1), "bias_proj": (channels,)}
    shapes |= norm_shapes(channels, "norm_2") | ffn_shapes(channels)
    return random_parameters(shapes, device)


@each_backend("sme_block")
@each_shape
@pytest.mark.parametrize("taps", [1, 3, 11, 31])
def test_values_of_sme(backend, device, shape, taps):
    assert_close_to_naive(backend, sme_block, naive_sme_block, sme_tensors(device, shape, taps))


@each_backend("sme_block")
@each_layout
def test_layouts_of_sme(backend, device, layout):
    assert_close_to_naive(backend, sme_block, naive_sme_block, sme_tensors(device), layout)


@each_backend("sme_block")
@each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize("spread", [1, 300])
def test_narrow_dtypes_of_sme(backend, device, dtype, layout, spread):
    tensors = sme_tensors(device, (2, 8, 17, 19), taps=11)
    tensors["x"] *= spread
    assert_within_yardstick(backend, sme_block, naive_sme_block, tensors, dtype, layout)


@each_backend("sme_block", dtype=torch.float64)
def test_gradcheck_of_sme(backend, device):
    with running_on(backend, device):
        assert_gradcheck(sme_block, sme_tensors(device, (2, 2, 3, 3), taps=3))


@each_kernel("gated_ffn")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize("recompute", [False, True])
def test_kernels_of_sme(backend, device, dtype, layout, recompute):
    tensors = sme_tensors(device, (2, 12, 7, 18), taps=11)
    assert_within_yardstick(backend, sme_block, naive_sme_block, tensors, dtype, layout, recompute=recompute)


@each_kernel("gated_ffn")
def test_kernels_of_sme_are_one_graph(backend, device):
    calls = (cast(sme_tensors(device, shape), torch.float32) for shape in [(2, 3, 6, 7), (3, 3, 9, 5)])
    with running_on(backend, device):
        assert_compiles(sme_block, *calls)


# The modules


BLOCKS = {
    "RME": lambda: RME(4, ranks=(2, 4), top_k=1, recursive=1, use_shuffle=False),
    "SME": lambda: SME(4),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    "x, error, says",
    [
        (None, TypeError, "x is None, expected a tensor"),
        (torch.zeros(4, 8, 8), ValueError, r"x has shape \(4, 8, 8\), expected \(B, C, H, W\)"),
        (torch.zeros(1, 5, 8, 8), ValueError, r"norm_1 has shape \(4,\), expected \(C\) with B = 1, C = 5"),
        (torch.zeros(1, 4, 8, 8).half(), TypeError, "norm_1 has dtype torch.float32, expected torch.float16"),
        (torch.zeros(1, 4, 8, 8).int(), TypeError, "x has dtype torch.int32, expected a floating type"),
        (torch.zeros(1, 4, 8, 8, device="meta"), ValueError, "norm_1 is on cpu, expected meta"),
    ],
    ids=["none", "three dimensions", "channels", "dtype", "integers", "device"],
)
def test_modules_refuse_bad_images(name, x, error, says):
    with pytest.raises(error, match=f"^{name}: {says}"):
        BLOCKS[name]()(x)


def test_rme_refuses_images_too_small_to_aggregate():
    with pytest.raises(ValueError, match=r"^RME: x is 3x8 pixels, expected at least 4x4"):
        BLOCKS["RME"]()(torch.zeros(1, 4, 3, 8))
