"""Blocks: RME, a routed mixture of low-rank experts, and SME, spatial enhancement, each with its GatedFFN."""

from dataclasses import replace

import pytest
import torch
from helpers.backends import running_on
from helpers.cases import OpCase, each, grid
from helpers.naive import (
    naive_calibrate,
    naive_conv1x1,
    naive_gated_ffn,
    naive_low_rank_experts,
    naive_norm_conv3x3,
    naive_norm_pointwise,
    naive_router,
    naive_striped_conv,
)
from helpers.ops import (
    LAYOUTS,
    SHAPES,
    assert_compiles,
    assert_gradcheck,
    assert_values,
    calibrate_shapes,
    cast,
    expert_shapes,
    ffn_shapes,
    norm_shapes,
    random_parameters,
    striped_shapes,
    value_and_gradients,
)
from helpers.table import BFLOAT, DTYPES, FLOAT, LAST, SPREAD

from seemore_fast import use_backend
from seemore_fast.network.blocks import RME, SME
from seemore_fast.network.fused import RMEParams, SMEParams, rme, sme, unflatten
from seemore_fast.network.modules import shuffle_channels

STEM = ("norm_1_weight", "norm_1_bias", "weight_conv", "bias_conv", "weight_expand", "bias_expand")
CALIBRATE = tuple(calibrate_shapes(1))
STRIPED = tuple(striped_shapes(1, 3))
EXPERTS = tuple(expert_shapes(1, [1]))
QV = ("norm_1_weight", "norm_1_bias", "weight_qv", "bias_qv")
FFN = ("norm_2_weight", "norm_2_bias", *ffn_shapes(1))


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


def naive_inputs_of_the_experts(x, p, recursive, use_shuffle):
    channels = x.shape[1]
    u = naive_norm_conv3x3(x, *(p[name] for name in STEM), activation="gelu")
    if use_shuffle:  # the channels of both halves in turn: 0, C, 1, C + 1, ...
        u = u[:, [half * channels + c for c in range(channels) for half in (0, 1)]]
    a = naive_striped_conv(u[:, :channels], *(p[name] for name in STRIPED), activation="gelu")
    return a, naive_calibrate(u[:, channels:], *(p[name] for name in CALIBRATE), recursive)


def naive_rme_block(x, ranks, top_k, recursive, use_shuffle, **p):
    a, k = naive_inputs_of_the_experts(x, p, recursive, use_shuffle)
    routed = naive_router(a, p["weight_router"], top_k)
    m = naive_low_rank_experts(a, k, *routed, *(p[name] for name in EXPERTS), ranks)
    x = x + naive_conv1x1(m, p["weight_proj"], p["bias_proj"])
    return naive_gated_ffn(x, *(p[name] for name in FFN))


def rme_arguments(device, shape=(3, 4, 6, 7), ranks=(2, 4, 8), top_k=1, taps=3, recursive=1, use_shuffle=False):
    """Return random tensors whose images choose different experts, and options."""
    channels = shape[1]
    shapes = {"x": shape} | norm_shapes(channels, "norm_1")
    shapes |= {"weight_conv": (channels, channels, 3, 3), "bias_conv": (channels,)}
    shapes |= {"weight_expand": (2 * channels, channels, 1, 1), "bias_expand": (2 * channels,)}
    shapes |= calibrate_shapes(channels) | striped_shapes(channels, taps)
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
    return p | {"ranks": ranks, "top_k": top_k, "recursive": recursive, "use_shuffle": use_shuffle}


def naive_sme_block(x, **p):
    channels = x.shape[1]
    qv = naive_norm_pointwise(x, *(p[name] for name in QV), "gelu")
    q = naive_striped_conv(qv[:, :channels], *(p[name] for name in STRIPED))
    x = x + naive_conv1x1(q * qv[:, channels:], p["weight_proj"], p["bias_proj"])
    return naive_gated_ffn(x, *(p[name] for name in FFN))


def sme_arguments(device, shape=(2, 3, 6, 7), taps=5, **options):
    channels = shape[1]
    shapes = {"x": shape} | norm_shapes(channels, "norm_1")
    shapes |= {"weight_qv": (2 * channels, channels, 1, 1), "bias_qv": (2 * channels,)}
    shapes |= striped_shapes(channels, taps)
    shapes |= {"weight_proj": (channels, channels, 1, 1), "bias_proj": (channels,)}
    shapes |= norm_shapes(channels, "norm_2") | ffn_shapes(channels)
    return random_parameters(shapes, device) | options


