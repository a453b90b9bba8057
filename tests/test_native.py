"""When the CUDA library is loaded and its devices are asked, with stubs where a GPU would be."""

import types

import pytest
import torch

from seemore_fast import native


class Devices:
    """GPUs that are counted, made current and asked; `reasons` are answers by index, or errors to raise."""

    def __init__(self, reasons):
        self.reasons, self.current, self.asked = reasons, 0, []

    def guard(self, index):
        devices = self

        class Guard:
            def __enter__(self):
                self.before, devices.current = devices.current, index

            def __exit__(self, *exception):
                devices.current = self.before

        return Guard()

    def unsupported_reason(self):
        self.asked.append(self.current)
        answer = self.reasons[self.current]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def devices(monkeypatch):
    devices = Devices({0: "", 1: "no kernel image", 2: RuntimeError("out of memory\nbacktrace")})
    monkeypatch.setattr(native, "_cuda_reasons", {})
    monkeypatch.setattr(native, "load", lambda path: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device", devices.guard)
    monkeypatch.setattr(torch.ops, "seemore_cuda", types.SimpleNamespace(unsupported_reason=devices.unsupported_reason))
    return devices


def test_loading_asks_no_device(devices):
    assert native.load_cuda() is None
    assert devices.asked == []


def test_each_device_answers_for_itself_once(devices):
    for _ in range(2):
        assert native.cuda_unsupported_reason(1) == "no kernel image"
        assert native.cuda_unsupported_reason(0) is None
    assert devices.asked == [1, 0]
    assert devices.current == 0


def test_an_error_that_may_pass_is_not_remembered(devices):
    assert native.cuda_unsupported_reason(2) == "CUDA device 2 does not answer: out of memory"
    devices.reasons[2] = ""
    assert native.cuda_unsupported_reason(2) is None
    assert devices.asked == [2, 2]


@pytest.mark.parametrize(
    "change, reason",
    [
        ((torch.version, "cuda", None), "torch is built without CUDA"),
        ((native, "load", lambda path: f"{path.name} was not built"), "libseemore_cuda.so was not built"),
    ],
)
def test_reasons_against_every_device(devices, monkeypatch, change, reason):
    monkeypatch.setattr(*change)
    assert native.load_cuda() == reason
    assert devices.asked == []
