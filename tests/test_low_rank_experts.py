"""low_rank_experts: what its conformance (test_conformance.py) leaves open."""

import pytest
import torch
from helpers.backends import each_backend, each_kernel, running_on
from helpers.ops import assert_same, value_and_gradients
from helpers.table import BY_NAME

from seemore_fast.ops import low_rank_experts

CASE = BY_NAME["low_rank_experts"]
RANKS = (2, 4, 8)


def of_expert(name, tensor, expert):
    """Return an expert's part of a parameter."""
    rows = slice(sum(RANKS[:expert]), sum(RANKS[: expert + 1]))
    return tensor[:, rows] if name == "weight_out" else tensor[expert if name == "bias_out" else rows]


@each_backend("low_rank_experts")
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_experts_not_chosen_are_left_out(backend, device, wanted):
    """Their gradients are zero, not None: Adam and DDP see the difference. Their values do not matter, not even NaN."""
    tensors, options = CASE.call(device, backend.widest, ranks=RANKS, top_k=1)
    tensors["expert_index"] = torch.full_like(tensors["expert_index"], wanted)
    parameters = ("weight_a", "bias_a", "weight_k", "bias_k", "weight_out", "bias_out")
    with running_on(backend, device):
        expected = value_and_gradients(low_rank_experts, tensors, **options)
        for name in parameters:
            for expert in {0, 1, 2} - {wanted}:
                of_expert(name, tensors[name], expert).fill_(torch.nan)
        if backend != "reference":  # whose gradients of what it leaves out are zeros, but of finite weights only
            assert_same(value_and_gradients(low_rank_experts, tensors, **options), expected)
        assert torch.equal(low_rank_experts(**tensors, **options), expected["y"])
    for name in parameters:
        for expert in range(3):
            gradient = of_expert(name, expected[f"gradient of {name}"], expert)
            assert torch.all(gradient != 0 if expert == wanted else gradient == 0), f"{name} of expert {expert}"


@each_kernel("low_rank_experts")
@pytest.mark.parametrize("index", [-1, 3, 2**40])
def test_an_index_of_no_expert_is_left_out(backend, device, index):
    tensors, options = CASE.call(device, torch.float32, top_k=1)
    tensors["expert_index"][1] = index
    with running_on(backend, device):
        found = value_and_gradients(low_rank_experts, tensors, **options)
    assert torch.equal(found["y"][1], tensors["a"][1])
    assert all(value.isfinite().all() for value in found.values())
    assert not found["gradient of expert_weight"][1].any()


def test_an_index_that_is_no_tensor_is_refused(device):
    tensors, options = CASE.call(device)
    with pytest.raises(TypeError, match=r"^low_rank_experts: expert_index is a list, expected a tensor"):
        low_rank_experts(**tensors | {"expert_index": tensors["expert_index"].tolist()}, **options)