SHUFFLE = {"use_shuffle": [False, True]}
RME_CASE = OpCase(
    "rme_block",
    rme_arguments,
    naive_rme_block,
    rme_block,
    by_reference(rme_block),
    "rme_block",
    values=grid(
        {
            "shape, recursive": [
                ((1, 1, 4, 4), 1),
                ((0, 3, 4, 5), 1),
                ((3, 5, 5, 9), 1),
                ((1, 36, 7, 8), 1),
                ((2, 3, 16, 16), 2),
                ((2, 4, 17, 35), 2),
            ]
        }
        | SHUFFLE
    )
    + grid({"ranks, top_k": [((3,), 1), ((2, 4, 8), 1), ((2, 4, 8), 3), ((2, 3, 4, 5), 2)]} | SHUFFLE)
    + grid({"taps": [1, 7]})
    + grid({"layout": LAYOUTS} | SHUFFLE),
    narrow=grid(DTYPES | LAST | SPREAD, shape=(2, 8, 17, 19), top_k=2, use_shuffle=True),
    gradcheck=grid({"top_k": [1, 2]} | SHUFFLE, shape=(2, 2, 4, 4), ranks=(1, 2)),
    compiles=grid(use_shuffle=True),
    other={"shape": (2, 4, 9, 5)},
)
SME_CASE = OpCase(
    "sme_block",
    sme_arguments,
    naive_sme_block,
    sme_block,
    by_reference(sme_block),
    "sme_block",
    values=grid({"shape": SHAPES, "taps": [1, 3, 11, 31]}) + grid({"layout": LAYOUTS}),
    narrow=grid(DTYPES | LAST | SPREAD, shape=(2, 8, 17, 19), taps=11),
    gradcheck=grid(shape=(2, 2, 3, 3), taps=3),
)
CASES = [RME_CASE, SME_CASE]
# on the kernels of their parts
NARROW = {"dtype": [FLOAT, BFLOAT]} | LAST
OF_KERNELS = [
    replace(
        RME_CASE,
        kernel="low_rank_experts",
        narrow=grid(NARROW, shape=(2, 12, 7, 18), use_shuffle=True),
        compiles=grid(use_shuffle=True, dtype=FLOAT),
    ),
    replace(
        SME_CASE,
        kernel="gated_ffn",
        narrow=grid(NARROW | {"recompute": [False, True]}, shape=(2, 12, 7, 18), taps=11),
        compiles=grid(dtype=FLOAT),
    ),
]


@each(CASES, "values")
def test_values(case, backend, example, device):
    assert_values(backend, case, *case.call_of(backend, device, example))


@each(CASES, "narrow")
def test_narrow_dtypes(case, backend, example, device):
    check_narrow(backend, case, *case.call_of(backend, device, example))


@each(OF_KERNELS, "narrow", reference=False)
def test_of_kernels(case, backend, example, device):
    check_narrow(backend, case, *case.call_of(backend, device, example))


def check_narrow(backend, case, tensors, options):
    if case.name == "rme_block":
        wide, top_k = cast(tensors, torch.float64), options["top_k"]
        a, _ = naive_inputs_of_the_experts(wide["x"], wide, 1, use_shuffle=True)
        p = naive_router(a, wide["weight_router"], top_k + 1)[1]
        margin = (p[:, top_k - 1] / p[:, top_k]).log().min()
        assert margin > (0.3 if top_k > 1 else 0.1), "rounding may flip the choice: errors then mean nothing"
    assert_values(backend, case, tensors, options)


@each(CASES, "gradcheck")
def test_gradcheck(case, backend, example, device):
    tensors, options = case.call_of(backend, device, example)
    with running_on(backend, device):
        assert_gradcheck(case.run, tensors, **options)


@each(CASES, "compiles")
def test_compiles(case, backend, example, device):
    check_compiles(case, backend, example, device)


@each(OF_KERNELS, "compiles", reference=False)
def test_kernels_are_one_graph(case, backend, example, device):
    check_compiles(case, backend, example, device)


def check_compiles(case, backend, example, device):
    tensors, options = case.call_of(backend, device, example)
    others, _ = case.call_of(backend, device, example, **case.other)
    with running_on(backend, device):
        assert_compiles(case.run, tensors, others, **options)


@pytest.mark.parametrize("use_shuffle", [False, True])
def test_each_image_is_routed_alone(device, use_shuffle):
    """Images of a batch that choose different experts come out as they do one by one."""
    tensors, options = RME_CASE.call(device, shape=(6, 4, 6, 7), use_shuffle=use_shuffle)
    a, _ = naive_inputs_of_the_experts(tensors["x"], tensors, 1, use_shuffle)
    assert len(set(naive_router(a, tensors["weight_router"], 1)[0][:, 0].tolist())) > 1
    batch = rme_block(**tensors, **options)
    alone = [rme_block(**tensors | {"x": image[None]}, **options) for image in tensors["x"]]
    torch.testing.assert_close(batch, torch.cat(alone), rtol=1e-10, atol=1e-10)


def test_experts_not_chosen_get_zero_gradients(device):
    tensors, options = RME_CASE.call(device, shape=(1, 4, 6, 7))
    gradients = value_and_gradients(rme_block, tensors, **options)
    used = gradients["gradient of bias_out"].abs().sum(dim=1) > 0
    assert used.sum() == 1
    for name in ("weight_a", "bias_a", "weight_k", "bias_k"):
        experts = gradients[f"gradient of {name}"].split((2, 4, 8))
        assert [bool(gradient.any()) for gradient in experts] == used.tolist(), name


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
