"""Bad input, which operators refuse by an error that names them and the tensor."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

# what is wrong: (how a good tensor becomes bad, the exception, what its message says about the tensor)
FAULTS: dict[str, tuple[Callable[[Tensor], object], type[Exception], str]] = {
    "rank": (lambda x: x[None], ValueError, r"has shape \(1, "),
    "integer": (lambda x: x.to(torch.int32), TypeError, "has dtype torch.int32"),
    "dtype": (lambda x: x.to(torch.float16), TypeError, "has dtype torch.float(16|64)"),
    "list": (lambda x: x.tolist(), TypeError, "is a list"),
    "none": (lambda x: None, TypeError, "is (None|a NoneType)"),
}
BATCH_AND_PIXELS = [("x", 0), ("x", 2), ("x", 3)]  # of any size, where no second image goes with x


def assert_refused(fault: str, case, device: str):
    """Each tensor in turn is made bad; the operator raises an error that names itself and that tensor."""
    spoil, error, says = FAULTS[fault]
    tensors, options = case.call(device)
    for position, name in enumerate(tensors):
        if name in case.exempt.get(fault, ()):
            continue
        # The first tensor sets the dtype: when it is the odd one, the second is blamed.
        blamed = r"\w+" if fault == "dtype" and position == 0 else name
        with pytest.raises(error, match=f"^{case.error_name}: {blamed} {says}"):
            case.operator(**tensors | {name: spoil(tensors[name])}, **options)


def assert_sizes_refused(case, device: str):
    """Each dimension of each tensor, but those that are free, is made one longer; the operator names a culprit."""
    tensors, options = case.call(device)
    culprit = re.compile(rf"^{case.error_name}: (({'|'.join(tensors)}) has shape|ranks are) .*expected")
    for name, tensor in tensors.items():
        for dim in range(tensor.dim()):
            if (name, dim) not in case.free:
                longer = torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
                with pytest.raises(ValueError, match=culprit):
                    case.operator(**tensors | {name: longer}, **options)
