"""Choice of backend."""

import subprocess
import sys

import pytest
import torch

import seemore_fast
from seemore_fast import ops, use_backend
from seemore_fast.backends import IMPLEMENTATIONS, chosen_backend, implementation


def test_setter_and_context_manager(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "other", object())
    assert chosen_backend() == "reference"
    use_backend("other")
    assert chosen_backend() == "other"
    with use_backend("reference"):
        assert chosen_backend() == "reference"
        with use_backend("other"):
            assert chosen_backend() == "other"
        assert chosen_backend() == "reference"
    assert chosen_backend() == "other"
    use_backend("auto")
    assert chosen_backend() == "reference"


def test_context_restores_the_outer_choice_also_after_an_error(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "other", object())
    with pytest.raises(KeyError), use_backend("other"):
        assert chosen_backend() == "other"
        raise KeyError
    assert chosen_backend() == "reference"


def test_operators_run_the_chosen_backend(monkeypatch):
    class Other:
        @staticmethod
        def depthwise_gate(u, g, weight, bias):
            return "other"

    monkeypatch.setitem(IMPLEMENTATIONS, "other", Other)
    arguments = torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 3), torch.rand(2, 1, 3, 3), torch.rand(2)
    with use_backend("other"):
        assert ops.depthwise_gate(*arguments) == "other"
    assert ops.depthwise_gate(*arguments).shape == (1, 2, 3, 3)


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_a_missing_backend_gives_its_reason(name):
    with pytest.raises(RuntimeError, match=f"{name}.*not part of this version"):
        use_backend(name)


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="'fast', expected one of: auto, reference"):
        use_backend("fast")


def test_every_operator_has_a_reference():
    for name in ops.__all__:
        assert callable(implementation(name))


def test_backend_info_says_what_is_there_and_why_not():
    info = seemore_fast.backend_info()
    assert info["backend"] == "reference"
    assert info["available"] == ["reference"]
    assert set(info["unavailable"]) == {"cpu", "cuda", "triton"}
    assert info["seemore_fast"] == seemore_fast.__version__
    assert info["torch"] == torch.__version__
    assert info["cuda"]["available"] == torch.cuda.is_available()
    assert info["cuda"]["available"] or info["cuda"]["reason"]


def test_import_brings_nothing_that_takes_long():
    code = (
        "import torch, sys; before = set(sys.modules); import seemore_fast; "
        "print(*sorted(m for m in set(sys.modules) - before if not m.startswith('seemore_fast')))"
    )
    brought = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"PIL", "safetensors", "tqdm", "onnx", "triton"} & set(brought)
