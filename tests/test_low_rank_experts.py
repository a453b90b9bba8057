"""low_rank_experts: a + what each image's chosen experts make of a and k."""

import pytest
import torch
from helpers.backends import each_backend, each_kernel, running_on
from helpers.faults import assert_refused, assert_sizes_refused, each_fault
from helpers.naive import naive_conv1x1, naive_low_rank_experts
from helpers.ops import (
    assert_close_to_naive,
    assert_compiles,
    assert_gradcheck,
    assert_large_offsets,
    assert_operator,
    assert_within_yardstick,
    cast,
    each_layout,
    each_narrow_dtype,
    each_shape,
    expert_shapes,
    random_parameters,
    value_and_gradients,
)

from seemore_fast.ops import low_rank_experts

MIXTURES = [((1,), 1), ((3,), 1), ((5, 2), 1), ((3, 3, 3), 2), ((2, 3, 4, 5, 6, 7), 4)]
MIXTURES += [((2, 4, 8), top_k) for top_k in (1, 2, 3)]
each_mixture = pytest.mark.parametrize("ranks, top_k", MIXTURES, ids=str)


def tensors_of(device, shape=(3, 5, 4, 6), ranks=(2, 4, 8), top_k=2):
    """Random tensors; every image chooses its own experts, in no order."""
    choice = random_parameters({"scores": (shape[0], len(ranks))}, device, seed=1)["scores"]
    tensors = random_parameters(
        {"a": shape, "k": shape, "expert_weight": (shape[0], top_k)} | expert_shapes(shape[1], ranks), device
    )
    tensors["expert_weight"] = tensors["expert_weight"].sigmoid()
    return tensors | {"expert_index": choice.argsort(dim=1)[:, :top_k].contiguous()}


@each_backend("low_rank_experts")
@each_shape
@each_mixture
def test_values(backend, device, shape, ranks, top_k):
    tensors = tensors_of(device, shape, ranks, top_k)
    assert_close_to_naive(backend, low_rank_experts, naive_low_rank_experts, tensors, ranks=ranks)


@each_backend("low_rank_experts", dtype=torch.float64)
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_experts_not_chosen_get_zero_gradients(backend, device, chosen):
    """Zeros, not None: Adam and DDP see the difference. And the chosen one gets some."""
    tensors = tensors_of(device, ranks=(2, 4, 8), top_k=1)
    tensors["expert_index"] = torch.full_like(tensors["expert_index"], chosen)
    with running_on(backend, device):
        gradients = value_and_gradients(low_rank_experts, tensors, ranks=(2, 4, 8))
    for e, rows in enumerate([slice(0, 2), slice(2, 6), slice(6, 14)]):
        for name in ("weight_a", "bias_a", "weight_k", "bias_k", "weight_out", "bias_out"):
            gradient = gradients[f"gradient of {name}"]
            mine = gradient[:, rows] if name == "weight_out" else gradient[e if name == "bias_out" else rows]
            assert torch.all(mine != 0 if e == chosen else mine == 0), f"{name} of expert {e}"


@each_backend("low_rank_experts", dtype=torch.float64)
def test_values_of_experts_not_chosen_do_not_matter(backend, device):
    """Not even NaN: an expert that is not chosen is not multiplied by zero but left out."""
    tensors = tensors_of(device, ranks=(2, 4, 8), top_k=1)
    tensors["expert_index"] = torch.full_like(tensors["expert_index"], 1)
    with running_on(backend, device):
        expected = low_rank_experts(**tensors, ranks=(2, 4, 8))
        for name in ("weight_a", "bias_a", "weight_k", "bias_k"):
            tensors[name][:2] = tensors[name][6:] = torch.nan
        tensors["bias_out"][0] = tensors["bias_out"][2] = torch.nan
        assert torch.equal(low_rank_experts(**tensors, ranks=(2, 4, 8)), expected)


@each_backend("low_rank_experts")
@each_layout
def test_layouts(backend, device, layout):
    tensors = tensors_of(device)
    assert_close_to_naive(backend, low_rank_experts, naive_low_rank_experts, tensors, layout, ranks=(2, 4, 8))


@each_backend("low_rank_experts")
@each_narrow_dtype
@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_narrow_dtypes(backend, device, dtype, layout, top_k):
    """The result is of a's dtype although expert_weight is float32."""
    tensors = tensors_of(device, (3, 8, 17, 19), top_k=top_k)
    assert_within_yardstick(backend, low_rank_experts, naive_low_rank_experts, tensors, dtype, layout, ranks=(2, 4, 8))


