"""rme_block: Rank Modulating Expert, a routed mixture of low-rank experts and then GatedFFN."""

import pytest
import torch
from helpers.backends import each_backend, each_kernel, running_on
from helpers.faults import BATCH_AND_PIXELS, assert_refused, assert_sizes_refused, each_fault
from helpers.naive import (
    naive_calibrate,
    naive_conv1x1,
    naive_expert_weight,
    naive_gated_ffn,
    naive_low_rank_experts,
    naive_norm_conv3x3,
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
    expert_shapes,
    ffn_shapes,
    norm_shapes,
    random_parameters,
    striped_shapes,
    value_and_gradients,
)

from seemore_fast.ops import rme_block

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


def tensors_of(device, shape=(3, 4, 6, 7), ranks=(2, 4, 8), use_shuffle=False):
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
    tensors = tensors_of(device, shape, use_shuffle=use_shuffle)
    assert_close_to_naive(backend, rme_block, naive_rme_block, tensors, **options)


@each_backend("rme_block")
@each_mixture
@each_shuffle
def test_mixtures(backend, device, ranks, top_k, use_shuffle):
    options = OPTIONS | {"ranks": ranks, "top_k": top_k, "use_shuffle": use_shuffle}
    tensors = tensors_of(device, ranks=ranks, use_shuffle=use_shuffle)
    assert_close_to_naive(backend, rme_block, naive_rme_block, tensors, **options)


@each_backend("rme_block")
@pytest.mark.parametrize("taps", [1, 7])
def test_other_striped_kernels(backend, device, taps):
    tensors = tensors_of(device)
    tensors |= random_parameters(striped_shapes(4, taps), device)
    assert_close_to_naive(backend, rme_block, naive_rme_block, tensors, **OPTIONS)


@each_backend("rme_block")
@each_shuffle
def test_each_image_is_routed_alone(backend, device, use_shuffle):
    """Images of a batch that choose different experts come out as they do one by one."""
    tensors = tensors_of(device, (6, 4, 6, 7), use_shuffle=use_shuffle)
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
    tensors = tensors_of(device, use_shuffle=use_shuffle)
    assert_close_to_naive(backend, rme_block, naive_rme_block, tensors, layout, **options)


@each_backend("rme_block")
@each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize("spread", [1, 300])
def test_narrow_dtypes(backend, device, dtype, layout, spread):
    """Squares of 300 overflow float16: the statistics must not be computed in it."""
    options = OPTIONS | {"top_k": 2, "use_shuffle": True}
    tensors = tensors_of(device, (2, 8, 17, 19), use_shuffle=True)
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
        assert_gradcheck(rme_block, tensors_of(device, (2, 2, 4, 4), (1, 2), use_shuffle), **options)


@each_backend("rme_block")
def test_experts_not_chosen_get_zero_gradients(backend, device):
    tensors = tensors_of(device, (1, 4, 6, 7))
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
            rme_block, tensors_of(device), tensors_of(device, (2, 4, 9, 5)), **OPTIONS | {"use_shuffle": True}
        )


@each_fault
def test_bad_tensors(device, fault):
    assert_refused(fault, rme_block, tensors_of(device), **OPTIONS)


def test_bad_sizes(device):
    assert_sizes_refused(rme_block, tensors_of(device), free=BATCH_AND_PIXELS, **OPTIONS)


@pytest.mark.parametrize(
    "option, says",
    [
        ({"ranks": (2, 4, 7)}, "ranks are .*expected 3 positive integers .* add up to 14"),
        ({"ranks": (6, 8)}, "ranks are .*expected 3 positive integers .* add up to 14"),
        ({"top_k": 0}, "top_k is 0, expected 1 to 3"),
        ({"top_k": 4}, "top_k is 4, expected 1 to 3"),
        ({"recursive": 0}, "recursive is 0, expected an integer of at least 1"),
        ({"recursive": 2}, "x is 6x7 pixels, expected at least 16x16"),
    ],
    ids=str,
)
def test_bad_options_are_refused(device, option, says):
    with pytest.raises(ValueError, match=f"^rme_block: {says}"):
        rme_block(**tensors_of(device), **OPTIONS | option)


@pytest.mark.parametrize("taps", [0, 2, 4])
def test_even_kernels_are_refused(device, taps):
    tensors = tensors_of(device) | random_parameters(striped_shapes(4, taps), device)
    with pytest.raises(ValueError, match=f"^rme_block: weight_row has {taps} taps, expected an odd number"):
        rme_block(**tensors, **OPTIONS)


# On the kernels of its parts


@each_kernel("low_rank_experts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [None, "channels_last"])
def test_of_kernels(backend, device, dtype, layout):
    options = OPTIONS | {"use_shuffle": True}
    tensors = tensors_of(device, (2, 12, 7, 18), use_shuffle=True)
    a, _ = naive_inputs_of_the_experts(tensors["x"], tensors, 1, use_shuffle=True)
    p = naive_router(a, tensors["weight_router"], 2)[1]
    assert (p[:, 0] / p[:, 1]).log().min() > 0.1, "rounding may flip the choice: errors then mean nothing"
    assert_within_yardstick(backend, rme_block, naive_rme_block, tensors, dtype, layout, **options)


@each_kernel("low_rank_experts")
def test_of_kernels_is_one_graph(backend, device):
    calls = (cast(tensors_of(device, shape), torch.float32) for shape in [(2, 4, 6, 7), (3, 4, 9, 5)])
    with running_on(backend, device):
        assert_compiles(rme_block, *calls, **OPTIONS | {"use_shuffle": True})
