"""The checker of the operators' tensors: what it accepts, and the words with which it refuses.

Checks of options: test_conformance.py.
"""

import pytest
import torch

from seemore_fast.ops.checks import check_tensors


def test_sizes_are_returned():
    x, weight = torch.zeros(2, 3, 4, 5), torch.zeros(6, 3, 1, 7)
    sizes = check_tensors("op", x=(x, "B C H W"), weight=(weight, "2C C 1 K"), bias=(torch.zeros(6), "2C"))
    assert sizes == {"B": 2, "C": 3, "H": 4, "W": 5, "K": 7}


@pytest.mark.parametrize(
    "shape, spec",
    [
        ((3,), "B C H W"),
        ((1, 2, 3, 4, 5), "B C H W"),
        ((), "C"),
        ((4,), "C"),
        ((3,), "2C"),
        ((7,), "2C"),
        ((3, 2, 3, 3), "C 1 3 3"),
        ((3, 1, 3), "C 1 3 3"),
        ((3, 1, 3, 3, 1), "C 1 3 3"),
        ((4, 5), "D D"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape, spec):
    """The message holds both shapes and what the letters stood for."""
    expected = spec.replace(" ", ", ")
    with pytest.raises(ValueError) as refused:
        check_tensors("op", x=(torch.zeros(1, 3), "B C"), w=(torch.zeros(shape), spec))
    assert str(refused.value).startswith(f"op: w has shape {shape}, expected ({expected}) with B = 1, C = 3")


def test_zero_is_a_size():
    assert check_tensors("op", x=(torch.zeros(0, 3), "B C"), y=(torch.zeros(0, 6), "B 2C")) == {"B": 0, "C": 3}
    with pytest.raises(ValueError, match=r"^op: y has shape"):
        check_tensors("op", x=(torch.zeros(0, 3), "B C"), y=(torch.zeros(1, 3), "B C"))


@pytest.mark.parametrize("value", [[1.0], 1.0, "x", torch.zeros(1).numpy()], ids=lambda value: type(value).__name__)
def test_other_things_than_tensors_are_refused(value):
    with pytest.raises(TypeError, match=rf"^op: x is a {type(value).__name__}, expected a tensor of shape \(C\)"):
        check_tensors("op", x=(value, "C"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_other_than_floating_types_are_refused(dtype):
    with pytest.raises(TypeError, match=f"^op: x has dtype {dtype}, expected a floating type"):
        check_tensors("op", x=(torch.zeros(3, dtype=dtype), "C"))


def test_mixed_dtypes_are_refused_but_under_autocast():
    arguments = {"x": (torch.zeros(3), "C"), "w": (torch.zeros(3, dtype=torch.bfloat16), "C")}
    with pytest.raises(TypeError, match=r"^op: w has dtype torch.bfloat16, expected torch.float32, which x has"):
        check_tensors("op", **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert check_tensors("op", **arguments) == {"C": 3}


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match=r"^op: w is on meta, expected cpu, where x is"):
        check_tensors("op", x=(torch.zeros(3), "C"), w=(torch.zeros(3, device="meta"), "C"))


def test_none_is_an_optional_tensor():
    """It sets no size and no dtype: what follows is compared with the first tensor there is."""
    sizes = check_tensors("op", x=(None, "C ?"), y=(torch.zeros(4).half(), "C ?"), z=(torch.zeros(8).half(), "2C"))
    assert sizes == {"C": 4}


def test_empty_images_are_refused():
    assert check_tensors("op", x=(torch.zeros(0, 3, 4, 5), "B C H W"))["B"] == 0
    for shape in [(1, 0, 4, 5), (1, 3, 0, 5), (1, 3, 4, 0)]:
        with pytest.raises(ValueError, match=r"^op: x has shape .*, expected no size of 0 but B's$"):
            check_tensors("op", x=(torch.zeros(shape), "B C H W"))