@each_backend("low_rank_experts", dtype=torch.float64)
@pytest.mark.parametrize("ranks, top_k", [((2,), 1), ((1, 2, 3), 1), ((1, 2, 3), 2), ((2, 1), 2)], ids=str)
def test_gradcheck(backend, device, ranks, top_k):
    tensors = tensors_of(device, (2, 2, 2, 3), ranks, top_k)
    with running_on(backend, device):
        assert_gradcheck(low_rank_experts, tensors, ranks=ranks)


@each_backend("low_rank_experts", dtype=torch.float64)
def test_compiles(backend, device):
    """With other experts chosen in the second call, too: the choice is data."""
    with running_on(backend, device):
        assert_compiles(low_rank_experts, tensors_of(device), tensors_of(device, (4, 5, 7, 3)), ranks=(2, 4, 8))


@each_fault
def test_bad_tensors(device, fault):
    exempt = {"dtype": ["expert_weight"], "list": ["expert_index"]}.get(fault, [])  # the first: float32 with any a
    assert_refused(fault, low_rank_experts, tensors_of(device), exempt, ranks=(2, 4, 8))


def test_index_that_is_no_tensor_is_refused(device):
    tensors = tensors_of(device)
    with pytest.raises(TypeError, match=r"^low_rank_experts: expert_index is a list, expected a tensor"):
        low_rank_experts(**tensors | {"expert_index": tensors["expert_index"].tolist()}, ranks=(2, 4, 8))


@pytest.mark.parametrize("name", ["expert_index", "expert_weight"])
def test_routing_on_another_device_is_refused(device, name):
    tensors = tensors_of(device)
    with pytest.raises(ValueError, match=rf"^low_rank_experts: {name} is on meta, expected {device}"):
        low_rank_experts(**tensors | {name: tensors[name].to("meta")}, ranks=(2, 4, 8))


def test_bad_sizes(device):
    assert_sizes_refused(low_rank_experts, tensors_of(device), ranks=(2, 4, 8))


@pytest.mark.parametrize("ranks", [(2, 4, 7), (2, 4, 9), (2, 12), (2, 4, 4, 4), (0, 6, 8), (-2, 8, 8), ()], ids=str)
def test_ranks_that_do_not_add_up_are_refused(device, ranks):
    with pytest.raises(ValueError, match=r"^low_rank_experts: ranks are .*expected 3 positive .* add up to 14"):
        low_rank_experts(**tensors_of(device), ranks=ranks)


@pytest.mark.parametrize("ranks", [[2.0, 4.0, 8.0], "248", 14, None], ids=str)
def test_ranks_that_are_no_integers_are_refused(device, ranks):
    with pytest.raises((TypeError, ValueError), match=r"^low_rank_experts: ranks (are|is) .*expected"):
        low_rank_experts(**tensors_of(device), ranks=ranks)


# Kernels, which float32, float16 and bfloat16 have


def projected(device, shape, ranks, top_k):
    """The arguments with a projection and a residual."""
    channels = shape[1]
    more = {"weight_proj": (channels, channels, 1, 1), "bias_proj": (channels,), "residual": shape}
    return tensors_of(device, shape, ranks, top_k) | random_parameters(more, device, seed=2)


def naive_projected(weight_proj=None, bias_proj=None, residual=None, **arguments):
    m = naive_low_rank_experts(**arguments)
    return m if residual is None else residual + naive_conv1x1(m, weight_proj, bias_proj)


naive_projected.__name__ = "naive_low_rank_experts"


@each_backend("low_rank_experts")
@pytest.mark.parametrize("ranks, top_k", [((2, 4, 8), 1), ((3, 3), 2)], ids=str)
def test_projection(backend, device, ranks, top_k):
    tensors = projected(device, (2, 4, 3, 5), ranks, top_k)
    assert_close_to_naive(backend, low_rank_experts, naive_projected, tensors, ranks=ranks)


@each_kernel("low_rank_experts")
@pytest.mark.parametrize(
    "shape, ranks, top_k",
    [
        ((2, 36, 5, 27), (2, 4, 8), 1),  # more than one tile of pixels
        ((1, 48, 3, 7), (2, 4, 8), 2),
        ((2, 5, 1, 70), (1, 33, 64), 2),
        ((3, 64, 2, 3), (64,), 1),
        ((2, 1, 1, 1), (1, 2), 2),
        ((2, 17, 9, 1), (2, 3, 4, 5, 6, 7), 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("tensors_of", [tensors_of, projected], ids=["alone", "projected"])
def test_sizes(backend, device, shape, ranks, top_k, tensors_of):
    tensors = tensors_of(device, shape, ranks, top_k)
    assert_within_yardstick(backend, low_rank_experts, naive_projected, tensors, torch.float32, ranks=ranks)


@each_kernel("low_rank_experts")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [None, "channels_last", "slice"])
def test_narrow_projection(backend, device, dtype, layout):
    tensors = projected(device, (2, 12, 9, 13), (2, 4, 8), 2)
    assert_within_yardstick(backend, low_rank_experts, naive_projected, tensors, dtype, layout, ranks=(2, 4, 8))


@each_kernel("low_rank_experts")
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_kernels_leave_out_experts_not_chosen(backend, device, chosen):
    """Their gradients are zero, and what their weights are, even NaN, does not matter."""
    ranks = (2, 4, 8)
    tensors = cast(tensors_of(device, ranks=ranks, top_k=1), torch.float32)
    tensors["expert_index"] = torch.full_like(tensors["expert_index"], chosen)
    with running_on(backend, device):
        expected = value_and_gradients(low_rank_experts, tensors, ranks=ranks)
        rows = [slice(0, 2), slice(2, 6), slice(6, 14)]
        for expert in {0, 1, 2} - {chosen}:
            for name in ("weight_a", "bias_a", "weight_k", "bias_k"):
                tensors[name][rows[expert]] = torch.nan
            tensors["weight_out"][:, rows[expert]] = tensors["bias_out"][expert] = torch.nan
        found = value_and_gradients(low_rank_experts, tensors, ranks=ranks)
    for what, value in expected.items():
        assert torch.equal(found[what], value), what
    for expert in range(3):
        for name in ("weight_a", "bias_a", "weight_k", "bias_k", "weight_out", "bias_out"):
            gradient = found[f"gradient of {name}"]
            mine = (
                gradient[:, rows[expert]]
                if name == "weight_out"
                else gradient[expert if name == "bias_out" else rows[expert]]
            )
            assert torch.all(mine != 0 if expert == chosen else mine == 0), f"{name} of expert {expert}"


@each_kernel("low_rank_experts")
@pytest.mark.parametrize("index", [-1, 3, 2**40])
def test_an_index_of_no_expert_is_left_out(backend, device, index):
    tensors = cast(tensors_of(device, ranks=(2, 4, 8), top_k=1), torch.float32)
    tensors["expert_index"][1] = index
    with running_on(backend, device):
        found = value_and_gradients(low_rank_experts, tensors, ranks=(2, 4, 8))
    assert torch.equal(found["y"][1], tensors["a"][1])
    assert all(value.isfinite().all() for value in found.values())
    assert not found["gradient of expert_weight"][1].any()


@each_kernel("low_rank_experts")
def test_no_images(backend, device):
    tensors = cast(tensors_of(device, (0, 3, 4, 5)), torch.float32)
    with running_on(backend, device):
        found = value_and_gradients(low_rank_experts, tensors, ranks=(2, 4, 8))
    assert found["y"].shape == (0, 3, 4, 5) and not any(value.any() for value in found.values())


@each_kernel("low_rank_experts")
def test_operator(backend, device):
    tensors = cast(tensors_of(device), torch.float32)
    other = cast(tensors_of(device, (4, 5, 7, 3)), torch.float32)
    with running_on(backend, device):
        assert_operator(low_rank_experts, tensors, ranks=(2, 4, 8))
        assert_compiles(low_rank_experts, tensors, other, ranks=(2, 4, 8))
        assert_large_offsets(low_rank_experts, tensors, ["a", "k"], ranks=(2, 4, 8))


@each_kernel("low_rank_experts")
@pytest.mark.falls_back("triton", reason="ranks up to 64")
def test_higher_ranks_are_left_to_the_reference(backend, device):
    tensors = tensors_of(device, (1, 5, 3, 4), (65,), 1)
    assert_within_yardstick(backend, low_rank_experts, naive_low_rank_experts, tensors, torch.float32, ranks=(65,))


@pytest.mark.parametrize("missing", ["weight_proj", "bias_proj", "residual"])
def test_part_of_a_projection_is_refused(device, missing):
    tensors = projected(device, (1, 3, 4, 5), (2, 4), 1) | {missing: None}
    with pytest.raises(ValueError, match=rf"^low_rank_experts: .*{missing}.* None"):
        low_rank_experts(**tensors, ranks=(2, 4))
